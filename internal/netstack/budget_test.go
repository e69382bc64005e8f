package netstack

import (
	"io"
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
		sa.wg.Wait()
		sb.wg.Wait()
		ab.close()
		ba.close()
	})
	l := listen(t, b, "[::]:80")
	c, d := connect(t, a, l, b4)
	const size = 24 << 20
	start := time.Now()
	go func() {
		buf := make([]byte, 256<<10)
		for range size / len(buf) {
			c.Write(buf)
		}
		closeWrite(t, c)
	}()
	n, err := io.Copy(io.Discard, d)
	if n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	took := time.Since(start)
	rcv, snd := d.(*conn).rgrow.size(), c.(*conn).wgrow.size()
	t.Logf("%d MiB in %v; receive buffer %d KiB, send buffer %d KiB, %d retransmits", size>>20, took.Round(time.Millisecond),
		rcv>>10, snd>>10, a.gv.Stats().TCP.Retransmits.Value())
	if k := a.gv.Stats().TCP.Retransmits.Value(); k != 0 {
		t.Errorf("%d retransmits", k)
	}
	if rcv < 1<<20 || rcv > 8<<20 {
		t.Errorf("receive buffer of %d bytes", rcv)
	}
}
