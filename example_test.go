package tailnode_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

// exampleTailnet starts a coordination server and a relay on loopback and returns what a node
// needs to join. A program that joins an existing tailnet needs none of this.
func exampleTailnet() (controlURL, authKey string, stop func()) {
	r := &relay.Server{Addr: "127.0.0.1:0"}
	if err := r.Start(context.Background()); err != nil {
		log.Fatal(err)
	}
	c := &coord.Server{Relays: []coord.Region{regionOf(r, 900)}}
	if err := c.Start(context.Background()); err != nil {
		log.Fatal(err)
	}
	key, err := c.CreateAuthKey(coord.AuthKeyOptions{Reusable: true})
	if err != nil {
		log.Fatal(err)
	}
	return c.BaseURL(), key, func() { c.Close(); r.Close() }
}

// exampleNode returns a node of that tailnet, not started.
func exampleNode(name, controlURL, authKey string) *tailnode.Server {
	return &tailnode.Server{Hostname: name, ControlURL: controlURL, AuthKey: authKey, Store: tailnode.NewMemoryStore()}
}

// A web server on the tailnet that knows its visitors, and one of them.
func Example() {
	controlURL, authKey, stop := exampleTailnet()
	defer stop()

	srv := exampleNode("web", controlURL, authKey)
	defer srv.Close()
	ln, err := srv.Listen("tcp", ":80")
	if err != nil {
		log.Fatal(err)
	}
	lc, err := srv.LocalClient()
	if err != nil {
		log.Fatal(err)
	}
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := lc.WhoIs(r.Context(), r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "Hello, %s!", who.Node.ComputedName)
	}))

	visitor := exampleNode("laptop", controlURL, authKey)
	defer visitor.Close()
	client := visitor.HTTPClient()
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://web/")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", body)
	// Output: Hello, laptop!
}

func ExampleServer_Up() {
	controlURL, authKey, stop := exampleTailnet()
	defer stop()

	srv := exampleNode("hello", controlURL, authKey)
	defer srv.Close()
	st, err := srv.Up(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(st.BackendState, st.Self.HostName)

	// A key that control refuses is an error at once, in control's own words.
	stranger := exampleNode("stranger", controlURL, "tskey-auth-wrong")
	defer stranger.Close()
	_, err = stranger.Up(context.Background())
	fmt.Println(err.(*tailnode.Error).Code == tailnode.CodeAuthRefused)
	// Output:
	// Running hello
	// true
}

func ExampleServer_Dial() {
	controlURL, authKey, stop := exampleTailnet()
	defer stop()

	srv := exampleNode("greeter", controlURL, authKey)
	defer srv.Close()
	ln, err := srv.Listen("tcp", ":7000")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // the server is closed
			}
			io.WriteString(c, "good morning")
			c.Close()
		}
	}()

	caller := exampleNode("caller", controlURL, authKey)
	defer caller.Close()
	conn, err := caller.Dial(context.Background(), "tcp", "greeter:7000")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	said, err := io.ReadAll(conn)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", said)
	// Output: good morning
}

// The names of the tailnet in a net.Resolver.
func ExampleServer_Dial_dns() {
	controlURL, authKey, stop := exampleTailnet()
	defer stop()

	srv := exampleNode("searcher", controlURL, authKey)
	defer srv.Close()
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return srv.Dial(ctx, network, "100.100.100.100:53")
	}}
	st, err := srv.Up(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	addrs, err := resolver.LookupHost(context.Background(), st.Self.DNSName)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(slices.Contains(addrs, st.TailscaleIPs[0].String()))
	// Output: true
}

func ExampleLocalClient_WhoIs() {
	controlURL, authKey, stop := exampleTailnet()
	defer stop()

	srv := exampleNode("alone", controlURL, authKey)
	defer srv.Close()
	lc, err := srv.LocalClient()
	if err != nil {
		log.Fatal(err)
	}
	st, err := srv.Up(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	who, err := lc.WhoIs(context.Background(), st.TailscaleIPs[0].String())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(who.Node.ComputedName)
	// Output: alone
}
