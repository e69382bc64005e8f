package netstack

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// rawTCP returns a TCP packet from a4 to b4 port 80. Its TCP checksum is left out, for the tunnel has authenticated it.
func rawTCP(from uint16, seq, ack uint32, flags byte, payload int) []byte {
	b := make([]byte, 40+payload)
	b[0], b[8], b[9] = 0x45, 64, protoTCP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	src, dst := a4.As4(), b4.As4()
	copy(b[12:], src[:])
	copy(b[16:], dst[:])
	binary.BigEndian.PutUint16(b[10:], ^refSum(b[:20]))
	t := b[20:]
	binary.BigEndian.PutUint16(t, from)
	binary.BigEndian.PutUint16(t[2:], 80)
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[12], t[13] = 5<<4, flags
	binary.BigEndian.PutUint16(t[14:], 65535)
	return b
}

// strayFrom commits a packet of rawTCP as the data path does.
func strayFrom(s *Stack, in *Inbox, b []byte) {
	from := netip.AddrPortFrom(a4, binary.BigEndian.Uint16(b[20:]))
	in.CommitStray(b, s.Taker(netip.AddrPortFrom(b4, 80), from))
	in.Flush()
}

// gate is an Output that lets nothing leave until it is opened, and counts.
type gate struct {
	open chan struct{}
	held atomic.Int32 // packets that wait for that
	mu   sync.Mutex
	left map[byte]int // packets by TCP flags
	any  chan struct{}
}

func (g *gate) WritePacket(p *Packet) {
	g.held.Add(1)
	<-g.open
	g.mu.Lock()
	g.left[tcpHeader(p.Header())[13]]++
	g.mu.Unlock()
	select {
	case g.any <- struct{}{}:
	default:
	}
}

func (g *gate) count(flags byte) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.left[flags]
}

// newGated returns a stack with a listener, whose packets do not leave until the gate is opened.
func newGated(t *testing.T) (*Stack, *Inbox, *gate) {
	t.Helper()
	g := &gate{open: make(chan struct{}), left: map[byte]int{}, any: make(chan struct{}, 1)}
	s, err := New(Config{Output: g, Backlog: 4 * maxStrays})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.SetAddresses([]netip.Addr{b4})
	listen(t, s, "[::]:80")
	return s, s.NewInbox(), g
}

// hold sends a SYN, and waits until its answer holds a worker up.
func (g *gate) hold(s *Stack, in *Inbox) {
	strayFrom(s, in, rawTCP(1, 1, 0, tcpSYN, 0))
	for g.held.Load() == 0 {
		runtime.Gosched()
	}
}

// await opens the gate, and waits for n packets.
func (g *gate) await(flags byte, n int) {
	select {
	case <-g.open:
	default:
		close(g.open)
	}
	for g.count(flags) < n {
		<-g.any
	}
}

// age lets a part of a pause, if it has begun, be over.
func (s *strays) age(p *pause) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.since.IsZero() {
		p.since = p.since.Add(-pausePart)
	}
}

// TestStraysBound has a peer send to a listener while no answer gets away, for as long as it may be: what waits is bounded, and once answers
// leave all of it is answered and the next is taken.
func TestStraysBound(t *testing.T) {
	for _, tt := range []struct {
		name          string
		flags, answer byte
		payload       int
	}{
		{"SYN", tcpSYN, tcpSYN | tcpACK, 0},
		{"acknowledgement of nothing", tcpACK, tcpRST, 0},
		{"data of no connection", tcpACK, tcpRST, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, in, g := newGated(t)
			g.hold(s, in)
			st := &s.link.strays
			for i := range uint16(3 * maxStrays) {
				strayFrom(s, in, rawTCP(1000+i, 1, 5, tt.flags, tt.payload))
				st.age(&st.quiet)
			}
			if n := st.waiting.Load(); n != maxStrays {
				t.Errorf("%d wait, want %d", n, maxStrays)
			}
			want := maxStrays // with the answer to the SYN of hold
			if tt.answer == tcpRST {
				want--
			}
			g.await(tt.answer, want)
			for st.waiting.Load() != 0 { // the last is counted right after it has left
				runtime.Gosched()
			}
			strayFrom(s, in, rawTCP(999, 1, 5, tt.flags, tt.payload))
			g.await(tt.answer, want+1)
		})
	}
}

// TestHandshakeBound: the same for what comes to a connection that is half open, of which most has no answer.
func TestHandshakeBound(t *testing.T) {
	s, in, g := newGated(t)
	g.hold(s, in)
	st := &s.link.strays
	if to := s.Taker(netip.AddrPortFrom(b4, 80), netip.AddrPortFrom(a4, 1)); to != Handshake {
		t.Fatalf("what comes to it is for %v", to)
	}
	before := s.gv.Stats().TCP.ValidSegmentsReceived.Value()
	for range 3 * maxStrays {
		strayFrom(s, in, rawTCP(1, 2, 12345, tcpACK, 0))
		st.mu.Lock()
		st.first = time.Now() // handshakeLong does not pass, however slow this machine is
		st.mu.Unlock()
		st.age(&st.worked)
	}
	if n := s.gv.Stats().TCP.ValidSegmentsReceived.Value() - before; n != maxStrays {
		t.Errorf("%d came in, want %d", n, maxStrays)
	}
	g.await(tcpRST, maxStrays)
	for n := uint64(maxStrays); n == maxStrays; n = s.gv.Stats().TCP.ValidSegmentsReceived.Value() - before {
		strayFrom(s, in, rawTCP(1, 2, 12345, tcpACK, 0))
		st.age(&st.worked)
	}
	g.await(tcpRST, maxStrays+1)
	st.handshake.Store(maxStrays)
	st.mu.Lock()
	st.worked, st.first = pause{}, st.first.Add(-handshakeLong)
	st.mu.Unlock()
	if !st.enterHandshake() {
		t.Error("shut for long")
	}
}

// TestStraysWithoutAnswer: what nothing is answered to does not shut new ones out for long.
func TestStraysWithoutAnswer(t *testing.T) {
	var s strays
	s.answered.Store(int64(time.Since(epoch) + time.Hour)) // as if one had just left, however slow this machine is
	s.waiting.Store(maxStrays)
	for range strayQuiet {
		if s.enter() {
			t.Fatal("more than the bound")
		}
		s.age(&s.quiet)
	}
	for range maxStrays {
		if !s.enter() {
			t.Fatal("still shut")
		}
	}
	// Some time after the last, at once.
	s.waiting.Store(maxStrays)
	s.quiet, s.asked = pause{}, s.asked-strayQuiet*pausePart
	s.answered.Store(int64(time.Since(epoch) - strayQuiet*pausePart))
	if !s.enter() {
		t.Error("shut after a while without any")
	}
}

// TestPauseHeldUp: a packet that is held up, whenever that began, is no pause, and the next begins when it has left.
func TestPauseHeldUp(t *testing.T) {
	for part := range 4 {
		var s strays
		s.answered.Store(int64(time.Since(epoch) + time.Hour))
		s.waiting.Store(maxStrays)
		var era uint32
		for i := range 12 {
			if i == part {
				era = s.leaving()
			}
			if over := s.enter(); over != (i == strayQuiet && part >= i) {
				t.Fatalf("held up from %d: %v at %d", part, over, i)
			} else if over {
				s.waiting.Store(maxStrays)
			}
			s.age(&s.quiet)
		}
		s.left(era, nil)
		for i := range strayQuiet + 1 {
			if over := s.enter(); over != (i == strayQuiet) {
				t.Errorf("held up from %d: after it %v at %d", part, over, i)
			}
			s.age(&s.quiet)
		}
	}
}

// TestNeverAnswered: what has no answer, or might have none, is neither counted nor let in.
func TestNeverAnswered(t *testing.T) {
	s, in, g := newGated(t)
	edit := func(b []byte, f func(b []byte)) []byte {
		f(b)
		binary.BigEndian.PutUint16(b[10:], 0)
		binary.BigEndian.PutUint16(b[10:], ^refSum(b[:int(b[0]&15)*4]))
		return b
	}
	syn := rawTCP(2, 1, 0, tcpSYN, 0)
	options := append(append(append([]byte{}, syn[:20]...), 1, 1, 1, 1), syn[20:]...)
	extended := append(ipHeader(a6, b6, 60, 8+20), protoTCP, 0, 1, 4, 0, 0, 0, 0)
	extended = append(extended, syn[20:]...)
	damaged := rawTCP(2, 1, 0, tcpSYN, 0)
	damaged[10]++
	for name, b := range map[string][]byte{
		"RST":                   rawTCP(2, 1, 5, tcpRST|tcpACK, 0),
		"FIN alone":             rawTCP(2, 1, 0, tcpFIN, 0),
		"SYN and FIN":           rawTCP(2, 1, 0, tcpSYN|tcpFIN, 0),
		"SYN and RST":           rawTCP(2, 1, 0, tcpSYN|tcpRST, 0),
		"fragment":              edit(rawTCP(2, 1, 0, tcpSYN, 0), func(b []byte) { b[6] = 0x20 }),
		"IPv4 options":          edit(options, func(b []byte) { b[0], b[3] = 0x46, 44 }),
		"IPv6 extension header": extended,
		"checksum":              damaged,
	} {
		before := s.gv.Stats().IP.PacketsReceived.Value()
		for _, to := range []Taker{Listener, Nobody, Foreign} {
			in.CommitStray(b, to)
		}
		in.Flush()
		if n := s.gv.Stats().IP.PacketsReceived.Value() - before; n != 0 || s.link.strays.waiting.Load() != 0 {
			t.Errorf("%s: came in", name)
		}
	}
	// Of a connection, they count for nothing.
	in.CommitStray(rawTCP(2, 1, 0, tcpSYN, 0), Connection)
	if n := s.link.strays.waiting.Load(); n != 0 {
		t.Errorf("a SYN of a connection: %d wait", n)
	}
	g.await(tcpSYN|tcpACK, 1)
}

// TestStraysToNobody: a port without a listener answers at once, so nothing of it stays counted.
func TestStraysToNobody(t *testing.T) {
	s, in, g := newGated(t)
	close(g.open)
	for i := range uint16(10) {
		b := rawTCP(3, 1+1000*uint32(i), 5, tcpACK, 1000) // which an Inbox would join
		b[23] = 81
		in.CommitStray(b, Nobody)
	}
	if n := s.link.strays.waiting.Load(); n != 0 || g.count(tcpRST) != 10 {
		t.Errorf("%d wait, %d resets", n, g.count(tcpRST))
	}
}

func TestLongStray(t *testing.T) {
	s, in, g := newGated(t)
	for _, payload := range []int{maxStray, maxStray - 40} {
		strayFrom(s, in, rawTCP(1000, 1, 5, tcpACK, payload))
	}
	strayFrom(s, in, rawTCP(1001, 1, 5, tcpACK, 0))
	g.await(tcpRST, 2)
	if n := g.count(tcpRST); n != 2 {
		t.Errorf("%d resets, want one for the shorter, and one for the last", n)
	}
}
