package wg

import (
	"math/rand/v2"
	"sync"
	"time"
)

// scheduler wakes peers at their next deadline, all with one timer. The hot path only writes
// down times (when data first went unanswered, and so on); the peer's tick, when it comes, works
// out from them what is due and when to come back. A deadline that has moved away costs one
// idle tick.
type scheduler struct {
	dev *Device

	mu      sync.Mutex
	idle    sync.Cond
	heap    []*Peer // by wakeAt, earliest first
	timer   *time.Timer
	armed   int64 // what timer is set to
	running bool  // run is at work
	closed  bool
}

func (q *scheduler) init(d *Device) {
	q.dev, q.idle.L, q.armed = d, &q.mu, never
}

// wakeBy sees to it that p ticks at the given time or earlier. It is cheap if that is so already.
func (q *scheduler) wakeBy(p *Peer, at int64) {
	if p.wakeAt.Load() <= at {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || p.wakeAt.Load() <= at || p.removed.Load() {
		return
	}
	p.wakeAt.Store(at)
	if p.heapAt < 0 {
		p.heapAt = int32(len(q.heap))
		q.heap = append(q.heap, p)
	}
	q.up(int(p.heapAt))
	q.arm()
}

// arm sets the timer to the earliest deadline. mu is held.
func (q *scheduler) arm() {
	if q.running || len(q.heap) == 0 {
		return // run arms at its end
	}
	at := q.heap[0].wakeAt.Load()
	if at >= q.armed {
		return // run will find that it has come too early, if so
	}
	q.armed = at
	d := time.Duration(max(at-q.dev.now(), 0))
	if q.timer == nil {
		q.timer = time.AfterFunc(d, q.run)
	} else {
		q.timer.Reset(d)
	}
}

// run ticks the peers that are due.
func (q *scheduler) run() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.armed = never
	if q.running || q.closed {
		return
	}
	q.running = true
	for !q.closed && len(q.heap) > 0 {
		p := q.heap[0]
		now := q.dev.now()
		if p.wakeAt.Load() > now {
			break
		}
		q.removeLocked(p)
		q.mu.Unlock()
		p.tick(now)
		q.mu.Lock()
	}
	q.running = false
	q.idle.Broadcast()
	if !q.closed {
		q.arm()
	}
}

// remove forgets p.
func (q *scheduler) remove(p *Peer) {
	q.mu.Lock()
	q.removeLocked(p)
	q.mu.Unlock()
}

func (q *scheduler) removeLocked(p *Peer) {
	at := int(p.heapAt)
	if at < 0 {
		return
	}
	last := len(q.heap) - 1
	moved := q.heap[last]
	q.heap[last] = nil
	q.heap = q.heap[:last]
	p.heapAt = -1
	p.wakeAt.Store(never)
	if moved != p {
		q.heap[at] = moved
		moved.heapAt = int32(at)
		q.up(at)
		q.down(int(moved.heapAt))
	}
	if last == 0 {
		q.heap = nil
	} else if cap(q.heap) > 64 && last < cap(q.heap)/4 {
		q.heap = append(make([]*Peer, 0, last*2), q.heap...)
	}
}

func (q *scheduler) less(i, j int) bool { return q.heap[i].wakeAt.Load() < q.heap[j].wakeAt.Load() }

func (q *scheduler) swap(i, j int) {
	q.heap[i], q.heap[j] = q.heap[j], q.heap[i]
	q.heap[i].heapAt, q.heap[j].heapAt = int32(i), int32(j)
}

func (q *scheduler) up(i int) {
	for i > 0 && q.less(i, (i-1)/2) {
		q.swap(i, (i-1)/2)
		i = (i - 1) / 2
	}
}

func (q *scheduler) down(i int) {
	for {
		c := 2*i + 1
		if c >= len(q.heap) {
			return
		}
		if c+1 < len(q.heap) && q.less(c+1, c) {
			c++
		}
		if !q.less(c, i) {
			return
		}
		q.swap(i, c)
		i = c
	}
}

// close stops the timer and waits until no tick runs.
func (q *scheduler) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	if q.timer != nil {
		q.timer.Stop()
	}
	for q.running {
		q.idle.Wait()
	}
	for _, p := range q.heap {
		p.heapAt = -1
	}
	q.heap = nil
}

func jitter(most int64) int64 {
	if most <= 0 {
		return 0
	}
	return rand.Int64N(most)
}

// tick does what is due for p and schedules what comes next.
func (p *Peer) tick(now int64) {
	d := p.dev
	if p == &d.janitor {
		uses, left := d.pool.trim()
		heavy := uses >= heavyUse
		if f := d.cfg.Traffic; f != nil && (heavy || d.heavy) {
			f(heavy)
		}
		if d.heavy = heavy; left || heavy {
			d.sched.wakeBy(p, now+trimInterval)
		}
		return
	}
	t := &d.t
	next := int64(never)
	// due reports whether the time is here; if not it is noted.
	due := func(at int64) bool {
		if now >= at {
			return true
		}
		next = min(next, at)
		return false
	}

	p.mu.Lock()
	if p.removed.Load() {
		p.mu.Unlock()
		return
	}
	p.age(now, due)
	cur := p.current.Load()
	if p.unproved(cur, now, due) {
		p.meet.renew()
		p.meet.want(t, now)
		p.meet.retryAt = now // due below
	}
	initiate, gaveUp := p.meet.due(t, now, cur != nil)
	if gaveUp {
		p.dropHandshake()
	}
	next = min(next, p.meet.at())
	p.mu.Unlock()

	if gaveUp {
		d.log.Debug("wg: no answer to handshake", "peer", p.pub.ShortString())
		d.stage.drop(p)
		p.unanswered.Store(0)
	}
	if at := d.stage.expire(p, now-t.rekeyAttemptTime); at != never {
		due(at + t.rekeyAttemptTime)
	}
	p.sendMu.Lock()
	next = min(next, p.kept.tidy(now))
	p.sendMu.Unlock()
	fresh := false
	if since := p.unanswered.Load(); since != 0 && due(since+t.keepaliveTimeout+t.rekeyTimeout) {
		p.unanswered.Store(0)
		initiate, fresh = true, true
	}
	probe := false
	if since := p.owed.Load(); since != 0 && due(since+t.keepaliveTimeout) {
		p.owed.Store(0)
		probe = true
	}
	if every := p.keepalive.Load(); every > 0 {
		if due(max(p.lastTx.Load(), p.lastRx.Load()) + every) {
			if p.HasSession() {
				probe = true
			} else {
				initiate, fresh = true, true
			}
			due(now + every)
		}
	}
	if probe {
		p.flush(now, true)
	}
	if initiate {
		p.handshake(now, fresh)
	}
	if next != never {
		d.sched.wakeBy(p, next)
	}
}

// age ends the sessions whose time is over and shrinks what is idle. mu is held.
func (p *Peer) age(now int64, due func(int64) bool) {
	t := &p.dev.t
	// Past this time a session neither sends nor receives, so its keys go at once; the paper
	// (§6.1) would let them lie for three times as long.
	over := func(s *session) bool { return s != nil && due(s.created+t.rejectAfterTime) }
	cur := p.current.Load()
	if over(cur) {
		p.current.Store(nil)
		cur.kill()
		cur = nil
	}
	if over(p.next) {
		p.next.kill()
		p.next = nil
	}
	// Messages on the previous session come late or not at all once the other end sends on the
	// current one. As long as it does not, the previous one is the one it sends on.
	if over(p.previous) || p.previous != nil && cur != nil && cur.heard.Load() != 0 &&
		due(cur.heard.Load()+t.keepaliveTimeout) {
		p.previous.kill()
		p.previous = nil
	}
	for _, s := range []*session{cur, p.previous, p.next} {
		if s == nil {
			continue
		}
		s.winMu.Lock()
		if s.win.ring != nil && due(p.lastRx.Load()+t.keepaliveTimeout) {
			s.win.collapse()
		}
		s.winMu.Unlock()
	}
}
