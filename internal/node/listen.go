package node

import (
	"cmp"
	"context"
	"net"
	"net/netip"

	"github.com/tailnode/tailnode/internal/errcode"
)

// Listen listens for TCP connections from the tailnet. Without a host it listens on all of
// the node's addresses (of the network's family), those that it will get as well. With one
// it waits until the node has addresses. ctx bounds that wait alone. The empty network is tcp.
func (n *Node) Listen(ctx context.Context, networkName, address string) (net.Listener, error) {
	nw, err := parseNetwork(cmp.Or(networkName, "tcp"))
	if err != nil {
		return nil, err
	}
	if nw.udp {
		return nil, errcode.New(errcode.Unsupported, "Listen is for TCP; use ListenPacket for %s", networkName)
	}
	ap, err := n.listenAddr(ctx, nw, address)
	if err != nil {
		return nil, err
	}
	if nw.family == 6 && ap.Addr().IsUnspecified() {
		return n.engine.Stack().ListenTCP6(ap.Port())
	}
	return n.engine.Stack().ListenTCP(ap)
}

// ListenPacket listens for UDP datagrams from the tailnet; addresses are as for Listen.
func (n *Node) ListenPacket(ctx context.Context, networkName, address string) (net.PacketConn, error) {
	nw, err := parseNetwork(networkName)
	if err != nil {
		return nil, err
	}
	if !nw.udp {
		return nil, errcode.New(errcode.Unsupported, "ListenPacket is for UDP; use Listen for %s", networkName)
	}
	ap, err := n.listenAddr(ctx, nw, address)
	if err != nil {
		return nil, err
	}
	if nw.family == 6 && ap.Addr().IsUnspecified() {
		return n.engine.Stack().ListenUDP6(ap.Port())
	}
	return n.engine.Stack().ListenUDP(ap)
}

func (n *Node) listenAddr(ctx context.Context, nw network, address string) (netip.AddrPort, error) {
	host, port, err := splitAddr(ctx, nw, address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if host == "" {
		a := netip.IPv6Unspecified() // both families
		if nw.family == 4 {
			a = netip.IPv4Unspecified()
		}
		return netip.AddrPortFrom(a, port), nil
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, errcode.New(errcode.InvalidArgument, "the host to listen on, %q, is not an IP address", host)
	}
	a = a.Unmap()
	if a.IsUnspecified() {
		if !nw.accepts(a) {
			return netip.AddrPort{}, errcode.New(errcode.InvalidArgument, "%v is not of the network's address family", a)
		}
		return netip.AddrPortFrom(a, port), nil
	}
	if !nw.accepts(a) {
		return netip.AddrPort{}, errcode.New(errcode.InvalidArgument, "%v is not of the network's address family", a)
	}
	st, err := n.AwaitRunning(ctx)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if st.Netmap.Self.HasAddr(a) {
		return netip.AddrPortFrom(a, port), nil
	}
	return netip.AddrPort{}, errcode.New(errcode.InvalidArgument, "%v is not an address of this node", a)
}
