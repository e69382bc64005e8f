package datapath

import (
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/wg"
)

// output is the Engine as the netstack sees it.
type output Engine

// WritePacket carries one packet of the netstack, which may be a TCP segment of many MTUs,
// to the peer that its destination belongs to. It runs on the goroutine of whoever wrote.
func (o *output) WritePacket(p *netstack.Packet) {
	e := (*Engine)(o)
	var h packet.Parsed
	if h.DecodeHeader(p.Header()) != nil {
		return
	}
	if isDNS(&h) {
		e.dns.ask(p)
		return
	}
	m, at := e.netmap.Load(), now()
	n, pr := e.route(m, h.Dst.Addr(), at)
	if pr == nil {
		return
	}
	f := e.filter.Load()
	if f == nil || !f.Out(&h, e.flows, at).Accepted() {
		return
	}
	if h.TCPFlags&packet.TCPSyn != 0 && h.Proto == packet.TCP && ownAddr(n, h.Dst.Addr()) {
		p.OfferAnyMSS()
	}
	var src wg.Source = p
	if as, ok := masqFor(m, n, h.Src.Addr()); ok {
		src = &masqSource{Source: p, own: h.Src.Addr(), as: as}
	} else if h.Proto == packet.TCP && e.parting.on.Load() && e.parting.take(pr, p) {
		return
	}
	// An error is a lost packet, and the layers above expect those.
	switch mtu := 0; {
	case h.Proto == packet.UDP && p.Len() <= MTU, h.Proto == packet.TCP && p.Len() <= tiny:
		pr.datagram(src, p.Len(), at, h.Proto == packet.TCP)
	default:
		if p.AnySize() {
			mtu = pr.path.MTU(p.Len())
		}
		pr.segment(src, mtu)
	}
}

// route returns the peer that packets to dst go to, or nil: there is none, or its key has expired.
func (e *Engine) route(m *netmap.Map, dst netip.Addr, at time.Time) (*netmap.Node, *peer) {
	n := m.Route(dst)
	if n == nil || m.Expired(n, at) {
		return nil, nil
	}
	return n, e.trans.Load().peer(n.Key)
}

// ownAddr reports whether a is an address of n itself, and not one of a network behind it: there, segments of any size
// would depend on messages of its routers about their size getting back to whoever sends them.
func ownAddr(n *netmap.Node, a netip.Addr) bool {
	for _, p := range n.Addresses {
		if p.IsSingleIP() && p.Addr() == a {
			return true
		}
	}
	return false
}

// one is a wg.Source of a single packet.
type one []byte

// Next implements wg.Source.
func (o *one) Next(dst []byte) int {
	n := copy(dst, *o)
	*o = nil
	return n
}

// send seals one IP packet that the Engine made itself, whose source is the node's own address.
func (p *peer) send(pkt []byte) error {
	m := p.t.e.netmap.Load()
	if n := m.PeerByKey(p.wg.Public()); n != nil && (n.Masq4.IsValid() || n.Masq6.IsValid()) {
		var h packet.Parsed
		if h.Decode(pkt) == nil {
			if as, ok := masqFor(m, n, h.Src.Addr()); ok {
				setAddr(&h, as, true)
			}
		}
	}
	return p.wg.Send((*one)(&pkt))
}
