package packet

import (
	"encoding/binary"
	"net/netip"
)

const (
	icmp4EchoReply    = 0
	icmp4Unreachable  = 3
	icmp4FragNeeded   = 4 // a code of icmp4Unreachable
	icmp4EchoRequest  = 8
	icmp4TimeExceeded = 11
	icmp4ParamProblem = 12
	icmp6Unreachable  = 1
	icmp6PacketTooBig = 2
	icmp6TimeExceeded = 3
	icmp6ParamProblem = 4
	icmp6EchoRequest  = 128
	icmp6EchoReply    = 129
)

// Echo is an ICMP echo message (RFC 792, RFC 4443 §4).
type Echo struct {
	Reply   bool
	ID, Seq uint16
	Data    []byte // from Parsed.Echo: part of the packet
}

func (p *Parsed) icmp() (typ, code uint8, ok bool) {
	if p.Proto != ICMPv4 && p.Proto != ICMPv6 {
		return 0, 0, false
	}
	return p.b[p.hdr], p.b[p.hdr+1], true
}

// Echo returns the packet's echo message; ok is false if it is something else,
// a fragment, or its checksum is wrong.
func (p *Parsed) Echo() (e Echo, ok bool) {
	if p.More || !(p.IsEchoRequest() || p.IsEchoReply()) {
		return Echo{}, false
	}
	sub := p.Transport()
	var sum uint32
	if p.Version == 6 {
		sum = PseudoSum(p.Src.Addr(), p.Dst.Addr(), ICMPv6, len(sub))
	}
	if Checksum(sub, sum) != 0 {
		return Echo{}, false
	}
	return Echo{
		Reply: p.IsEchoReply(),
		ID:    binary.BigEndian.Uint16(sub[4:6]),
		Seq:   binary.BigEndian.Uint16(sub[6:8]),
		Data:  sub[icmpLen:],
	}, true
}

// IsEchoRequest reports whether the packet is an ICMP echo request.
func (p *Parsed) IsEchoRequest() bool {
	t, c, ok := p.icmp()
	if !ok || c != 0 {
		return false
	}
	if p.Proto == ICMPv4 {
		return t == icmp4EchoRequest
	}
	return t == icmp6EchoRequest
}

// IsEchoReply reports whether the packet is an ICMP echo reply.
func (p *Parsed) IsEchoReply() bool {
	t, c, ok := p.icmp()
	if !ok || c != 0 {
		return false
	}
	if p.Proto == ICMPv4 {
		return t == icmp4EchoReply
	}
	return t == icmp6EchoReply
}

// IsICMPError reports whether the packet is an ICMP message that answers
// another packet with a failure: unreachable, too big, time exceeded, parameter
// problem.
func (p *Parsed) IsICMPError() bool {
	t, _, ok := p.icmp()
	if !ok {
		return false
	}
	if p.Proto == ICMPv4 {
		return t == icmp4Unreachable || t == icmp4TimeExceeded || t == icmp4ParamProblem
	}
	return t == icmp6Unreachable || t == icmp6PacketTooBig || t == icmp6TimeExceeded || t == icmp6ParamProblem
}

// Failed returns where the packet that an ICMP error is about was sent, and the MTU of the path there if that is what the error tells
// (RFC 1191 §4, RFC 4443 §3.2), -1 otherwise. ok is false if the packet is no ICMP error, or has too little of that packet.
func (p *Parsed) Failed() (dst netip.Addr, mtu int, ok bool) {
	b := p.Payload()
	if !p.IsICMPError() || p.Version == 4 && len(b) < 20 || p.Version == 6 && len(b) < 40 {
		return netip.Addr{}, 0, false
	}
	typ, code, _ := p.icmp()
	mtu = -1
	if p.Version == 6 {
		if typ == icmp6PacketTooBig {
			mtu = int(min(binary.BigEndian.Uint32(p.Transport()[4:]), 1<<16))
		}
		return netip.AddrFrom16([16]byte(b[24:40])), mtu, true
	}
	if typ == icmp4Unreachable && code == icmp4FragNeeded {
		mtu = int(binary.BigEndian.Uint16(p.Transport()[6:]))
	}
	return netip.AddrFrom4([4]byte(b[16:20])), mtu, true
}
