package datapath

import (
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/wg"
)

// Datagrams that a program sends one right after the other are gathered for each peer, as the stack does with small writes
// on a TCP connection: carried to the socket one by one, each costs a system call, which is most of its way; together, dozens
// cost one, and come to the receiver with one. So a datagram goes straight out only if the peer was sent none for burst;
// otherwise it joins those that wait. They leave when there are as many as one call takes, and at the latest when the
// goroutine that sees to it gets to run, which is microseconds later. Their order stays.
const burst = 30 * time.Microsecond

// gather is what waits for one peer. Locks: send is taken before mu.
type gather struct {
	send sync.Mutex // held from taking what waits until it is sent

	mu   sync.Mutex
	wait *packets // nil: nothing
	last time.Time
}

var gatherBuffers = sync.Pool{New: func() any { return &packets{buf: make([]byte, 0, gatherSize)} }}

// gatherSize is about what one call takes once it is sealed.
const gatherSize = 62 << 10

// datagram sends a packet of up to MTU bytes, or keeps it for a moment.
func (p *peer) datagram(src wg.Source, n int, at time.Time) {
	g := &p.gather
	for {
		g.mu.Lock()
		if g.wait == nil {
			alone := at.Sub(g.last) >= burst
			if alone || !p.t.e.gatherer.Add(p) {
				g.last = at
				g.mu.Unlock()
				g.send.Lock() // after what is being sent
				p.wg.Send(src)
				g.send.Unlock()
				return
			}
			g.wait = gatherBuffers.Get().(*packets)
		}
		if g.wait.fits(n) {
			break
		}
		g.mu.Unlock()
		p.flush()
	}
	g.last = at
	g.wait.add(src)
	full := !g.wait.fits(n) // another like it
	g.mu.Unlock()
	if full {
		p.flush()
	}
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
}

// maxPackets is how many packets the kernel segments in one call.
const maxPackets = 64

// packets is a wg.Source of several packets, which lie in buf one after the other.
type packets struct {
	buf  []byte // never grows
	n    [maxPackets]uint16
	k, i int // there are k, of which i have been read
	off  int // where the next to be read begins
}

var _ wg.Source = (*packets)(nil)

// fits reports whether there is room for a packet of n bytes.
func (s *packets) fits(n int) bool { return s.k < maxPackets && len(s.buf)+n <= cap(s.buf) }

// add adds the next packet of src, for which there is room.
func (s *packets) add(src wg.Source) {
	at := len(s.buf)
	if n := src.Next(s.buf[at:cap(s.buf)]); n > 0 {
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
