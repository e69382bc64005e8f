package netstack

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// initialBuffer is the size a connection's receive and send buffers start with: enough for a request, an answer and
// the first windows of slow start.
const initialBuffer = 128 << 10

const (
	idleAfter    = 3 * time.Second // a grown connection that moved nothing for this long may be asked to shrink
	reclaimEvery = time.Second
)

// budget is the node's ceiling for TCP buffers.
//
// Each connection starts with small buffers, and gVisor grows them as the path shows that it needs more: the receive
// buffer by how much the application reads within a round trip, the send buffer by the congestion window. What they
// grow by is taken from one pool. A connection gets at most half of what the pool has left, so the first to come
// cannot starve the rest, and gives everything back when it closes. Once the pool runs short, connections that have
// moved nothing for a while are shrunk to the initial size; a window already advertised is never taken back
// (RFC 9293 §3.8.6), the buffer only stops being refilled.
//
// So the stack holds at most connections × 2 × initialBuffer + total, and windows reach max/2 on a path that needs it.
type budget struct {
	max int64

	mu       sync.Mutex
	left     int64
	reclaims time.Time // of the latest reclaim
	grown    map[*grower]struct{}
}

func (b *budget) init(max, total int) {
	b.max, b.left = int64(max), int64(total)
	b.grown = make(map[*grower]struct{})
}

// grower is one direction of one connection.
type grower struct {
	b    *budget
	opts *tcpip.SocketOptions
	recv bool

	// Guarded by b.mu.
	extra  int64     // granted beyond initialBuffer
	active time.Time // when it last asked
}

func (g *grower) size() int64 {
	if g.recv {
		return g.opts.GetReceiveBufferSize()
	}
	return g.opts.GetSendBufferSize()
}

// setSize sets the size without the side effect that switches automatic growth off.
func (g *grower) setSize(n int64) {
	if g.recv {
		g.opts.SetReceiveBufferSize(n, false)
	} else {
		g.opts.SetSendBufferSize(n, false)
	}
}

// settle is called by the connection now and then while it moves data: it pays for what gVisor grew the buffer by, or
// trims the buffer to what was granted.
func (g *grower) settle() {
	size := g.size()
	if size <= initialBuffer {
		return // the common case takes no lock
	}
	b := g.b
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.grown == nil {
		return
	}
	g.active = time.Now()
	want := min(size, b.max) - initialBuffer - g.extra
	if want > 0 {
		if want > b.left/2 && g.active.Sub(b.reclaims) >= reclaimEvery {
			b.reclaimLocked(g.active)
		}
		got := max(min(want, b.left/2), 0)
		b.left -= got
		g.extra += got
		b.grown[g] = struct{}{}
	}
	if granted := initialBuffer + g.extra; size > granted {
		g.setSize(granted)
	}
}

// release gives back what g was granted.
func (g *grower) release() {
	b := g.b
	b.mu.Lock()
	b.left += g.extra
	g.extra = 0
	delete(b.grown, g)
	b.mu.Unlock()
}

func (b *budget) reclaimLocked(now time.Time) {
	b.reclaims = now
	for g := range b.grown {
		if now.Sub(g.active) >= idleAfter {
			g.setSize(initialBuffer)
			b.left += g.extra
			g.extra = 0
			delete(b.grown, g)
		}
	}
}

// available returns what is left to grow by.
func (b *budget) available() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.left
}
