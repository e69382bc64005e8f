package datapath

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/wg"
)

// Datagrams that a program sends one right after the other are gathered for each peer, as the stack does with small writes
// on a TCP connection: carried to the socket one by one, each costs a system call, which is most of its way; together, dozens
// cost one, and come to the receiver with one. So a datagram goes straight out only if fewer than burstRun before it were less than burst
// apart; otherwise it joins those that wait. They leave when there are as many as one call takes, and at the latest when the
// goroutine that sees to it gets to run, which is microseconds later. Their order stays.
//
// Waking that goroutine costs as much as the call. So where datagrams do not cease to follow each other like that, streamRun of them, one
// that looks every streamTick takes its place for as long as that lasts.
const (
	burst      = 30 * time.Microsecond
	burstRun   = 2 // one that ends a connection and one that begins the next are no burst
	streamRun  = 64
	streamTick = 100 * time.Microsecond
)

// tiny is the most bytes of a TCP segment that is gathered as datagrams are: those that begin, acknowledge and end connections, of which
// there are many at a time where there are many connections, and what is no longer than they are.
const tiny = 256

// gather is what waits for one peer. Locks: send is taken before mu.
type gather struct {
	send sync.Mutex // held from taking what waits until it is sent

	mu   sync.Mutex
	wait *packets // nil: nothing
	last time.Time
	run  int // packets in a row that came less than burst after the one before
	// ticking says that what waits is looked after by stream, and added that something has been since it last looked.
	ticking, added bool

	busy atomic.Bool // wait is not nil, or was not and is being sent
}

var gatherBuffers = sync.Pool{New: func() any { return &packets{buf: make([]byte, 0, gatherSize)} }}

// gatherSize is about what one call takes once it is sealed.
const gatherSize = 62 << 10

// datagram sends a packet of up to MTU bytes, or keeps it for a moment; less than that if it is urgent.
func (p *peer) datagram(src wg.Source, n int, at time.Time, urgent bool) {
	g := &p.gather
	g.mu.Lock()
	if g.run++; at.Sub(g.last) >= burst {
		g.run = 0
	}
	g.last = at
	if g.run >= streamRun && !g.ticking && !urgent {
		g.ticking = p.t.e.streams.run(p.stream)
	}
	for {
		if g.wait == nil {
			if !g.ticking && (g.run < burstRun || !p.t.e.gatherer.Add(p)) {
				g.mu.Unlock()
				g.send.Lock() // after what is being sent
				p.wg.Send(src)
				g.send.Unlock()
				g.mu.Lock()
				g.last = now() // what sending takes is no pause
				g.mu.Unlock()
				return
			}
			g.wait = gatherBuffers.Get().(*packets)
			g.busy.Store(true)
		}
		if g.wait.fits(n) {
			break
		}
		g.mu.Unlock()
		p.flush()
		g.mu.Lock()
	}
	g.wait.add(src)
	g.added = true
	leaves := !g.wait.fits(n) || urgent && g.ticking // no room for another like it
	g.mu.Unlock()
	if leaves {
		p.flush()
	}
}

// stream sends what waits every streamTick, until nothing has come for as long.
func (p *peer) stream(done <-chan struct{}) {
	g := &p.gather
	tick := time.NewTicker(streamTick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-done:
		}
		p.flush()
		g.mu.Lock()
		g.ticking, g.added = g.added, false
		if !g.ticking {
			g.mu.Unlock()
			return
		}
		g.mu.Unlock()
	}
}

// streams are the goroutines of peers that are being sent datagrams without a pause.
type streams struct {
	mu   sync.Mutex
	done chan struct{} // closed by close; nil before the first
	over bool
	wg   sync.WaitGroup
}

// run starts f, or reports that it is too late.
func (s *streams) run(f func(done <-chan struct{})) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return false
	}
	if s.done == nil {
		s.done = make(chan struct{})
	}
	done := s.done
	s.wg.Go(func() { f(done) })
	return true
}

// close waits until all have seen that nothing more comes.
func (s *streams) close() {
	s.mu.Lock()
	s.over = true
	if s.done != nil {
		close(s.done)
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// flush sends what waits.
func (p *peer) flush() {
	g := &p.gather
	g.send.Lock()
	defer g.send.Unlock()
	g.mu.Lock()
	s := g.wait
	g.wait = nil
	g.mu.Unlock()
	if s != nil {
		p.wg.Send(s) // an error is lost packets
		s.reset()
		gatherBuffers.Put(s)
	}
	g.mu.Lock()
	if g.wait == nil {
		g.busy.Store(false)
	}
	g.mu.Unlock()
}

// segment sends a packet of any length, after what waits.
func (p *peer) segment(src wg.Source, mtu int) {
	if p.gather.busy.Load() {
		p.flush()
	}
	p.wg.SendSized(src, mtu)
}

// maxPackets is how many packets the kernel segments in one call.
const maxPackets = 64

// packets is a wg.Source of several packets, which lie in buf one after the other.
type packets struct {
	buf  []byte // never grows
	n    [maxPackets + 1]uint16
	k, i int // there are k, of which i have been read
	off  int // where the next to be read begins
}

var _ wg.Source = (*packets)(nil)

// fits reports whether there is room for n bytes in one packet, or in two of which one goes ahead of the other.
func (s *packets) fits(n int) bool { return s.k < maxPackets && len(s.buf)+n <= cap(s.buf) }

// add adds the packets of src, for which there is room.
func (s *packets) add(src wg.Source) {
	for s.k < len(s.n) {
		at := len(s.buf)
		n := src.Next(s.buf[at:cap(s.buf)])
		if n == 0 {
			return
		}
		s.buf = s.buf[:at+n]
		s.n[s.k] = uint16(n)
		s.k++
	}
}

// Next implements wg.Source.
func (s *packets) Next(dst []byte) int {
	if s.i == s.k {
		return 0
	}
	n := int(s.n[s.i])
	s.i++
	copy(dst, s.buf[s.off:s.off+n])
	s.off += n
	return n
}

func (s *packets) reset() { s.buf, s.k, s.i, s.off = s.buf[:0], 0, 0, 0 }
