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

	// Without regard to the round trip, the connections that have grown share shortPath, within these bounds: about
	// what a socket buffer of a few megabytes lets pass when all of them send at once.
	shortPath             = 8 << 20
	leastShort, mostShort = 512 << 10, 2 << 20

	// perRTT is what each millisecond of round trip adds: 512 KiB of buffer is 256 KiB of window, 2 Gbit/s. More than fullRTT
	// connections share what so many have, 8 Gbit/s in all: on a busy machine every round trip is milliseconds long, and what is
	// buffered beyond what the processors carry only waits.
	perRTT  = 512 << 10
	fullRTT = 4
	rttAge  = 30 * time.Second // after which the least round trip seen is forgotten, for paths change

	sampleEvery = 50 * time.Millisecond
)

// budget is the node's ceiling for TCP buffers.
//
// Each connection starts with small buffers. The receive buffer doubles while the application reads a fair part of the
// window within a round trip (gVisor's own way of growing it cannot be stopped at a size of our choice before the
// larger window is advertised). The send buffer is grown by gVisor with the congestion window, and trimmed here. Left
// alone, both grow on any fast path until some queue overflows, for the queue that they fill lengthens the round trip.
// So growth is limited twice.
//
// By the path: a connection may have a share of what suits short paths, and more with the least round trip it has
// seen (grower.limit).
//
// By the node: what buffers grow by is taken from one pool. A connection gets at most half of what the pool has left,
// so the first to come cannot starve the rest, and gives everything back when it closes. Once the pool runs short,
// connections that have moved nothing for a while go back to the initial size. A window already advertised is never
// taken back (RFC 9293 §3.8.6); the buffer only stops being refilled.
//
// So the stack holds at most connections × 2 × initialBuffer + total.
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
	ep   tcpip.Endpoint
	recv bool

	// Of the goroutine that reads, or writes.
	since   time.Time // start of the measurement
	sum     int       // bytes read since
	sampled time.Time // when the stack was asked for the round trip

	// Guarded by b.mu.
	gone   bool
	held   bool      // stretched: reclaim leaves it alone
	extra  int64     // granted beyond initialBuffer
	active time.Time // when it last asked
	rtt    time.Duration
	rttAt  time.Time
}

func (g *grower) size() int64 {
	if g.recv {
		return g.ep.SocketOptions().GetReceiveBufferSize()
	}
	return g.ep.SocketOptions().GetSendBufferSize()
}

// setSize sets the size without the side effect that switches automatic growth off.
func (g *grower) setSize(n int64) {
	if g.recv {
		g.ep.SocketOptions().SetReceiveBufferSize(n, false)
	} else {
		g.ep.SocketOptions().SetSendBufferSize(n, false)
	}
}

// received is called, now and then, with the number of bytes that were read.
func (g *grower) received(n int) {
	now := time.Now()
	if g.since.IsZero() {
		g.since = now
		return
	}
	g.sum += n
	elapsed := now.Sub(g.since)
	rtt := g.roundTrip(now)
	if elapsed < rtt {
		return
	}
	rate := float64(g.sum) * float64(rtt) / float64(elapsed) // bytes per round trip
	g.since, g.sum = now, 0
	size := g.size()
	// An eighth of the window is enough to ask for more: the least round trip is shorter than one under load, and the
	// limits see to the rest.
	if rate > float64(size/16) {
		size *= 2
	}
	g.settle(size)
}

// sent is called, now and then, by a connection that sends.
func (g *grower) sent() {
	if size := g.size(); size > initialBuffer { // the common case takes no lock
		g.roundTrip(time.Now())
		g.settle(size)
	}
}

// roundTrip returns the least round trip seen lately.
func (g *grower) roundTrip(now time.Time) time.Duration {
	var rtt time.Duration
	if now.Sub(g.sampled) >= sampleEvery {
		var info tcpip.TCPInfoOption
		g.ep.GetSockOpt(&info) // before b.mu, for it waits for the endpoint's lock
		rtt, g.sampled = info.RTT, now
	}
	g.b.mu.Lock()
	defer g.b.mu.Unlock()
	if rtt > 0 && (g.rtt == 0 || rtt < g.rtt || now.Sub(g.rttAt) > rttAge) {
		g.rtt, g.rttAt = rtt, now
	}
	return max(g.rtt, time.Millisecond)
}

// settle makes the buffer as large as it may be, up to size.
func (g *grower) settle(size int64) {
	if size <= initialBuffer {
		return
	}
	granted, changed := g.grant(size)
	if !changed {
		return
	}
	if !g.recv {
		g.setSize(granted)
		return
	}
	// The stack has to know of this one. It announces room when a Read, or a change of the size, takes the window from
	// less than one segment to more; but it compares with what the buffer had just before, not with what it told the
	// peer, so it would miss a window that was closed, opened a little by a Read of a part of a segment, and now grows. A
	// growth from nothing it cannot miss. This happens a few times in a connection's life. (That it switches gVisor's own
	// growth off, which nobody calls, would matter to the window's scale, and that is settled.) It is done without b.mu,
	// for the stack waits for the endpoint's lock and may send; reclaim leaves alone who was active just now.
	size, announce := g.ep.(interface {
		OnSetReceiveBufferSize(size, before int64) (int64, func())
	}).OnSetReceiveBufferSize(granted, 0)
	g.setSize(size)
	announce()
}

// grant takes from the pool what the buffer may grow by, or gives back, and returns the size that it is to have.
func (g *grower) grant(size int64) (granted int64, changed bool) {
	b := g.b
	b.mu.Lock()
	defer b.mu.Unlock()
	if g.gone {
		return 0, false
	}
	g.active = time.Now()
	b.grown[g] = struct{}{}
	want := min(size, g.limitLocked()) - initialBuffer - g.extra
	if g.recv {
		want = max(want, 0) // less than what was advertised would make the stack drop what the peer may send
	}
	if want > b.left/2 && g.active.Sub(b.reclaims) >= reclaimEvery {
		b.reclaimLocked(g.active)
	}
	got := min(want, b.left/2) // negative if the limit has fallen
	b.left -= got
	g.extra += got
	granted = initialBuffer + g.extra
	return granted, granted != g.size()
}

// limitLocked is the size that suits the connection's path.
func (g *grower) limitLocked() int64 {
	n := min(max(shortPath/int64(len(g.b.grown)), leastShort), mostShort)
	n += int64(g.rtt/time.Millisecond) * perRTT * fullRTT / max(fullRTT, int64(len(g.b.grown)))
	return max(min(n, g.b.max), initialBuffer)
}

// release gives back what g was granted.
func (g *grower) release() {
	b := g.b
	b.mu.Lock()
	b.left += g.extra
	g.extra, g.gone = 0, true
	delete(b.grown, g)
	b.mu.Unlock()
}

// stretch makes a send buffer larger than anything that it can hold, until relax gets the size that it returns.
func (g *grower) stretch() (size int64) {
	g.b.mu.Lock()
	defer g.b.mu.Unlock()
	g.held = true
	size = g.size()
	g.setSize(size + 2*g.b.max)
	return size
}

func (g *grower) relax(size int64) {
	g.b.mu.Lock()
	defer g.b.mu.Unlock()
	g.held = false
	g.setSize(size)
}

func (b *budget) reclaimLocked(now time.Time) {
	b.reclaims = now
	for g := range b.grown {
		if now.Sub(g.active) >= idleAfter && !g.held {
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
