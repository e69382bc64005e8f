package path

import (
	"container/heap"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/natlab"
)

// sim runs machines against each other over a network with NATs, in virtual time and on one goroutine.
type sim struct {
	t     *testing.T
	now   time.Time
	queue simQueue
	seq   int
	nodes []*simNode
	lab   *natlab.Lab
	tx    uint64
	delay func(from, to netip.AddrPort) (time.Duration, bool) // of a UDP packet; false: lost
	relay time.Duration

	depth, maxDepth int // how many messages have led to what is being done, each to the next
}

type simEvent struct {
	at  time.Time
	seq int
	f   func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at.Before(q[j].at) || q[i].at.Equal(q[j].at) && q[i].seq < q[j].seq
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any {
	x := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return x
}

type simNode struct {
	s     *sim
	mc    *machine
	peer  *simNode
	addrs []netip.AddrPort // own sockets
	noUDP bool

	route      via
	until      time.Time
	heard      time.Time
	lastTold   time.Time
	pings      int
	pongs      int
	calls      int
	directPkts int
	relayPkts  int
	arrived    time.Time
	maxGap     time.Duration
	directAt   time.Time
	ticks      int
	stunAt     time.Time
}

func newSim(t *testing.T) *sim {
	s := &sim{t: t, now: time.Unix(1e9, 0), relay: 20 * time.Millisecond,
		delay: func(_, _ netip.AddrPort) (time.Duration, bool) { return 5 * time.Millisecond, true }}
	s.lab = natlab.New(func() time.Time { return s.now })
	return s
}

// nat puts a box in front of a network.
func (s *sim) nat(inside, outside string, mapping, filtering natlab.Behaviour) *natlab.NAT {
	return s.lab.Add(natlab.Config{Inside: netip.MustParsePrefix(inside), Outside: netip.MustParseAddr(outside),
		Mapping: mapping, Filtering: filtering})
}

func (s *sim) node(addrs ...string) *simNode {
	x := &simNode{s: s}
	for _, a := range addrs {
		x.addrs = append(x.addrs, netip.MustParseAddrPort(a))
	}
	x.mc = newMachine(s.now, func() (tx disco.TxID) {
		s.tx++
		binary.BigEndian.PutUint64(tx[:], s.tx)
		return tx
	})
	s.nodes = append(s.nodes, x)
	return x
}

func (s *sim) after(d time.Duration, f func()) {
	s.seq++
	depth := s.depth + 1
	heap.Push(&s.queue, simEvent{s.now.Add(d), s.seq, func() {
		s.depth = depth
		f()
		s.depth = 0
	}})
}

// endpoints are what a node tells of itself: its own addresses, and the one that a STUN server sees.
func (n *simNode) endpoints() []netip.AddrPort {
	eps := append([]netip.AddrPort(nil), n.addrs...)
	if ext, ok := n.s.lab.Out(n.addrs[0], netip.MustParseAddrPort("9.9.9.9:3478")); ok && ext != n.addrs[0] {
		eps = append(eps, ext)
	}
	return eps
}

// udp carries a packet to the peer, if it gets there; f is told the source as the peer sees it.
func (n *simNode) udp(to netip.AddrPort, f func(src netip.AddrPort)) {
	s, p := n.s, n.peer
	if n.noUDP {
		return
	}
	for _, a := range n.addrs {
		if a.Addr().Is4() != to.Addr().Is4() {
			continue
		}
		src, ok := s.lab.Out(a, to)
		d, passes := s.delay(src, to)
		if !ok || !passes {
			return
		}
		s.after(d, func() {
			if dst, ok := s.lab.In(src, to); ok && !p.noUDP && slices.Contains(p.addrs, dst) {
				f(src)
			}
		})
		return
	}
}

// do carries out what the machine wants.
func (n *simNode) do() {
	s, acts := n.s, n.mc.acts
	n.mc.acts = nil
	for _, a := range acts {
		switch a.kind {
		case sendPing:
			n.pings++
			s.maxDepth = max(s.maxDepth, s.depth)
			if a.to.addr.IsValid() {
				n.udp(a.to.addr, func(src netip.AddrPort) {
					n.peer.mc.gotPing(n.s.now, via{addr: src}, src, &disco.Ping{TxID: a.tx})
					n.peer.do()
				})
			} else {
				n.s.after(n.s.relay, func() {
					n.peer.mc.gotPing(n.s.now, via{region: 1}, netip.AddrPortFrom(derpMagic, 1), &disco.Ping{TxID: a.tx})
					n.peer.do()
				})
			}
		case sendPong:
			n.pongs++
			s.maxDepth = max(s.maxDepth, s.depth)
			if a.to.addr.IsValid() {
				n.udp(a.to.addr, func(src netip.AddrPort) {
					n.peer.mc.gotPong(n.s.now, via{addr: src}, &disco.Pong{TxID: a.tx})
					n.peer.do()
				})
			} else {
				n.s.after(n.s.relay, func() {
					n.peer.mc.gotPong(n.s.now, via{region: 1}, &disco.Pong{TxID: a.tx})
					n.peer.do()
				})
			}
		case sendCall:
			n.calls++
			s.maxDepth = max(s.maxDepth, s.depth)
			eps := n.endpoints()
			n.s.after(n.s.relay, func() {
				n.peer.mc.callMeMaybe(n.s.now, eps)
				n.peer.do()
			})
		case setRoute:
			n.route, n.until = a.to, a.until
			if a.to.addr.IsValid() && n.directAt.IsZero() {
				n.directAt = n.s.now
			}
		case pingAnswer:
			a.req.done <- a.result
		}
	}
}

// data sends one packet of the application's.
func (n *simNode) data() {
	s := n.s
	if s.now.Sub(n.lastTold) >= 250*time.Millisecond {
		n.lastTold = s.now
		n.mc.sending(s.now, n.heard)
		n.do()
	}
	arrive := func() {
		if p := n.peer; !p.arrived.IsZero() {
			p.maxGap = max(p.maxGap, s.now.Sub(p.arrived))
		}
		n.peer.arrived = s.now
	}
	if n.route.addr.IsValid() && s.now.Before(n.until) {
		n.directPkts++
		n.udp(n.route.addr, func(src netip.AddrPort) {
			if src == n.peer.mc.d.best.addr {
				n.peer.heard = s.now
			}
			arrive()
		})
		return
	}
	n.relayPkts++
	s.after(s.relay, arrive)
}

// run lets d pass; every talks each so often in both directions, 0 for silence.
func (s *sim) run(d, every time.Duration) {
	end := s.now.Add(d)
	if every > 0 {
		var talk func()
		talk = func() {
			s.depth = 0 // the application's doing
			for _, n := range s.nodes {
				if s.now.Sub(n.stunAt) >= refreshMin {
					n.stunAt = s.now
					n.endpoints() // keeps the mapping that STUN servers see
				}
				n.data()
			}
			if s.now.Add(every).Before(end) {
				s.after(every, talk)
			}
		}
		s.after(0, talk)
	}
	for {
		next, who := end, (*simNode)(nil)
		if len(s.queue) > 0 && s.queue[0].at.Before(next) {
			next = s.queue[0].at
		}
		for _, n := range s.nodes {
			if t := n.mc.d.directNext(); !t.IsZero() && t.Before(next) {
				next, who = t, n
			}
		}
		if next.Before(s.now) {
			next = s.now
		}
		s.now = next
		switch {
		case who != nil:
			who.ticks++
			if who.ticks > 1_000_000 {
				s.t.Fatal("a machine asks for ticks without end")
			}
			who.mc.alive(who.heard)
			who.mc.tick(s.now)
			who.do()
		case len(s.queue) > 0 && s.queue[0].at.Before(end):
			heap.Pop(&s.queue).(simEvent).f()
		default:
			return
		}
	}
}

// pair joins two nodes that know each other's endpoints from control.
func (s *sim) pair(a, b *simNode) {
	a.peer, b.peer = b, a
	a.mc.endpoints(s.now, b.endpoints())
	b.mc.endpoints(s.now, a.endpoints())
}

func (n *simNode) direct() bool { return n.route.addr.IsValid() && n.s.now.Before(n.until) }

func TestNATPairs(t *testing.T) {
	const ei, ad, apd = natlab.EndpointIndependent, natlab.AddressDependent, natlab.AddressAndPortDependent
	type box struct {
		name            string
		nat             bool
		mapping, filter natlab.Behaviour
	}
	open := box{name: "open"}
	fullCone := box{"full cone", true, ei, ei}
	restricted := box{"address-restricted", true, ei, ad}
	portRestricted := box{"port-restricted", true, ei, apd}
	symmetric := box{"symmetric", true, apd, apd}
	symmetricOpen := box{"symmetric mapping, address filter", true, apd, ad}
	for _, tt := range []struct {
		a, b   box
		direct bool
	}{
		{open, open, true},
		{open, fullCone, true},
		{open, portRestricted, true},
		{open, symmetric, true},
		{fullCone, fullCone, true},
		{fullCone, symmetric, true},
		{restricted, restricted, true},
		{restricted, portRestricted, true},
		{restricted, symmetric, true},
		{portRestricted, portRestricted, true},
		{restricted, symmetricOpen, true},
		{portRestricted, symmetricOpen, false},
		{portRestricted, symmetric, false},
		{symmetric, symmetric, false},
	} {
		for _, swap := range []bool{false, true} {
			a, b := tt.a, tt.b
			if swap {
				a, b = b, a
			}
			t.Run(a.name+" and "+b.name, func(t *testing.T) {
				s := newSim(t)
				mk := func(x box, pub, inside, priv string) *simNode {
					if !x.nat {
						return s.node(pub + ":41641")
					}
					s.nat(inside, pub, x.mapping, x.filter)
					return s.node(priv + ":41641")
				}
				x, y := mk(a, "1.1.1.1", "10.0.0.0/24", "10.0.0.2"), mk(b, "2.2.2.2", "192.168.0.0/24", "192.168.0.2")
				s.pair(x, y)
				s.run(20*time.Second, 50*time.Millisecond)
				if x.direct() != tt.direct || y.direct() != tt.direct {
					t.Fatalf("direct: %v and %v, want %v", x.direct(), y.direct(), tt.direct)
				}
				if tt.direct {
					for _, n := range s.nodes {
						if d := n.directAt.Sub(time.Unix(1e9, 0)); d > 500*time.Millisecond {
							t.Errorf("direct after %v", d)
						}
					}
				}
				if x.maxGap > 100*time.Millisecond || y.maxGap > 100*time.Millisecond {
					t.Errorf("stalled for %v and %v", x.maxGap, y.maxGap)
				}
				// Probes are bounded, whatever the outcome.
				for _, n := range s.nodes {
					if n.pings > 40 || n.calls > 10 {
						t.Errorf("%d pings and %d calls in 20 s", n.pings, n.calls)
					}
				}
			})
		}
	}
}

// TestNetworksOfOneSite: pairs that share a router or a carrier.
func TestNetworksOfOneSite(t *testing.T) {
	const ei, apd = natlab.EndpointIndependent, natlab.AddressAndPortDependent
	for _, tt := range []struct {
		name   string
		boxes  func(*sim)
		a, b   []string
		direct bool
		toA    string // where b sends, if it matters
	}{
		{"one LAN", func(s *sim) { s.nat("10.0.0.0/24", "1.1.1.1", ei, apd) }, []string{"10.0.0.2:1"}, []string{"10.0.0.3:2"}, true, "10.0.0.2:1"},
		{"one LAN behind a symmetric NAT", func(s *sim) { s.nat("10.0.0.0/24", "1.1.1.1", apd, apd) }, []string{"10.0.0.2:1"}, []string{"10.0.0.3:2"}, true, "10.0.0.2:1"},
		{"two homes of one carrier, no hairpin", func(s *sim) {
			s.nat("100.64.0.0/10", "1.1.1.1", ei, apd)
			s.nat("10.0.0.0/24", "100.64.0.1", ei, apd)
			s.nat("10.0.1.0/24", "100.64.0.2", ei, apd)
		}, []string{"10.0.0.2:1"}, []string{"10.0.1.2:2"}, false, ""},
		{"two homes of one carrier, hairpin", func(s *sim) {
			s.lab.Add(natlab.Config{Inside: netip.MustParsePrefix("100.64.0.0/10"), Outside: netip.MustParseAddr("1.1.1.1"), Filtering: apd, Hairpin: true})
			s.nat("10.0.0.0/24", "100.64.0.1", ei, apd)
			s.nat("10.0.1.0/24", "100.64.0.2", ei, apd)
		}, []string{"10.0.0.2:1"}, []string{"10.0.1.2:2"}, true, ""},
		{"homes of two carriers", func(s *sim) {
			s.nat("100.64.0.0/16", "1.1.1.1", ei, apd)
			s.nat("100.65.0.0/16", "2.2.2.2", ei, apd)
			s.nat("10.0.0.0/24", "100.64.0.1", ei, apd)
			s.nat("10.0.1.0/24", "100.65.0.1", ei, apd)
		}, []string{"10.0.0.2:1"}, []string{"10.0.1.2:2"}, true, ""},
		{"symmetric NATs, but IPv6 behind firewalls", func(s *sim) {
			s.nat("10.0.0.0/24", "1.1.1.1", apd, apd)
			s.nat("10.0.1.0/24", "2.2.2.2", apd, apd)
			for _, p := range []string{"2001:db8:1::/48", "2001:db8:2::/48"} {
				s.lab.Add(natlab.Config{Inside: netip.MustParsePrefix(p), Filtering: apd})
			}
		}, []string{"10.0.0.2:1", "[2001:db8:1::1]:1"}, []string{"10.0.1.2:2", "[2001:db8:2::1]:2"}, true, "[2001:db8:1::1]:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSim(t)
			tt.boxes(s)
			x, y := s.node(tt.a...), s.node(tt.b...)
			s.pair(x, y)
			s.run(20*time.Second, 50*time.Millisecond)
			if x.direct() != tt.direct || y.direct() != tt.direct {
				t.Fatalf("direct: %v and %v, want %v", x.direct(), y.direct(), tt.direct)
			}
			if tt.toA != "" && y.route.addr.String() != tt.toA {
				t.Errorf("by %v, want %s", y.route.addr, tt.toA)
			}
		})
	}
}

// TestAsymmetricLoss: a direct path that loses in one direction is used as long as it answers, one that is dead in one direction is not.
func TestAsymmetricLoss(t *testing.T) {
	for _, tt := range []struct {
		name   string
		xy, yx float64
		direct bool
	}{
		{"a fifth, there", 0.2, 0, true},
		{"a fifth, back", 0, 0.2, true},
		{"much there, little back", 0.3, 0.05, true},
		{"dead there", 1, 0, false},
		{"dead back", 0, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSim(t)
			rnd := rand.New(rand.NewPCG(1, 2))
			s.delay = func(from, _ netip.AddrPort) (time.Duration, bool) {
				loss := tt.xy
				if from.Addr() == netip.MustParseAddr("2.2.2.2") {
					loss = tt.yx
				}
				return 5 * time.Millisecond, rnd.Float64() >= loss
			}
			s.nat("10.0.0.0/24", "1.1.1.1", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
			s.nat("192.168.0.0/24", "2.2.2.2", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
			x, y := s.node("10.0.0.2:1"), s.node("192.168.0.2:2")
			s.pair(x, y)
			s.run(time.Minute, 50*time.Millisecond)
			for _, n := range s.nodes {
				if n.directAt.IsZero() == tt.direct {
					t.Errorf("direct at %v", n.directAt)
				}
				if tt.direct && n.directPkts < 10*n.relayPkts {
					t.Errorf("%d packets directly, %d by the relay", n.directPkts, n.relayPkts)
				}
				if n.maxGap > 2*time.Second {
					t.Errorf("stalled for %v", n.maxGap)
				}
			}
		})
	}
}

func TestPathLossAndReturn(t *testing.T) {
	s := newSim(t)
	cut := false
	s.delay = func(_, _ netip.AddrPort) (time.Duration, bool) { return 5 * time.Millisecond, !cut }
	router := s.nat("10.0.0.0/24", "2.2.2.2", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
	x, y := s.node("1.1.1.1:1"), s.node("10.0.0.2:2")
	s.pair(x, y)
	s.run(5*time.Second, 20*time.Millisecond)
	if !x.direct() || !y.direct() {
		t.Fatal("not direct")
	}
	var worst time.Duration
	for i := range 20 {
		x.maxGap, y.maxGap = 0, 0
		switch i % 2 {
		case 0:
			cut = true
		case 1:
			router.Rebind()
		}
		s.run(10*time.Second, 20*time.Millisecond)
		if cut && (x.direct() || y.direct()) {
			t.Fatalf("%d: still direct over a dead path", i)
		}
		cut = false
		s.run(10*time.Second, 20*time.Millisecond)
		if !x.direct() || !y.direct() {
			t.Fatalf("%d: not direct again", i)
		}
		worst = max(worst, x.maxGap, y.maxGap)
	}
	t.Logf("longest stall %v", worst)
	if worst > 2*time.Second {
		t.Errorf("stalled for %v", worst)
	}
}

// TestIdleIsSilent: after traffic ends, nothing is sent and nothing wants to be woken.
func TestIdleIsSilent(t *testing.T) {
	s := newSim(t)
	x, y := s.node("1.1.1.1:1"), s.node("2.2.2.2:2")
	s.pair(x, y)
	s.run(10*time.Second, 50*time.Millisecond)
	s.run(time.Minute, 0)
	pings, ticks := x.pings+y.pings, x.ticks+y.ticks
	s.run(24*time.Hour, 0)
	if x.pings+y.pings != pings || x.ticks+y.ticks != ticks {
		t.Errorf("%d pings and %d ticks while idle", x.pings+y.pings-pings, x.ticks+y.ticks-ticks)
	}
	if x.direct() {
		t.Error("a path is believed in after a day")
	}
	for _, n := range s.nodes {
		if !n.mc.idle(s.now) {
			t.Error("machine is not idle")
		}
	}
	x.directAt = time.Time{}
	start := s.now
	s.run(time.Second, 50*time.Millisecond)
	if d := x.directAt.Sub(start); x.directAt.IsZero() || d > 50*time.Millisecond {
		t.Errorf("direct again after %v", d)
	}
}

func TestOneWayTraffic(t *testing.T) {
	s := newSim(t)
	x, y := s.node("1.1.1.1:1"), s.node("2.2.2.2:2")
	s.pair(x, y)
	for range 600 {
		x.data()
		s.run(50*time.Millisecond, 0)
	}
	if !x.direct() {
		t.Fatal("not direct")
	}
	if x.relayPkts > 2 {
		t.Errorf("%d packets by the relay", x.relayPkts)
	}
	if y.directAt.IsZero() && y.pings > 5 {
		t.Errorf("%d pings by the silent side", y.pings)
	}
	if x.pings > 45 { // one a second to see that the path lives, besides heartbeats
		t.Errorf("%d pings in 30 s", x.pings)
	}
}

func TestPrefersTheBetterPath(t *testing.T) {
	for _, tt := range []struct {
		name         string
		addrsA       []string
		addrsB       []string
		rtt          map[string]time.Duration // by destination
		wantA, wantB string
	}{
		{"faster", []string{"1.1.1.1:1"}, []string{"2.2.2.2:2", "2.2.2.3:2"},
			map[string]time.Duration{"2.2.2.2:2": 30 * time.Millisecond, "2.2.2.3:2": 10 * time.Millisecond}, "2.2.2.3:2", "1.1.1.1:1"},
		{"LAN before public at like speed", []string{"10.0.0.1:1"}, []string{"10.0.0.2:2", "2.2.2.2:2"},
			map[string]time.Duration{}, "10.0.0.2:2", "10.0.0.1:1"},
		{"IPv6 at like speed is not worth a change", []string{"1.1.1.1:1", "[2001:db8::1]:1"}, []string{"2.2.2.2:2", "[2001:db8::2]:2"},
			map[string]time.Duration{}, "2.2.2.2:2", "1.1.1.1:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSim(t)
			s.delay = func(_, to netip.AddrPort) (time.Duration, bool) {
				if d, ok := tt.rtt[to.String()]; ok {
					return d, true
				}
				return 5 * time.Millisecond, true
			}
			x, y := s.node(tt.addrsA...), s.node(tt.addrsB...)
			s.pair(x, y)
			s.run(10*time.Second, 50*time.Millisecond)
			if x.route.addr.String() != tt.wantA || y.route.addr.String() != tt.wantB {
				t.Errorf("%v and %v, want %s and %s", x.route.addr, y.route.addr, tt.wantA, tt.wantB)
			}
		})
	}
}

func TestUpgradesWhenABetterPathAppears(t *testing.T) {
	s := newSim(t)
	fast := false
	s.delay = func(_, to netip.AddrPort) (time.Duration, bool) {
		if to.Port() == 3 {
			return time.Millisecond, fast
		}
		return 20 * time.Millisecond, true
	}
	x, y := s.node("1.1.1.1:1"), s.node("2.2.2.2:2", "2.2.2.2:3")
	s.pair(x, y)
	s.run(10*time.Second, 50*time.Millisecond)
	if x.route.addr.Port() != 2 {
		t.Fatalf("by %v", x.route.addr)
	}
	fast = true
	s.run(2*upgradeEvery, 50*time.Millisecond)
	if x.route.addr.Port() != 3 || x.relayPkts > 2 {
		t.Errorf("by %v, %d packets by the relay", x.route.addr, x.relayPkts)
	}
}

func TestUserPingShowsTheDirectPath(t *testing.T) {
	s := newSim(t)
	x, y := s.node("1.1.1.1:1"), s.node("2.2.2.2:2")
	s.pair(x, y)
	req := &pingRequest{done: make(chan PingResult, 1)}
	x.mc.ping(s.now, req)
	x.do()
	s.run(time.Second, 0)
	if r := <-req.done; r.Addr.String() != "2.2.2.2:2" || r.Latency != 10*time.Millisecond || r.Region != 0 {
		t.Errorf("%+v", r)
	}
	y.noUDP = true
	s.run(time.Minute, 0)
	req = &pingRequest{done: make(chan PingResult, 1)}
	x.mc.ping(s.now, req)
	x.do()
	s.run(time.Second, 0)
	if r := <-req.done; r.Region != 1 || r.Latency != 40*time.Millisecond || r.Addr.IsValid() {
		t.Errorf("%+v", r)
	}
}

func TestNetworkChange(t *testing.T) {
	s := newSim(t)
	x, y := s.node("1.1.1.1:1"), s.node("2.2.2.2:2")
	s.pair(x, y)
	s.run(5*time.Second, 50*time.Millisecond)
	x.addrs = []netip.AddrPort{netip.MustParseAddrPort("3.3.3.3:3")}
	x.mc.changed(s.now)
	x.do()
	if x.direct() {
		t.Error("the old path is still believed in")
	}
	s.run(2*time.Second, 50*time.Millisecond)
	if !x.direct() || y.route.addr.String() != "3.3.3.3:3" || !y.direct() {
		t.Errorf("direct %v, and %v by %v", x.direct(), y.direct(), y.route.addr)
	}
}

func TestCandidateBounds(t *testing.T) {
	now := time.Unix(1e9, 0)
	mc := newMachine(now, func() disco.TxID { return disco.TxID{} })
	var many []netip.AddrPort
	for i := range 1000 {
		many = append(many, netip.AddrPortFrom(netip.AddrFrom4([4]byte{1, 1, byte(i >> 8), byte(i)}), 1))
	}
	mc.endpoints(now, many)
	mc.callMeMaybe(now.Add(time.Second), many[500:])
	for i, ap := range many {
		ap = netip.AddrPortFrom(netip.AddrFrom4([4]byte{2, 2, byte(i >> 8), byte(i)}), 2)
		mc.gotPing(now.Add(time.Duration(i)*time.Second), via{addr: ap}, ap, &disco.Ping{})
	}
	if n := len(mc.d.cands); n > 2*maxListed+maxObserved {
		t.Errorf("%d candidates", n)
	}
	if len(mc.sent) > maxSent {
		t.Errorf("%d pings remembered", len(mc.sent))
	}
	mc.endpoints(now, nil)
	mc.callMeMaybe(now.Add(time.Hour), nil)
	if n := len(mc.d.cands); n > maxObserved {
		t.Errorf("%d candidates after both lists are empty", n)
	}
	for _, bad := range []string{"0.0.0.0:1", "1.2.3.4:0", "224.0.0.1:5", "127.3.3.40:1", "[::]:1", "[ff02::1]:1",
		"[fd7a:115c:a1e0::5]:41641", "[::ffff:1.2.3.4]:5"} {
		if usable(netip.MustParseAddrPort(bad)) {
			t.Errorf("%s is taken for an endpoint", bad)
		}
	}
}

func TestCallsAreRateLimited(t *testing.T) {
	now := time.Unix(1e9, 0)
	mc := newMachine(now, func() disco.TxID { return disco.TxID{} })
	eps := []netip.AddrPort{netip.MustParseAddrPort("1.1.1.1:1")}
	for i := range 1000 {
		mc.callMeMaybe(now.Add(time.Duration(i)*time.Millisecond), eps)
	}
	if n := len(mc.acts); n > 4 {
		t.Errorf("%d pings for 1000 calls in a second", n)
	}
}

// behind is what a node of a random topology is behind of.
type behind struct {
	kind            string // "open", "NAT" or "firewall"
	mapping, filter natlab.Behaviour
	v6              bool // behind a firewall, besides
	noUDP           bool
}

// mustFind reports whether there is a direct path, each of the two pinging all that the other and a STUN server say of it.
func mustFind(a, b behind) bool {
	const ei, apd = natlab.EndpointIndependent, natlab.AddressAndPortDependent
	switch {
	case a.noUDP || b.noUDP:
		return false
	case a.v6 && b.v6, a.kind == "open" || b.kind == "open":
		return true
	case a.mapping == ei && b.mapping == ei:
		return true
	}
	// The one whose mapping is not what STUN says is seen at another port, which the other's filter must not mind.
	return a.mapping == ei && a.filter != apd || b.mapping == ei && b.filter != apd
}

// TestRandomTopologies holds what must be true whatever the network is like: a path that exists is found within a bound, data never
// stalls meanwhile, messages do not breed messages, probes per peer and minute are bounded, and silence follows traffic.
func TestRandomTopologies(t *testing.T) {
	count := 1000
	if testing.Short() {
		count = 100
	}
	const (
		foundWithin    = 15 * time.Second // with up to a quarter of the packets lost, in each direction its own share
		probesAMinute  = 600              // pings, pongs and call-me-maybes of one node
		longestLineage = 4                // a call-me-maybe makes a ping, that one back and a pong, and that a last pong
	)
	start := time.Unix(1e9, 0)
	var late time.Duration
	var most, direct, found int
	for seed := range count {
		rnd := rand.New(rand.NewPCG(uint64(seed), 7))
		s := newSim(t)
		s.relay = time.Duration(5+rnd.IntN(150)) * time.Millisecond
		lat := time.Duration(1+rnd.IntN(100)) * time.Millisecond
		var x, y *simNode
		loss := [2]float64{rnd.Float64() * 0.25, rnd.Float64() * 0.25}
		s.delay = func(from, _ netip.AddrPort) (time.Duration, bool) {
			l := loss[0]
			if a := from.Addr(); a == netip.MustParseAddr("2.2.2.2") || a == netip.MustParseAddr("2001:db8:2::2") {
				l = loss[1]
			}
			return lat + time.Duration(rnd.IntN(5))*time.Millisecond, rnd.Float64() >= l
		}
		behaviour := func() natlab.Behaviour { return natlab.Behaviour(rnd.IntN(3)) }
		mk := func(pub, inside, priv, net6, addr6 string) (*simNode, behind) {
			b := behind{kind: [...]string{"open", "NAT", "NAT", "NAT", "firewall"}[rnd.IntN(5)], v6: rnd.IntN(6) == 0, noUDP: rnd.IntN(12) == 0}
			addrs := []string{pub + ":41641"}
			switch b.kind {
			case "NAT":
				b.mapping, b.filter = behaviour(), behaviour()
				cfg := natlab.Config{Inside: netip.MustParsePrefix(inside), Outside: netip.MustParseAddr(pub), Mapping: b.mapping, Filtering: b.filter,
					Hairpin: rnd.IntN(2) == 0, PreservePort: rnd.IntN(2) == 0, Timeout: time.Duration(30+rnd.IntN(90)) * time.Second}
				s.lab.Add(cfg)
				addrs[0] = priv + ":41641"
			case "firewall":
				b.filter = natlab.AddressAndPortDependent
				s.lab.Add(natlab.Config{Inside: netip.MustParsePrefix(pub + "/32"), Filtering: b.filter})
			}
			if b.v6 {
				s.lab.Add(natlab.Config{Inside: netip.MustParsePrefix(net6), Filtering: natlab.AddressAndPortDependent})
				addrs = append(addrs, "["+addr6+"]:41641")
			}
			n := s.node(addrs...)
			n.noUDP = b.noUDP
			return n, b
		}
		x, bx := mk("1.1.1.1", "10.0.0.0/24", "10.0.0.2", "2001:db8:1::/48", "2001:db8:1::2")
		y, by := mk("2.2.2.2", "192.168.0.0/24", "192.168.0.2", "2001:db8:2::/48", "2001:db8:2::2")
		s.pair(x, y)
		must := mustFind(bx, by)
		for _, every := range []time.Duration{100 * time.Millisecond, 300 * time.Millisecond} {
			var before [2]int
			for i, n := range s.nodes {
				before[i] = n.pings + n.pongs + n.calls
			}
			s.run(time.Minute, every)
			for i, n := range s.nodes {
				sent := n.pings + n.pongs + n.calls - before[i]
				if most = max(most, sent); sent > probesAMinute {
					t.Errorf("seed %d: %d messages in a minute", seed, sent)
				}
			}
		}
		for _, n := range s.nodes {
			switch d := n.directAt.Sub(start); {
			case n.directAt.IsZero() && must:
				t.Errorf("seed %d: no direct path between %+v and %+v", seed, bx, by)
			case n.directAt.IsZero():
			case must:
				if late = max(late, d); d > foundWithin {
					t.Errorf("seed %d: direct after %v", seed, d)
				}
				found++
			case bx.noUDP || by.noUDP:
				t.Errorf("seed %d: direct without UDP", seed)
			}
			// Lost data is loss, not a stall: what counts is that packets keep arriving. Where both mappings vary, each may send by one
			// that nothing keeps open, and notice late.
			worst := 2500 * time.Millisecond
			if bx.mapping != natlab.EndpointIndependent && by.mapping != natlab.EndpointIndependent {
				worst = 4 * time.Second
			}
			if n.maxGap > worst {
				t.Errorf("seed %d: stalled for %v", seed, n.maxGap)
			}
		}
		if must {
			direct++
		}
		if s.maxDepth > longestLineage {
			t.Errorf("seed %d: a message that %d others led to", seed, s.maxDepth)
		}
		s.run(2*time.Minute, 0)
		sent, ticks := 0, 0
		for _, n := range s.nodes {
			sent, ticks = sent-n.pings-n.pongs-n.calls, ticks-n.ticks
		}
		s.run(time.Hour, 0)
		for _, n := range s.nodes {
			sent, ticks = sent+n.pings+n.pongs+n.calls, ticks+n.ticks
		}
		if sent != 0 || ticks != 0 || len(s.queue) != 0 {
			t.Errorf("seed %d: %d messages and %d timers in silence", seed, sent, ticks)
		}
	}
	t.Logf("%d topologies, %d with a direct path: the last was found after %v; at most %d messages of a node in a minute", count, direct, late, most)
}
