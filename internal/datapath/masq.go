package datapath

import (
	"encoding/binary"
	"net/netip"

	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/wg"
)

// Some peers know this node by another address than its own: control gives it with the peer
// (SelfNodeV4MasqAddrForThisPeer, docs/protocol/control.md, version 104). What goes to such
// a peer gets that address as its source, behind the filter and its notes of flows; what comes from
// it for that address gets the node's own as its destination, before the filter.

// masqFor returns the address by which n knows this node in place of own.
func masqFor(m *netmap.Map, n *netmap.Node, own netip.Addr) (a netip.Addr, ok bool) {
	switch {
	case own.Is4() && n.Masq4.IsValid():
		return n.Masq4, own == m.Self.Addr4()
	case own.Is6() && n.Masq6.IsValid():
		return n.Masq6, own == m.Self.Addr6()
	}
	return a, false
}

// unmask makes a packet of n for the address that n knows this node by one for the node's
// own address, in place.
func unmask(m *netmap.Map, n *netmap.Node, h *packet.Parsed) {
	var own netip.Addr
	switch dst := h.Dst.Addr(); {
	case n.Masq4.IsValid() && dst == n.Masq4:
		own = m.Self.Addr4()
	case n.Masq6.IsValid() && dst == n.Masq6:
		own = m.Self.Addr6()
	}
	if own.IsValid() {
		setAddr(h, own, false)
		h.Decode(h.Bytes()) // what it was decoded from before, but for the address: no error
	}
}

// masqSource is a wg.Source whose packets get another source address.
type masqSource struct {
	wg.Source
	own, as netip.Addr
	h       packet.Parsed
}

// Next implements wg.Source.
func (s *masqSource) Next(dst []byte) int {
	n := s.Source.Next(dst)
	if n > 0 && s.h.Decode(dst[:n]) == nil && s.h.Src.Addr() == s.own {
		setAddr(&s.h, s.as, true)
	}
	return n
}

// setAddr writes the source or destination address of the packet that h was decoded from, which
// is of the same family, and mends the checksums that cover it. h itself is stale afterwards.
func setAddr(h *packet.Parsed, a netip.Addr, source bool) {
	b := h.Bytes()
	var field []byte
	switch {
	case h.Version == 4 && source:
		field = b[12:16]
	case h.Version == 4:
		field = b[16:20]
	case source:
		field = b[8:24]
	default:
		field = b[24:40]
	}
	var was [16]byte
	n := copy(was[:], field)
	copy(field, a.AsSlice())
	if h.Version == 4 {
		mend(b[10:12], was[:n], field)
	}
	t := h.Transport()
	switch h.Proto {
	case packet.TCP:
		mend(t[16:18], was[:n], field)
	case packet.UDP:
		if t[6]|t[7] == 0 && h.Version == 4 {
			return // sent without a checksum (RFC 768)
		}
		mend(t[6:8], was[:n], field)
		if t[6]|t[7] == 0 {
			t[6], t[7] = 0xff, 0xff
		}
	case packet.ICMPv6:
		mend(t[2:4], was[:n], field)
	}
}

// mend changes a checksum for bytes that changed from was to is (RFC 1624 §3, equation 3).
func mend(sum, was, is []byte) {
	acc := uint32(^binary.BigEndian.Uint16(sum))
	for i := 0; i < len(was); i += 2 {
		acc += uint32(^binary.BigEndian.Uint16(was[i:])) + uint32(binary.BigEndian.Uint16(is[i:]))
	}
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	binary.BigEndian.PutUint16(sum, ^uint16(acc))
}
