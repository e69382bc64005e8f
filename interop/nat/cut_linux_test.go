package nat

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

// fault is something that befalls a path while a transfer goes over it.
type fault struct {
	name string
	// outage is for how long nothing at all can pass; such a stall is nobody's fault.
	outage time.Duration
	// do lets it happen, waits out its time, and repairs what is to be repaired.
	do func(a, b *proc, round int)
}

const (
	cutFor  = 2500 * time.Millisecond
	darkFor = 1500 * time.Millisecond
	settle  = 2 * time.Second
	// backWithin bounds the time until a path is direct again.
	backWithin = 30 * time.Second
	rateOfIt   = 2 << 20 // bytes a second
)

// Stalls are told and not judged: how long they are depends on what else the machine does, and upstream's node gives a path up
// 6.5 s after the last pong, until when its side of the transfer is lost.

var cuts = []fault{
	{name: "UDP cut for a while", do: func(_, b *proc, _ int) {
		b.site.cut("meta l4proto udp")
		<-time.After(cutFor)
		b.site.mend()
	}},
	{name: "sender's NAT rebound", do: func(a, _ *proc, round int) { a.site.rebind(20000 + 1000*round) }},
	{name: "receiver's NAT rebound", do: func(_, b *proc, round int) { b.site.rebind(20000 + 1000*round) }},
	{name: "UDP cut one way", do: func(_, b *proc, _ int) {
		b.site.cut(`iifname "wan" meta l4proto udp`)
		<-time.After(cutFor)
		b.site.mend()
	}},
	{name: "sender offline", outage: darkFor, do: func(a, _ *proc, _ int) {
		a.site.l.sh(a.site.router(), "ip link set lan down")
		<-time.After(darkFor)
		a.site.l.sh(a.site.router(), "ip link set lan up")
	}},
}

// roams change a node's address, as another Wi-Fi does, or its link, or its way out, or have it sleep.
var roams = []fault{
	{name: "sender moves", do: func(a, _ *proc, _ int) { move(a) }},
	{name: "receiver moves", do: func(_, b *proc, _ int) { move(b) }},
	{name: "sender's link goes and comes", outage: darkFor, do: func(a, _ *proc, _ int) { flap(a) }},
	{name: "receiver's link goes and comes", outage: darkFor, do: func(_, b *proc, _ int) { flap(b) }},
	{name: "sender's way out is another", do: func(a, _ *proc, _ int) { reroute(a) }},
	{name: "receiver's way out is another", do: func(_, b *proc, _ int) { reroute(b) }},
	{name: "sender sleeps", outage: sleepFor, do: func(a, _ *proc, _ int) { sleep(a) }},
	{name: "receiver sleeps", outage: sleepFor, do: func(_, b *proc, _ int) { sleep(b) }},
}

// sleepFor is long enough for the sleeper to notice by the clock alone.
const sleepFor = 32 * time.Second

// ways is what a host's addresses are: on eth0, or on eth1 once it has that.
func ways(p *proc) (dev string, net int) {
	out, _ := exec.Command("ip", "-n", p.site.l.ns(p.host), "-4", "route", "show", "default").Output()
	f := strings.Fields(string(out))
	for i := range f {
		switch {
		case f[i] == "dev" && i+1 < len(f):
			dev = f[i+1]
		case strings.HasPrefix(f[i], "192.168."):
			fmt.Sscanf(f[i], "192.168.%d.1", &net)
		}
	}
	return dev, net
}

// flap takes the link away and gives it back; a host without a manager of its network loses its routes by that.
func flap(p *proc) {
	dev, net := ways(p)
	p.site.l.sh(p.host, "ip link set "+dev+" down")
	<-time.After(darkFor)
	p.site.l.sh(p.host, fmt.Sprintf("ip link set %s up\nip route add default via 192.168.%d.1 dev %s", dev, net, dev))
}

// reroute changes the default route to the host's other interface, which it gets the first time. Its addresses stay.
func reroute(p *proc) {
	l := p.site.l
	if exec.Command("ip", "-n", l.ns(p.host), "link", "show", "eth1").Run() != nil {
		other := fmt.Sprintf("o%s", strings.TrimPrefix(p.host, "node"))
		l.sh("", fmt.Sprintf("ip -n %s link add %s type veth peer name eth1 netns %s", l.ns(p.site.router()), other, l.ns(p.host)))
		l.sh(p.site.router(), fmt.Sprintf("ip addr add 192.168.3.1/24 dev %[1]s\nip link set %[1]s up", other))
		l.sh(p.host, "ip link set eth1 up\nip addr add 192.168.3.10/24 dev eth1")
	}
	if dev, net := ways(p); dev == "eth0" {
		p.way = net
		l.sh(p.host, "ip route replace default via 192.168.3.1 dev eth1")
	} else {
		l.sh(p.host, fmt.Sprintf("ip route replace default via 192.168.%d.1 dev eth0", p.way))
	}
}

// sleep stops the process, as a host that sleeps does, while the world goes on.
func sleep(p *proc) {
	p.signal(syscall.SIGSTOP)
	<-time.After(sleepFor)
	p.signal(syscall.SIGCONT)
}

func move(p *proc) {
	from, to := 1, 2
	if p.moved {
		from, to = 2, 1
	}
	p.moved = !p.moved
	p.site.l.sh(p.host, fmt.Sprintf(`
		ip addr del 192.168.%d.10/24 dev eth0
		ip addr add 192.168.%d.10/24 dev eth0
		ip route replace default via 192.168.%[2]d.1`, from, to))
}

// TestCuts: a transfer outlives twenty cuts, and nothing of it is lost.
func TestCuts(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 5
	}
	testFaults(t, cuts, rounds)
}

// TestRoaming: a transfer outlives that either end moves to another network, loses its link, gets another way out, or sleeps.
func TestRoaming(t *testing.T) {
	rounds := len(roams)
	if testing.Short() {
		rounds = 4
	}
	testFaults(t, roams, rounds)
}

func testFaults(t *testing.T, faults []fault, rounds int) {
	require(t)
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := newLab(ctx, t)
	pairs := [][2]string{{"ours", "ours"}}
	if !testing.Short() {
		pairs = append(pairs, [2]string{"ours", "upstream"}, [2]string{"upstream", "ours"})
	}
	if os.Getenv("INTEROP_BASELINE") != "" {
		pairs = append(pairs, [2]string{"upstream", "upstream"})
	}
	t.Run("pairs", func(t *testing.T) { // returns when the parallel ones have
		for _, p := range pairs {
			t.Run(p[0]+"-"+p[1], func(t *testing.T) {
				t.Parallel()
				testFaultsOf(ctx, t, l, p[0], p[1], faults, rounds)
			})
		}
	})
}

func testFaultsOf(ctx context.Context, t *testing.T, l *lab, sender, receiver string, faults []fault, rounds int) {
	ours := sender == "ours" && receiver == "ours"
	home := kind{name: "cone", v4: true, nat: cone}
	name := sender + "-" + receiver
	a, err := l.node(ctx, l.newSite(home), sender, name+"-a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.node(ctx, l.newSite(home), receiver, name+"-b")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range [][2]*proc{{a, b}, {b, a}} {
		if err := harness.Until(ctx, "the nodes to know each other", func() (bool, error) {
			r, err := p[0].path(ctx, p[1])
			return err == nil && r.Relay != "", nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	awaitDirect := func() error {
		for _, p := range [][2]*proc{{a, b}, {b, a}} {
			var r probeResult
			if err := p[0].call(ctx, "await", probeArgs{IP: p[1].up.IP4, Wait: backWithin}, &r); err != nil {
				return err
			}
			if r.Direct.IsZero() {
				return fmt.Errorf("%s does not come back to a direct path: %+v", p[0].name, r.Path)
			}
		}
		return nil
	}
	var id int
	if err := a.call(ctx, "stream", streamArgs{b.up.IP4, rateOfIt}, &id); err != nil {
		t.Fatal(err)
	}
	if err := awaitDirect(); err != nil {
		t.Fatal(err)
	}
	for _, p := range [][2]*proc{{a, b}, {b, a}} {
		if err := p[0].call(ctx, "watch", p[1].up.IP4, nil); err != nil {
			t.Fatal(err)
		}
	}
	type event struct {
		*fault
		at, mended time.Time
	}
	var events []event
	for i := range rounds {
		f := &faults[i%len(faults)]
		e := event{fault: f, at: time.Now()}
		f.do(a, b, i)
		e.mended = time.Now()
		<-time.After(settle) // a broken path is believed in for a moment
		// A moved node that keeps its port finds its old one taken in the NAT, and another per destination: there need
		// not be a direct path for upstream's.
		if err := awaitDirect(); err != nil && ours {
			t.Errorf("after round %d, %s: %v", i, f.name, err)
		}
		<-time.After(settle / 2)
		events = append(events, e)
	}
	var r sendResult
	if err := a.call(ctx, "stop", id, &r); err != nil {
		t.Fatal(err)
	}
	if !r.Same {
		t.Errorf("%d bytes arrived, but not those that were sent", r.Bytes)
	}
	var changes [2][]change
	for i, p := range []*proc{a, b} {
		if err := p.call(ctx, "changes", nil, &changes[i]); err != nil {
			t.Fatal(err)
		}
	}

	longest := map[string]time.Duration{}
	for i, e := range events {
		end := time.Now()
		if i+1 < len(events) {
			end = events[i+1].at
		}
		var list []string
		for _, s := range r.Stalls {
			if at := s.At.Add(stallFrom); at.Before(e.at) || !at.Before(end) {
				continue
			}
			list = append(list, s.For.Round(time.Millisecond).String())
			d := s.For - e.outage
			longest[e.name] = max(longest[e.name], d)
		}
		t.Logf("round %2d: %-30s sender %-35s receiver %-35s stalls %s", i, e.name, course(changes[0], e.at, e.mended, end),
			course(changes[1], e.at, e.mended, end), strings.Join(list, " "))
	}
	t.Logf("%s: %d MB in %v, nothing lost", name, r.Bytes>>20, r.Took.Round(time.Millisecond))
	var sum []string
	for _, f := range faults {
		s := fmt.Sprintf("%s %v", f.name, longest[f.name].Round(time.Millisecond))
		if f.outage > 0 {
			s += fmt.Sprintf(" beyond the %v", f.outage)
		}
		if !slices.Contains(sum, s) {
			sum = append(sum, s)
		}
	}
	t.Logf("%s: longest stalls: %s", name, strings.Join(sum, "; "))
}

// course says what became of a path between from and end: when it left what it was and, after the repair, was direct again.
func course(changes []change, from, mended, end time.Time) string {
	var left, direct time.Time
	for _, c := range changes {
		if c.At.Before(from) || c.At.After(end) {
			continue
		}
		if left.IsZero() {
			left = c.At
		}
		direct = time.Time{}
		if c.Addr != "" {
			direct = c.At
		}
	}
	switch {
	case left.IsZero():
		return "stays"
	case direct.IsZero():
		return fmt.Sprintf("changes at %.1f s", left.Sub(from).Seconds())
	}
	return fmt.Sprintf("changes at %.1f s, direct at %+.1f s", left.Sub(from).Seconds(), direct.Sub(mended).Seconds())
}
