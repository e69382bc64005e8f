package harness

import (
	"context"
	"net"
	"net/netip"
	"strings"

	"tailscale.com/envknob"
	_ "tailscale.com/feature/relayserver" // tsnet has no peer relay of its own
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/net/netns"
	"tailscale.com/tsnet"
)

// UpstreamKnobs are the settings under which upstream's node runs here: nothing is logged to anyone, no
// gateway is asked for a port, and traffic takes the relay, the only path that our node has yet.
var UpstreamKnobs = map[string]string{
	"TS_NO_LOGS_NO_SUPPORT":     "true",
	"TS_DISABLE_PORTMAPPER":     "true",
	"TS_DEBUG_NEVER_DIRECT_UDP": "true",
}

func init() {
	for k, v := range UpstreamKnobs {
		envknob.Setenv(k, v)
	}
	netns.SetEnabled(false) // sockets bound to the default route's interface do not reach loopback
}

type upstreamNode struct {
	srv       *tsnet.Server
	peerRelay *uint16
}

// UpstreamNode makes a node of upstream's tsnet.
func UpstreamNode(c NodeConfig) (Node, error) {
	logf := c.Logf
	if logf == nil {
		logf = discard
	}
	return &upstreamNode{peerRelay: c.PeerRelay, srv: &tsnet.Server{
		Dir: c.Dir, Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey, Ephemeral: c.Ephemeral,
		Logf: logf, UserLogf: logf, Port: c.Port,
	}}, nil
}

func (n *upstreamNode) Up(ctx context.Context) error {
	if _, err := n.srv.Up(ctx); err != nil || n.peerRelay == nil {
		return err
	}
	lc, err := n.srv.LocalClient()
	if err != nil {
		return err
	}
	_, err = lc.EditPrefs(ctx, &ipn.MaskedPrefs{RelayServerPortSet: true, Prefs: ipn.Prefs{RelayServerPort: n.peerRelay}})
	return err
}

func (n *upstreamNode) Listen(network, addr string) (net.Listener, error) {
	return n.srv.Listen(network, addr)
}

func (n *upstreamNode) ListenPacket(network, addr string) (net.PacketConn, error) {
	return n.srv.ListenPacket(network, addr)
}

func (n *upstreamNode) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return n.srv.Dial(ctx, network, addr)
}

func (n *upstreamNode) Addrs() (v4, v6 netip.Addr) { return n.srv.TailscaleIPs() }

func (n *upstreamNode) WhoIs(ctx context.Context, remote string) (Who, error) {
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

func (n *upstreamNode) Status(ctx context.Context) (Status, error) {
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
		out.Peers[firstLabel(p.DNSName)] = upstreamPeer(p)
	}
	return out, nil
}

func upstreamPeer(p *ipnstate.PeerStatus) Peer {
	return Peer{
		Name: p.DNSName, Key: p.PublicKey.String(), Addrs: p.TailscaleIPs, Online: p.Online, Direct: p.CurAddr, Relay: p.Relay, PeerRelay: p.PeerRelay,
	}
}

func (n *upstreamNode) Login(ctx context.Context) error {
	lc, err := n.srv.LocalClient()
	if err != nil {
		return err
	}
	return lc.StartLoginInteractive(ctx)
}

func (n *upstreamNode) Close() error { return n.srv.Close() }

func firstLabel(name string) string {
	label, _, _ := strings.Cut(name, ".")
	return label
}
