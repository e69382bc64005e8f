package wg

import (
	"runtime"
	"sync"
	"time"
)

const (
	maxSegments = 64    // UDP_MAX_SEGMENTS of kernels before 6.9
	maxBatch    = 65507 // the longest UDP payload over IPv4
)

// Send seals what src yields and transmits it, in batches of equal messages that end with a
// shorter one at most, with one Conduit.Send each. Without a session it keeps the packets, the
// newest ones if there are too many, begins a handshake, and sends them when that completes;
// they are dropped after 90 seconds without.
//
// It runs on the caller's goroutine and blocks no longer than Conduit.Send and other Sends to
// the same peer do. When it returns nil src is used up. The error is the Conduit's first one
// (later packets were tried nevertheless), or ErrClosed, or ErrKey.
func (p *Peer) Send(src Source) error { return p.SendSized(src, 0) }

// SendSized does what [Peer.Send] does, but offers src room for packets of up to mtu bytes instead of the device's MTU. Where they
// have to wait for a session, or memory is short, it is less, but never less than the device's MTU.
func (p *Peer) SendSized(src Source, mtu int) error {
	d := p.dev
	now := d.now()
	p.sendMu.Lock()
	if p.removed.Load() {
		p.sendMu.Unlock()
		return ErrClosed
	}
	s := p.usable(now)
	if s == nil {
		d.stage.add(p, src, now)
		p.sendMu.Unlock()
		d.sched.wakeBy(p, now+d.t.rekeyAttemptTime)
		return p.handshake(now, true)
	}
	var err error
	if p.staged.Load() > 0 {
		err = p.seal(s, d.stage.take(p), d.mtu, now)
	}
	if e := p.seal(s, src, max(mtu, d.mtu), now); err == nil {
		err = e
	}
	rekey := p.wantsRekey(s, now)
	s.release()
	p.sendMu.Unlock()
	if rekey {
		p.handshake(now, true)
	}
	return err
}

// usable returns the session to send with, acquired, or nil. sendMu is held.
func (p *Peer) usable(now int64) *session {
	s := p.current.Load()
	t := &p.dev.t
	if s == nil || now-s.created >= t.rejectAfterTime || s.counter >= t.rejectAfterMessages || !s.acquire() {
		return nil
	}
	return s
}

// wantsRekey reports whether, after sending on s, it is time for the next (paper §6.2). sendMu
// is held.
func (p *Peer) wantsRekey(s *session, now int64) bool {
	t := &p.dev.t
	if s.counter < t.rekeyAfterMessages && !(s.initiator && now-s.created >= t.rekeyAfterTime) {
		return false
	}
	return now >= p.meet.next.Load() || s.counter >= t.rejectAfterMessages // with that, what is staged waits for it
}

// flush sends what was staged, or else, if probe, an empty message.
func (p *Peer) flush(now int64, probe bool) {
	p.sendMu.Lock()
	s := p.usable(now)
	if s == nil {
		p.sendMu.Unlock()
		return
	}
	if p.staged.Load() > 0 {
		p.seal(s, p.dev.stage.take(p), p.dev.mtu, now)
	} else if probe {
		var msg [sizeKeepalive]byte
		sealAt(msg[:], s, 0)
		p.sent(now, sizeKeepalive)
		p.conduit.Send(msg[:], sizeKeepalive)
	}
	rekey := p.wantsRekey(s, now)
	s.release()
	p.sendMu.Unlock()
	if rekey {
		p.handshake(now, true)
	}
}

// sealAt seals the n bytes that lie in b after the room for the header, and completes the
// message: type 4, receiver 4, counter 8, then the sealed packet. sendMu is held.
func sealAt(b []byte, s *session, n int) {
	le.PutUint32(b[4:], 0) // with the counter, the nonce: 4 zero bytes and 8 of counter (paper §5.4.6)
	le.PutUint64(b[8:], s.counter)
	s.counter++
	s.send.Seal(b[sizeHeader:sizeHeader], b[4:16], b[sizeHeader:sizeHeader+n], nil)
	le.PutUint32(b, typeData)
	le.PutUint32(b[4:], s.remote)
}

// sent notes that n bytes of authentic messages leave. sendMu is held.
func (p *Peer) sent(now int64, n int) {
	p.txBytes.Add(uint64(n))
	p.lastTx.Store(now)
	if p.owed.Load() != 0 {
		p.owed.Store(0)
	}
}

// seal seals and transmits all of src, in packets of up to mtu bytes, on s, which is acquired. sendMu is held over counter,
// sealing and transmission, so that a message never comes after 8,192 younger ones because
// its goroutine was preempted.
func (p *Peer) seal(s *session, src Source, mtu int, now int64) (err error) {
	d := p.dev
	buf := d.pool.get()
	defer d.pool.put(buf)
	b := *buf
	mtu = min(mtu, len(b)-sizeHeader-sizeTag)
	most := mtu + sizeHeader + sizeTag
	off, seg, count := 0, 0, 0
	total := 0
	keep := p.kept.wants(now, p.lastRx.Load())
	transmit := func() {
		if off > 0 {
			if e := p.conduit.Send(b[:off], seg); e != nil && err == nil {
				err = e
			}
		}
		total += off
		off, count = 0, 0
	}
	for {
		if off+most > len(b) || count == maxSegments {
			transmit()
		}
		if s.counter >= d.t.rejectAfterMessages {
			transmit()
			d.stage.add(p, src, now)
			break
		}
		n := src.Next(b[off+sizeHeader : off+sizeHeader+mtu])
		if n <= 0 {
			break
		}
		if n > mtu {
			continue // a faulty Source
		}
		if pkt := b[off+sizeHeader : off+sizeHeader+n]; keep || n <= maxSYN && isSYN(pkt) {
			if n <= d.mtu && p.kept.add(pkt, now) {
				d.sched.wakeBy(p, now+keptFor)
			}
			keep = keep && p.kept.room()
		}
		// Padding to 16 bytes hides the exact length; it never exceeds the MTU (paper §5.4.6).
		padded := min((n+15)&^15, mtu)
		if count > 0 && padded+sizeHeader+sizeTag > seg {
			at := off + sizeHeader
			transmit()
			copy(b[sizeHeader:], b[at:at+n])
		}
		clear(b[off+sizeHeader+n : off+sizeHeader+padded])
		sealAt(b[off:], s, padded)
		size := padded + sizeHeader + sizeTag
		if count == 0 {
			seg = size
		}
		off += size
		count++
		if size < seg {
			transmit()
		}
	}
	transmit()
	if total > 0 {
		p.sent(now, total)
		if s.initiator && s.heard.Load() == 0 && s.asked.Load() == 0 {
			s.asked.Store(now)
			d.sched.wakeBy(p, now+d.t.prove)
		}
		if p.unanswered.Load() == 0 {
			since := now + jitter(d.t.jitter)
			p.unanswered.Store(since)
			d.sched.wakeBy(p, since+d.t.keepaliveTimeout+d.t.rekeyTimeout)
		}
		d.sched.wakeBy(&d.janitor, now+trimInterval)
	}
	return err
}

const (
	trimInterval = int64(10 * time.Second)
	// heavyUse is how many Sends within that are a lot: a stream has thousands, with its acknowledgements alone.
	heavyUse = 500
)

// pool holds the batch buffers. There are no more of the large ones than goroutines that can
// run at once, twice over; whoever finds none left gets a small one that is not kept. The timer
// takes away what lay unused for a while.
type pool struct {
	mu     sync.Mutex
	free   []*[]byte // the last one used lies on top, warm
	out    int       // large ones in use
	max    int
	low    int // the fewest that lay free since the last trim
	uses   int // since the last trim
	large  int
	small  int
	closed bool
}

func (q *pool) init(mtu, workers int) {
	msg := mtu + sizeHeader + sizeTag
	q.large = max(msg, maxBatch)
	q.small = min(4*msg, q.large)
	if q.max = workers; workers <= 0 {
		q.max = 2 * runtime.GOMAXPROCS(0)
	}
}

func (q *pool) get() *[]byte {
	q.mu.Lock()
	q.uses++
	if n := len(q.free); n > 0 {
		b := q.free[n-1]
		q.free[n-1] = nil
		q.free = q.free[:n-1]
		q.low = min(q.low, n-1)
		q.out++
		q.mu.Unlock()
		return b
	}
	n := q.small
	if q.out < q.max {
		q.out++
		n = q.large
	}
	q.mu.Unlock()
	b := make([]byte, n)
	return &b
}

func (q *pool) put(b *[]byte) {
	if len(*b) != q.large {
		return
	}
	q.mu.Lock()
	q.out--
	if !q.closed && len(q.free) < q.max {
		q.free = append(q.free, b)
	}
	q.mu.Unlock()
}

// trim frees the buffers that nobody needed since the last call, and returns how often one was used since, and
// whether any is left.
func (q *pool) trim() (uses int, left bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	uses, q.uses = q.uses, 0
	n := min(q.low, len(q.free))
	for i := range n {
		q.free[i] = nil
	}
	q.free = append(q.free[:0], q.free[n:]...)
	q.low = len(q.free)
	return uses, len(q.free)+q.out > 0
}

func (q *pool) close() {
	q.mu.Lock()
	q.closed, q.free = true, nil
	q.mu.Unlock()
}
