package netstack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// superSegment describes a TCP segment as the stack hands it over.
type superSegment struct {
	src, dst netip.AddrPort
	seq, ack uint32
	flags    byte
	opts     []byte
	id       uint16
	payload  []byte
	pieces   []int // sizes of the views; the rest is in one more
}

func (g superSegment) header(total int) []byte {
	tcp := make([]byte, 20+len(g.opts))
	binary.BigEndian.PutUint16(tcp, g.src.Port())
	binary.BigEndian.PutUint16(tcp[2:], g.dst.Port())
	binary.BigEndian.PutUint32(tcp[4:], g.seq)
	binary.BigEndian.PutUint32(tcp[8:], g.ack)
	tcp[12] = byte(len(tcp) / 4 << 4)
	tcp[13] = g.flags
	binary.BigEndian.PutUint16(tcp[14:], 501)
	copy(tcp[20:], g.opts)
	h := ipHeader(g.src.Addr(), g.dst.Addr(), protoTCP, len(tcp)+total)
	if g.src.Addr().Is4() {
		binary.BigEndian.PutUint16(h[4:], g.id)
	}
	return append(h, tcp...)
}

// packetBuffer builds the stack's form of g.
func (g superSegment) packetBuffer(mss int) *stack.PacketBuffer {
	var data buffer.Buffer
	rest := g.payload
	for _, n := range g.pieces {
		n = min(n, len(rest))
		if n > 0 { // merged, for Append would fill up the view before
			b := buffer.MakeWithView(buffer.NewViewWithData(rest[:n]))
			data.Merge(&b)
		}
		rest = rest[n:]
	}
	for len(rest) > 0 {
		n := min(len(rest), 40000)
		b := buffer.MakeWithView(buffer.NewViewWithData(rest[:n]))
		data.Merge(&b)
		rest = rest[n:]
	}
	h := g.header(len(g.payload))
	ipLen := 20
	proto := tcpip.NetworkProtocolNumber(header.IPv4ProtocolNumber)
	if g.src.Addr().Is6() {
		ipLen, proto = 40, header.IPv6ProtocolNumber
	}
	pk := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: len(h) + 13, Payload: data})
	copy(pk.TransportHeader().Push(len(h)-ipLen), h[ipLen:])
	copy(pk.NetworkHeader().Push(ipLen), h[:ipLen])
	pk.NetworkProtocolNumber = proto
	pk.TransportProtocolNumber = header.TCPProtocolNumber
	pk.GSOOptions = stack.GSO{NeedsCsum: true, MSS: uint16(mss)}
	return pk
}

func splitAll(t testing.TB, p *Packet, mtu int) [][]byte {
	t.Helper()
	var out [][]byte
	dst := make([]byte, mtu)
	for {
		for i := range dst {
			dst[i] = 0xa5
		}
		n := p.Next(dst)
		if n == 0 {
			if p.Next(dst) != 0 {
				t.Error("Next after the end")
			}
			return out
		}
		out = append(out, bytes.Clone(dst[:n]))
	}
}

var timestamps = []byte{1, 1, 8, 10, 0, 0, 1, 0, 0, 0, 2, 0}

// TestSplitAndJoin: whatever a super-segment looks like, its packets are right, each by itself, and fed through an
// Inbox they give the same bytes in order again.
func TestSplitAndJoin(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 400 {
		mtu := []int{1280, 1280, 1420, 8960, 1500 + r.IntN(5000)}[i%5]
		g := superSegment{
			src: netip.AddrPortFrom(a4, 1234), dst: netip.AddrPortFrom(b4, 80),
			seq: r.Uint32(), ack: r.Uint32(), id: uint16(r.Uint32()),
			flags:   tcpACK | tcpPSH&byte(r.Uint32()) | tcpFIN&byte(r.Uint32()) | tcpCWR&byte(r.Uint32()),
			payload: make([]byte, 1+r.IntN([]int{10, 1500, 61440}[i%3])),
		}
		if i%2 == 1 {
			g.src, g.dst = netip.AddrPortFrom(a6, 1234), netip.AddrPortFrom(b6, 80)
		}
		switch i % 4 {
		case 1, 2:
			g.opts = timestamps
		case 3:
			g.opts = append(bytes.Clone(timestamps), 1, 1, 5, 10, 1, 2, 3, 4, 5, 6, 7, 8)
		}
		for j := range g.payload {
			g.payload[j] = byte(r.Uint32())
		}
		if i%7 == 0 {
			for j := range g.payload {
				g.payload[j] = 0xff // carries
			}
		}
		for n := 0; n < len(g.payload) && i%3 != 0; {
			k := 1 + r.IntN(3000)
			g.pieces = append(g.pieces, k)
			n += k
		}
		ipLen := len(g.header(0)) - 20 - len(g.opts)
		hlen := ipLen + 20 + len(g.opts)
		mss := mtu - hlen
		if i%6 == 5 {
			mss = 536
		}

		pk := g.packetBuffer(mss)
		p := newPacket()
		p.set(pk, mtu)
		if want := g.header(len(g.payload)); !bytes.Equal(p.Header(), want) {
			t.Fatalf("%d: Header\n%x, want\n%x", i, p.Header(), want)
		}
		if p.Len() != hlen+len(g.payload) {
			t.Fatalf("%d: Len %d", i, p.Len())
		}
		pkts := splitAll(t, p, mtu)
		p.free()
		pk.DecRef()

		var joined []byte
		for j, b := range pkts {
			last := j == len(pkts)-1
			_, _, tcp := checkPacket(t, b)
			if len(b) > mtu || !last && len(b) != hlen+mss {
				t.Errorf("%d: packet %d of %d has %d bytes", i, j, len(pkts), len(b))
			}
			if seq := binary.BigEndian.Uint32(tcp[4:]); seq != g.seq+uint32(len(joined)) {
				t.Errorf("%d: packet %d: sequence number off", i, j)
			}
			flags := g.flags
			if !last {
				flags &^= tcpFIN | tcpPSH
			}
			if j > 0 {
				flags &^= tcpCWR
			}
			if tcp[13] != flags {
				t.Errorf("%d: packet %d of %d: flags %#x, want %#x", i, j, len(pkts), tcp[13], flags)
			}
			if ipLen == 20 && binary.BigEndian.Uint16(b[4:]) != g.id+uint16(j) {
				t.Errorf("%d: packet %d: IP ID", i, j)
			}
			if !bytes.Equal(tcp[20:20+len(g.opts)], g.opts) {
				t.Errorf("%d: packet %d: options", i, j)
			}
			joined = append(joined, tcp[20+len(g.opts):]...)
		}
		if !bytes.Equal(joined, g.payload) {
			t.Fatalf("%d: split payload differs", i)
		}

		c := newCollector(t)
		for _, b := range pkts {
			room := c.in.Room(len(b) + 16)
			for k := range room {
				room[k] = 0x5a // what decryption may leave behind a packet
			}
			c.in.Commit(room[:copy(room, b)])
		}
		c.in.Flush()
		if got := c.stream(g.seq); !bytes.Equal(got, g.payload) {
			t.Fatalf("%d: payload differs behind the Inbox: %d bytes, want %d", i, len(got), len(g.payload))
		}
		plain := g.flags&^(tcpACK|tcpPSH|tcpCWR) == 0
		if g.flags&tcpCWR == 0 && plain && len(c.pkts) != 1 {
			t.Errorf("%d: %d packets joined into %d", i, len(pkts), len(c.pkts))
		}
		if !t.Failed() {
			continue
		}
		t.FailNow()
	}
}

// collector stands in for the stack behind an Inbox.
type collector struct {
	t    testing.TB
	in   *Inbox
	pkts [][]byte
	raw  []*stack.PacketBuffer
}

func newCollector(t testing.TB) *collector {
	c := &collector{t: t}
	s := &Stack{link: &link{mtu: DefaultMTU}}
	s.link.Attach(c)
	c.in = s.NewInbox()
	return c
}

func (c *collector) DeliverNetworkPacket(proto tcpip.NetworkProtocolNumber, pk *stack.PacketBuffer) {
	c.raw = append(c.raw, pk.IncRef())
	b := pk.ToView().ToSlice()
	want := tcpip.NetworkProtocolNumber(header.IPv4ProtocolNumber)
	if b[0]>>4 == 6 {
		want = header.IPv6ProtocolNumber
	}
	if proto != want {
		c.t.Errorf("protocol %d for version %d", proto, b[0]>>4)
	}
	c.pkts = append(c.pkts, b)
}

func (c *collector) DeliverLinkPacket(tcpip.NetworkProtocolNumber, *stack.PacketBuffer) {}

// stream puts the TCP payloads together, from sequence number seq on, and checks what was delivered: that lengths fit,
// and that nothing written later changed the bytes of an earlier packet.
func (c *collector) stream(seq uint32) []byte {
	c.t.Helper()
	var out []byte
	for i, b := range c.pkts {
		v := c.raw[i].ToView()
		if !bytes.Equal(v.ToSlice(), b) {
			c.t.Errorf("packet %d changed after it was delivered", i)
		}
		v.Release()
		c.raw[i].DecRef()
		ipLen := 40
		if b[0]>>4 == 4 {
			ipLen = 20
			if refSum(b[:20]) != 0xffff {
				c.t.Errorf("packet %d: IPv4 header checksum", i)
			}
			if int(binary.BigEndian.Uint16(b[2:])) != len(b) {
				c.t.Errorf("packet %d: IPv4 length", i)
			}
		} else if int(binary.BigEndian.Uint16(b[4:])) != len(b)-40 {
			c.t.Errorf("packet %d: IPv6 length", i)
		}
		tcp := b[ipLen:]
		if got := binary.BigEndian.Uint32(tcp[4:]); got != seq+uint32(len(out)) {
			c.t.Errorf("packet %d: sequence number %d, want %d", i, got, seq+uint32(len(out)))
		}
		out = append(out, tcp[int(tcp[12]>>4)*4:]...)
	}
	return out
}

func TestNextTooSmall(t *testing.T) {
	g := superSegment{src: netip.AddrPortFrom(a4, 1), dst: netip.AddrPortFrom(b4, 2), flags: tcpACK, payload: make([]byte, 5000)}
	pk := g.packetBuffer(1240)
	defer pk.DecRef()
	p := newPacket()
	p.set(pk, DefaultMTU)
	if n := p.Next(make([]byte, 100)); n != 0 {
		t.Errorf("Next wrote %d bytes to 100", n)
	}
	p.free()
}
