package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/dns"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/netmap"
)

// patience is how long a dial waits for a node that the tailnet does not have yet, where
// its context has no deadline of its own: peers appear a moment after they join.
const patience = 10 * time.Second

// network is a parsed network name.
type network struct {
	udp    bool
	family byte // 0, 4 or 6
}

func parseNetwork(s string) (network, error) {
	switch s {
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
		n := network{udp: s[0] == 'u'}
		if len(s) == 4 {
			n.family = s[3] - '0'
		}
		return n, nil
	}
	return network{}, errcode.With(errcode.Unsupported, net.UnknownNetworkError(s))
}

// name returns the name for package net.
func (n network) name() string {
	s := "tcp"
	if n.udp {
		s = "udp"
	}
	if n.family != 0 {
		s += string(rune('0' + n.family))
	}
	return s
}

// accepts reports whether the network allows a's family.
func (n network) accepts(a netip.Addr) bool {
	return n.family == 0 || n.family == 4 == a.Is4()
}

// splitAddr splits "host:port"; the port may be a service name.
func splitAddr(ctx context.Context, nw network, address string) (host string, port uint16, err error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, errcode.With(errcode.InvalidArgument, err)
	}
	proto := "tcp"
	if nw.udp {
		proto = "udp"
	}
	p, err := net.DefaultResolver.LookupPort(ctx, proto, service)
	if err != nil {
		return "", 0, errcode.With(errcode.InvalidArgument, err)
	}
	return host, uint16(p), nil
}

// Dial connects to an address on the tailnet. It waits until the node is running and the
// name or address is known, and never leaves the tailnet. It blocks until ctx ends or the
// node is closed.
func (n *Node) Dial(ctx context.Context, networkName, address string) (net.Conn, error) {
	nw, err := parseNetwork(networkName)
	if err != nil {
		return nil, err
	}
	host, port, err := splitAddr(ctx, nw, address)
	if err != nil {
		return nil, err
	}
	if port == 0 {
		return nil, errcode.New(errcode.InvalidArgument, "port 0 cannot be dialled")
	}
	addr, err := n.resolve(ctx, nw, host, port)
	if err != nil {
		return nil, err
	}
	dst := netip.AddrPortFrom(addr, port)
	if nw.udp {
		return n.engine.Stack().DialUDP(ctx, dst)
	}
	dctx, stop := n.engine.Dialing(ctx, dst)
	defer stop()
	c, err := n.engine.Stack().DialTCP(dctx, dst)
	if err != nil && dctx.Err() != nil {
		switch {
		case n.ctx.Err() != nil:
			return nil, errNodeClosed
		case ctx.Err() == nil: // the peer's rejection
			return nil, context.Cause(dctx)
		}
		st, _ := n.Status()
		return nil, n.whyNoAnswer(ctx, st.Netmap, dst)
	}
	return c, err
}

// whyNoAnswer explains a dial that ran out of time.
func (n *Node) whyNoAnswer(ctx context.Context, m *netmap.Map, dst netip.AddrPort) error {
	err := context.Cause(ctx)
	if m == nil {
		return err
	}
	if p := m.Route(dst.Addr()); p != nil && p.OnlineKnown && !p.Online {
		return fmt.Errorf("%w: %v does not answer, and control says that %s is offline", err, dst, p.ShortName())
	}
	return fmt.Errorf("%w: %v does not answer", err, dst)
}

// errNotYet is in errors that a later netmap may cure, so that it is worth waiting for one.
var errNotYet = errors.New("not yet")

// notYet returns an error with a code and a text in which errors.Is finds errNotYet.
func notYet(code errcode.Code, format string, args ...any) error {
	return errcode.With(code, patientError{fmt.Errorf(format, args...)})
}

type patientError struct{ error }

func (patientError) Is(target error) bool { return target == errNotYet }

// resolve finds the tailnet address that host means, waiting for it to appear.
func (n *Node) resolve(ctx context.Context, nw network, host string, port uint16) (addr netip.Addr, err error) {
	if ip, err := netip.ParseAddr(host); err == nil && datapath.IsService(ip) {
		// The tailnet's DNS is this node itself, and speaks UDP alone: its answers are short.
		if !nw.udp || port != 53 || !nw.accepts(ip) {
			return ip, errcode.New(errcode.NotTailnet, "%v answers DNS over UDP, and nothing else", ip)
		}
		_, err = n.AwaitRunning(ctx)
		return ip, err
	}
	_, err = n.awaitPeer(ctx, func(m *netmap.Map) error {
		var err error
		addr, err = lookup(m, nw, host)
		return err
	})
	return addr, err
}

// awaitPeer blocks until find succeeds on a netmap of a running node, fails with another error
// than errNotYet, or time is up: ctx's, or patience where ctx has no deadline.
func (n *Node) awaitPeer(ctx context.Context, find func(*netmap.Map) error) (*netmap.Map, error) {
	if _, ok := ctx.Deadline(); !ok {
		if st, err := n.AwaitRunning(ctx); err != nil {
			return nil, err
		} else if find(st.Netmap) == nil {
			return st.Netmap, nil
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	var last error
	st, err := n.Await(ctx, func(st Status) (bool, error) {
		if st.State == Failed {
			return false, st.Err
		}
		if st.State != Running {
			return false, nil
		}
		last = find(st.Netmap)
		if errors.Is(last, errNotYet) {
			return false, nil
		}
		return last == nil, last
	})
	if err != nil && errors.Is(last, errNotYet) && ctx.Err() != nil {
		err = last // says more than that time is up
	}
	return st.Netmap, err
}

// lookup finds the address in one netmap. The error wraps errNotYet where a later netmap may
// know better.
func lookup(m *netmap.Map, nw network, host string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		ip = ip.Unmap().WithZone("")
		if !nw.accepts(ip) {
			return ip, errcode.New(errcode.InvalidArgument, "%v is not of the network's address family", ip)
		}
		return ip, reachable(m, ip)
	}
	addrs, ours, err := dns.Lookup(m, nw.name(), host)
	if len(addrs) > 0 {
		return addrs[0], reachable(m, addrs[0])
	}
	switch {
	case errors.Is(err, dns.ErrNoAddress):
		return netip.Addr{}, errcode.New(errcode.NoSuchHost, "%s has no address of the network's family", host)
	case ours:
		return netip.Addr{}, notYet(errcode.NoSuchHost, "no node of the tailnet is called %s", host)
	}
	return netip.Addr{}, errcode.New(errcode.NotTailnet, "%s is not a name of this tailnet, and nothing else is dialled from here", host)
}

// reachable reports whether packets to a have somewhere to go.
func reachable(m *netmap.Map, a netip.Addr) error {
	if m.Self.HasAddr(a) {
		return nil
	}
	if p := m.Route(a); p != nil {
		if m.Expired(p, time.Now()) {
			return notYet(errcode.KeyExpired, "the node key of %s has expired; it has to log in again", strings.TrimSuffix(p.Name, "."))
		}
		return nil
	}
	if dns.IsTailnetAddr(m, a) {
		return notYet(errcode.Unreachable, "no node of the tailnet has the address %v", a)
	}
	return errcode.New(errcode.NotTailnet, "%v is not on this tailnet: no node has it and no subnet route leads to it", a)
}
