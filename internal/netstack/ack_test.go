package netstack

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// ackScript is a test of an ackTable that reads as a conversation. Its connection is from local to remote; windows are in units of 16 bytes.
type ackScript struct {
	t             *testing.T
	a             *ackTable
	local, remote netip.AddrPort

	mu   sync.Mutex
	sent [][]byte // what the table has let go of
}

func newAckScript(t *testing.T, v6 bool) *ackScript {
	s := &ackScript{t: t, a: new(ackTable), local: netip.AddrPortFrom(a4, 1000), remote: netip.AddrPortFrom(b4, 7)}
	if v6 {
		s.local, s.remote = netip.AddrPortFrom(a6, 1000), netip.AddrPortFrom(b6, 7)
	}
	s.a.scale = 4
	s.a.out = func(pkt []byte) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sent = append(s.sent, bytes.Clone(pkt))
	}
	t.Cleanup(s.a.close)
	return s
}

// in is a segment of n bytes that comes and is acknowledged with ack.
func (s *ackScript) in(n int, ack uint32, flags byte) {
	s.a.expect(tcpPacket(s.remote, s.local, ack-uint32(n), 1, 4096, flags), n, ack)
}

// out is a segment with data bytes of payload that leaves.
func (s *ackScript) out(ack uint32, flags byte, window uint16, data int, kept bool) {
	s.t.Helper()
	b := tcpPacket(s.local, s.remote, 1, ack, window, flags)
	if got := s.a.keep(b, len(b)+data, &Packet{raw: b}); got != kept {
		s.t.Errorf("packet that acknowledges %d kept back: %v, want %v", ack, got, kept)
	}
}

func (s *ackScript) acks(ack uint32)  { s.t.Helper(); s.out(ack, tcpACK, 4096, 0, true) }
func (s *ackScript) goes(ack uint32)  { s.t.Helper(); s.out(ack, tcpACK, 4096, 0, false) }
func (s *ackScript) reply(ack uint32) { s.t.Helper(); s.out(ack, tcpACK|tcpPSH, 4096, 100, false) }

// wants says which acknowledgements the table has let go of by now.
func (s *ackScript) wants(acks ...uint32) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var got []uint32
	for _, b := range s.sent {
		got = append(got, binary.BigEndian.Uint32(tcpHeader(b)[8:]))
	}
	if len(got) != len(acks) {
		s.t.Fatalf("sent acknowledgements of %v, want %v", got, acks)
	}
	for i := range got {
		if got[i] != acks[i] {
			s.t.Fatalf("sent acknowledgements of %v, want %v", got, acks)
		}
	}
}

func (s *ackScript) waits() { k := keyFor(flow{s.local, s.remote}); s.a.release(&k) }

// later lets the longest delay pass.
func (s *ackScript) later() { time.Sleep(ackDelay); synctest.Wait() }

func TestAcknowledgements(t *testing.T) {
	const full = 1228
	for _, tt := range []struct {
		name string
		run  func(s *ackScript)
	}{
		{"goes with the answer", func(s *ackScript) { s.in(32, 33, tcpACK); s.acks(33); s.reply(33); s.later(); s.wants() }},
		{"the answer comes before it", func(s *ackScript) { s.in(32, 33, tcpACK); s.reply(33); s.goes(33); s.later(); s.wants() }},
		{"the reader waits for more", func(s *ackScript) {
			s.in(32, 33, tcpACK)
			s.acks(33)
			s.waits()
			s.wants(33)
			s.later()
			s.wants(33)
		}},
		{"the reader is quicker than the stack", func(s *ackScript) { s.in(32, 33, tcpACK); s.waits(); s.goes(33); s.later(); s.wants() }},
		{"nobody reads", func(s *ackScript) { s.in(32, 33, tcpACK); s.acks(33); s.wants(); s.later(); s.wants(33) }},
		{"small segments together", func(s *ackScript) {
			for i := range uint32(10) {
				s.in(32, 33+32*i, tcpACK)
				s.acks(33 + 32*i)
			}
			s.wants()
			s.later()
			s.wants(33 + 32*9)
		}},
		{"every second full segment", func(s *ackScript) {
			for i := uint32(1); i < 20; i += 2 {
				s.in(full, full*i, tcpACK)
				s.acks(full * i)
				s.in(full, full*(i+1), tcpACK)
				s.goes(full * (i + 1))
			}
			s.wants()
		}},
		{"two segments and one acknowledgement", func(s *ackScript) {
			s.in(32, 33, tcpACK)
			s.in(32, 65, tcpACK)
			s.acks(65)
			s.reply(65)
			s.later()
			s.wants()
		}},
		{"two full segments and one acknowledgement", func(s *ackScript) { s.in(full, full, tcpACK); s.in(full, 2*full, tcpACK); s.goes(2 * full) }},
		{"a large segment", func(s *ackScript) { s.in(8000, 8001, tcpACK); s.goes(8001) }},
		{"a duplicate", func(s *ackScript) { s.in(32, 133, tcpACK); s.goes(33); s.later(); s.wants() }},
		{"a duplicate after one that is kept", func(s *ackScript) {
			s.in(32, 33, tcpACK)
			s.acks(33)
			s.in(32, 165, tcpACK)
			s.goes(32)
			s.later()
			s.wants()
		}},
		{"a window update", func(s *ackScript) { s.in(32, 33, tcpACK); s.acks(33); s.waits(); s.wants(33); s.goes(33) }},
		{"a small window", func(s *ackScript) { s.in(32, 33, tcpACK); s.out(33, tcpACK, ackRoom>>4-1, 0, false) }},
		{"a reset", func(s *ackScript) { s.in(32, 33, tcpACK); s.out(33, tcpACK|tcpRST, 4096, 0, false) }},
		{"a reset after one that is kept", func(s *ackScript) {
			s.in(32, 33, tcpACK)
			s.acks(33)
			s.out(33, tcpACK|tcpRST, 4096, 0, false)
			s.wants(33)
		}},
		{"nothing expected", func(s *ackScript) { s.goes(33) }},
		{"numbers that wrap around", func(s *ackScript) {
			s.in(32, 8, tcpACK)
			s.acks(8)
			s.in(32, 40, tcpACK)
			s.acks(40)
			s.waits()
			s.wants(40)
		}},
		{"the peer's FIN", func(s *ackScript) {
			s.in(1, 2, tcpFIN|tcpACK)
			s.acks(2)
			s.out(2, tcpFIN|tcpACK, 4096, 0, false)
			s.later()
			s.wants()
		}},
		{"the last", func(s *ackScript) {
			s.out(1, tcpFIN|tcpACK, 4096, 0, false)
			s.in(1, 2, tcpFIN|tcpACK)
			s.acks(2)
			s.wants()
			s.later()
			s.wants(2)
		}},
		{"the last goes ahead of the next connection", func(s *ackScript) {
			s.out(1, tcpFIN|tcpACK, 4096, 0, false)
			s.in(1, 2, tcpFIN|tcpACK)
			s.acks(2)
			var b ackPacket
			elsewhere := netip.AddrPortFrom(netip.MustParseAddr("100.64.0.9"), 7)
			if n := s.a.ahead(tcpPacket(netip.AddrPortFrom(a4, 1), elsewhere, 1, 0, 4096, tcpSYN), &b); n != 0 {
				s.t.Error("it goes with a packet to another peer")
			}
			syn := tcpPacket(netip.AddrPortFrom(s.local.Addr(), 1001), netip.AddrPortFrom(s.remote.Addr(), 80), 1, 0, 4096, tcpSYN)
			n := s.a.ahead(syn, &b)
			if n == 0 || !bytes.Equal(b[:n], tcpPacket(s.local, s.remote, 1, 2, 4096, tcpACK)) {
				s.t.Errorf("ahead of the SYN goes %x", b[:n])
			}
			if s.a.ahead(syn, &b) != 0 {
				s.t.Error("it goes twice")
			}
			s.later()
			s.wants()
		}},
		{"data after our own FIN", func(s *ackScript) {
			s.out(1, tcpFIN|tcpACK, 4096, 0, false)
			s.in(32, 33, tcpACK)
			s.goes(33) // the peer still sends, and its window must move
		}},
		{"many last ones", func(s *ackScript) {
			for i := range len(s.a.last) + 1 {
				s.local = netip.AddrPortFrom(s.local.Addr(), uint16(1000+i))
				s.out(1, tcpFIN|tcpACK, 4096, 0, false)
				s.in(1, 2, tcpFIN|tcpACK)
				s.out(2, tcpACK, 4096, 0, i < len(s.a.last))
			}
			s.later()
			want := make([]uint32, len(s.a.last))
			for i := range want {
				want[i] = 2
			}
			s.wants(want...)
		}},
		{"two connections in one place", func(s *ackScript) {
			s.in(32, 33, tcpACK)
			s.acks(33)
			k := keyFor(flow{s.local, s.remote})
			place := s.a.slot(&k)
			for port := uint16(1001); ; port++ {
				s.local = netip.AddrPortFrom(s.local.Addr(), port)
				if k := keyFor(flow{s.local, s.remote}); s.a.slot(&k) == place {
					break
				}
			}
			s.goes(33)
			s.wants() // a packet of the other leaves it alone
			s.in(32, 77, tcpACK)
			s.wants(33)
			s.acks(77)
			s.later()
			s.wants(33, 77)
		}},
		{"cut short", func(s *ackScript) {
			b := tcpPacket(s.local, s.remote, 1, 33, 4096, tcpACK)
			for n := range b {
				s.in(32, 33, tcpACK)
				s.a.keep(b[:n], n, &Packet{raw: b[:n]})
				s.a.expect(b[:n], 1, 1)
				var dst ackPacket
				s.a.ahead(b[:n], &dst)
			}
			b[len(b)-8] = 15 << 4 // longer than it is
			s.in(32, 33, tcpACK)
			if s.a.keep(b, len(b), &Packet{raw: b}) {
				s.t.Error("a header that is cut short was kept")
			}
		}},
		{"closed", func(s *ackScript) {
			s.in(32, 33, tcpACK)
			s.acks(33)
			s.a.close()
			s.later()
			s.waits()
			s.wants()
		}},
	} {
		for _, v6 := range []bool{false, true} {
			name := tt.name
			if v6 {
				name += ", IPv6"
			}
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { tt.run(newAckScript(t, v6)) })
			})
		}
	}
}

// TestAckCloseWhileSegmentsCome: the receive loops go on while a stack is closed.
func TestAckCloseWhileSegmentsCome(t *testing.T) {
	for range 2000 {
		s := newAckScript(t, false)
		var wg sync.WaitGroup
		for port := range uint16(3) {
			seg := tcpPacket(s.remote, netip.AddrPortFrom(a4, port), 1, 1, 4096, tcpACK)
			wg.Go(func() { s.a.expect(seg, 32, 33) })
		}
		s.a.close()
		wg.Wait()
	}
}

// TestAckTimerRests has no timer run when there is nothing to wait for.
func TestAckTimerRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newAckScript(t, false)
		for range 3 {
			s.in(32, 33, tcpACK)
			s.acks(33)
			s.reply(33)
			s.later()
			s.later()
			if s.a.armed.Load() {
				t.Fatal("the timer runs without need")
			}
		}
	})
}

// checksummed fails the test when a packet that a stack has sent does not have the checksums that a peer with another stack looks at.
func (p *pair) checksummed(t *testing.T) {
	for _, w := range []*wire{p.ab, p.ba} {
		w.mu.Lock()
		w.drop = func(b []byte) bool {
			seg := tcpHeader(b)
			if seg == nil {
				return false
			}
			addrs := b[8:40]
			if b[0]>>4 == 4 {
				addrs = b[12:20]
			}
			sum := checksum.Combine(checksum.Checksum(addrs, protoTCP), uint16(len(seg)))
			if checksum.Checksum(seg, sum) != 0xffff {
				t.Errorf("wrong checksum: %x", b)
			}
			return false
		}
		w.mu.Unlock()
	}
}

// TestAcknowledgementsLeaveWhole has acknowledgements leave in each of the ways in which one that was kept back may: by a reader that waits
// for more, by the sweep, and ahead of the next connection.
func TestAcknowledgementsLeaveWhole(t *testing.T) {
	for _, to := range []netip.Addr{b4, b6} {
		t.Run(to.String(), func(t *testing.T) {
			p := newPair(t, nil)
			p.checksummed(t)
			var swept, asked, ahead atomic.Int32
			p.ba.mu.Lock()
			p.ba.taps = func(q *Packet) {
				if q.raw != nil {
					asked.Add(1) // or swept
				}
			}
			p.ba.mu.Unlock()
			p.ab.mu.Lock()
			p.ab.taps = func(q *Packet) {
				if q.nAhead > 0 {
					ahead.Add(1)
				}
			}
			p.ab.mu.Unlock()
			ln, err := p.b.ListenTCP(netip.AddrPortFrom(to, 7))
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			conns := make(chan net.Conn)
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						close(conns)
						return
					}
					conns <- c
				}
			}()
			deadline := time.Now().Add(5 * time.Minute) // each takes a few tries, more on a busy machine
			until := func(what string, n *atomic.Int32, try func(x, y net.Conn)) {
				t.Helper()
				for n.Load() == 0 {
					x, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(to, 7))
					if err != nil {
						t.Fatal(err)
					}
					y := <-conns
					x.SetDeadline(deadline)
					y.SetDeadline(deadline)
					try(x, y)
					x.Close()
					if _, err := io.Copy(io.Discard, y); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					y.Close()
					if time.Now().After(deadline) {
						t.Fatalf("no acknowledgement left %s", what)
					}
				}
			}
			until("ahead", &ahead, func(x, y net.Conn) {})
			until("for a reader", &asked, func(x, y net.Conn) {
				done := make(chan struct{})
				go func() {
					defer close(done)
					io.ReadFull(y, make([]byte, 50))
				}()
				for range 50 {
					x.Write([]byte{1})
					x.(*conn).flush()
				}
				<-done
			})
			asked.Store(0)
			until("by the sweep", &swept, func(x, y net.Conn) {
				x.Write([]byte{1})
				x.(*conn).flush()
				// Nobody reads. On a busy machine the stack may have acknowledged before it could be told to wait: then the next connection tells.
				for end := time.Now().Add(time.Second); asked.Load() == 0 && time.Now().Before(end); {
					time.Sleep(time.Millisecond)
				}
				swept.Store(asked.Load())
			})
		})
	}
}

// TestAnswersCarryAcknowledgements counts the packets of requests and their answers between two stacks.
func TestAnswersCarryAcknowledgements(t *testing.T) {
	p := newPair(t, nil)
	p.checksummed(t)
	var data, bare atomic.Int32
	tap := func(q *Packet) {
		if h := q.Header(); q.Len() > 0 {
			if n := tcpHeader(h); n != nil && n[13]&(tcpSYN|tcpFIN|tcpRST) == 0 {
				if q.Len() == len(h)-len(n)+int(n[12]>>4)*4 {
					bare.Add(1)
				} else {
					data.Add(1)
				}
			}
		}
	}
	for _, w := range []*wire{p.ab, p.ba} {
		w.mu.Lock()
		w.taps = tap
		w.mu.Unlock()
	}
	ln, err := p.b.ListenTCP(netip.AddrPortFrom(b4, 7))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 64)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			c.Write(b[:n])
		}
	}()
	c, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(b4, 7))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	// A sweep in the middle of a trip, or a reader that runs ahead of the stack, costs a bare acknowledgement: now and then, or on a busy
	// machine for a while. Without the delay each trip has two.
	const trips = 50
	msg := make([]byte, 32)
	for run := range 200 {
		data.Store(0)
		bare.Store(0)
		for range trips {
			if _, err := c.Write(msg); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, msg); err != nil {
				t.Fatal(err)
			}
		}
		if bare.Load() <= trips && data.Load() >= 2*trips {
			t.Logf("%d packets with data, %d bare acknowledgements for %d requests, at try %d", data.Load(), bare.Load(), trips, run+1)
			return
		}
	}
	t.Errorf("%d packets with data and %d bare acknowledgements for %d requests, want few", data.Load(), bare.Load(), trips)
}
