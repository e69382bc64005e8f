package netstack

import (
	"net/netip"
	"sync"
	"testing"
	"time"
)

// TestBudget: growth is limited by path and by node, comes back, and is taken from those who do not use it.
func TestBudget(t *testing.T) {
	const mib = 1 << 20
	p := newPair(t, func(c *Config) { c.MaxBuffer, c.BufferBudget = 8*mib, 12*mib })
	l := listen(t, p.b, "[::]:80")
	conns := make([]*conn, 4)
	for i := range conns {
		c, _ := connect(t, p.a, l, b4)
		conns[i] = c.(*conn)
	}
	b := &p.a.budget
	b.mu.Lock()
	b.reclaims = time.Now().Add(time.Hour) // none before its turn, however slow this machine is
	b.mu.Unlock()
	set := func(i int, rtt time.Duration, want int64) int64 {
		g := &conns[i].rgrow
		b.mu.Lock()
		g.rtt = rtt
		b.mu.Unlock()
		g.settle(want)
		if b.available() < 0 {
			t.Fatalf("%d left", b.available())
		}
		return g.size()
	}
	for _, step := range []struct {
		name     string
		i        int
		rtt      time.Duration
		ask, got int64
	}{
		{"nothing asked", 0, time.Millisecond, initialBuffer, initialBuffer},
		{"short path", 0, time.Millisecond, 8 * mib, 2*mib + mib/2},
		{"same path grown longer", 0, 100 * time.Millisecond, 8 * mib, (initialBuffer + 2*mib + mib/2 - initialBuffer) + (12*mib-(2*mib+mib/2-initialBuffer))/2},
		{"half of what is left", 1, 100 * time.Millisecond, 8 * mib, initialBuffer + (12*mib-(2*mib+mib/2-initialBuffer))/4},
	} {
		if got := set(step.i, step.rtt, step.ask); got != step.got {
			t.Errorf("%s: %d, want %d", step.name, got, step.got)
		}
	}

	// The first has been idle: the third gets what it had.
	b.mu.Lock()
	conns[0].rgrow.active = time.Now().Add(-2 * idleAfter)
	b.reclaims = time.Time{}
	b.mu.Unlock()
	if got := set(2, 100*time.Millisecond, 8*mib); got < 3*mib {
		t.Errorf("after reclaiming: %d", got)
	}
	if got := conns[0].rgrow.size(); got != initialBuffer {
		t.Errorf("the idle one kept %d", got)
	}
	for _, c := range conns {
		c.Close()
		c.rgrow.settle(8 * mib) // late, from a Read that was under way
	}
	if got := b.available(); got != 12*mib {
		t.Errorf("%d left of %d", got, 12*mib)
	}
}

// TestReclaimWhileStretched: a flush that has stretched the send buffer is not disturbed by another connection that wants to grow.
func TestReclaimWhileStretched(t *testing.T) {
	p := newPair(t, func(c *Config) { c.MaxBuffer = 1 << 20 })
	l := listen(t, p.b, "[::]:80")
	cc, _ := connect(t, p.a, l, b4)
	c := cc.(*conn)
	b := &p.a.budget
	reclaim := func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.reclaimLocked(time.Now().Add(2 * idleAfter))
	}
	c.sm.Lock()
	defer c.sm.Unlock()
	c.wgrow.settle(1 << 20)
	size := c.wgrow.stretch()
	reclaim()
	if got := c.wgrow.size(); got != size+2<<20 {
		t.Errorf("while it is stretched: %d bytes, want %d", got, size+2<<20)
	}
	c.wgrow.relax(size)
	reclaim()
	if got := c.wgrow.size(); got != initialBuffer {
		t.Errorf("later: %d bytes, want %d", got, initialBuffer)
	}
}

// slow is an Output that delivers after a while, in order, without limit in between: a long fat path.
type slow struct {
	to    *wire
	delay time.Duration
	wg    sync.WaitGroup

	mu  sync.Mutex
	fly [][][]byte // each WritePacket's packets
}

func (s *slow) WritePacket(p *Packet) {
	w := newWire() // to cut the packet up
	w.WritePacket(p)
	s.wg.Add(1)
	s.mu.Lock()
	s.fly = append(s.fly, w.queue)
	s.mu.Unlock()
	time.AfterFunc(s.delay, func() {
		defer s.wg.Done()
		s.mu.Lock()
		defer s.mu.Unlock()
		first := s.fly[0]
		s.fly = s.fly[1:]
		s.to.mu.Lock()
		defer s.to.mu.Unlock()
		if !s.to.closed {
			s.to.queue = append(s.to.queue, first...)
			s.to.cond.Signal()
		}
	})
}

// TestWindowGrows: on a path of 40 ms the buffers grow far enough to fill it, and nothing is lost by that.
func TestWindowGrows(t *testing.T) {
	ab, ba := newWire(), newWire()
	sa, sb := &slow{to: ab, delay: 20 * time.Millisecond}, &slow{to: ba, delay: 20 * time.Millisecond}
	a, err := New(Config{Output: sa})
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(Config{Output: sb})
	if err != nil {
		t.Fatal(err)
	}
	a.SetAddresses([]netip.Addr{a4})
	b.SetAddresses([]netip.Addr{b4})
	go ab.pump(b)
	go ba.pump(a)
	t.Cleanup(func() {
		a.Close()
		b.Close()
		ab.close()
		ba.close()
		sa.wg.Wait() // now that nothing is sent any more, not even a reset by a pump
		sb.wg.Wait()
	})
	l := listen(t, b, "[::]:80")
	c, d := connect(t, a, l, b4)
	start := time.Now()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.Close()
	wg.Go(func() {
		for buf := make([]byte, 256<<10); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	const least, most = 24 << 20, 1 << 30 // a machine that is busy with others needs more until the window has grown
	size := func() int64 { return d.(*conn).rgrow.size() }
	n := 0
	for buf := make([]byte, 256<<10); n < least || n < most && size() < 1<<20; {
		k, err := d.Read(buf)
		if n += k; err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
	}
	st := a.gv.Stats().TCP
	t.Logf("%d MiB in %v; receive buffer %d KiB, send buffer %d KiB, %d retransmits, %d timeouts", n>>20, time.Since(start).Round(time.Millisecond),
		size()>>10, c.(*conn).wgrow.size()>>10, st.Retransmits.Value(), st.Timeouts.Value())
	// The path loses nothing. What it delivers late is taken for lost by the clock alone.
	if k := st.Retransmits.Value(); k != 0 && st.Timeouts.Value() == 0 {
		t.Errorf("%d retransmits", k)
	}
	if rcv := size(); rcv < 1<<20 || rcv > 8<<20 {
		t.Errorf("receive buffer of %d bytes", rcv)
	}
}
