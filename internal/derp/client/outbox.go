package client

import (
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
)

// Bounds of what waits for a relay: little while it is not connected, for nothing ages
// worse than a packet; when connected, what a fast sender produces while the writer is busy.
const (
	idleBytes, idleFrames = 64 << 10, 64
	liveBytes, liveFrames = 1 << 20, 8192
	maxControl            = 4 << 10
)

// outbox is what waits to be written to one region. It outlives connections.
type outbox struct {
	wake chan struct{} // one token: there may be something to write

	mu      sync.Mutex
	q       derp.Queue
	flow    derp.Flow
	ctl     []byte // control frames; they go first
	bucket  bucket
	live    bool
	busy    bool          // what next returned last is being written
	idle    chan struct{} // somebody waits until nothing is; nil: nobody
	sent    uint64        // packets queued
	bytes   uint64
	dropped uint64
}

func newOutbox() *outbox {
	return &outbox{
		wake: make(chan struct{}, 1),
		q:    derp.Queue{MaxBytes: idleBytes, MaxFrames: idleFrames},
	}
}

// attach says that a connection is up, detach that it is gone.
func (o *outbox) attach() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.live = true
	o.q.Trim(liveBytes, liveFrames)
	o.signal()
}

func (o *outbox) detach() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.live, o.ctl, o.bucket = false, nil, bucket{}
	o.restLocked()
	o.dropped += uint64(o.q.Trim(idleBytes, idleFrames))
}

func (o *outbox) clear() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dropped += uint64(o.q.Clear())
}

// pending reports whether packets wait.
func (o *outbox) pending() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	_, frames := o.q.Len()
	return frames > 0
}

// count returns how many packets were ever queued.
func (o *outbox) count() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sent
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) limit(rate, burst int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.bucket.set(rate, burst)
}

// control queues a control frame, unless a relay provoked absurdly many.
func (o *outbox) control(frame []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.ctl)+len(frame) <= maxControl {
		o.ctl = append(o.ctl, frame...)
		o.signal()
	}
}

// send queues packets; live says whether a connection is there to write them.
func (o *outbox) send(dst key.NodePublic, b []byte, seg int) (live bool, err error) {
	if seg <= 0 || seg > len(b) {
		seg = len(b)
	}
	if seg > derp.MaxPacket {
		return false, ErrTooLarge
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(b) > 0 {
		p := b[:min(seg, len(b))]
		b = b[len(p):]
		if !o.bucket.take(derp.HeaderLen + key.Size + len(p)) {
			o.dropped++
			err = ErrRateLimited
			continue
		}
		o.dropped += uint64(o.q.Push(derp.SendPacket, dst, p, &o.flow))
		o.sent++
		o.bytes += uint64(len(p))
	}
	o.signal()
	return o.live, err
}

// next takes what is to be written now; what it returned before has been.
func (o *outbox) next() (ctl []byte, chunk *derp.Chunk) {
	o.mu.Lock()
	defer o.mu.Unlock()
	ctl, o.ctl = o.ctl, nil
	chunk = o.q.Pop()
	if o.busy = ctl != nil || chunk != nil; !o.busy {
		o.restLocked()
	}
	return ctl, chunk
}

// restLocked says that nothing is being written.
func (o *outbox) restLocked() {
	o.busy = false
	if o.idle != nil {
		close(o.idle)
		o.idle = nil
	}
}

// written returns a channel that is closed once all that waits has been written, or the connection has gone; nil if there is nothing to wait for.
func (o *outbox) written() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, frames := o.q.Len(); !o.live || !o.busy && frames == 0 && len(o.ctl) == 0 {
		return nil
	}
	if o.idle == nil {
		o.idle = make(chan struct{})
	}
	return o.idle
}

// bucket is the token bucket that a relay may impose. The zero value imposes nothing.
type bucket struct {
	rate, burst float64 // bytes a second, bytes
	tokens      float64
	last        time.Time
}

func (b *bucket) set(rate, burst int) {
	if rate <= 0 {
		*b = bucket{}
		return
	}
	if burst < derp.HeaderLen+derp.MaxPayload {
		// A burst that no packet fits in cannot be meant.
		burst = max(burst, rate, derp.HeaderLen+derp.MaxPayload)
	}
	*b = bucket{rate: float64(rate), burst: float64(burst), tokens: float64(burst), last: time.Now()}
}

func (b *bucket) take(n int) bool {
	if b.rate == 0 {
		return true
	}
	now := time.Now()
	b.tokens = min(b.burst, b.tokens+now.Sub(b.last).Seconds()*b.rate)
	b.last = now
	if b.tokens < float64(n) {
		return false
	}
	b.tokens -= float64(n)
	return true
}
