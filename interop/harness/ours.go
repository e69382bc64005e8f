package harness

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path"
	"time"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

type ourNode struct{ srv *tailnode.Server }

// OurNode makes a node of ours.
func OurNode(c NodeConfig) (Node, error) {
	logf := c.Logf
	if logf == nil {
		logf = discard
	}
	return &ourNode{&tailnode.Server{
		Dir: c.Dir, Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey, Ephemeral: c.Ephemeral,
		Logf: logf, UserLogf: logf, Port: c.Port, RelayServerPort: c.PeerRelay,
	}}, nil
}

func (n *ourNode) Up(ctx context.Context) error {
	_, err := n.srv.Up(ctx)
	return err
}

func (n *ourNode) Listen(network, addr string) (net.Listener, error) {
	return n.srv.Listen(network, addr)
}

func (n *ourNode) ListenPacket(network, addr string) (net.PacketConn, error) {
	return n.srv.ListenPacket(network, addr)
}

func (n *ourNode) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return n.srv.Dial(ctx, network, addr)
}

func (n *ourNode) Addrs() (v4, v6 netip.Addr) { return n.srv.TailscaleIPs() }

func (n *ourNode) WhoIs(ctx context.Context, remote string) (Who, error) {
	lc, err := n.srv.LocalClient()
	if err != nil {
		return Who{}, err
	}
	w, err := lc.WhoIs(ctx, remote)
	if err != nil {
		return Who{}, err
	}
	who := Who{Name: w.Node.Name, Login: w.UserProfile.LoginName}
	for _, p := range w.Node.Addresses {
		who.Addrs = append(who.Addrs, p.Addr())
	}
	return who, nil
}

func (n *ourNode) Status(ctx context.Context) (Status, error) {
	lc, err := n.srv.LocalClient()
	if err != nil {
		return Status{}, err
	}
	st, err := lc.Status(ctx)
	if err != nil {
		return Status{}, err
	}
	out := Status{State: st.BackendState, AuthURL: st.AuthURL, Peers: map[string]Peer{}}
	if st.Self != nil {
		out.Name, out.Key = st.Self.DNSName, st.Self.PublicKey.String()
	}
	for _, p := range st.Peer {
		out.Peers[firstLabel(p.DNSName)] = Peer{
			Name: p.DNSName, Key: p.PublicKey.String(), Addrs: p.TailscaleIPs, Online: p.Online, Direct: p.CurAddr, Relay: p.Relay, PeerRelay: p.PeerRelay,
		}
	}
	return out, nil
}

// Login has nothing to do: our node asks for a new login as soon as its key has expired.
func (n *ourNode) Login(context.Context) error { return nil }

func (n *ourNode) Close() error { return n.srv.Close() }

type ourControl struct {
	conf coord.Server // its fields; each Start is a new server with them
	srv  *coord.Server
}

// OurControl starts our coordination server, with its database in a folder of its own.
func OurControl(r RelayInfo, logf func(string, ...any)) (Control, error) {
	dir, err := os.MkdirTemp("", "coord")
	if err != nil {
		return nil, err
	}
	host := r.DERP.Addr().String()
	c := &ourControl{conf: coord.Server{
		Dir: dir, Addr: "127.0.0.1:0", Logger: slogTo(logf), EphemeralTimeout: 2 * time.Second,
		Relays: []coord.Region{{ID: 1, Code: "lo", Name: "loopback", Nodes: []coord.Relay{{
			Name: "1a", HostName: host, IPv4: host, IPv6: "none",
			DERPPort: int(r.DERP.Port()), STUNPort: r.STUNPort, CertName: r.CertName,
		}}}},
	}}
	if err := c.Start(); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return c, nil
}

func (c *ourControl) Start() error {
	srv := &coord.Server{
		Dir: c.conf.Dir, Addr: c.conf.Addr, Logger: c.conf.Logger, EphemeralTimeout: c.conf.EphemeralTimeout, Relays: c.conf.Relays,
	}
	if err := srv.Start(context.Background()); err != nil {
		return err
	}
	c.srv = srv
	c.conf.Addr = srv.BaseURL()[len("http://"):]
	return nil
}

func (c *ourControl) Stop() error { return c.srv.Close() }

func (c *ourControl) Close() error {
	err := c.srv.Close()
	os.RemoveAll(c.conf.Dir)
	return err
}

func (c *ourControl) URL() string { return c.srv.BaseURL() }

func (c *ourControl) AuthKey(ephemeral bool) (string, error) {
	return c.srv.CreateAuthKey(coord.AuthKeyOptions{Ephemeral: ephemeral})
}

// Interactive has nothing to do: a node without an auth key is shown a URL.
func (c *ourControl) Interactive(bool) error { return nil }

func (c *ourControl) Approve(_ context.Context, authURL string) error {
	return c.srv.ApproveLogin(path.Base(authURL), coord.ApproveOptions{})
}

func (c *ourControl) node(nodeKey string) (coord.Node, error) {
	nodes, err := c.srv.Nodes()
	if err != nil {
		return coord.Node{}, err
	}
	for _, n := range nodes {
		if n.Key == nodeKey {
			return n, nil
		}
	}
	return coord.Node{}, fmt.Errorf("harness: coord knows no node %s", nodeKey)
}

func (c *ourControl) Expire(_ context.Context, nodeKey string) error {
	n, err := c.node(nodeKey)
	if err != nil {
		return err
	}
	return c.srv.ExpireNode(n.ID)
}

func (c *ourControl) AllowPorts(_ context.Context, nodeKey string, ports ...uint16) error {
	n, err := c.node(nodeKey)
	if err != nil {
		return err
	}
	rule := coord.FilterRule{Src: []string{"*"}, Dst: []string{"*"}, Proto: []string{"tcp"}}
	for _, p := range ports {
		rule.Ports = append(rule.Ports, fmt.Sprint(p))
	}
	return c.srv.SetNodeFilter(n.ID, &coord.Filter{Rules: []coord.FilterRule{rule}})
}

// Gone has nothing to do: the server removes ephemeral nodes by itself.
func (c *ourControl) Gone(context.Context, string) error { return nil }

type ourRelay struct {
	dir  string
	logf func(string, ...any)
	srv  *relay.Server
	addr string
	stun string
}

// OurRelay starts our relay, with its key and certificate in a folder of its own.
func OurRelay(logf func(string, ...any)) (Relay, error) {
	dir, err := os.MkdirTemp("", "relay")
	if err != nil {
		return nil, err
	}
	r := &ourRelay{dir: dir, logf: logf, addr: "127.0.0.1:0"}
	if err := r.Start(); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return r, nil
}

func (r *ourRelay) Start() error {
	srv := &relay.Server{Addr: r.addr, STUNAddr: r.stun, Dir: r.dir, Logger: slogTo(r.logf)}
	if err := srv.Start(context.Background()); err != nil {
		return err
	}
	tcp, udp := srv.Addrs()
	r.srv, r.addr, r.stun = srv, tcp.String(), udp.String()
	return nil
}

func (r *ourRelay) Info() RelayInfo {
	n := r.srv.Node()
	return RelayInfo{DERP: netip.MustParseAddrPort(r.addr), STUNPort: n.STUNPort, CertName: n.CertName}
}

func (r *ourRelay) Stop() error { return r.srv.Close() }

func (r *ourRelay) Close() error {
	err := r.srv.Close()
	os.RemoveAll(r.dir)
	return err
}

// slogTo gives what a structured logger writes to a printf-like one; nil stays silent.
func slogTo(logf func(string, ...any)) *slog.Logger {
	if logf == nil {
		return nil
	}
	return slog.New(slog.NewTextHandler(logWriter(logf), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type logWriter func(string, ...any)

func (w logWriter) Write(b []byte) (int, error) {
	w("%s", b)
	return len(b), nil
}
