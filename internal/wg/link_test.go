package wg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A lossy is a network of two devices in virtual time.
type lossy struct {
	t     testing.TB
	ends  [2]*node
	delay time.Duration

	mu     sync.Mutex
	rnd    *rand.Rand
	spread time.Duration
	loss   float64
	dup    float64
	replay float64
	down   bool
	old    [2][][]byte
	seen   func(to int, msg []byte)
	wg     sync.WaitGroup
}

// A node is one end of a lossy network. It is its own Conduit.
type node struct {
	l    *lossy
	n    int
	dev  *Device
	peer *Peer

	mu   sync.Mutex
	got  map[uint32]int
	last uint32 // id of the last packet that came
	errs map[error]int
	sent atomic.Int64 // messages
}

func newLossy(t testing.TB, seed uint64, mod func(i int, c *Config)) *lossy {
	l := &lossy{t: t, delay: 10 * time.Millisecond, rnd: rand.New(rand.NewPCG(seed, 3))}
	for i := range l.ends {
		l.ends[i] = &node{l: l, n: i, got: map[uint32]int{}, errs: map[error]int{}}
		l.ends[i].dev = newDevice(t, func(c *Config) {
			if mod != nil {
				mod(i, c)
			}
		})
	}
	for i, e := range l.ends {
		p, err := e.dev.AddPeer(l.ends[1-i].dev.Public(), e, e)
		if err != nil {
			t.Fatal(err)
		}
		e.peer = p
	}
	return l
}

func (l *lossy) close() {
	for _, e := range l.ends {
		e.dev.Close()
	}
	l.wg.Wait()
}

func (l *lossy) set(f func()) { l.mu.Lock(); f(); l.mu.Unlock() }

func (e *node) Send(b []byte, seg int) error {
	l := e.l
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(b) > 0 {
		n := min(seg, len(b))
		m := bytes.Clone(b[:n])
		b = b[n:]
		e.sent.Add(1)
		if l.seen != nil {
			l.seen(1-e.n, m)
		}
		if l.down {
			continue
		}
		if l.replay > 0 {
			if len(l.old[e.n]) < 1000 {
				l.old[e.n] = append(l.old[e.n], bytes.Clone(m))
			}
			if l.rnd.Float64() < l.replay {
				l.later(1-e.n, bytes.Clone(l.old[e.n][l.rnd.IntN(len(l.old[e.n]))]))
			}
		}
		if l.rnd.Float64() < l.loss {
			continue
		}
		l.later(1-e.n, m)
		if l.rnd.Float64() < l.dup {
			l.later(1-e.n, bytes.Clone(m))
		}
	}
	return nil
}

func (l *lossy) later(to int, m []byte) {
	d := l.delay
	if l.spread > 0 {
		d += time.Duration(l.rnd.Int64N(int64(l.spread)))
	}
	l.wg.Add(1)
	time.AfterFunc(d, func() {
		defer l.wg.Done()
		e := l.ends[to]
		pkt, _, err := e.dev.Receive(nil, m, nil)
		e.mu.Lock()
		defer e.mu.Unlock()
		if err != nil {
			for errors.Unwrap(err) != nil {
				err = errors.Unwrap(err)
			}
			e.errs[err]++
		} else if pkt != nil {
			id := binary.BigEndian.Uint32(pkt[20:])
			if !bytes.Equal(pkt, ip4(len(pkt), id)) {
				l.t.Errorf("packet %d came changed", id)
			}
			e.got[id]++
			e.last = id
		}
	})
}

func (e *node) send(ids ...uint32) {
	s := new(packets)
	for _, id := range ids {
		*s = append(*s, ip4(100, id))
	}
	if err := e.peer.Send(s); err != nil {
		e.l.t.Errorf("Send: %v", err)
	}
}

// count returns how many of the packets first to last came, and fails if one came twice.
func (e *node) count(first, last uint32) (n int) {
	e.l.t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for id := first; id <= last; id++ {
		if c := e.got[id]; c > 1 {
			e.l.t.Errorf("packet %d came %d times", id, c)
		} else {
			n += c
		}
	}
	return n
}

// all fails unless each of the packets first to last came to both ends once.
func (l *lossy) all(first, last uint32) {
	l.t.Helper()
	for i, e := range l.ends {
		if n := e.count(first, last); n != int(last-first+1) {
			l.t.Errorf("end %d: %d of the packets %d to %d came (refused: %v)", i, n, first, last, e.errs)
		}
	}
}
