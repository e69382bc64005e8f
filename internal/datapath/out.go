package datapath

import (
	"net/netip"

	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/packet"
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
	pr := e.route(h.Dst.Addr())
	if pr == nil {
		return
	}
	f := e.filter.Load()
	if f == nil || !f.Out(&h, e.flows, now()).Accepted() {
		return
	}
	pr.wg.Send(p) // an error is a lost packet, and the layers above expect those
}

// route returns the peer that packets to dst go to, or nil.
func (e *Engine) route(dst netip.Addr) *peer {
	n := e.netmap.Load().Route(dst)
	if n == nil {
		return nil
	}
	return e.trans.Load().peer(n.Key)
}

// one is a wg.Source of a single packet.
type one []byte

func (o *one) Next(dst []byte) int {
	n := copy(dst, *o)
	*o = nil
	return n
}

// send seals one IP packet that the Engine made itself.
func (p *peer) send(pkt []byte) error { return p.wg.Send((*one)(&pkt)) }
