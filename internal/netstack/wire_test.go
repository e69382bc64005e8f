package netstack

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	a4 = netip.MustParseAddr("100.64.0.1")
	a6 = netip.MustParseAddr("fd7a:115c:a1e0::1")
	b4 = netip.MustParseAddr("100.64.0.2")
	b6 = netip.MustParseAddr("fd7a:115c:a1e0::2")
)

// wire is one direction between two stacks: what one's Output yields is pumped into the other's Inbox.
type wire struct {
	mu      sync.Mutex
	cond    sync.Cond
	queue   [][]byte
	spare   [][]byte
	closed  bool
	stopped chan struct{}

	mtu   int                   // what Next is given room for; may change under mu
	any   bool                  // offer packets of any size
	limit int                   // packets queued before the wire drops
	drop  func(pkt []byte) bool // called under mu
	swap  func() bool           // whether to exchange a packet with the one before
	taps  func(p *Packet)
}

func newWire() *wire {
	w := &wire{stopped: make(chan struct{}), limit: 4096, mtu: DefaultMTU}
	w.cond.L = &w.mu
	return w
}

func (w *wire) WritePacket(p *Packet) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.taps != nil {
		w.taps(p)
	}
	room := w.mtu
	if w.any {
		p.OfferAnyMSS()
		if !p.AnySize() {
			room = DefaultMTU
		}
	}
	for {
		var b []byte
		if n := len(w.spare); n > 0 {
			b, w.spare = w.spare[n-1], w.spare[:n-1]
		} else {
			b = make([]byte, room)
		}
		if cap(b) < room {
			b = make([]byte, room)
		}
		n := p.Next(b[:room])
		if n == 0 {
			w.spare = append(w.spare, b)
			break
		}
		b = b[:n]
		if w.closed || len(w.queue) >= w.limit || w.drop != nil && w.drop(b) {
			w.spare = append(w.spare, b)
			continue
		}
		w.queue = append(w.queue, b)
		if k := len(w.queue); k > 1 && w.swap != nil && w.swap() {
			w.queue[k-1], w.queue[k-2] = w.queue[k-2], w.queue[k-1]
		}
	}
	w.cond.Signal()
}

// pump delivers to s until the wire is closed.
func (w *wire) pump(s *Stack) {
	defer close(w.stopped)
	in := s.NewInbox()
	var batch [][]byte
	for {
		w.mu.Lock()
		w.spare = append(w.spare, batch...)
		for len(w.queue) == 0 && !w.closed {
			w.cond.Wait()
		}
		if w.closed {
			w.mu.Unlock()
			return
		}
		batch, w.queue = w.queue, batch[:0]
		w.mu.Unlock()
		for _, b := range batch {
			room := in.Room(len(b) + 16)
			in.Commit(room[:copy(room, b)])
		}
		in.Flush()
	}
}

func (w *wire) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cond.Broadcast()
	<-w.stopped
}

type pair struct {
	a, b   *Stack
	ab, ba *wire
}

// newPair returns two stacks, wired back to back, with addresses of both families.
func newPair(t testing.TB, edit func(*Config)) *pair {
	t.Helper()
	p := &pair{ab: newWire(), ba: newWire()}
	mk := func(out *wire) *Stack {
		cfg := Config{Output: out}
		if edit != nil {
			edit(&cfg)
		}
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		out.mtu = s.MTU()
		return s
	}
	p.a, p.b = mk(p.ab), mk(p.ba)
	p.a.SetAddresses([]netip.Addr{a4, a6})
	p.b.SetAddresses([]netip.Addr{b4, b6})
	go p.ab.pump(p.b)
	go p.ba.pump(p.a)
	t.Cleanup(func() {
		p.a.Close()
		p.b.Close()
		p.ab.close()
		p.ba.close()
	})
	return p
}

// lossy makes both directions drop and reorder.
func (p *pair) lossy(seed uint64, loss, reorder float64) {
	for i, w := range []*wire{p.ab, p.ba} {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		w.mu.Lock()
		w.drop = func([]byte) bool { return r.Float64() < loss }
		w.swap = func() bool { return r.Float64() < reorder }
		w.mu.Unlock()
	}
}
