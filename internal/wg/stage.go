package wg

import "sync"

const maxStaged = 128 // packets per peer

// stage keeps plaintext packets until their peer has a session. All of them, over all peers,
// stand in one list by age, so that the oldest goes first when there are too many bytes.
type stage struct {
	mu         sync.Mutex
	head, tail *waiting // by age, all peers
	queues     map[*Peer]*queue
	bytes, max int
}

type waiting struct {
	peer       *Peer
	prev, next *waiting // in the device's list
	after      *waiting // in the peer's queue
	at         int64
	b          []byte
}

type queue struct{ head, tail *waiting }

func (s *stage) init(max int) {
	s.max = max
	s.queues = make(map[*Peer]*queue)
}

// add stages all of src for p. p.sendMu is held.
func (s *stage) add(p *Peer, src Source, now int64) {
	buf := make([]byte, p.dev.mtu)
	for {
		n := src.Next(buf)
		if n <= 0 {
			break
		}
		if n > len(buf) {
			continue
		}
		w := &waiting{peer: p, at: now, b: append(make([]byte, 0, n), buf[:n]...)}
		s.mu.Lock()
		s.push(w)
		s.mu.Unlock()
	}
	clear(buf)
}

func (s *stage) push(w *waiting) {
	p := w.peer
	if q := s.queues[p]; q != nil && int(p.staged.Load()) >= maxStaged {
		s.pop(q)
	}
	for s.head != nil && s.bytes+len(w.b) > s.max {
		s.pop(s.queues[s.head.peer]) // the oldest of all is its peer's oldest
	}
	if w.prev = s.tail; w.prev != nil {
		w.prev.next = w
	} else {
		s.head = w
	}
	s.tail = w
	q := s.queues[p]
	if q == nil {
		q = new(queue)
		s.queues[p] = q
	}
	if q.tail != nil {
		q.tail.after = w
	} else {
		q.head = w
	}
	q.tail = w
	s.bytes += len(w.b)
	p.staged.Add(1)
}

// pop drops the oldest packet of a queue.
func (s *stage) pop(q *queue) {
	w := q.head
	s.unlink(w)
	clear(w.b)
	if q.head = w.after; q.head == nil {
		delete(s.queues, w.peer)
	}
	w.peer.staged.Add(-1)
}

// unlink takes w off the device's list.
func (s *stage) unlink(w *waiting) {
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		s.head = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	} else {
		s.tail = w.prev
	}
	w.prev, w.next = nil, nil
	s.bytes -= len(w.b)
}

// take returns all packets of p as a Source, oldest first.
func (s *stage) take(p *Peer) *staged {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.queues[p]
	if q == nil {
		return &staged{}
	}
	delete(s.queues, p)
	p.staged.Store(0)
	for w := q.head; w != nil; w = w.after {
		s.unlink(w)
	}
	return &staged{q.head}
}

type staged struct{ w *waiting }

// Next implements Source.
func (s *staged) Next(dst []byte) int {
	w := s.w
	if w == nil {
		return 0
	}
	s.w = w.after
	n := copy(dst, w.b)
	clear(w.b)
	w.b, w.after = nil, nil
	return n
}

// drop drops all packets of p.
func (s *stage) drop(p *Peer) {
	for st := s.take(p); st.w != nil; {
		clear(st.w.b)
		st.w = st.w.after
	}
}

// expire drops the packets of p from before t and returns when the oldest left was staged, or
// never if there is none.
func (s *stage) expire(p *Peer, t int64) int64 {
	if p.staged.Load() == 0 {
		return never
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		q := s.queues[p]
		if q == nil {
			return never
		}
		if q.head.at > t {
			return q.head.at
		}
		s.pop(q)
	}
}
