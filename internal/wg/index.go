package wg

import (
	"crypto/rand"
	"sync"
	"sync/atomic"
)

// table finds the session of a data message without a lock: an open-addressed array of
// pointers that readers probe while writers, one at a time, fill it or publish a new one.
// Indices are random and ours alone, so nobody outside chooses where they fall.
// It knows pending handshakes too; those are few and found under the lock.
type table struct {
	mu      sync.Mutex
	slots   atomic.Pointer[[]atomic.Pointer[session]] // length is a power of two
	live    int                                       // sessions
	used    int                                       // slots that are not nil: sessions and tombstones
	pending map[uint32]*Peer
}

// tombstone stands where a session was, so that probing goes on past it.
var tombstone = new(session)

const minSlots = 16

func (t *table) init() {
	s := make([]atomic.Pointer[session], minSlots)
	t.slots.Store(&s)
	t.pending = make(map[uint32]*Peer)
}

// lookup returns the session whose index is i, or nil.
func (t *table) lookup(i uint32) *session {
	slots := *t.slots.Load()
	mask := uint32(len(slots) - 1)
	for at := i & mask; ; at = (at + 1) & mask {
		s := slots[at].Load()
		if s == nil {
			return nil
		}
		if s != tombstone && s.index == i {
			return s
		}
	}
}

// handshake returns the peer whose handshake has the index i, or nil.
func (t *table) handshake(i uint32) *Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pending[i]
}

// reserve returns an index that is not in use and notes it for a handshake of p.
func (t *table) reserve(p *Peer) uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		var b [4]byte
		rand.Read(b[:])
		i := le.Uint32(b[:])
		if _, ok := t.pending[i]; !ok && t.lookup(i) == nil {
			t.pending[i] = p
			return i
		}
	}
}

// cancel gives up the index of a handshake.
func (t *table) cancel(i uint32) {
	t.mu.Lock()
	delete(t.pending, i)
	t.mu.Unlock()
}

// insert makes s findable under its index, which was reserved.
func (t *table) insert(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.pending, s.index)
	if slots := *t.slots.Load(); (t.used+1)*4 > len(slots)*3 {
		t.resize(t.live + 1)
	}
	t.put(*t.slots.Load(), s)
	t.live++
}

func (t *table) put(slots []atomic.Pointer[session], s *session) {
	mask := uint32(len(slots) - 1)
	at := s.index & mask
	for slots[at].Load() != nil {
		at = (at + 1) & mask
	}
	slots[at].Store(s)
	t.used++
}

// remove forgets s, if it is there.
func (t *table) remove(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	slots := *t.slots.Load()
	mask := uint32(len(slots) - 1)
	for at := s.index & mask; ; at = (at + 1) & mask {
		switch slots[at].Load() {
		case nil:
			return
		case s:
			slots[at].Store(tombstone)
			t.live--
			if len(slots) > minSlots && t.live*8 < len(slots) {
				t.resize(t.live)
			}
			return
		}
	}
}

// resize publishes a new array in which n sessions fill half or less.
func (t *table) resize(n int) {
	size := minSlots
	for size < 2*n {
		size *= 2
	}
	old := *t.slots.Load()
	fresh := make([]atomic.Pointer[session], size)
	t.used = 0
	for i := range old {
		if s := old[i].Load(); s != nil && s != tombstone {
			t.put(fresh, s)
		}
	}
	t.slots.Store(&fresh)
}
