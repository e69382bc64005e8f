package nat

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

// kinds are the networks that the pairs are made of.
var kinds = []kind{
	{name: "open", v4: true},
	{name: "firewall", v4: true, fw: true},
	{name: "cone", v4: true, nat: cone},
	{name: "cgnat", v4: true, nat: cone, carrier: true},
	{name: "symmetric", v4: true, nat: symmetric},
	{name: "noudp", v4: true, nat: cone, noUDP: true},
	{name: "v6", v6: true},
	{name: "v6fw", v6: true, fw: true},
	{name: "dual", v4: true, nat: symmetric, v6: true, fw: true},
}

// haveDirect says whether there is a direct path between nodes in networks of these kinds: whether what the one learns of its
// own addresses is of use to the other, through what either lets in.
func haveDirect(a, b kind) bool {
	if a.noUDP || b.noUDP {
		return false
	}
	if a.v6 && b.v6 {
		return true // firewalls let in what answers, and both send
	}
	if !a.v4 || !b.v4 {
		return false
	}
	open := func(k kind) bool { return k.nat == public && !k.fw }
	switch {
	case open(a) || open(b):
		return true // the other comes to it, from wherever that seems to be
	case a.nat == symmetric || b.nat == symmetric:
		return false // it comes from a port that the other's filter has not heard of
	}
	return true
}

const (
	// directWithin bounds the time to a direct path, generously: the machine may be busy.
	directWithin = 10 * time.Second
	// relayFor is how long a pair without a direct path is watched for finding one.
	relayFor = 2500 * time.Millisecond
	pairSize = 2 << 20
	// atOnce is how many things are done at a time that should be quick, manyAtOnce those that mostly wait.
	atOnce     = 3
	manyAtOnce = 16
)

type result struct {
	dialer, listener *proc
	probe            probeResult
	back             time.Duration // until the listener's path was direct too
	want             bool
	mbps             float64
}

// TestPairs is the table: every kind of network with every other, our node with ours, and with upstream's both ways.
func TestPairs(t *testing.T) {
	require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := newLab(ctx, t)
	ks := kinds
	if testing.Short() {
		ks = slices.DeleteFunc(slices.Clone(ks), func(k kind) bool {
			return k.name != "cone" && k.name != "symmetric" && k.name != "v6fw"
		})
	}
	groups := []string{"a-ours", "b-ours", "c-upstream"}
	baseline := os.Getenv("INTEROP_BASELINE") != ""
	if baseline {
		groups = append(groups, "d-upstream")
	}
	nodes := map[string][]*proc{}
	began := time.Now()
	made := inParallel(t, 2*atOnce)
	for _, g := range groups {
		row := make([]*proc, len(ks))
		nodes[g] = row
		for i, k := range ks {
			made.run(func() error {
				n, err := l.node(ctx, l.newSite(k), g[2:], g+"-"+k.name)
				row[i] = n
				return err
			})
		}
	}
	made.wait()
	if t.Failed() {
		return
	}
	for _, g := range groups { // everybody has heard of everybody
		for _, n := range nodes[g] {
			for _, h := range groups {
				for _, m := range nodes[h] {
					if m == n {
						continue
					}
					if err := harness.Until(ctx, n.name+" to know "+m.name, func() (bool, error) {
						p, err := n.path(ctx, m)
						return err == nil && p.Relay != "", nil
					}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	t.Logf("%d nodes in %d networks after %v", len(groups)*len(ks), l.sites, time.Since(began).Round(time.Millisecond))

	type pair struct{ dialer, listener *proc }
	var pairs []pair
	for i := range ks {
		for j := range ks {
			a, b, c := nodes["a-ours"], nodes["b-ours"], nodes["c-upstream"]
			if i <= j {
				pairs = append(pairs, pair{a[i], b[j]})
			}
			if (i+j)%2 == 0 {
				pairs = append(pairs, pair{a[i], c[j]})
			} else {
				pairs = append(pairs, pair{c[j], a[i]})
			}
			if baseline && i <= j {
				pairs = append(pairs, pair{c[i], nodes["d-upstream"][j]})
			}
		}
	}
	var mu sync.Mutex
	var results []result
	quick, slow := inParallel(t, atOnce), inParallel(t, manyAtOnce)
	check := func(group *parallel, p pair) {
		group.run(func() error {
			r, err := checkPair(ctx, p.dialer, p.listener)
			if err != nil {
				return fmt.Errorf("%s dials %s: %w", p.dialer.name, p.listener.name, err)
			}
			mu.Lock()
			results = append(results, r)
			mu.Unlock()
			return nil
		})
	}
	for _, direct := range []bool{true, false} { // one after the other: the times of the direct ones are of interest
		for _, p := range pairs {
			switch {
			case haveDirect(p.dialer.site.kind, p.listener.site.kind) != direct:
			case direct:
				check(quick, p)
			default:
				check(slow, p)
			}
		}
		quick.wait()
		slow.wait()
	}
	logTable(t, results)
}

// parallel runs functions, so many at a time, and makes their errors a test's.
type parallel struct {
	t    *testing.T
	wg   sync.WaitGroup
	room chan struct{}
}

func inParallel(t *testing.T, n int) *parallel { return &parallel{t: t, room: make(chan struct{}, n)} }

func (p *parallel) wait() { p.wg.Wait() }

func (p *parallel) run(f func() error) {
	p.wg.Go(func() {
		p.room <- struct{}{}
		defer func() { <-p.room }()
		if err := f(); err != nil {
			p.t.Error(err)
		}
	})
}

func checkPair(ctx context.Context, dialer, listener *proc) (result, error) {
	return meet(ctx, dialer, listener, haveDirect(dialer.site.kind, listener.site.kind))
}

// meet has one dial the other: they are to come to a direct path, or not, in both directions, and to exchange what they are to.
func meet(ctx context.Context, dialer, listener *proc, direct bool) (result, error) {
	r := result{dialer: dialer, listener: listener, want: direct}
	wait := relayFor
	if r.want {
		wait = directWithin
	}
	var back probeResult
	backDone := make(chan error, 1)
	go func() { backDone <- listener.call(ctx, "await", probeArgs{IP: dialer.up.IP4, Wait: wait}, &back) }()
	if err := dialer.call(ctx, "probe", probeArgs{IP: listener.up.IP4, Wait: wait}, &r.probe); err != nil {
		return r, err
	}
	if err := <-backDone; err != nil {
		return r, err
	}
	if !back.Direct.IsZero() {
		r.back = back.Direct.Sub(r.probe.Began)
	}
	var sent sendResult
	if err := dialer.call(ctx, "send", sendArgs{listener.up.IP4, pairSize}, &sent); err != nil {
		return r, err
	}
	if !sent.Same {
		return r, fmt.Errorf("%d bytes arrived of %d, or not the same", sent.Bytes, pairSize)
	}
	r.mbps = pairSize * 8 / sent.Took.Seconds() / 1e6
	there, andBack := !r.probe.Direct.IsZero(), r.back != 0
	switch {
	case r.want && !(there && andBack):
		return r, fmt.Errorf("not direct after %v: %+v, and back %+v", wait, r.probe.Path, back.Path)
	case !r.want && (there || andBack):
		return r, fmt.Errorf("direct, which should not be: %+v, and back %+v", r.probe.Path, back.Path)
	}
	return r, nil
}

func logTable(t *testing.T, results []result) {
	slices.SortFunc(results, func(a, b result) int {
		return strings.Compare(a.dialer.who+a.listener.who+a.dialer.name+a.listener.name, b.dialer.who+b.listener.who+b.dialer.name+b.listener.name)
	})
	times := map[string][]time.Duration{}
	for _, r := range results {
		path := "relay"
		if !r.probe.Direct.IsZero() {
			d := r.probe.Direct.Sub(r.probe.Began)
			path = fmt.Sprintf("direct after %4d ms, back %4d ms", d.Milliseconds(), r.back.Milliseconds())
			who := r.dialer.who + " dials " + r.listener.who
			times[who] = append(times[who], d)
			times[who+", back"] = append(times[who+", back"], r.back)
		}
		t.Logf("%-8s %-9s -> %-8s %-9s  dial %4d ms  %-35s %6.0f Mbit/s",
			r.dialer.who, r.dialer.site.kind.name, r.listener.who, r.listener.site.kind.name, r.probe.Dial.Milliseconds(), path, r.mbps)
	}
	for _, who := range slices.Sorted(maps.Keys(times)) {
		d := times[who]
		slices.Sort(d)
		slow := 0
		for _, x := range d {
			if x > time.Second {
				slow++
			}
		}
		t.Logf("%s: %d direct, median %v, longest %v, %d after more than 1 s", who, len(d), d[len(d)/2].Round(time.Millisecond), d[len(d)-1].Round(time.Millisecond), slow)
	}
}
