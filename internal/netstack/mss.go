package netstack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// How large the packets of a TCP connection may be is settled in three places that know nothing of each other. The peer's SYN
// says what it takes (RFC 9293 §3.7.1), the path carries what it does at that moment, and gVisor counts its windows in segments
// that fit the interface, so that its congestion control and what it sends again keep to a size that every path carries.
//
// So a node that takes packets of any size says AnyMSS in its SYNs, which [Packet.OfferAnyMSS] writes in place of gVisor's. What the peer says is
// carried through gVisor in the low bits of the MSS: the options that gVisor subtracts are multiples of four bytes long (RFC 9293
// §3.1), so the bits come out again with each segment, and no table of connections is needed. Next cuts by them.

// AnyMSS is the MSS of a node that takes TCP segments of whatever size the path carries: what fits the longest IPv6 packet.
const AnyMSS = 65535 - header.IPv6MinimumSize - header.TCPMinimumSize

// The marks in the low two bits of the MSS that gVisor is shown, and of the size of its segments.
const (
	markBits  = 3
	markWhole = 2 // the peer takes packets of the MTU: cut by the headers that there are, and not by the most that there might be
	markAny   = 3 // the peer said AnyMSS
)

// mostOptions is what gVisor leaves for TCP options at the most.
const mostOptions = header.TCPOptionsMaximumSize

// mssLimit is the MSS of packets of the MTU, rounded down to the marks' granularity.
func mssLimit(mtu, ipLen int) int { return mtu&^markBits - ipLen - header.TCPMinimumSize }

// marked returns what gVisor is to be shown for a SYN's mss.
func marked(mss, limit int) int {
	switch {
	case mss >= AnyMSS:
		return limit - 4 + markAny
	case mss >= limit:
		return limit - 4 + markWhole
	case mss&markBits >= markWhole:
		return mss&^markBits + markWhole - 1
	}
	return mss
}

// markOf returns the mark in the size of gVisor's segments. Smaller ones carry none: what an ICMP message has made of them
// counts as it is.
func markOf(size, limit int) int {
	if size < limit-4-mostOptions {
		return 0
	}
	return size & markBits
}

// mssOption returns where in a SYN's TCP header the two bytes of the MSS are, 0 for nowhere.
func mssOption(tcp []byte) int {
	for i := header.TCPMinimumSize; i < len(tcp) && tcp[i] != header.TCPOptionEOL; {
		if tcp[i] == header.TCPOptionNOP {
			i++
			continue
		}
		if i+1 >= len(tcp) {
			break
		}
		n := int(tcp[i+1])
		if n < 2 || i+n > len(tcp) {
			break
		}
		if tcp[i] == header.TCPOptionMSS && n == header.TCPOptionMSSLength {
			return i + 2
		}
		i += n
	}
	return 0
}

// markSYN marks the MSS of an inbound SYN, whose TCP header is tcp, and reports whether it is AnyMSS. Its checksum is left behind:
// gVisor does not look at it.
func markSYN(tcp []byte, mtu, ipLen int) bool {
	i := mssOption(tcp)
	if i == 0 {
		return false
	}
	mss := int(binary.BigEndian.Uint16(tcp[i:]))
	binary.BigEndian.PutUint16(tcp[i:], uint16(marked(mss, mssLimit(mtu, ipLen))))
	return mss >= AnyMSS
}

// offerAnyMSS makes the MSS of an outbound SYN AnyMSS. pkt is a whole packet.
func offerAnyMSS(pkt []byte) {
	ipLen := header.IPv6MinimumSize
	if pkt[0]>>4 == 4 {
		ipLen = int(pkt[0]&15) * 4
	}
	if len(pkt) < ipLen+header.TCPMinimumSize {
		return
	}
	t := pkt[ipLen:]
	i := mssOption(t[:min(len(t), int(t[12]>>4)*4)])
	if i == 0 {
		return
	}
	was, is := binary.BigEndian.Uint16(t[i:]), uint16(AnyMSS)
	binary.BigEndian.PutUint16(t[i:], is)
	if i&1 != 0 { // in the other half of each word (RFC 1071 §2)
		was, is = was<<8|was>>8, is<<8|is>>8
	}
	acc := uint32(^binary.BigEndian.Uint16(t[16:])) + uint32(^was) + uint32(is) // RFC 1624 §3, equation 3
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	binary.BigEndian.PutUint16(t[16:], ^uint16(acc))
}
