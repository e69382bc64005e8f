package netstack

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync"
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

// gate is an Output that lets nothing leave until it is opened, and counts.
type gate struct {
	open chan struct{}
	mu   sync.Mutex
	left map[byte]int // packets by TCP flags
	any  chan struct{}
}

func (g *gate) WritePacket(p *Packet) {
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

// TestStraysBound has a peer send to a listener while no answer gets away: what waits is bounded, and once answers leave all of it is answered and the next is
// taken.
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
			g := &gate{open: make(chan struct{}), left: map[byte]int{}, any: make(chan struct{}, 1)}
			s, err := New(Config{Output: g, Backlog: 4 * maxStrays})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			s.SetAddresses([]netip.Addr{b4})
			ln, err := s.ListenTCP(netip.AddrPortFrom(b4, 80))
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			in := s.NewInbox()
			send := func(from uint16) {
				b := rawTCP(from, 1, 5, tt.flags, tt.payload)
				if tt.flags == tcpSYN {
					in.Commit(b)
				} else {
					in.CommitStray(b)
				}
				in.Flush()
			}
			s.link.strays.answered.Store(int64(time.Since(epoch) + time.Hour)) // as if one had just left, however slow this machine is
			for i := range uint16(3 * maxStrays) {
				send(1000 + i)
			}
			if n := s.link.strays.waiting.Load(); n != maxStrays {
				t.Errorf("%d wait, want %d", n, maxStrays)
			}
			close(g.open)
			for g.count(tt.answer) < maxStrays {
				<-g.any
			}
			for s.link.strays.waiting.Load() != 0 { // the last is counted right after it has left
				runtime.Gosched()
			}
			send(999)
			for g.count(tt.answer) < maxStrays+1 {
				<-g.any
			}
		})
	}
}

// TestStraysWithoutAnswer: what nothing is answered to does not shut new ones out for long.
func TestStraysWithoutAnswer(t *testing.T) {
	var s strays
	at := time.Since(epoch)
	s.answered.Store(int64(at + time.Hour))
	n := 0
	for s.enter() {
		n++
	}
	if n != maxStrays {
		t.Errorf("%d of %d", n, maxStrays)
	}
	s.answered.Store(int64(at - strayQuiet))
	for range maxStrays {
		if !s.enter() {
			t.Fatal("still shut")
		}
	}
}

func TestLongStray(t *testing.T) {
	g := &gate{open: make(chan struct{}), left: map[byte]int{}, any: make(chan struct{}, 1)}
	close(g.open)
	s, err := New(Config{Output: g})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.SetAddresses([]netip.Addr{b4})
	in := s.NewInbox()
	for _, payload := range []int{maxStray, maxStray - 40} {
		in.CommitStray(rawTCP(1000, 1, 5, tcpACK, payload))
		in.Flush()
	}
	if n := g.count(tcpRST); n != 1 { // nobody listens: answered at once
		t.Errorf("%d resets, want one, for the shorter", n)
	}
}
