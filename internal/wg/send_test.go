package wg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/tailnode/tailnode/internal/key"
)

func TestBatches(t *testing.T) {
	rep := func(n, size int) (s []int) {
		for range n {
			s = append(s, size)
		}
		return s
	}
	cat := func(s ...[]int) (out []int) {
		for _, x := range s {
			out = append(out, x...)
		}
		return out
	}
	const full = 1280 + 32
	for _, tc := range []struct {
		name string
		mtu  int
		in   []int
		want []batch
	}{
		{"one", 1280, []int{100}, []batch{{112 + 32, 112 + 32}}},
		{"equal", 1280, rep(3, 1280), []batch{{3 * full, full}}},
		{"equal once padded", 1280, []int{97, 112, 100}, []batch{{3 * 144, 144}}},
		{"shorter one ends it", 1280, []int{1280, 1280, 600, 1280}, []batch{{2*full + 640, full}, {full, full}}},
		{"longer one starts anew", 1280, []int{64, 64, 1280, 1280}, []batch{{2 * 96, 96}, {2 * full, full}}},
		{"growing", 1280, []int{64, 200, 1280}, []batch{{96, 96}, {240, 240}, {full, full}}},
		{"shrinking", 1280, []int{1280, 200, 64}, []batch{{full + 240, full}, {96, 96}}},
		{"64 KB", 1280, rep(60, 1280), []batch{{49 * full, full}, {11 * full, full}}},
		{"64 segments", 1280, rep(130, 40), []batch{{64 * 80, 80}, {64 * 80, 80}, {2 * 80, 80}}},
		{"segments and a long one", 1280, cat(rep(64, 40), []int{1280}), []batch{{64 * 80, 80}, {full, full}}},
		{"MTU not of 16", 1420, []int{1420, 1419, 1409, 1408}, []batch{{3*1452 + 1440, 1452}}},
		{"large MTU", 16384, rep(5, 16384), []batch{{3 * 16416, 16416}, {2 * 16416, 16416}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newPair(t, func(c *Config) { c.MTU = tc.mtu })
				connect(t, a, b)
				a.out.take()
				var s packets
				for i, n := range tc.in {
					s = append(s, ip4(n, uint32(i)))
				}
				want := s
				if err := a.peer.Send(&s); err != nil {
					t.Fatal(err)
				}
				if got := fmt.Sprint(a.out.batches); got != fmt.Sprint(tc.want) {
					t.Errorf("batches %v, want %v", got, tc.want)
				}
				got := b.give(t, a.out.take()...)
				if len(got) != len(want) {
					t.Fatalf("%d packets, want %d", len(got), len(want))
				}
				for i := range got {
					if !bytes.Equal(got[i], want[i]) {
						t.Errorf("packet %d differs", i)
					}
				}
			})
		})
	}
}

// TestPaddingIsZero: a buffer is used again and again, and what it held must not leak into
// the padding.
func TestPaddingIsZero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		a.peer.Send(src(bytes.Repeat([]byte{0xff}, 1280)))
		a.out.take()
		a.peer.Send(src(ip4(33, 0)))
		m := a.out.take()[0]
		if _, _, err := b.dev.Receive(nil, m, nil); err != nil {
			t.Fatal(err)
		}
		if pad := m[sizeHeader+33 : sizeHeader+48]; !bytes.Equal(pad, make([]byte, 15)) {
			t.Errorf("padding %x", pad)
		}
	})
}

type failing struct{ n int }

func (f *failing) Send([]byte, int) error { f.n++; return errors.New("no way out") }

func TestConduitError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		f := new(failing)
		a.peer.conduit = f
		s := src(ip4(64, 1), ip4(1280, 2))
		if err := a.peer.Send(s); err == nil || err.Error() != "no way out" {
			t.Errorf("error %v", err)
		}
		if f.n != 2 || len(*s) != 0 {
			t.Errorf("%d batches tried, %d packets left", f.n, len(*s))
		}
	})
}

func TestRemoveAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		a.peer.Send(src(ip4(64, 1)))
		m := a.out.take()[0]
		b.peer.Remove()
		b.peer.Remove()
		if _, _, err := b.dev.Receive(nil, m, nil); !errors.Is(err, ErrUnknownIndex) {
			t.Errorf("after Remove: %v", err)
		}
		if err := b.peer.Send(src(ip4(64, 1))); !errors.Is(err, ErrClosed) {
			t.Errorf("Send after Remove: %v", err)
		}
		if b.dev.Peer(a.dev.Public()) != nil || b.dev.table.live != 0 || len(b.dev.sched.heap) != 0 {
			t.Error("something of the peer is left")
		}
		if _, err := b.dev.AddPeer(a.dev.Public(), b.out, "again"); err != nil {
			t.Errorf("AddPeer again: %v", err)
		}
		if _, err := b.dev.AddPeer(a.dev.Public(), b.out, nil); !errors.Is(err, ErrPeerExists) {
			t.Errorf("AddPeer twice: %v", err)
		}
		if p := b.dev.Peer(a.dev.Public()); p.Owner() != "again" || p.Public() != a.dev.Public() {
			t.Error("owner or key lost")
		}
		for _, pub := range []key.NodePublic{{}, b.dev.Public()} {
			if _, err := b.dev.AddPeer(pub, b.out, nil); !errors.Is(err, ErrKey) {
				t.Errorf("AddPeer(%v): %v", pub, err)
			}
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(b.dev.Close)
		}
		wg.Wait()
		if _, _, err := b.dev.Receive(nil, m, nil); !errors.Is(err, ErrClosed) {
			t.Errorf("Receive after Close: %v", err)
		}
		if _, err := b.dev.AddPeer(key.NewNode().Public(), b.out, nil); !errors.Is(err, ErrClosed) {
			t.Errorf("AddPeer after Close: %v", err)
		}
		if err := b.dev.SetPrivateKey(key.NewNode()); !errors.Is(err, ErrClosed) {
			t.Errorf("SetPrivateKey after Close: %v", err)
		}
	})
}

func TestLowOrderKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(t, nil)
		p, err := d.AddPeer(key.NodePublicFromRaw([32]byte{1}), nowhere{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Send(src(ip4(64, 1))); !errors.Is(err, ErrKey) {
			t.Errorf("Send: %v", err)
		}
		if n := p.Stats().Staged; n != 0 {
			t.Errorf("%d packets staged for nothing", n)
		}
	})
}

func TestConfig(t *testing.T) {
	k := key.NewNode()
	for _, tc := range []struct {
		name string
		cfg  Config
		ok   bool
	}{
		{"default", Config{PrivateKey: k}, true},
		{"no key", Config{}, false},
		{"small MTU", Config{PrivateKey: k, MTU: MinMTU}, true},
		{"too small", Config{PrivateKey: k, MTU: MinMTU - 1}, false},
		{"large", Config{PrivateKey: k, MTU: MaxMTU}, true},
		{"too large", Config{PrivateKey: k, MTU: MaxMTU + 1}, false},
	} {
		d, err := NewDevice(tc.cfg)
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
		if d != nil {
			d.Close()
		}
	}
}

func TestPool(t *testing.T) {
	var q pool
	q.init(1280, 2)
	a, b, c := q.get(), q.get(), q.get()
	if len(*a) != q.large || len(*b) != q.large || len(*c) != q.small {
		t.Errorf("%d, %d, %d", len(*a), len(*b), len(*c))
	}
	q.put(a)
	q.put(b)
	q.put(c)
	if len(q.free) != 2 || q.out != 0 {
		t.Errorf("%d free, %d out", len(q.free), q.out)
	}
	q.trim()
	q.put(q.get()) // one is in use from time to time
	if _, left := q.trim(); !left || len(q.free) != 1 {
		t.Errorf("%d free, want the one that is needed", len(q.free))
	}
	if uses, left := q.trim(); uses != 0 || left || len(q.free) != 0 {
		t.Errorf("%d free after a quiet while", len(q.free))
	}
}

// TestReceiveFromMany opens the messages of one session on many goroutines while sessions
// come and go; the race detector is the judge.
func TestReceiveFromMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		var s packets
		const n = 4000
		for i := range uint32(n) {
			s = append(s, ip4(64, i))
		}
		a.peer.Send(&s)
		msgs := make(chan []byte, 3*n)
		for _, m := range a.out.take() {
			msgs <- m
			msgs <- bytes.Clone(m)
		}
		close(msgs)
		var mu sync.Mutex
		got := map[uint32]int{}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for m := range msgs {
					pkt, _, err := b.dev.Receive(nil, m, nil)
					if err != nil {
						if !errors.Is(err, ErrReplay) {
							t.Error(err)
						}
						continue
					}
					mu.Lock()
					got[binary.BigEndian.Uint32(pkt[20:])]++
					mu.Unlock()
				}
			})
		}
		wg.Go(func() {
			for range 100 {
				p, err := b.dev.AddPeer(key.NewNode().Public(), nowhere{}, nil)
				if err == nil {
					p.Rekey()
					p.Remove()
				}
				b.peer.Stats()
			}
		})
		wg.Wait()
		if len(got) != n {
			t.Errorf("%d of %d packets", len(got), n)
		}
		for id, c := range got {
			if c != 1 {
				t.Errorf("packet %d came %d times", id, c)
			}
		}
	})
}

// TestSendFromMany sends on many goroutines, through a rekey and the end of the peer.
func TestSendFromMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		out := &order{t: t, last: map[uint32]uint64{}}
		a.peer.conduit = out
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range uint32(200) {
					if err := a.peer.Send(src(ip4(64, i), ip4(64, i))); err != nil && !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		for range 4 {
			wg.Go(func() {
				for i := range uint32(100) {
					if err := a.peer.Send(src(ip4(64, i))); err != nil && !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
				}
			})
		}
		wg.Go(a.peer.Remove)
		wg.Wait()
	})
}

// order checks that the counters of one session leave in order.
type order struct {
	t    testing.TB
	mu   sync.Mutex
	last map[uint32]uint64
}

func (o *order) Send(b []byte, seg int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for ; len(b) > 0; b = b[min(seg, len(b)):] {
		if b[0] != typeData {
			continue
		}
		i, c := le.Uint32(b[4:]), le.Uint64(b[8:])
		if last, ok := o.last[i]; ok && c != last+1 {
			o.t.Errorf("counter %d after %d", c, last)
		}
		o.last[i] = c
	}
	return nil
}
