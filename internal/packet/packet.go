// Package packet reads and builds the IP packets that travel inside the
// WireGuard tunnel: IPv4 and IPv6 with TCP, UDP, SCTP, ICMP, and TSMP, the small
// signalling protocol of a tailnet (docs/protocol/tsmp.md).
//
// The reader is made for a filter. It allocates nothing, looks at no more than
// the headers, and refuses what two readers could understand differently:
// lengths that contradict each other, a first fragment without its whole
// transport header, a later fragment that could overwrite one (RFC 1858, RFC
// 3128), chains of extension headers that end nowhere.
package packet

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
)

// Proto is an IP protocol number.
type Proto uint8

// The protocols that the node has an opinion on.
const (
	Unknown  Proto = 0
	ICMPv4   Proto = 1
	IGMP     Proto = 2
	TCP      Proto = 6
	UDP      Proto = 17
	ICMPv6   Proto = 58
	TSMP     Proto = 99
	SCTP     Proto = 132
	Fragment Proto = 0xFF // not on the wire: a fragment other than the first
)

// String returns the protocol's name, or its number.
func (p Proto) String() string {
	switch p {
	case Unknown:
		return "unknown"
	case ICMPv4:
		return "ICMPv4"
	case IGMP:
		return "IGMP"
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case ICMPv6:
		return "ICMPv6"
	case TSMP:
		return "TSMP"
	case SCTP:
		return "SCTP"
	case Fragment:
		return "fragment"
	}
	return "proto-" + strconv.Itoa(int(p))
}

// The TCP flags (RFC 9293 §3.1).
const (
	TCPFin uint8 = 1 << iota
	TCPSyn
	TCPRst
	TCPPsh
	TCPAck
	TCPUrg
	TCPEce
	TCPCwr
)

// What Decode says of a packet it refuses.
var (
	ErrNotIP     = errors.New("packet: neither IPv4 nor IPv6")
	ErrTruncated = errors.New("packet: shorter than its headers say")
	ErrMalformed = errors.New("packet: header fields contradict each other")
	ErrFragment  = errors.New("packet: fragment that could hide a transport header")
	ErrExtension = errors.New("packet: IPv6 extension header that is not taken")
)

const (
	ip4Len  = 20
	ip6Len  = 40
	icmpLen = 8 // type, code, checksum and the four bytes that echo uses
	tcpLen  = 20
	udpLen  = 8
	sctpLen = 12
	tsmpLen = 7 // the shortest message, a rejection without flags

	// maxExtensions bounds the walk along IPv6 extension headers. Real packets
	// carry one or two.
	maxExtensions = 6

	// minFragmentOffset is the lowest offset, in 8-byte blocks, of a later
	// fragment: behind the longest transport header (TCP, 60 bytes), with room
	// to spare for the same rule as other clients of the network have.
	minFragmentOffset = (60 + 20) / 8
)

// Parsed is the outcome of reading one packet. It is made to be reused: Decode
// sets every field. It is not safe for concurrent use.
type Parsed struct {
	b    []byte // the IP packet, without what follows it
	hdr  int    // where the transport header starts
	data int    // where its payload starts
	end  int    // where the payload ends

	Version  uint8          // 4 or 6; 0 after an error
	Proto    Proto          // Fragment for a fragment other than the first
	TCPFlags uint8          // set if Proto is TCP
	More     bool           // a fragment with others behind it
	Src, Dst netip.AddrPort // ports are 0 where the protocol has none
}

// Decode reads the IP packet at the start of b. What follows the packet, such
// as WireGuard's padding, is ignored. It keeps b until the next Decode, changes
// nothing in it and allocates nothing.
//
// After an error p is empty: Version and Proto are zero.
func (p *Parsed) Decode(b []byte) error { return p.decode(b, false) }

// DecodeHeader is Decode for the beginning of a packet whose payload lies
// elsewhere or is yet to be split into segments: the length fields are not
// looked at, and only the headers must be there.
func (p *Parsed) DecodeHeader(b []byte) error { return p.decode(b, true) }

func (p *Parsed) decode(b []byte, headerOnly bool) error {
	*p = Parsed{}
	if len(b) == 0 {
		return ErrTruncated
	}
	var err error
	switch b[0] >> 4 {
	case 4:
		err = p.decode4(b, headerOnly)
	case 6:
		err = p.decode6(b, headerOnly)
	default:
		err = ErrNotIP
	}
	if err != nil {
		*p = Parsed{}
	}
	return err
}

func (p *Parsed) decode4(b []byte, headerOnly bool) error {
	if len(b) < ip4Len {
		return ErrTruncated
	}
	hdr := int(b[0]&0x0f) * 4
	total := int(binary.BigEndian.Uint16(b[2:4]))
	if headerOnly {
		total = len(b)
	}
	if hdr < ip4Len || total < hdr {
		return ErrMalformed
	}
	if total > len(b) {
		return ErrTruncated
	}
	p.b, p.hdr, p.end = b[:total:total], hdr, total
	p.Version = 4
	src := netip.AddrFrom4([4]byte(b[12:16]))
	dst := netip.AddrFrom4([4]byte(b[16:20]))

	frag := binary.BigEndian.Uint16(b[6:8])
	p.More = frag&0x2000 != 0
	return p.transport(Proto(b[9]), frag&0x1fff, src, dst, headerOnly)
}

func (p *Parsed) decode6(b []byte, headerOnly bool) error {
	if len(b) < ip6Len {
		return ErrTruncated
	}
	total := int(binary.BigEndian.Uint16(b[4:6])) + ip6Len
	if headerOnly {
		total = len(b)
	}
	if total > len(b) {
		return ErrTruncated
	}
	p.b, p.hdr, p.end = b[:total:total], ip6Len, total
	p.Version = 6
	src := netip.AddrFrom16([16]byte(b[8:24]))
	dst := netip.AddrFrom16([16]byte(b[24:40]))
	if src.Is4In6() || dst.Is4In6() {
		// Such an address on the wire means nothing (RFC 4942 §2.2), and a
		// rule for the IPv4 address must not be met by it.
		return ErrMalformed
	}

	// RFC 8200 §4. Hop-by-hop and destination options are stepped over; the
	// stack knows what to do with them. A routing header would make the
	// destination a different one than the filter saw. Nothing may stand between
	// the fragment header and the transport header: a chain that goes on in the
	// fragmentable part could push the transport header behind minFragmentOffset.
	next := b[6]
	for range maxExtensions {
		switch next {
		case 0, 60: // hop-by-hop options, destination options
			if next == 0 && p.hdr != ip6Len {
				return ErrExtension // only directly behind the IPv6 header (§4.3)
			}
			if p.hdr+8 > total {
				return ErrTruncated
			}
			n := (int(p.b[p.hdr+1]) + 1) * 8
			if p.hdr+n > total {
				return ErrTruncated
			}
			next = p.b[p.hdr]
			p.hdr += n
		case 44: // fragment
			if p.hdr+8 > total {
				return ErrTruncated
			}
			h := p.b[p.hdr : p.hdr+8]
			frag := binary.BigEndian.Uint16(h[2:4])
			p.More = frag&1 != 0
			p.hdr += 8
			switch h[0] {
			case 0, 43, 44, 50, 51, 60, 135, 139, 140:
				if frag>>3 == 0 {
					return ErrExtension
				}
			}
			return p.transport(Proto(h[0]), frag>>3, src, dst, headerOnly)
		case 43, 50, 51, 135, 139, 140: // routing, ESP, AH, mobility, HIP, shim6
			return ErrExtension
		default:
			return p.transport(Proto(next), 0, src, dst, headerOnly)
		}
	}
	return ErrExtension
}

// transport reads the transport header at p.hdr; frag is the fragment's offset.
func (p *Parsed) transport(proto Proto, frag uint16, src, dst netip.Addr, headerOnly bool) error {
	p.data = p.hdr
	if frag != 0 {
		if frag < minFragmentOffset {
			return ErrFragment
		}
		if int(frag)*8+(p.end-p.hdr) > 65535 {
			return ErrFragment // would be longer than a packet can be (RFC 791 §3.2)
		}
		p.Proto = Fragment
		p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
		return nil
	}

	sub := p.b[p.hdr:]
	var sport, dport uint16
	need := 0
	switch proto {
	case TCP:
		need = tcpLen
	case UDP:
		need = udpLen
	case SCTP:
		need = sctpLen
	case ICMPv4, ICMPv6:
		need = icmpLen
	case IGMP:
		need = 8
	case TSMP:
		need = tsmpLen
	case Fragment, Unknown:
		return ErrMalformed // reserved numbers that mean something else in Parsed
	}
	if len(sub) < need {
		if p.More {
			return ErrFragment
		}
		return ErrTruncated
	}
	switch proto {
	case TCP:
		n := int(sub[12]>>4) * 4
		if n < tcpLen {
			return ErrMalformed
		}
		if n > len(sub) {
			if p.More {
				return ErrFragment
			}
			return ErrTruncated
		}
		p.TCPFlags = sub[13]
		need = n
	case UDP:
		n := int(binary.BigEndian.Uint16(sub[4:6]))
		switch {
		case headerOnly:
		case n < udpLen:
			return ErrMalformed
		case p.More: // the length is of the whole datagram
		case n > len(sub):
			return ErrTruncated
		default:
			p.end = p.hdr + n
		}
	case ICMPv4:
		if p.Version != 4 {
			return ErrMalformed
		}
	case ICMPv6:
		if p.Version != 6 {
			return ErrMalformed
		}
	case TSMP:
		if p.More {
			return ErrFragment // no message is that long
		}
		need = 0 // the payload is the message with its type byte
	}
	switch proto {
	case TCP, UDP, SCTP:
		sport = binary.BigEndian.Uint16(sub[0:2])
		dport = binary.BigEndian.Uint16(sub[2:4])
	}
	p.Proto = proto
	p.data = p.hdr + need
	p.Src, p.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return nil
}

// Bytes returns the packet without what followed it. It is part of the slice
// that was given to Decode.
func (p *Parsed) Bytes() []byte { return p.b }

// Transport returns the packet from the transport header on.
func (p *Parsed) Transport() []byte { return p.b[p.hdr:p.end] }

// Payload returns what the transport header carries. For ICMP that is what
// follows the first 8 bytes, for TSMP the message with its type byte, for a
// protocol unknown to this package everything behind the IP header.
func (p *Parsed) Payload() []byte { return p.b[p.data:p.end] }

// IsSYN reports whether the packet asks for a new TCP connection: SYN without
// ACK.
func (p *Parsed) IsSYN() bool {
	return p.Proto == TCP && p.TCPFlags&(TCPSyn|TCPAck) == TCPSyn
}
