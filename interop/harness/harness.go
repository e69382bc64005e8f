// Package harness runs one tailnet on loopback out of exchangeable parts: the nodes, the
// coordination server and the relay can each be ours or upstream's. It returns errors and knows
// nothing of package testing, so that the benchmark uses it as well.
package harness

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Node is one tailnet node, whoever implements it. Its methods mean what tsnet.Server's mean.
type Node interface {
	Up(ctx context.Context) error
	Listen(network, addr string) (net.Listener, error)
	ListenPacket(network, addr string) (net.PacketConn, error)
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
	// Addrs returns the node's addresses, which are invalid until Up has returned.
	Addrs() (v4, v6 netip.Addr)
	WhoIs(ctx context.Context, remote string) (Who, error)
	Status(ctx context.Context) (Status, error)
	// Login asks for a new interactive login, as after the node key has expired. The URL appears in Status.
	Login(ctx context.Context) error
	Close() error
}

// NodeConfig says what node to make.
type NodeConfig struct {
	Hostname   string
	Dir        string // kept by the caller, so that a node can come back as itself
	ControlURL string
	AuthKey    string
	Ephemeral  bool
	Logf       func(format string, args ...any) // nil is silent
	Port       uint16                           // UDP, 0 for any
	PeerRelay  *uint16                          // if not nil, relay for others on that port
}

// NodeMaker makes a node that has not been started.
type NodeMaker func(NodeConfig) (Node, error)

// Who is the answer to WhoIs.
type Who struct {
	Name  string // MagicDNS name with its trailing dot
	Login string
	Addrs []netip.Addr
}

// Status is what the tests ask of a node's own view.
type Status struct {
	State   string // upstream's words: "NeedsLogin", "Running" ...
	AuthURL string
	Name    string // MagicDNS name of the node itself, with its trailing dot
	Key     string // node key, in its "nodekey:" text form
	Peers   map[string]Peer
}

// Peer is one peer in a Status, under the first label of its MagicDNS name.
type Peer struct {
	Name   string
	Key    string
	Addrs  []netip.Addr
	Online bool
	Direct string // address and port in use; "": its traffic takes a relay
	Relay  string // code of its home relay

	PeerRelay string // the peer relay in use, "address:port:vni:number"
}

// Control is a coordination server on loopback.
type Control interface {
	URL() string
	// AuthKey returns a key for one node, or "" if the server wants none.
	AuthKey(ephemeral bool) (string, error)
	// Interactive makes the server demand a login by URL of every node from now on.
	Interactive(on bool) error
	// Approve completes the login behind a URL that a node was told to show.
	Approve(ctx context.Context, authURL string) error
	// Expire makes a node's key expire now.
	Expire(ctx context.Context, nodeKey string) error
	// AllowPorts replaces the packet filter of the node with that key: only these TCP ports, from anyone.
	AllowPorts(ctx context.Context, nodeKey string, ports ...uint16) error
	// Gone is called when an ephemeral node has been closed. A server that removes such nodes has
	// nothing to do here; one that cannot must tell the others.
	Gone(ctx context.Context, nodeKey string) error
	// Stop ends the server, with all its connections; Start brings it back with its state, at the same address.
	Stop() error
	Start() error
	Close() error
}

// ControlMaker starts a coordination server whose map of relays holds the one that is given.
type ControlMaker func(relay RelayInfo, logf func(string, ...any)) (Control, error)

// Relay is a DERP and STUN server on loopback.
type Relay interface {
	Info() RelayInfo
	// Stop ends the server, with all its connections; Start brings it back as itself.
	Stop() error
	Start() error
	Close() error
}

// RelayMaker starts a relay.
type RelayMaker func(logf func(string, ...any)) (Relay, error)

// RelayInfo is what a DERP map says of a relay.
type RelayInfo struct {
	DERP     netip.AddrPort
	STUNPort int
	CertName string // "sha256-raw:" and the certificate's hash
}

// Until calls ok every few milliseconds until it reports true, and returns ctx's error with what
// and ok's last error if that does not happen. It is for conditions of which the parts under test have no
// event that all of them share.
func Until(ctx context.Context, what string, ok func() (bool, error)) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		done, err := ok()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return fmt.Errorf("harness: waiting for %s: %w", what, err)
		case <-tick.C:
		}
	}
}

func discard(string, ...any) {}
