package datapath

import (
	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/path"
)

// sink takes what one receive loop delivers. It is used by that loop alone.
type sink struct {
	t     *transport
	inbox *netstack.Inbox
	hdr   packet.Parsed
	src   path.Source // the one that reply answers to: most often the next packet is from there too
	reply path.Reply
}

func (t *transport) newSink() *sink { return &sink{t: t, inbox: t.e.stack.NewInbox()} }

// WireGuard takes one WireGuard message.
func (s *sink) WireGuard(src path.Source, _ *path.Peer, b []byte) {
	if src != s.src {
		s.src, s.reply = src, s.t.paths.Reply(src)
	}
	plain, wp, err := s.t.dev.Receive(s.inbox.Room(len(b)), b, &s.reply)
	if err != nil || plain == nil {
		return // not authentic, or a handshake message or keepalive that is dealt with
	}
	s.packet(wp.Owner().(*peer), plain)
}

// Flush hands everything that is still gathered to the netstack.
func (s *sink) Flush() { s.inbox.Flush() }

// packet takes an authenticated packet of p.
func (s *sink) packet(p *peer, b []byte) {
	e := s.t.e
	h := &s.hdr
	if h.Decode(b) != nil {
		return
	}
	m, f := e.netmap.Load(), e.filter.Load()
	if m == nil || f == nil {
		return // without a filter from control nothing comes in
	}
	// Cryptokey routing: the source address must be one that the netmap routes to this peer.
	n := m.Route(h.Src.Addr())
	if n == nil || n.Key != p.wg.Public() || n.Expired {
		return
	}
	if !f.In(h, e.flows, now()).Accepted() {
		e.rejected(p, h)
		return
	}
	if e.intercept(p, h) {
		return
	}
	s.inbox.Commit(b)
}
