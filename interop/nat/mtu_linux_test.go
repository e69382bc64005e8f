package nat

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// linkMTU gives the link between the site and the Internet an MTU, at both ends.
func (s *site) linkMTU(n int) {
	s.l.sh("inet", fmt.Sprintf("ip link set s%d mtu %d", s.n, n))
	s.l.sh(s.router(), fmt.Sprintf("ip link set wan mtu %d", n))
}

// jumbo gives all links of the site an MTU.
func (s *site) jumbo(n int) {
	s.linkMTU(n)
	for i := 1; i <= s.nodes; i++ {
		s.l.sh(s.router(), fmt.Sprintf("ip link set n%d mtu %d", i, n))
		s.l.sh(fmt.Sprintf("node%d-%d", s.n, i), fmt.Sprintf("ip link set eth0 mtu %d", n))
	}
	s.l.sh(s.router(), fmt.Sprintf("ip link set lan mtu %d", n))
}

// countSizes counts the UDP packets that come into the site, by size.
func (s *site) countSizes() {
	s.l.nft(s.router(), `table inet sizes {
	chain c {
		type filter hook forward priority -20
		iifname "wan" meta l4proto udp meta length > 1344 counter comment "1344"
		iifname "wan" meta l4proto udp meta length > 1400 counter comment "1400"
		iifname "wan" meta l4proto udp meta length > 1480 counter comment "1480"
		iifname "wan" meta l4proto udp meta length > 1500 counter comment "1500"
		iifname "wan" meta l4proto udp meta length > 8900 counter comment "8900"
	}
}`)
}

var sizeCounter = regexp.MustCompile(`counter packets (\d+) bytes \d+ comment "(\w+)"`)

// sizes returns how many packets were longer than each size. The kernel counts a batch as one packet.
func (s *site) sizes() map[string]int {
	s.l.t.Helper()
	out, err := exec.Command("ip", "netns", "exec", s.l.ns(s.router()), "nft", "list", "table", "inet", "sizes").Output()
	if err != nil {
		s.l.t.Fatal(err)
	}
	m := map[string]int{}
	for _, x := range sizeCounter.FindAllStringSubmatch(string(out), -1) {
		m[x[2]], _ = strconv.Atoi(x[1])
	}
	return m
}

// segmentOff has the links carry packets as a wire would, and not batches of them.
func (s *site) segmentOff() {
	off := func(ns, dev string) {
		s.l.sh(ns, fmt.Sprintf("ip link set %s gso_max_segs 1 gro_max_size 1500 2>/dev/null || ip link set %[1]s gso_max_segs 1", dev))
	}
	for i := 1; i <= s.nodes; i++ {
		off(fmt.Sprintf("node%d-%d", s.n, i), "eth0")
	}
	off(s.router(), "wan")
	off("inet", fmt.Sprintf("s%d", s.n))
}

// mtuPair is two of our nodes with public addresses, and a direct path.
func mtuPair(ctx context.Context, t *testing.T, name string, sender, receiver string) (a, b *proc) {
	t.Helper()
	l := newLab(ctx, t)
	open := kind{name: "public", v4: true}
	var err error
	if a, err = l.node(ctx, l.newSite(open), sender, name+"-a"); err != nil {
		t.Fatal(err)
	}
	if b, err = l.node(ctx, l.newSite(open), receiver, name+"-b"); err != nil {
		t.Fatal(err)
	}
	awaitDirect(ctx, t, a, b)
	a.site.segmentOff()
	b.site.segmentOff()
	return a, b
}

// awaitDirect waits, with a little traffic, until a reaches b directly; on a busy machine a path may be doubted for a moment.
func awaitDirect(ctx context.Context, t *testing.T, a, b *proc) {
	t.Helper()
	var r probeResult
	if err := a.call(ctx, "probe", probeArgs{IP: b.up.IP4, Wait: backWithin}, &r); err != nil {
		t.Fatal(err)
	}
	if r.Direct.IsZero() {
		t.Fatalf("no direct path: %+v", r.Path)
	}
}

// TestMTU: packets are as long as the links between two nodes carry, and where these carry not even the base size,
// nothing is lost.
func TestMTU(t *testing.T) {
	require(t)
	for _, tc := range []struct {
		name             string
		mtu              int
		jumbo            bool
		sender, receiver string
		longer, notAbove string // the counters that must, and must not, have counted
	}{
		{"1500", 1500, false, "ours", "ours", "1480", "1500"},
		{"1400", 1400, false, "ours", "ours", "1344", "1400"},
		{"1300", 1300, false, "ours", "ours", "", "1344"},
		{"9000", 9000, true, "ours", "ours", "8900", ""},
		{"1500 to upstream", 1500, false, "ours", "upstream", "", "1344"},
		{"1500 from upstream", 1500, false, "upstream", "ours", "", "1344"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if testing.Short() && tc.sender+tc.receiver != "oursours" {
				t.Skip("not with -short")
			}
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			a, b := mtuPair(ctx, t, "mtu", tc.sender, tc.receiver)
			if tc.jumbo {
				a.site.jumbo(tc.mtu)
			}
			if b.site.linkMTU(tc.mtu); tc.jumbo {
				b.site.jumbo(tc.mtu)
			}
			b.site.countSizes()
			var n map[string]int
			for tries := 1; ; tries++ { // a transfer may be over before the padded pings are answered
				var r sendResult
				if err := a.call(ctx, "send", sendArgs{b.up.IP4, 16 << 20}, &r); err != nil {
					t.Fatal(err)
				}
				if !r.Same {
					t.Errorf("%d bytes arrived, but not those that were sent", r.Bytes)
				}
				n = b.site.sizes()
				t.Logf("%.0f Mbit/s; packets longer than: %v", float64(r.Bytes)*8e-6/r.Took.Seconds(), n)
				if tc.longer == "" || n[tc.longer] > 0 {
					break
				}
				if tries == 20 {
					t.Fatalf("no packet was longer than %s", tc.longer)
				}
			}
			// A few padded pings, which do not arrive.
			if tc.notAbove != "" && n[tc.notAbove] > 20 {
				t.Errorf("%d packets longer than %s", n[tc.notAbove], tc.notAbove)
			}
			awaitDirect(ctx, t, a, b)
		})
	}
}

// TestMTUBlackHole: a router that begins to swallow what is long, without a word, holds a transfer up for a moment.
func TestMTUBlackHole(t *testing.T) {
	require(t)
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	a, b := mtuPair(ctx, t, "hole", "ours", "ours")
	b.site.countSizes()
	var id int
	if err := a.call(ctx, "stream", streamArgs{b.up.IP4, 8 << 20}, &id); err != nil {
		t.Fatal(err)
	}
	within(ctx, t, "long packets", func() bool { return b.site.sizes()["1480"] > 100 })
	b.site.cut("meta l4proto udp meta length > 1400")
	began := time.Now()
	before := b.site.sizes()["1344"]
	within(ctx, t, "packets of what still passes", func() bool { return b.site.sizes()["1344"] > before+1000 })
	t.Logf("a thousand packets after %v", time.Since(began).Round(time.Millisecond))
	var r sendResult
	if err := a.call(ctx, "stop", id, &r); err != nil {
		t.Fatal(err)
	}
	if !r.Same {
		t.Errorf("%d bytes arrived, but not those that were sent", r.Bytes)
	}
	var longest time.Duration
	for _, s := range r.Stalls {
		longest = max(longest, s.For)
	}
	t.Logf("longest stall %v", longest.Round(time.Millisecond))
	awaitDirect(ctx, t, a, b)
}

// within waits until f is true.
func within(ctx context.Context, t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, context.Cause(ctx))
		}
	}
}
