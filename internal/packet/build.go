package packet

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// ErrBuild reports arguments of which no packet can be made: addresses of
// different families, or more payload than a packet holds.
var ErrBuild = errors.New("packet: cannot be built of these")

// defaultTTL is what the packets of this package start with.
const defaultTTL = 64

// AppendIP appends an IP header for a payload of n bytes and returns the longer
// slice. An IPv4 header says "don't fragment" and has identification 0, which RFC 6864
// §4.1 allows for such packets. src and dst must be of one family.
func AppendIP(b []byte, src, dst netip.Addr, proto Proto, n int) ([]byte, error) {
	switch {
	case n < 0:
		return b, ErrBuild
	case src.Is4() && dst.Is4():
		if ip4Len+n > 65535 {
			return b, ErrBuild
		}
		s, d := src.As4(), dst.As4()
		at := len(b)
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(ip4Len+n))
		b = append(b, 0, 0, 0x40, 0, defaultTTL, byte(proto), 0, 0)
		b = append(b, s[:]...)
		b = append(b, d[:]...)
		binary.BigEndian.PutUint16(b[at+10:], Checksum(b[at:], 0))
		return b, nil
	case src.Is6() && dst.Is6() && !src.Is4In6() && !dst.Is4In6():
		if n > 65535 {
			return b, ErrBuild
		}
		s, d := src.As16(), dst.As16()
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(n))
		b = append(b, byte(proto), defaultTTL)
		b = append(b, s[:]...)
		b = append(b, d[:]...)
		return b, nil
	}
	return b, ErrBuild
}

// AppendEcho appends an ICMP echo packet of the addresses' family, with its
// checksum.
func AppendEcho(b []byte, src, dst netip.Addr, e Echo) ([]byte, error) {
	proto, typ := ICMPv4, byte(icmp4EchoRequest)
	if e.Reply {
		typ = icmp4EchoReply
	}
	if src.Is6() {
		proto, typ = ICMPv6, icmp6EchoRequest
		if e.Reply {
			typ = icmp6EchoReply
		}
	}
	n := icmpLen + len(e.Data)
	b, err := AppendIP(b, src, dst, proto, n)
	if err != nil {
		return b, err
	}
	at := len(b)
	b = append(b, typ, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, e.ID)
	b = binary.BigEndian.AppendUint16(b, e.Seq)
	b = append(b, e.Data...)
	var sum uint32
	if proto == ICMPv6 {
		sum = PseudoSum(src, dst, ICMPv6, n)
	}
	binary.BigEndian.PutUint16(b[at+2:], Checksum(b[at:], sum))
	return b, nil
}

// AppendUDP appends a UDP packet with its checksum.
func AppendUDP(b []byte, src, dst netip.AddrPort, payload []byte) ([]byte, error) {
	n := udpLen + len(payload)
	if n > 65535 {
		return b, ErrBuild
	}
	b, err := AppendIP(b, src.Addr(), dst.Addr(), UDP, n)
	if err != nil {
		return b, err
	}
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = append(b, 0, 0)
	b = append(b, payload...)
	sum := Checksum(b[at:], PseudoSum(src.Addr(), dst.Addr(), UDP, n))
	if sum == 0 {
		sum = 0xffff // 0 would mean "no checksum" (RFC 768)
	}
	binary.BigEndian.PutUint16(b[at+6:], sum)
	return b, nil
}

// TCPHeader is what AppendTCP puts into the header beside the ports.
type TCPHeader struct {
	Seq, Ack uint32
	Flags    uint8
	Window   uint16
	Options  []byte // a multiple of 4 bytes, at most 40
}

// AppendTCP appends a TCP packet with its checksum.
func AppendTCP(b []byte, src, dst netip.AddrPort, h TCPHeader, payload []byte) ([]byte, error) {
	if len(h.Options)%4 != 0 || len(h.Options) > 40 {
		return b, ErrBuild
	}
	n := tcpLen + len(h.Options) + len(payload)
	b, err := AppendIP(b, src.Addr(), dst.Addr(), TCP, n)
	if err != nil {
		return b, err
	}
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint32(b, h.Seq)
	b = binary.BigEndian.AppendUint32(b, h.Ack)
	b = append(b, byte((tcpLen+len(h.Options))/4)<<4, h.Flags)
	b = binary.BigEndian.AppendUint16(b, h.Window)
	b = append(b, 0, 0, 0, 0)
	b = append(b, h.Options...)
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[at+16:], Checksum(b[at:], PseudoSum(src.Addr(), dst.Addr(), TCP, n)))
	return b, nil
}

// Checksum returns the Internet checksum (RFC 1071) of b, starting from the
// partial sum initial, which PseudoSum gives or which is 0. Over data that holds its own
// right checksum it returns 0.
func Checksum(b []byte, initial uint32) uint16 {
	sum := uint64(initial)
	for len(b) >= 8 {
		sum += uint64(binary.BigEndian.Uint32(b)) + uint64(binary.BigEndian.Uint32(b[4:]))
		b = b[8:]
	}
	for len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// PseudoSum returns the partial sum of the pseudo-header (RFC 9293 §3.1, RFC
// 8200 §8.1) for n bytes of the protocol.
func PseudoSum(src, dst netip.Addr, proto Proto, n int) uint32 {
	var sum uint64
	add := func(b []byte) {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint64(binary.BigEndian.Uint16(b))
		}
	}
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		add(s[:])
		add(d[:])
	} else {
		s, d := src.As16(), dst.As16()
		add(s[:])
		add(d[:])
	}
	sum += uint64(proto) + uint64(n)>>16 + uint64(n)&0xffff
	return uint32(sum)
}
