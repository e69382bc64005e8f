package datapath

import (
	"errors"
	"net/netip"

	"github.com/tailnode/tailnode/internal/filter"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/wg"
)

// sink takes what one receive loop delivers. It is used by that loop alone.
type sink struct {
	t     *transport
	inbox *netstack.Inbox
	hdr   packet.Parsed
	src   path.Source // the one that reply answers to: most often the next packet is from there too
	reply path.Reply

	tcpSrc, tcpDst netip.AddrPort // the connection that was last found, for the packets until Flush
}

func (t *transport) newSink() *sink { return &sink{t: t, inbox: t.e.stack.NewInbox()} }

// WireGuard takes one WireGuard message.
func (s *sink) WireGuard(src path.Source, _ *path.Peer, b []byte) {
	if src != s.src {
		s.src, s.reply = src, s.t.paths.Reply(src)
	}
	m := s.t.e.netmap.Load()
	plain, wp, err := s.t.dev.Receive(s.inbox.Room(len(b)), b, &s.reply)
	if err != nil {
		if errors.Is(err, wg.ErrUnknownPeer) && s.t.knocks.add(now(), src, b) && s.t.e.netmap.Load() != m {
			s.t.answerKnocks() // the netmap that knows the sender may have come in between
		}
		return // not authentic, or from nobody that the netmap knows
	}
	p, ok := wp.Owner().(*peer)
	if !ok {
		return
	}
	if src.Region == 0 {
		p.path.Heard(src)
	}
	if plain == nil {
		return // a handshake message or keepalive that is dealt with
	}
	s.packet(p, plain)
}

// taker returns what a TCP packet is for.
func (s *sink) taker(h *packet.Parsed) netstack.Taker {
	if h.Src == s.tcpSrc && h.Dst == s.tcpDst {
		return netstack.Connection
	}
	to := s.t.e.stack.Taker(h.Dst, h.Src)
	if to == netstack.Connection {
		s.tcpSrc, s.tcpDst = h.Src, h.Dst
	}
	return to
}

// Flush hands everything that is still gathered to the netstack.
func (s *sink) Flush() {
	s.tcpSrc, s.tcpDst = netip.AddrPort{}, netip.AddrPort{}
	s.inbox.Flush()
}

// packet takes an authenticated packet of p.
func (s *sink) packet(p *peer, b []byte) {
	e := s.t.e
	h := &s.hdr
	if h.Decode(b) != nil {
		return
	}
	m, at := e.netmap.Load(), now()
	if m == nil {
		return
	}
	// Cryptokey routing: the source address must be one that the netmap routes to this peer.
	n := m.Route(h.Src.Addr())
	if n == nil || n.Key != p.wg.Public() || m.Expired(n, at) {
		return
	}
	f := e.filterFor(n)
	if f == nil {
		return // without a filter from control nothing comes in
	}
	dst := h.Dst
	unmask(m, n, h)
	v := f.In(h, e.flows, at)
	if !v.Accepted() {
		e.rejected(p, h, dst)
		return
	}
	if v == filter.AcceptICMP && h.IsICMPError() && !credible(m, n, h) {
		return
	}
	stray := false
	var to netstack.Taker
	if h.Proto == packet.TCP {
		to = s.taker(h)
		if v == filter.AcceptTCP && to == netstack.Listener && !f.AllowsTCP(h.Src.Addr(), h.Dst) {
			// Otherwise a peer without a rule could guess the cookie with which a listener whose backlog is full answers, and would be connected.
			return
		}
		stray = to != netstack.Connection || h.TCPFlags&packet.TCPSyn != 0
	}
	if e.intercept(p, h) {
		return
	}
	if stray {
		s.inbox.CommitStray(b, to)
	} else {
		s.inbox.Commit(b)
	}
}

// leastMTU is the least MTU of a path that is believed: RFC 8200 §5 has no lower one, and of IPv4 there is none as low as what all must take
// (RFC 791). With a lower one the stack would send a packet for every few bytes, without an end.
const (
	leastMTU4 = 576
	leastMTU6 = 1280
)

// credible reports whether an ICMP error of n is about a packet that went to n or through it, as it says: the stack would apply it to whatever
// connection it names, and so would let any peer slow down or end those with others.
func credible(m *netmap.Map, n *netmap.Node, h *packet.Parsed) bool {
	to, mtu, ok := h.Failed()
	least := leastMTU4
	if h.Version == 6 {
		least = leastMTU6
	}
	return ok && m.Route(to) == n && (mtu < 0 || mtu >= least)
}
