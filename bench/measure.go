package main

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/interop/harness"
)

// plan is how much is measured.
type plan struct {
	starts   int           // rounds of a start and a first dial
	restarts int           // rounds of restarts
	rounds   int           // rounds of everything else
	idle     time.Duration // of idling, once a round and side
	stream   time.Duration // each transfer
	after    time.Duration // from the end of the last transfer until memory is looked at again, in the first round
	trips    int           // round trips
	hold     int           // connections open at a Close
	close    time.Duration // that a Close may take
	patience patience      // with others' use of the machine, in all
	quiet    time.Duration // and before each measurement
	profiles string        // a folder for CPU profiles, or ""
}

var full = plan{
	starts: 11, restarts: 5, rounds: 5, idle: 15 * time.Second, stream: 4 * time.Second, after: 60 * time.Second, trips: 5000,
	hold: 1000, close: 15 * time.Second, patience: patience(4 * time.Minute), quiet: 30 * time.Second,
}

var quick = plan{
	starts: 2, restarts: 1, rounds: 2, idle: 4 * time.Second, stream: 2 * time.Second, after: 4 * time.Second, trips: 2000,
	hold: 1000, close: 4 * time.Second, patience: patience(5 * time.Second), quiet: 2 * time.Second,
}

// A measurement measures one side once.
type measurement struct {
	name   string
	rounds func(p *plan) int
	lean   bool // also of upstream at its leanest, in the first round
	run    func(s *side, rep *report, p *plan, round int) error
}

var measurements = []measurement{
	{"start", func(p *plan) int { return p.starts }, false, measureStart},
	{"restart", func(p *plan) int { return p.restarts }, false, measureRestart},
	{"idle", func(p *plan) int { return min(2, p.rounds) }, true, measureIdle},
	{"direct", func(p *plan) int { return p.rounds }, false, measureDirect},
	{"relayed", func(p *plan) int { return p.rounds }, false, measureRelayed},
	{"close", func(p *plan) int { return min(2, p.rounds) }, false, measureClose},
}

// measureStart starts two nodes and has the second dial the first at once.
func measureStart(s *side, rep *report, p *plan, _ int) error {
	g, err := newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, first, err := g.pair(s, false)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	for _, p := range []*proc{a, b} {
		rep.add("process start to Up returned", "ms", true, s, p.spawn.Seconds()*1e3)
		rep.add("main to Up returned", "ms", true, s, p.up.Seconds*1e3)
	}
	rep.add("process start to first byte back from a peer", "ms", true, s, (b.spawn.Seconds()+first.Seconds)*1e3)
	rep.add("first Dial to first byte back", "ms", true, s, first.Seconds*1e3)
	rep.add("first Dial to a direct path", "ms", true, s, first.Direct*1e3)
	return nil
}

// measureRestart restarts each of two nodes that know each other.
func measureRestart(s *side, rep *report, p *plan, _ int) error {
	g, err := newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s, false)
	if err != nil {
		return err
	}
	defer func() { a.stop(); b.stop() }()
	nb, err := g.again(s, b, a.up.IP)
	if err != nil {
		return fmt.Errorf("restart of the dialling node: %w", err)
	}
	b = nb
	rep.add("restart of the dialling node: process start to first byte back", "ms", true, s, b.spawn.Seconds()*1e3)
	na, err := g.again(s, a, "")
	if err != nil {
		return fmt.Errorf("restart of the dialled node: %w", err)
	}
	a = na
	if _, err := b.do(child.Command{Op: "first", Addr: a.up.IP}); err != nil {
		return fmt.Errorf("restart of the dialled node: %w", err)
	}
	rep.add("restart of the dialled node: process start to first byte back", "ms", true, s, time.Since(a.began).Seconds()*1e3)
	return nil
}

func measureIdle(s *side, rep *report, p *plan, _ int) error {
	g, err := newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s, false)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	before, err := a.do(child.Command{Op: "stats"})
	if err != nil {
		return err
	}
	time.Sleep(p.idle) // what is measured is the passing of time
	rss, threads := residentMB(a), procStatus(a.cmd.Process.Pid, "Threads")
	after, err := a.do(child.Command{Op: "stats"})
	if err != nil {
		return err
	}
	rep.add(fmt.Sprintf("idle for %v, one peer: resident memory", p.idle), "MB", true, s, rss)
	rep.add("idle: goroutines", "", true, s, float64(after.Goroutines))
	rep.add("idle: threads", "", true, s, threads)
	rep.add("idle: processor time", "ms/s", true, s, (after.CPU-before.CPU)*1e3/p.idle.Seconds())
	return nil
}

// transfer sends from b to a, and notes speed, cost and memory. It returns the relay's processor time for a gigabyte.
func transfer(s *side, rep *report, a, b *proc, name string, streams int, d time.Duration, profile bool) (relay float64, err error) {
	var before, after [2]child.Reply
	for i, p := range []*proc{a, b} {
		resetPeak(p)
		if before[i], err = p.do(child.Command{Op: "stats"}); err != nil {
			return 0, err
		}
	}
	if profile {
		if _, err := a.do(child.Command{Op: "profile", Seconds: d.Seconds()}); err != nil {
			return 0, err
		}
	}
	relay = child.CPU()
	r, err := b.do(child.Command{Op: "send", Addr: a.up.IP, Streams: streams, Seconds: d.Seconds()})
	if err != nil {
		return 0, err
	}
	relay = child.CPU() - relay
	for i, p := range []*proc{a, b} {
		if after[i], err = p.do(child.Command{Op: "stats"}); err != nil {
			return 0, err
		}
	}
	gb := float64(r.Bytes) / 1e9
	name += fmt.Sprintf(", %d stream", streams)
	if streams > 1 {
		name += "s"
	}
	rep.add(name, "Mbit/s", false, s, gb*8e3/r.Seconds)
	rep.add(name+": both nodes' processor time", "s/GB", true, s, (after[0].CPU+after[1].CPU-before[0].CPU-before[1].CPU)/gb)
	rep.add(name+": sender's peak memory", "MB", true, s, peakMB(b))
	rep.add(name+": receiver's peak memory", "MB", true, s, peakMB(a))
	return relay / gb, nil
}

func roundTrips(s *side, rep *report, a, b *proc, name string, p *plan) error {
	r, err := b.do(child.Command{Op: "rtt", Addr: a.up.IP, Count: p.trips})
	if err != nil {
		return err
	}
	rep.add(name+" round trip, p50", "µs", true, s, r.P50*1e6)
	rep.add(name+" round trip, p99", "µs", true, s, r.P99*1e6)
	return nil
}

func measureDirect(s *side, rep *report, p *plan, round int) error {
	g, err := newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s, false)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	if err := roundTrips(s, rep, a, b, "direct", p); err != nil {
		return err
	}
	for _, streams := range []int{1, 8} {
		if _, err := transfer(s, rep, a, b, "direct TCP", streams, p.stream, false); err != nil {
			return err
		}
		// The path must have been direct to the end.
		r, err := b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: 0.1})
		if err != nil {
			return err
		}
		if r.Direct == 0 {
			return errNotDirect
		}
	}
	if round == 0 {
		time.Sleep(p.after) // what is measured is what is given back in a length of time
		rep.add(fmt.Sprintf("%v after: sender's memory", p.after), "MB", true, s, residentMB(b))
		rep.add(fmt.Sprintf("%v after: receiver's memory", p.after), "MB", true, s, residentMB(a))
	}
	return nil
}

// measureRelayed has either relay between two nodes that may not take another path.
func measureRelayed(s *side, rep *report, p *plan, round int) error {
	for _, relay := range []struct {
		name  string
		maker harness.RelayMaker
	}{{"our relay", harness.OurRelay}, {"upstream's relay", harness.UpstreamRelay}} {
		if err := relayed(s, rep, p, "by "+relay.name, relay.maker, round); err != nil {
			return fmt.Errorf("%s: %w", relay.name, err)
		}
	}
	return nil
}

func relayed(s *side, rep *report, p *plan, name string, relay harness.RelayMaker, round int) error {
	g, err := newGround(relay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s, true)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	if err := roundTrips(s, rep, a, b, name, p); err != nil {
		return err
	}
	for _, streams := range []int{1, 8} {
		cpu, err := transfer(s, rep, a, b, name, streams, p.stream, false)
		if err != nil {
			return err
		}
		if streams == 1 {
			rep.add(name+", 1 stream: the relay's processor time", "s/GB", true, s, cpu)
		}
	}
	return nil
}

// measureClose closes a node with many connections, all of which it has dialled.
func measureClose(s *side, rep *report, p *plan, _ int) error {
	g, err := newGround(harness.UpstreamRelay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s, false)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	r, err := b.do(child.Command{Op: "hold", Addr: a.up.IP, Count: p.hold})
	if err != nil {
		return err
	}
	rep.add("connections opened, 16 at once", "1/s", false, s, float64(p.hold)/r.Seconds)
	if r, err = b.do(child.Command{Op: "close", Seconds: p.close.Seconds()}); err != nil {
		return err
	}
	rep.add(fmt.Sprintf("Close with %d connections (given up after %v)", p.hold, p.close), "ms", true, s, r.Seconds*1e3)
	b.cmd.Process.Kill() // it may never end
	return nil
}

// profiled makes CPU profiles of both nodes in a long transfer of one stream, direct and by each relay.
func profiled(s *side, p *plan) error {
	for _, way := range []struct {
		name  string
		relay harness.RelayMaker
		only  bool
	}{{"direct", harness.UpstreamRelay, false}, {"our-relay", harness.OurRelay, true}, {"upstream-relay", harness.UpstreamRelay, true}} {
		g, err := newGround(way.relay)
		if err != nil {
			return err
		}
		defer g.close()
		var nodes [2]*proc
		for i, name := range []string{"receiver", "sender"} {
			nodes[i], err = g.start(s, child.Config{
				Hostname: name, RelayOnly: way.only, Profile: filepath.Join(p.profiles, s.dir+"-"+way.name+"-"+name+".pprof"),
			})
			if err != nil {
				return err
			}
			defer nodes[i].stop()
		}
		wait := directWait
		if way.only {
			wait = 0
		}
		a, b := nodes[0], nodes[1]
		if _, err := b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: wait.Seconds()}); err != nil {
			return err
		}
		var rep report
		if _, err := transfer(s, &rep, a, b, way.name, 1, p.stream, true); err != nil {
			return err
		}
		time.Sleep(time.Second) // the receiver's profile ends by the clock
	}
	return nil
}
