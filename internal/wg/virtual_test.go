package wg

import (
	"bytes"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// inBubble runs f over a network of two devices in virtual time.
func inBubble(t *testing.T, f func(t *testing.T, l *lossy)) {
	synctest.Test(t, func(t *testing.T) {
		l := newLossy(t, 1, nil)
		defer l.close()
		f(t, l)
	})
}

func settle() {
	time.Sleep(100 * time.Millisecond)
	synctest.Wait()
}

// TestRekeyWithoutLoss has traffic for ten minutes over a network that loses nothing: the
// rekeys may not lose anything either.
func TestRekeyWithoutLoss(t *testing.T) {
	for _, tc := range []struct {
		name string
		a, b bool // who begins
	}{{"one begins", true, false}, {"both begin", true, true}} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, l *lossy) {
				inits := 0
				l.seen = func(_ int, m []byte) {
					if m[0] == typeInitiation {
						inits++
					}
				}
				a, b := l.ends[0], l.ends[1]
				if tc.a {
					a.send(0)
				}
				if tc.b {
					b.send(0)
				}
				settle()
				const n = 600 * 20
				for i := range uint32(n) {
					a.send(i + 1)
					b.send(i + 1)
					time.Sleep(50 * time.Millisecond)
				}
				settle()
				l.all(1, n)
				if inits < 5 || inits > 12 {
					t.Errorf("%d initiations in ten minutes", inits)
				}
			})
		})
	}
}

func TestHostileNetwork(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLossy(t, seed, nil)
				defer l.close()
				l.set(func() { l.loss, l.dup, l.replay, l.spread = 0.3, 0.2, 0.2, 60*time.Millisecond })
				a, b := l.ends[0], l.ends[1]
				const n = 400 * 10
				for i := range uint32(n) {
					a.send(i)
					b.send(i)
					time.Sleep(100 * time.Millisecond)
				}
				time.Sleep(time.Second)
				for i, e := range l.ends {
					if c := e.count(0, n-1); c < n*6/10 {
						t.Errorf("end %d: %d of %d came (refused: %v)", i, c, n, e.errs)
					}
					if e.errs[ErrReplay] == 0 {
						t.Errorf("end %d refused no replay", i)
					}
				}
				l.set(func() { l.loss, l.spread = 0, 0 })
				a.send(n)
				b.send(n)
				time.Sleep(30 * time.Second)
				a.send(n + 1)
				b.send(n + 1)
				settle()
				l.all(n+1, n+1)
			})
		})
	}
}

func TestSimultaneousInitiation(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		for round := range uint32(4) {
			id := 100 * round
			a.send(id)
			b.send(id)
			settle()
			l.all(id, id) // at once, not after a time-out
			for i := range uint32(50) {
				a.send(id + 1 + i)
				b.send(id + 1 + i)
				time.Sleep(time.Second)
			}
			settle()
			l.all(id, id+50)
			time.Sleep(200 * time.Second)
		}
	})
}

func TestCrossedSessionsStayIdle(t *testing.T) {
	// After a simultaneous initiation each side may send on a session of its own. An idle
	// while must not part them.
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.send(0)
		b.send(0)
		settle()
		time.Sleep(60 * time.Second)
		a.send(1)
		b.send(1)
		settle()
		l.all(0, 1)
	})
}

func TestIdlePeerIsSilent(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.send(1)
		settle()
		b.send(1)
		time.Sleep(30 * time.Second)
		before := a.sent.Load() + b.sent.Load()
		time.Sleep(time.Hour)
		synctest.Wait()
		if after := a.sent.Load() + b.sent.Load(); after != before {
			t.Errorf("%d messages in an idle hour", after-before)
		}
		if a.peer.HasSession() || b.peer.HasSession() {
			t.Error("a session outlived its time")
		}
		synctest.Wait()
		if len(a.dev.sched.heap)+a.dev.table.live != 0 {
			t.Errorf("left: %d deadlines, %d sessions", len(a.dev.sched.heap), a.dev.table.live)
		}
		a.send(2)
		settle()
		b.send(2)
		settle()
		l.all(1, 2)
	})
}

func TestPassiveKeepalive(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.send(1)
		settle()
		time.Sleep(time.Second) // for a to begin to doubt the session
		before := b.sent.Load()
		time.Sleep(8 * time.Second)
		if b.sent.Load() != before {
			t.Errorf("%d messages before the keepalive was due", b.sent.Load()-before)
		}
		time.Sleep(2 * time.Second)
		if b.sent.Load() != before+1 {
			t.Errorf("%d messages, want one keepalive", b.sent.Load()-before)
		}
		sentA := a.sent.Load()
		time.Sleep(60 * time.Second)
		if b.sent.Load() != before+1 || a.sent.Load() != sentA {
			t.Error("a keepalive was answered")
		}
	})
}

func TestSilentPeerGetsNewHandshake(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.send(1)
		settle()
		b.send(1)
		settle()
		// b forgets everything, as after a restart.
		b.peer.mu.Lock()
		b.peer.dropSessions()
		b.peer.mu.Unlock()
		a.send(2)
		time.Sleep(14 * time.Second)
		if b.peer.Stats().LastHandshake.After(time.Now().Add(-14 * time.Second)) {
			t.Error("a new handshake came too early")
		}
		time.Sleep(2 * time.Second)
		a.send(3)
		settle()
		if b.count(3, 3) != 1 {
			t.Error("no new handshake after 15 seconds of silence")
		}
	})
}

// TestUnprovedSession: the responder has lost the session with its response, as it does if it works on two initiations at once.
func TestUnprovedSession(t *testing.T) {
	loses := func(l *lossy, n *int) { // b loses the session of its next n responses
		b := l.ends[1]
		l.seen = func(to int, m []byte) {
			if to == 0 && m[0] == typeResponse && *n > 0 {
				*n--
				l.wg.Go(func() {
					b.peer.mu.Lock()
					defer b.peer.mu.Unlock()
					b.peer.next.kill()
					b.peer.next = nil
				})
			}
		}
	}
	for _, tc := range []struct {
		name  string
		lost  int
		after time.Duration // what a sends comes by then
	}{{"once", 1, 600 * time.Millisecond}, {"twice", 2, 2700 * time.Millisecond}, {"thrice", 3, 18500 * time.Millisecond}} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, l *lossy) {
				a, b := l.ends[0], l.ends[1]
				n := tc.lost
				loses(l, &n)
				for i := range uint32(2) {
					from := 1000 * i
					last := from + uint32(tc.after/(50*time.Millisecond))
					for id := from; id <= last; id++ {
						a.send(id)
						time.Sleep(50 * time.Millisecond)
					}
					settle()
					if i == 0 && b.count(from, from) != 0 {
						t.Error("the first came: the session was not lost")
					}
					if b.count(last, last) != 1 {
						t.Errorf("nothing comes after %v", tc.after)
					}
					b.send(from)
					settle()
				}
				if a.count(0, 0)+a.count(1000, 1000) != 2 {
					t.Error("the answers did not come")
				}
			})
		})
	}
	t.Run("rekey", func(t *testing.T) { // of a session on which b goes on sending
		inBubble(t, func(t *testing.T, l *lossy) {
			a, b := l.ends[0], l.ends[1]
			id := uint32(0)
			both := func(d time.Duration) {
				for end := time.Now().Add(d); time.Now().Before(end); id++ {
					a.send(id)
					b.send(id)
					time.Sleep(50 * time.Millisecond)
				}
			}
			both(115 * time.Second)
			n := 1
			loses(l, &n)
			from := id
			both(10 * time.Second)
			settle()
			if n != 0 {
				t.Fatal("no rekey")
			}
			if a.count(from, id-1) != int(id-from) {
				t.Error("what b sent was lost")
			}
			if lost := int(id-from) - b.count(from, id-1); lost == 0 || lost > 13 {
				t.Errorf("%d lost in steps of 50 ms", lost)
			}
		})
	})
	t.Run("nothing to say", func(t *testing.T) { // is no reason for more than a handshake or two
		inBubble(t, func(t *testing.T, l *lossy) {
			a, b := l.ends[0], l.ends[1]
			inits := 0
			l.seen = func(_ int, m []byte) {
				if m[0] == typeInitiation {
					inits++
				}
			}
			for i := range uint32(1200) {
				a.send(i)
				time.Sleep(500 * time.Millisecond)
			}
			settle()
			if b.count(0, 1199) != 1200 {
				t.Errorf("%d of 1200 came", b.count(0, 1199))
			}
			if inits > 5+maxDoubts {
				t.Errorf("%d initiations in ten minutes", inits)
			}
		})
	})
}

func TestGivingUp(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		l.set(func() { l.down = true })
		var at []time.Time
		l.seen = func(int, []byte) { at = append(at, time.Now()) }
		a.send(1)
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(at) < 20 || len(at) > 22 {
			t.Errorf("%d initiations", len(at))
		}
		for i := range at[1:] {
			want := min(250*time.Millisecond<<i, 5*time.Second)
			if d := at[i+1].Sub(at[i]); d < want || d > want+334*time.Millisecond {
				t.Errorf("initiations %d and %d are %v apart, want %v", i, i+1, d, want)
			}
		}
		if d := at[len(at)-1].Sub(at[0]); d > 90*time.Second {
			t.Errorf("gave up after %v", d)
		}
		if n := a.peer.Stats().Staged; n != 0 {
			t.Errorf("%d packets still staged", n)
		}
		l.set(func() { l.down = false })
		a.send(2)
		settle()
		if b.count(1, 1) != 0 || b.count(2, 2) != 1 {
			t.Error("want the new packet and not the old one")
		}
	})
}

// TestAlive is a peer that joins a moment after it is first sent to.
func TestAlive(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		l.set(func() { l.down = true })
		a.send(1)
		time.Sleep(30 * time.Second) // long enough for the waits to be the paper's
		l.set(func() { l.down = false })
		a.peer.Alive(0)
		settle()
		if b.count(1, 1) != 1 {
			t.Error("the handshake did not go on at once")
		}
		stamp := a.peer.Stats().LastHandshake
		a.peer.Alive(0)
		settle()
		if a.peer.Stats().LastHandshake != stamp {
			t.Error("a handshake began although there is a session")
		}
	})
}

func TestStagedPacketsAge(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		l.set(func() { l.down = true })
		for i := range uint32(10) { // keeps the handshake going
			a.send(i)
			time.Sleep(20 * time.Second)
		}
		l.set(func() { l.down = false })
		time.Sleep(20 * time.Second)
		if old, young := b.count(0, 5), b.count(6, 9); old != 0 || young < 3 {
			t.Errorf("%d old packets, %d young ones", old, young)
		}
	})
}

func TestStagingBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLossy(t, 1, func(i int, c *Config) { c.StageBytes = 5000 })
		defer l.close()
		a, b := l.ends[0], l.ends[1]
		l.set(func() { l.down = true })
		other, err := a.dev.AddPeer(key.NewNode().Public(), nowhere{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		other.Send(src(ip4(100, 1), ip4(100, 2)))
		for i := range uint32(49) { // 4,900 bytes beside the 200
			a.send(i)
		}
		if n, m := other.Stats().Staged, a.peer.Stats().Staged; n != 1 || m != 49 {
			t.Errorf("%d and %d staged: the oldest should have gone", n, m)
		}
		for i := range uint32(30) {
			a.send(i + 49)
		}
		if n, m := other.Stats().Staged, a.peer.Stats().Staged; n != 0 || m != 50 {
			t.Errorf("%d and %d staged", n, m)
		}
		if a.dev.stage.bytes != 5000 {
			t.Errorf("%d bytes", a.dev.stage.bytes)
		}
		l.set(func() { l.down = false })
		time.Sleep(6 * time.Second)
		if n := b.count(29, 78); n != 50 || b.count(0, 28) != 0 {
			t.Errorf("%d of the newest 50 came", n)
		}
		if s := &a.dev.stage; s.bytes != 0 || s.head != nil || s.tail != nil || len(s.queues) != 0 {
			t.Errorf("left: %+v", s)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		l := newLossy(t, 1, nil)
		defer l.close()
		l.set(func() { l.down = true })
		for i := range uint32(maxStaged + 100) {
			l.ends[0].send(i)
		}
		if n := l.ends[0].peer.Stats().Staged; n != maxStaged {
			t.Errorf("%d staged", n)
		}
	})
}

// TestStagedInOrder: what was staged leaves before what is sent later.
func TestStagedInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		a.peer.Send(src(ip4(100, 1), ip4(100, 2)))
		b.give(t, a.out.take()...)
		a.peer.Send(src(ip4(200, 3)))
		a.give(t, b.out.take()...)
		a.peer.Send(src(ip4(100, 4)))
		got := b.give(t, a.out.take()...)
		if len(got) != 4 {
			t.Fatalf("%d packets", len(got))
		}
		for i, p := range got {
			if !bytes.Equal(p, ip4(len(p), uint32(i+1))) {
				t.Errorf("packet %d is out of order", i+1)
			}
		}
	})
}

func TestPersistentKeepalive(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.peer.SetPersistentKeepalive(25 * time.Second)
		time.Sleep(30 * time.Second)
		if !a.peer.HasSession() {
			t.Fatal("no session")
		}
		last := a.sent.Load()
		for range 40 {
			time.Sleep(26 * time.Second)
			if a.sent.Load() == last {
				t.Error("26 seconds of silence")
			}
			last = a.sent.Load()
		}
		if !a.peer.HasSession() || !b.peer.HasSession() {
			t.Error("the session was not renewed")
		}
		a.peer.SetPersistentKeepalive(0)
		time.Sleep(time.Minute)
		last = a.sent.Load()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a.sent.Load() != last {
			t.Error("not turned off")
		}
	})
}

// TestListenerRenews: a side that only listens renews the session it initiated, with its
// keepalives after 120 seconds, or on receipt in the last 15.
func TestListenerRenews(t *testing.T) {
	count := func(l *lossy) *[2]int {
		n := new([2]int)
		l.seen = func(to int, m []byte) {
			if m[0] == typeInitiation {
				n[1-to]++
			}
		}
		return n
	}
	t.Run("keepalives", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *lossy) {
			inits := count(l)
			a, b := l.ends[0], l.ends[1]
			a.send(0)
			settle()
			const n = 400
			for i := range uint32(n) {
				b.send(i + 1)
				time.Sleep(time.Second)
			}
			synctest.Wait()
			if c := a.count(1, n); c != n {
				t.Errorf("%d of %d came", c, n)
			}
			if *inits != [2]int{4, 0} {
				t.Errorf("initiations: %v", *inits)
			}
		})
	})
	t.Run("late", func(t *testing.T) {
		inBubble(t, func(t *testing.T, l *lossy) {
			inits := count(l)
			a, b := l.ends[0], l.ends[1]
			a.send(0)
			settle()
			b.send(0)
			time.Sleep(164 * time.Second)
			b.send(1)
			settle()
			if *inits != [2]int{1, 0} {
				t.Errorf("initiations before the last 15 seconds: %v", *inits)
			}
			time.Sleep(2 * time.Second)
			b.send(2)
			settle()
			if *inits != [2]int{2, 0} || a.count(1, 2) != 2 {
				t.Errorf("initiations in the last 15 seconds: %v", *inits)
			}
		})
	})
}

func TestRekeyAfterMessages(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		for _, e := range l.ends {
			e.dev.t.rekeyAfterMessages, e.dev.t.rejectAfterMessages = 100, 200
		}
		a.send(0)
		settle()
		first := a.peer.current.Load()
		for i := range uint32(150) {
			a.send(i + 1)
			time.Sleep(100 * time.Millisecond)
		}
		if a.peer.current.Load() == first {
			t.Error("no rekey after 100 messages")
		}
		settle()
		if n := b.count(0, 150); n != 151 {
			t.Errorf("%d came", n)
		}
		// More at once than a session may carry: what is left over waits for the next one.
		var ids []uint32
		for i := range uint32(250) {
			ids = append(ids, 1000+i)
		}
		a.send(ids...)
		time.Sleep(10 * time.Second)
		if n := b.count(1000, 1249); n != 250 {
			t.Errorf("%d of 250 came", n)
		}
	})
}

func TestSetPrivateKey(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.send(1)
		settle()
		k := key.NewNode()
		if err := a.dev.SetPrivateKey(k); err != nil {
			t.Fatal(err)
		}
		if a.peer.HasSession() {
			t.Error("a session outlived its key")
		}
		if a.dev.Public() != k.Public() {
			t.Error("the old public key")
		}
		b.peer.Remove()
		p, err := b.dev.AddPeer(k.Public(), b, b)
		if err != nil {
			t.Fatal(err)
		}
		b.peer = p
		a.send(2)
		settle()
		b.send(2)
		settle()
		l.all(2, 2)
		if err := a.dev.SetPrivateKey(key.NodePrivate{}); err == nil {
			t.Error("a zero key was taken")
		}
	})
}

func TestUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l *lossy
		asked := 0
		l = newLossy(t, 1, func(i int, c *Config) {
			if i == 1 {
				c.Unknown = func(pub key.NodePublic) bool {
					asked++
					if pub != l.ends[0].dev.Public() {
						return false
					}
					p, err := l.ends[1].dev.AddPeer(pub, l.ends[1], nil)
					l.ends[1].peer = p
					return err == nil
				}
			}
		})
		defer l.close()
		a, b := l.ends[0], l.ends[1]
		b.peer.Remove()
		a.send(1)
		settle()
		if asked != 1 || b.count(1, 1) != 1 {
			t.Errorf("asked %d times, %d packets", asked, b.count(1, 1))
		}
		// A stranger is refused.
		s := newDevice(t, nil)
		w := new(wire)
		p, _ := s.AddPeer(b.dev.Public(), w, nil)
		p.Rekey()
		if _, _, err := b.dev.Receive(nil, w.take()[0], nil); err != ErrUnknownPeer || asked != 2 {
			t.Errorf("asked %d times: %v", asked, err)
		}
	})
}

// TestTraffic has much sent, and then little: that is told once, and no timer runs on.
func TestTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []bool
		l := newLossy(t, 1, func(i int, c *Config) {
			if i == 0 {
				c.Traffic = func(heavy bool) { told = append(told, heavy) }
			}
		})
		defer l.close()
		a := l.ends[0]
		for range uint32(30) { // a little
			a.send(1)
			time.Sleep(time.Second)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(told) != 0 {
			t.Errorf("told of a little: %v", told)
		}
		for i := range uint32(25 * 100) { // 25 s
			a.send(2 + i)
			time.Sleep(10 * time.Millisecond)
		}
		for range uint32(120) { // a little goes on
			a.send(3)
			time.Sleep(time.Second)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(told); n < 3 || n > 5 || told[n-1] || !told[n-2] || !told[0] {
			t.Errorf("told %v", told)
		}
	})
}
