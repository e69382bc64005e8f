package netstack

import (
	"encoding/binary"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpPSH = 0x08
	tcpACK = 0x10
	tcpCWR = 0x80

	protoTCP = 6
)

// A Packet is one outbound packet on its way to the tunnel: an IP packet as it is, or a TCP segment of up to about
// 60 KB that Next cuts into packets. It belongs to the stack and is valid only during Output.WritePacket.
type Packet struct {
	raw []byte // SendRaw: the packet itself; otherwise nil

	hdr  []byte // headers, contiguous: IP and TCP, or as much of the first bytes as fits in scratch
	size int    // whole packet, before splitting

	// What Next has not yet handed out.
	view *buffer.View
	off  int // consumed bytes of view
	left int // payload bytes; for a packet that goes out as it is, all its bytes

	split  bool // a TCP segment whose checksum is ours to compute
	done   bool
	offer  bool // a SYN whose MSS is to be AnyMSS
	any    bool // split, for a receiver that takes packets of any size
	mss    int  // payload bytes per packet, unless any
	ipLen  int
	seq    uint32
	id     uint16
	flags  byte
	pseudo uint16 // sum of the pseudo header without the length
	first  bool

	nAhead int // bytes of ahead, another packet to the same peer, which goes first
	ahead  ackPacket

	scratch [128]byte
}

var packets = sync.Pool{New: func() any { return new(Packet) }}

func newPacket() *Packet { return packets.Get().(*Packet) }

// free returns p to the pool; everything but scratch and ahead is reset, for those are always written before they are read.
func (p *Packet) free() {
	p.raw, p.hdr, p.view = nil, nil, nil
	p.size, p.off, p.left, p.nAhead = 0, 0, 0, 0
	p.split, p.done, p.offer, p.any = false, false, false, false
	packets.Put(p)
}

// set makes p the packet pk.
func (p *Packet) set(pk *stack.PacketBuffer, mtu int) {
	views, skip := pk.AsViewList()
	v := views.Front()
	for v != nil && skip >= v.Size() {
		skip -= v.Size()
		v = v.Next()
	}
	p.view, p.off = v, skip
	p.size = pk.Size()
	p.left = p.size

	need := len(pk.NetworkHeader().Slice()) + len(pk.TransportHeader().Slice())
	p.hdr = p.peek(need)

	if pk.TransportProtocolNumber == header.TCPProtocolNumber && pk.GSOOptions.NeedsCsum {
		p.prepare(int(pk.GSOOptions.MSS), mtu)
	}
}

// peek returns the next n bytes of the packet, contiguous, without consuming them: in place where they lie in one
// view, which is the rule, otherwise the first of them copied into scratch. At least 64 bytes are shown where there
// are so many, so that a filter sees the transport header of packets that the stack did not parse.
func (p *Packet) peek(n int) []byte {
	n = min(max(n, 64), p.left)
	if p.view == nil {
		return nil
	}
	if b := p.view.AsSlice()[p.off:]; len(b) >= n {
		return b[:n:n]
	}
	b := p.scratch[:0]
	off := p.off
	for v := p.view; v != nil && len(b) < min(n, len(p.scratch)); v = v.Next() {
		s := v.AsSlice()[off:]
		off = 0
		b = append(b, s[:min(len(s), min(n, len(p.scratch))-len(b))]...)
	}
	return b
}

// prepare reads the headers of the TCP segment that is to be split.
func (p *Packet) prepare(mss, mtu int) {
	h := p.hdr
	var addrs []byte
	switch h[0] >> 4 {
	case 4:
		p.ipLen = int(h[0]&15) * 4
		p.id = binary.BigEndian.Uint16(h[4:])
		addrs = h[12:20]
	default:
		p.ipLen = header.IPv6MinimumSize
		addrs = h[8:40]
	}
	t := h[p.ipLen:]
	hlen := p.ipLen + int(t[12]>>4)*4
	p.hdr = h[:hlen:hlen]
	p.seq = binary.BigEndian.Uint32(t[4:])
	p.flags = t[13]
	p.pseudo = checksum.Checksum(addrs, protoTCP)
	p.mss = mtu - hlen
	switch mark := markOf(mss, mssLimit(mtu, p.ipLen)); {
	case mark == markAny:
		p.any = true
	case mss > 0 && mss < p.mss && mark != markWhole:
		p.mss = mss
	}
	p.split, p.first = true, true
	p.skip(hlen)
}

func (p *Packet) skip(n int) {
	p.left -= n
	for p.view != nil && n > 0 {
		if k := p.view.Size() - p.off; n < k {
			p.off += n
			return
		} else {
			n -= k
		}
		p.view, p.off = p.view.Next(), 0
	}
}

// Header returns the IP and transport headers, contiguous, as they are before splitting: the length in them is the
// whole segment's, and a TCP checksum is not yet computed. For a packet that has no transport header the stack knows
// of (ICMP, a fragment, SendRaw) it is the first bytes of the packet, at least 64 where there are as many. The bytes
// are valid during WritePacket and must not be changed.
func (p *Packet) Header() []byte {
	if p.raw != nil {
		return p.raw
	}
	return p.hdr
}

// Len returns the length in bytes of the whole packet, before splitting and with its headers once, and of another one that goes ahead of it.
func (p *Packet) Len() int {
	if p.raw != nil {
		return len(p.raw)
	}
	return p.nAhead + p.size
}

// AnySize reports whether p is a TCP segment for a receiver that takes packets of any size ([AnyMSS]): Next then fills dst, however long.
func (p *Packet) AnySize() bool { return p.any }

// OfferAnyMSS says, if p is a SYN, that this node takes packets of any size by that connection, for which the inbox has room.
// It does not call for any: the peer cuts by what it finds the path to carry.
func (p *Packet) OfferAnyMSS() {
	h := p.hdr
	if len(h) < header.IPv4MinimumSize+header.TCPMinimumSize || p.split || p.raw != nil {
		return
	}
	at, proto := header.IPv6MinimumSize, h[6]
	if h[0]>>4 == 4 {
		at, proto = int(h[0]&15)*4, h[9]
	}
	p.offer = proto == protoTCP && len(h) > at+13 && h[at+13]&tcpSYN != 0
}

// Next writes the next IP packet, with correct checksums, to dst and returns its length; 0 means that there is no more. It is
// at most MTU bytes long, or as long as dst if [Packet.AnySize]. dst must have room for the MTU: a packet that does not
// fit is dropped. Next implements the tunnel's packet source.
func (p *Packet) Next(dst []byte) int {
	switch {
	case p.nAhead > 0:
		n := p.nAhead
		p.nAhead = 0
		if len(dst) >= n {
			return copy(dst, p.ahead[:n])
		}
		return p.Next(dst)
	case p.done:
		return 0
	case p.raw != nil:
		p.done = true
		if len(dst) < len(p.raw) {
			return 0
		}
		return copy(dst, p.raw)
	case !p.split:
		p.done = true
		if len(dst) < p.left {
			return 0
		}
		n := p.left
		p.copyPlain(dst[:n])
		if p.offer {
			offerAnyMSS(dst[:n])
		}
		return n
	}

	hlen := len(p.hdr)
	most := p.mss
	if p.any {
		most = max(1, min(len(dst), 65535)-hlen)
	}
	n := min(p.left, most)
	if len(dst) < hlen+n {
		p.done = true
		return 0
	}
	last := n == p.left
	copy(dst, p.hdr)
	acc := p.copySum(dst[hlen:hlen+n], checksum.Combine(p.pseudo, uint16(hlen-p.ipLen+n)))

	t := dst[p.ipLen:hlen:hlen]
	flags := p.flags
	if !last {
		flags &^= tcpFIN | tcpPSH
	}
	if !p.first {
		flags &^= tcpCWR // RFC 3168 §6.1.2: once for the window, on its first packet
	}
	binary.BigEndian.PutUint32(t[4:], p.seq)
	t[13] = flags
	t[16], t[17] = 0, 0
	binary.BigEndian.PutUint16(t[16:], ^checksum.Checksum(t, acc))

	total := hlen + n
	if dst[0]>>4 == 4 {
		binary.BigEndian.PutUint16(dst[2:], uint16(total))
		binary.BigEndian.PutUint16(dst[4:], p.id)
		dst[10], dst[11] = 0, 0
		binary.BigEndian.PutUint16(dst[10:], ^checksum.Checksum(dst[:p.ipLen], 0))
	} else {
		binary.BigEndian.PutUint16(dst[4:], uint16(total-p.ipLen))
	}
	p.id++
	p.seq += uint32(n)
	p.first = false
	p.done = last
	return total
}

// copyPlain fills dst with the packet's next bytes.
func (p *Packet) copyPlain(dst []byte) {
	for len(dst) > 0 && p.view != nil {
		k := copy(dst, p.view.AsSlice()[p.off:])
		dst = dst[k:]
		p.skip(k)
	}
}

// copySum fills dst with the packet's next bytes and adds them to the checksum acc. Summing right behind each copy,
// while the bytes are in the cache, is faster than one loop that does both.
func (p *Packet) copySum(dst []byte, acc uint16) uint16 {
	odd := false
	for len(dst) > 0 && p.view != nil {
		k := copy(dst, p.view.AsSlice()[p.off:])
		s := checksum.Checksum(dst[:k], 0)
		if odd { // the piece starts at an odd offset: its bytes count in the other half of each word (RFC 1071 §2)
			s = s<<8 | s>>8
		}
		acc = checksum.Combine(acc, s)
		odd = odd != (k&1 == 1)
		dst = dst[k:]
		p.skip(k)
	}
	return acc
}
