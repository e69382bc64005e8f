// Package coord is a coordination server for a small private tailnet, to run by itself or inside a
// program or a test.
//
//	srv := &coord.Server{Dir: "/var/lib/tailnet", Addr: ":8080", URL: "https://tailnet.example.com"}
//	if err := srv.Start(ctx); err != nil { … }
//	defer srv.Close()
//	key, err := srv.CreateAuthKey(coord.AuthKeyOptions{})
//
// A node joins with the server's URL as its control URL and the key as its auth key. It may be a tailnode node or
// any other client that speaks the protocol of docs/protocol/control.md; none needs special settings. Without an
// auth key, a node shows a URL, and [Server.ApproveLogin] lets it in.
//
// The server tells nodes of each other and of relays; it does not carry their traffic. Give it [Server.Relays],
// or nodes can reach each other only where they have a direct path.
//
// With [Server.Dir] set, the server keeps everything in one database file. What it has acknowledged, to a node or to
// a caller, survives the process being killed. A separate process administers the server with [OpenAdmin].
//
// Every node of the tailnet may talk to every other, whatever its user or tags, until [Server.SetFilter] says otherwise.
package coord
