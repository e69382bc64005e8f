package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/interop/harness"
)

// What goes between two nodes.

// goals of a path, as ratios to upstream's; 0 is none.
type goals struct {
	trip    float64
	rate    map[int]float64 // by streams
	cpu     float64
	peak    float64
	streams []int
}

// traffic measures round trips and transfers from b to a on the path that they have.
func (r *round) traffic(a, b *proc, name string, g goals) error {
	trips := func(what string, load int, goal float64) error {
		t, err := b.do(child.Command{Op: "rtt", Addr: a.up.IP, Count: r.p.trips, Seconds: r.p.tripping.Seconds(), Streams: load})
		if err != nil {
			return err
		}
		r.add(less(name+": round trip"+what+", p50", "µs", goal), t.P50*1e6)
		r.add(less(name+": round trip"+what+", p99", "µs", 0), t.P99*1e6)
		return nil
	}
	if err := trips("", 0, g.trip); err != nil {
		return fmt.Errorf("round trips: %w", err)
	}
	for _, n := range g.streams {
		relay, err := r.transfer(a, b, name, n, g)
		if err != nil {
			return fmt.Errorf("%d streams: %w", n, err)
		}
		if n == 1 && !strings.HasPrefix(name, overDirect) {
			r.add(less(name+", 1 stream: the relay's processor time", "s/GB", 0), relay)
		}
	}
	if err := trips(" beside one stream", 1, 0); err != nil {
		return fmt.Errorf("round trips under load: %w", err)
	}
	return nil
}

// transfer sends from b to a, and notes speed, cost and memory. It returns this process's processor time for a gigabyte: the relay is in it.
func (r *round) transfer(a, b *proc, name string, streams int, g goals) (relay float64, err error) {
	var before, after [2]child.Reply
	for i, p := range []*proc{a, b} {
		resetPeak(p)
		if before[i], err = p.do(child.Command{Op: "stats"}); err != nil {
			return 0, err
		}
	}
	relay = child.CPU()
	t, err := b.do(child.Command{Op: "send", Addr: a.up.IP, Streams: streams, Seconds: r.p.stream.Seconds()})
	if err != nil {
		return 0, err
	}
	relay = child.CPU() - relay
	for i, p := range []*proc{a, b} {
		if after[i], err = p.do(child.Command{Op: "stats"}); err != nil {
			return 0, err
		}
	}
	gb := float64(t.Bytes) / 1e9
	name += fmt.Sprintf(", %d stream", streams)
	if streams > 1 {
		name += "s"
	}
	peak := 0.0
	if streams == 8 {
		peak = g.peak
	}
	r.add(more(name+": throughput", "Mbit/s", g.rate[streams]), gb*8e3/t.Seconds)
	r.add(less(name+": both nodes' processor time", "s/GB", g.cpu), (after[0].CPU+after[1].CPU-before[0].CPU-before[1].CPU)/gb)
	r.add(less(name+": sender's peak memory", "MB", peak), peakMB(b))
	r.add(less(name+": receiver's peak memory", "MB", peak), peakMB(a))
	return relay / gb, nil
}

func measureDirect(r *round) error {
	return r.direct(overDirect, goals{trip: 0.65, rate: map[int]float64{1: 2.2, 8: 2.8}, cpu: 0.45, peak: 0.05, streams: []int{1, 8, 64}})
}

// measureEthernet has links that carry no more than 1,500 bytes, which loopback's do.
func measureEthernet(r *round) error {
	if !namespaced() {
		return errors.New("needs a network namespace, to change its link")
	}
	mtu := func(n string) error {
		out, err := exec.Command("ip", "link", "set", "lo", "mtu", n).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mtu %s: %w: %s", n, err, out)
		}
		return nil
	}
	if err := mtu("1500"); err != nil {
		return err
	}
	defer mtu("65536")
	return r.direct(overDirect+" over a link of 1,500 bytes", goals{streams: []int{1, 8}})
}

// between runs f with two nodes of the round's side, and ends them.
func (r *round) between(relay harness.RelayMaker, w way, f func(a, b *proc) error) error {
	g, err := r.newGround(relay)
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(r.side, w)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	return f(a, b)
}

// overDirect begins the names of what goes by direct paths.
const overDirect = "direct"

func (r *round) direct(name string, goal goals) error {
	return r.between(harness.UpstreamRelay, direct, func(a, b *proc) error {
		if err := r.traffic(a, b, name, goal); err != nil {
			return err
		}
		return stillDirect(a, b)
	})
}

// measureRelayed has either relay between two nodes that may not take another path.
func measureRelayed(r *round) error {
	streams := []int{1, 8, 64}
	if r.p.quick {
		streams = streams[:2]
	}
	for _, relay := range []struct {
		name  string
		maker harness.RelayMaker
		rate  float64
	}{{"our relay", harness.OurRelay, 4}, {"upstream's relay", harness.UpstreamRelay, 2}} {
		err := r.relayed("by "+relay.name, relay.maker, goals{
			trip: 0.7, rate: map[int]float64{1: relay.rate, 8: relay.rate}, streams: streams,
		})
		if err != nil { // the other relay is still to be measured
			r.fail(r.side.name, fmt.Errorf("%s: %w", relay.name, err))
		}
	}
	return nil
}

func (r *round) relayed(name string, relay harness.RelayMaker, goal goals) error {
	return r.between(relay, relayOnly, func(a, b *proc) error {
		return r.traffic(a, b, name, goal)
	})
}

func measureUDP(r *round) error {
	return r.between(harness.UpstreamRelay, direct, func(a, b *proc) error {
		u, err := b.do(child.Command{Op: "udp", Addr: a.up.IP, Seconds: r.p.stream.Seconds()})
		if err != nil {
			return err
		}
		r.add(more("direct: UDP datagrams of 1,200 bytes that arrive", "1/s", 2), float64(u.Count)/u.Seconds)
		r.add(more("direct: UDP datagrams that were sent, without a pause", "1/s", 0), float64(u.Sent)/u.Seconds)
		return stillDirect(a, b)
	})
}

func measureConnections(r *round) error {
	return r.between(harness.UpstreamRelay, direct, func(a, b *proc) error {
		for _, c := range []struct {
			n    int
			name string
		}{{1, "one at a time"}, {32, "32 at once"}} {
			t, err := b.do(child.Command{Op: "conns", Addr: a.up.IP, Streams: c.n, Seconds: (r.p.stream * 2 / 3).Seconds()})
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			r.add(more("connections opened, used and closed, "+c.name, "1/s", 1.5), float64(t.Count)/t.Seconds)
		}
		return nil
	})
}

// profiles makes CPU profiles of both nodes in a long transfer of one stream, direct and by each relay, in folder dir.
func (r *round) profiles(dir string) error {
	for _, way := range []struct {
		name  string
		relay harness.RelayMaker
		only  bool
	}{{"direct", harness.UpstreamRelay, false}, {"our-relay", harness.OurRelay, true}, {"upstream-relay", harness.UpstreamRelay, true}} {
		if err := r.profiled(dir, way.name, way.relay, way.only); err != nil {
			return err
		}
	}
	return nil
}

func (r *round) profiled(dir, name string, relay harness.RelayMaker, only bool) error {
	g, err := r.newGround(relay)
	if err != nil {
		return err
	}
	defer g.close()
	var nodes [2]*proc
	for i, who := range []string{"receiver", "sender"} {
		nodes[i], err = g.start(r.side, child.Config{
			Hostname: who, RelayOnly: only, Profile: filepath.Join(dir, r.side.dir+"-"+name+"-"+who+".pprof"),
		})
		if err != nil {
			return err
		}
		defer nodes[i].stop()
	}
	wait := directWait
	if only {
		wait = 0
	}
	a, b := nodes[0], nodes[1]
	if _, err := b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: wait.Seconds()}); err != nil {
		return err
	}
	if _, err := a.do(child.Command{Op: "profile", Seconds: r.p.stream.Seconds()}); err != nil {
		return err
	}
	if _, err := b.do(child.Command{Op: "send", Addr: a.up.IP, Streams: 1, Seconds: r.p.stream.Seconds()}); err != nil {
		return err
	}
	time.Sleep(time.Second) // the receiver's profile ends by the clock
	return nil
}

// profile is -profile: instead of measuring.
func profile(dir string, sides []*side, p *plan) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, s := range sides {
		progress("profiles of %s", s.name)
		r := &round{m: &measure{name: "profile"}, p: p, side: s}
		if err := r.profiles(dir); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}
