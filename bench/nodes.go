package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/interop/harness"
)

// What a node is by itself: its weight, its start, its rest, its end.

// measureSize weighs what the sides were built into, which is done by now.
func measureSize(r *round) error {
	for _, s := range r.sides {
		fi, err := os.Stat(s.min)
		if err != nil {
			return err
		}
		r.addTo(s, less("minimal program, stripped", "MB", 0.40), float64(fi.Size())/1e6)
		plain := s.min + "-plain"
		if err := goBuild(plain, "./min/"+s.dir, s.tags, ""); err != nil {
			return err
		}
		if fi, err = os.Stat(plain); err != nil {
			return err
		}
		r.addTo(s, less("minimal program, not stripped", "MB", 0), float64(fi.Size())/1e6)
		deps, err := command("go", "list", "-deps", "-tags", s.tags, "-f", "{{.ImportPath}} {{.Standard}}", "./min/"+s.dir)
		if err != nil {
			return err
		}
		r.addTo(s, less("packages linked", "", 0), float64(strings.Count(deps, "\n"))) // without the program's own
		r.addTo(s, less("packages linked outside of the standard library", "", 0.30), float64(strings.Count(deps, " false")-1))
	}
	return nil
}

// measureStart starts two nodes and has the second dial the first at once.
func measureStart(r *round) error {
	g, err := r.newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, first, err := g.pair(r.side, direct)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	for _, p := range []*proc{a, b} {
		r.add(less("process start to Up returned", "ms", 0), p.spawn.Seconds()*1e3)
		r.add(less("main to Up returned", "ms", 0), p.up.Seconds*1e3)
	}
	r.add(less("process start to first byte back from a peer", "ms", 0.7), (b.spawn.Seconds()+first.Seconds)*1e3)
	r.add(less("first Dial to first byte back", "ms", 0), first.Seconds*1e3)
	r.add(less("first Dial to a direct path", "ms", 0), first.Direct*1e3)
	return nil
}

// startMany is measureStart with so many peers in the netmap that are not there.
func startMany(peers int) func(r *round) error {
	return func(r *round) error {
		g, err := r.newBigGround(peers)
		if err != nil {
			return err
		}
		defer g.close()
		a, b, first, err := g.pair(r.side, anyWay)
		if err != nil {
			return err
		}
		defer a.stop()
		defer b.stop()
		goal := 0.0
		if peers == 10_000 {
			goal = 0.35
		}
		at := thousands(peers) + " peers: "
		r.add(less(at+"process start to Up returned", "ms", 0), b.spawn.Seconds()*1e3)
		r.add(less(at+"process start to first byte back from a peer", "ms", goal), (b.spawn.Seconds()+first.Seconds)*1e3)
		return nil
	}
}

// measureBlocked is measureStart while the kernel drops every datagram that arrives, without telling anybody.
func measureBlocked(r *round) error {
	if !namespaced() {
		return errors.New("needs a network namespace, to drop UDP in it")
	}
	for _, rule := range []string{
		"add table inet blocked", "add chain inet blocked in { type filter hook input priority 0; }",
		"add rule inet blocked in meta l4proto udp drop",
	} {
		if out, err := exec.Command("nft", rule).CombinedOutput(); err != nil {
			return fmt.Errorf("nft %s: %w: %s", rule, err, out)
		}
	}
	defer exec.Command("nft", "delete table inet blocked").Run()
	g, err := r.newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, first, err := g.pair(r.side, anyWay)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	r.add(less("UDP blocked: process start to Up returned", "ms", 0.2), b.spawn.Seconds()*1e3)
	r.add(less("UDP blocked: process start to first byte back from a peer", "ms", 0.2), (b.spawn.Seconds()+first.Seconds)*1e3)
	return nil
}

// measureRestart restarts each of two nodes that know each other.
func measureRestart(r *round) error {
	g, err := r.newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(r.side, direct)
	if err != nil {
		return err
	}
	defer func() { a.stop(); b.stop() }()
	nb, err := g.again(r.side, b, a.up.IP)
	if err != nil {
		return fmt.Errorf("restart of the dialling node: %w", err)
	}
	b = nb
	r.add(less("restart of the dialling node: process start to first byte back", "ms", 0).within(1000), b.spawn.Seconds()*1e3)
	na, err := g.again(r.side, a, "")
	if err != nil {
		return fmt.Errorf("restart of the dialled node: %w", err)
	}
	a = na
	if _, err := b.do(child.Command{Op: "first", Addr: a.up.IP}); err != nil {
		return fmt.Errorf("restart of the dialled node: %w", err)
	}
	r.add(less("restart of the dialled node: process start to first byte back", "ms", 0).within(1000), time.Since(a.began).Seconds()*1e3)
	return nil
}

// measureIdle has pairs of nodes of all sides do nothing, with netmaps of three sizes, all at the same time: they only wait.
func measureIdle(r *round) error {
	type pair struct {
		side  *side
		peers int
		a     *proc
		err   error
		cpu   float64
	}
	var pairs []*pair
	for _, peers := range []int{1, 1000, 10_000} {
		for _, s := range r.sides {
			if s.lean && peers > 1 {
				continue
			}
			p := &pair{side: s, peers: peers}
			pairs = append(pairs, p)
			var g *ground
			if peers == 1 {
				g, p.err = r.newGround(harness.UpstreamRelay)
			} else {
				g, p.err = r.newBigGround(peers)
			}
			if p.err != nil {
				continue
			}
			defer g.close()
			var b *proc
			if p.a, b, _, p.err = g.pair(s, anyWay); p.err != nil {
				continue
			}
			defer p.a.stop()
			defer b.stop()
		}
	}
	stats := func(p *pair) (cpu float64, goroutines int) {
		if p.err != nil {
			return 0, 0
		}
		var st child.Reply
		st, p.err = p.a.do(child.Command{Op: "stats"})
		return st.CPU, st.Goroutines
	}
	time.Sleep(r.p.idle / 3) // what a start leaves to be done later
	for _, p := range pairs {
		p.cpu, _ = stats(p)
	}
	began := time.Now()
	time.Sleep(r.p.idle) // what is measured is the passing of time
	for _, p := range pairs {
		var rss, threads float64
		if p.err == nil {
			rss, threads = residentMB(p.a), procStatus(p.a.cmd.Process.Pid, "Threads")
		}
		cpu, goroutines := stats(p)
		took := time.Since(began)
		if p.err != nil {
			r.fail(p.side.name, fmt.Errorf("%s peers: %w", thousands(p.peers), p.err))
			continue
		}
		name, goal := "idle: ", 0.5
		if p.peers > 1 {
			name, goal = fmt.Sprintf("idle with %s peers: ", thousands(p.peers)), 0.3
		}
		if p.peers == 10_000 {
			goal = 0.2
		}
		r.addTo(p.side, less(name+"resident memory", "MB", goal), rss)
		r.addTo(p.side, less(name+fmt.Sprintf("processor time over %v", r.p.idle), "ms/s", 1), (cpu-p.cpu)*1e3/took.Seconds())
		if p.peers == 1 {
			r.addTo(p.side, less("idle: goroutines", "", 0.4), float64(goroutines))
			r.addTo(p.side, less("idle: threads", "", 0.75), threads)
		}
	}
	return nil
}

// measureDelta sends changes to a node that has 10,000 peers.
func measureDelta(r *round) error {
	g, err := r.newBigGround(10_000)
	if err != nil {
		return err
	}
	defer g.close()
	a, err := g.start(r.side, child.Config{Hostname: "alpha"})
	if err != nil {
		return err
	}
	defer a.stop()
	seen := func() (time.Duration, error) {
		began := time.Now()
		addr := g.big.addPeer()
		_, err := a.do(child.Command{Op: "knows", Addr: addr.String(), Seconds: 20})
		return time.Since(began), err
	}
	if _, err := seen(); err != nil {
		return err
	}
	time.Sleep(time.Second) // what the start has left to do
	for range r.p.deltas {
		took, err := seen()
		if err != nil {
			return err
		}
		r.add(less("10,000 peers: one more, until the node knows it", "ms", 0).charted(), took.Seconds()*1e3)
	}
	before, err := a.do(child.Command{Op: "stats"})
	if err != nil {
		return err
	}
	n := 10 * r.p.deltas
	g.big.patch(n)
	if _, err := seen(); err != nil {
		return err
	}
	time.Sleep(500 * time.Millisecond) // what it puts off; it counts as well
	after, err := a.do(child.Command{Op: "stats"})
	if err != nil {
		return err
	}
	r.add(less("10,000 peers: processor time for one peer's new endpoint", "ms", 0).charted(), (after.CPU-before.CPU)*1e3/float64(n+1))
	return nil
}

// measureAfter looks at the memory of nodes of all sides before a load and a minute after.
func measureAfter(r *round) error {
	type pair struct {
		side   *side
		nodes  [2]*proc
		before [2]float64
	}
	var pairs []*pair
	for _, s := range r.sides {
		if s.lean {
			continue
		}
		g, err := r.newGround(harness.UpstreamRelay)
		if err != nil {
			return err
		}
		defer g.close()
		a, b, _, err := g.pair(s, direct)
		if err != nil {
			r.fail(s.name, err)
			continue
		}
		defer a.stop()
		defer b.stop()
		p := &pair{s, [2]*proc{a, b}, [2]float64{}}
		time.Sleep(2 * time.Second) // so that the start is not taken for idling
		for i, n := range p.nodes {
			p.before[i] = residentMB(n)
		}
		if _, err := b.do(child.Command{Op: "send", Addr: a.up.IP, Streams: 8, Seconds: r.p.stream.Seconds()}); err != nil {
			r.fail(s.name, err)
			continue
		}
		pairs = append(pairs, p)
	}
	time.Sleep(r.p.after) // what is measured is what is given back in a length of time
	for _, p := range pairs {
		for i, who := range []string{"receiver", "sender"} {
			now := residentMB(p.nodes[i])
			r.addTo(p.side, less(fmt.Sprintf("%v after 8 streams: %s's memory", r.p.after, who), "MB", 0), now)
			r.addTo(p.side, less(fmt.Sprintf("%v after 8 streams: %s's memory above what it was before", r.p.after, who), "MB", 0).within(4.2), now-p.before[i])
		}
	}
	return nil
}

// measureClose closes a node with many connections, all of which it has dialled.
func measureClose(r *round) error {
	g, err := r.newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, err := g.start(r.side, child.Config{Hostname: "alpha"})
	if err != nil {
		return err
	}
	defer a.stop()
	b, err := g.start(r.side, child.Config{Hostname: "bravo", Account: true})
	if err != nil {
		return err
	}
	defer b.stop()
	if _, err := b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: directWait.Seconds()}); err != nil {
		return err
	}
	n := thousands(r.p.hold)
	h, err := b.do(child.Command{Op: "hold", Addr: a.up.IP, Count: r.p.hold, Seconds: (r.m.limit[r.p.index()] - r.p.close - 15*time.Second).Seconds()})
	if err != nil {
		return fmt.Errorf("opening %s connections: %w", n, err)
	}
	r.add(more(n+" connections opened and kept, 16 at a time", "1/s", 0), float64(h.Count)/h.Seconds)
	r.add(less(n+" connections open: memory of the node that dialled", "MB", 0), residentMB(b))
	c, err := b.do(child.Command{Op: "close", Seconds: r.p.close.Seconds()})
	if err != nil {
		return err
	}
	r.add(less(fmt.Sprintf("Close with %s connections (given up after %v)", n, r.p.close), "ms", 0).within(100), c.Seconds*1e3)
	r.add(less("after that Close: goroutines left", "", 0), float64(c.Left.Goroutines))
	if runtime.GOOS == "linux" {
		r.add(less("after that Close: descriptors left", "", 0), float64(c.Left.Files))
		r.add(less("after that Close: resident memory", "MB", 0), residentMB(b))
	}
	r.add(less("after that Close: heap left", "MB", 0), float64(c.Left.Heap)/1e6)
	b.cmd.Process.Kill() // it may never end
	return nil
}

func thousands(n int) string {
	if n >= 1000 {
		return fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	return fmt.Sprint(n)
}
