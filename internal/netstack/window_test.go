package netstack

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// TestSmallWindows tables what becomes of an inbound acknowledgement, with a window of scale 4.
func TestSmallWindows(t *testing.T) {
	next := uint32(0xfffffff0) // what lies beyond wraps around
	for _, tt := range []struct {
		name  string
		units uint16
		seq   uint32
		flags byte
		again bool
	}{
		{"at the start of a closed window", 0, next, tcpACK, false},
		{"beyond a closed window", 0, next + 67, tcpACK, true},
		{"before the window", 0, next - 1, tcpACK, false},
		{"at the end of an open window", 3, next + 48, tcpACK, false},
		{"beyond an open window", 3, next + 49, tcpACK, true},
		{"beyond a large window", 2048, next + 32768 + 1, tcpACK, false},
		{"a FIN", 0, next + 67, tcpACK | tcpFIN, false},
		{"a reset", 0, next + 67, tcpACK | tcpRST, false},
	} {
		for _, v6 := range []bool{false, true} {
			var s smallWindows
			s.init(65535 << 4)
			if s.scale != 4 {
				t.Fatalf("scale %d", s.scale)
			}
			a, b := netip.AddrPortFrom(a4, 1000), netip.AddrPortFrom(b4, 7)
			if v6 {
				a, b = netip.AddrPortFrom(a6, 1000), netip.AddrPortFrom(b6, 7)
			}
			in := tcpPacket(b, a, tt.seq, 1, 0, tt.flags)
			want := func(state string, again bool) {
				t.Helper()
				if seq, yes := s.refused(in); yes != again || yes && seq != next {
					t.Errorf("%s, %s (IPv6 %v): refused %v, %d", tt.name, state, v6, yes, seq)
				}
			}
			want("unknown", false)
			s.sent(tcpPacket(b, a, 1, next, tt.units, tcpACK)) // another flow
			s.sent(tcpPacket(a, b, 1, next, tt.units, tcpACK|tcpSYN))
			want("another flow", false)
			s.sent(tcpPacket(a, b, 1, next, tt.units, tcpACK))
			want("small", tt.again)
			for n := range in { // cut short
				s.sent(in[:n])
				s.refused(in[:n])
			}
			want("after garbage", tt.again)
			s.sent(tcpPacket(a, b, 1, next, 4096, tcpACK))
			want("open again", false)
			s.sent(tcpPacket(a, b, 1, next, tt.units, tcpACK))
			s.sent(tcpPacket(a, b, 1, next, tt.units, tcpACK|tcpRST))
			want("reset", false)
			s.sent(tcpPacket(a, b, 1, next, tt.units, tcpACK))
			s.forget(flow{a, b})
			want("closed", false)
			s.forget(flow{b, a})
			if s.n.Load() != 0 || len(s.flows) != 0 {
				t.Errorf("%s: %d flows are still watched", tt.name, len(s.flows))
			}
		}
	}
}

func TestSmallWindowsBound(t *testing.T) {
	var s smallWindows
	s.init(1 << 20)
	for i := range 3 * maxWatched {
		s.sent(tcpPacket(netip.AddrPortFrom(a4, uint16(i)), netip.AddrPortFrom(b4, 7), 1, 1, 0, tcpACK))
	}
	if len(s.flows) != maxWatched {
		t.Errorf("%d connections watched, want %d", len(s.flows), maxWatched)
	}
	if _, yes := s.refused(tcpPacket(netip.AddrPortFrom(b4, 7), netip.AddrPortFrom(a4, 3*maxWatched-1), 9, 1, 0, tcpACK)); !yes {
		t.Error("the latest is not among them")
	}
}

// tcpPacket returns the headers of a TCP segment.
func tcpPacket(src, dst netip.AddrPort, seq, ack uint32, window uint16, flags byte) []byte {
	var b []byte
	if src.Addr().Is4() {
		b = make([]byte, 20, 40)
		b[0], b[9] = 0x45, protoTCP
		copy(b[12:], src.Addr().AsSlice())
		copy(b[16:], dst.Addr().AsSlice())
	} else {
		b = make([]byte, 40, 60)
		b[0], b[6] = 0x60, protoTCP
		copy(b[8:], src.Addr().AsSlice())
		copy(b[24:], dst.Addr().AsSlice())
	}
	be := binary.BigEndian
	b = be.AppendUint16(b, src.Port())
	b = be.AppendUint16(b, dst.Port())
	b = be.AppendUint32(b, seq)
	b = be.AppendUint32(b, ack)
	b = append(b, 5<<4, flags)
	b = be.AppendUint16(b, window)
	return append(b, 0, 0, 0, 0)
}

// segments is an Output for a test that plays the TCP peer itself.
type segments chan []byte

func (s segments) WritePacket(p *Packet) {
	for {
		b := make([]byte, DefaultMTU)
		n := p.Next(b)
		if n == 0 {
			return
		}
		s <- b[:n]
	}
}

// A handPeer is a TCP peer that a test plays itself, packet by packet.
type handPeer struct {
	t    *testing.T
	s    *Stack
	out  segments
	in   *Inbox
	hung <-chan time.Time

	conn        *conn  // the stack's end
	seq, expect uint32 // of the peer
	acked, edge uint32 // the stack's latest acknowledgement, and where its window ends
}

const peerMSS = 1200

func newHandPeer(t *testing.T) *handPeer {
	p := &handPeer{t: t, out: make(segments, 4096), seq: 7000, hung: time.After(5 * time.Minute)}
	var err error
	if p.s, err = New(Config{Output: p.out}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.s.Close)
	p.s.SetAddresses([]netip.Addr{b4})
	p.in = p.s.NewInbox()
	ln, err := p.s.ListenTCP(netip.AddrPortFrom(b4, 7))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p.send(tcpSYN, 0, 2, 4, peerMSS>>8, peerMSS&255, 3, 3, 8, 1)
	p.seq++
	p.next()
	p.send(tcpACK, 0)
	p.in.Flush()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	p.conn = c.(*conn)
	return p
}

func (p *handPeer) send(flags byte, payload int, options ...byte) {
	b := tcpPacket(netip.AddrPortFrom(a4, 1000), netip.AddrPortFrom(b4, 7), p.seq, p.expect, 0xffff, flags)
	b[32] = byte(5+len(options)/4) << 4
	b = append(append(b, options...), make([]byte, payload)...)
	b[8] = 64
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b[:20], 0))
	p.in.Commit(b)
}

// next delivers what was sent and waits for the stack's next segment.
func (p *handPeer) next() {
	p.in.Flush()
	select {
	case b := <-p.out:
		h := b[20:]
		at := binary.BigEndian.Uint32(h[4:])
		p.acked = binary.BigEndian.Uint32(h[8:])
		p.edge = p.acked + uint32(binary.BigEndian.Uint16(h[14:]))<<p.s.link.windows.scale
		if h[13]&tcpSYN != 0 {
			p.edge = p.acked + uint32(binary.BigEndian.Uint16(h[14:])) // RFC 7323 §2.2: not scaled
			p.expect = at + 1
		} else if at == p.expect {
			p.expect += uint32(len(b) - 20 - int(h[12]>>4)*4)
		}
	case <-p.hung:
		p.t.Helper()
		p.t.Fatal("the stack does not say what it should")
	}
}

// fill sends until the stack's window is closed. The stack may round its window down when leftover bytes are still
// allowed; then those are not sent. What the stack sends meanwhile is not acknowledged.
func (p *handPeer) fill(leftover uint32) {
	first := p.expect
	for closed := false; !closed; {
		for p.edge-p.seq > leftover {
			n := min(p.edge-p.seq-leftover, peerMSS)
			expect := p.expect
			p.expect = first
			p.send(tcpACK|tcpPSH, int(n))
			p.expect = expect
			p.seq += n
		}
		for closed = false; p.acked != p.seq; closed = p.edge == p.seq {
			p.next()
		}
	}
}

// TestSmallWindow drives a connection into the state that smallWindows is for: the application only writes, the peer
// has filled its window to the last byte, and the stack's latest window ends 67 bytes before that.
func TestSmallWindow(t *testing.T) {
	const total = 1 << 20 // what the application writes: more than the send buffer holds
	p := newHandPeer(t)
	defer p.conn.Close()
	wrote := make(chan error, 1)
	go func() { wrote <- pour(p.conn, total) }()
	first := p.expect
	p.next()
	p.fill(67)
	p.seq += 67
	// From here on the peer only acknowledges, as one that has no window does.
	for p.expect != first+total {
		p.send(tcpACK, 0)
		p.next()
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
}

// TestGrowthOpensWindow reads a part of what has closed the window, and lets the buffer grow. The stack announces the
// room at once, and does not wait until the peer asks.
func TestGrowthOpensWindow(t *testing.T) {
	p := newHandPeer(t)
	defer p.conn.Close()
	p.send(tcpACK, 20*peerMSS) // also for the stack to tell its window, scaled
	p.seq += 20 * peerMSS
	p.next()
	p.fill(0)
	// More than a segment of the wire, less than one of those that the stack gets.
	if n, err := p.conn.Read(make([]byte, 4*peerMSS)); n != 4*peerMSS || err != nil {
		t.Fatal(n, err)
	}
	p.conn.rgrow.settle(2 * initialBuffer)
	for p.edge-p.acked < initialBuffer/2 {
		p.next()
	}
}
