package disco

import "encoding/binary"

// GeneveLen is the length of the Geneve header (RFC 8926 §3.4) that stands before everything that goes to or comes from a
// peer relay. There are no options.
//
//	0   1  version 0, option length 0
//	1   1  80: control, for the handshake with the relay itself; 00: to be forwarded
//	2   2  protocol: 7a11 disco, 7a12 WireGuard
//	4   3  VNI
//	7   1  0
const GeneveLen = 8

// MaxVNI is the greatest virtual network identifier; 0 is none.
const MaxVNI = 1<<24 - 1

// Protocol says what a Geneve header stands before.
type Protocol uint16

// The protocols.
const (
	GeneveDisco     Protocol = 0x7a11
	GeneveWireGuard Protocol = 0x7a12
)

// Geneve is the header.
type Geneve struct {
	VNI      uint32
	Protocol Protocol
	Control  bool
}

// Append appends the header.
func (g Geneve) Append(dst []byte) []byte {
	var h [GeneveLen]byte
	if g.Control {
		h[1] = 0x80
	}
	binary.BigEndian.PutUint16(h[2:], uint16(g.Protocol))
	binary.BigEndian.PutUint32(h[4:], g.VNI<<8)
	return append(dst, h[:]...)
}

// ParseGeneve reads the header of packet b; what it stands before is b[GeneveLen:]. ok is false if b has none of this form. No
// disco message, WireGuard message or STUN message is taken for one: their third and fourth bytes, or the first two, differ.
func ParseGeneve(b []byte) (g Geneve, ok bool) {
	if len(b) < GeneveLen || b[0] != 0 || b[1]&0x7f != 0 || b[7] != 0 {
		return g, false
	}
	p := Protocol(binary.BigEndian.Uint16(b[2:]))
	if p != GeneveDisco && p != GeneveWireGuard {
		return g, false
	}
	return Geneve{VNI: binary.BigEndian.Uint32(b[4:]) >> 8, Protocol: p, Control: b[1] == 0x80}, true
}
