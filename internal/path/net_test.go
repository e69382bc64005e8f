package path

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/natlab"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestManagersBehindNATs(t *testing.T) {
	const ei, ad, apd = natlab.EndpointIndependent, natlab.AddressDependent, natlab.AddressAndPortDependent
	type box struct {
		name            string
		nat             bool
		mapping, filter natlab.Behaviour
		blocked         bool
	}
	open := box{name: "open"}
	fullCone := box{"full cone", true, ei, ei, false}
	restricted := box{"address-restricted", true, ei, ad, false}
	portRestricted := box{"port-restricted", true, ei, apd, false}
	symmetric := box{"symmetric", true, apd, apd, false}
	symmetricOpen := box{"symmetric mapping, address filter", true, apd, ad, false}
	blocked := box{"UDP blocked", true, ei, ei, true}
	for _, tt := range []struct {
		a, b   box
		direct bool
		why    string
	}{
		{open, open, true, ""},
		{open, fullCone, true, ""},
		{open, portRestricted, true, ""},
		{open, symmetric, true, ""},
		{fullCone, fullCone, true, ""},
		{fullCone, symmetric, true, ""},
		{restricted, restricted, true, ""},
		{restricted, symmetric, true, ""},
		{portRestricted, portRestricted, true, ""},
		{restricted, symmetricOpen, true, ""},
		{portRestricted, symmetricOpen, false, "answers on none"},
		{portRestricted, symmetric, false, "answers on none"},
		{symmetric, symmetric, false, "answers on none"},
		{blocked, open, false, "blocked"},
		{blocked, blocked, false, "blocked"},
	} {
		t.Run(tt.a.name+" and "+tt.b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newInternet(t)
				mk := func(x box, pub, inside, priv string) *inode {
					if !x.nat {
						return w.node(nodeOpts{}, pub)
					}
					w.nat(inside, pub, x.mapping, x.filter).SetBlockUDP(x.blocked)
					return w.node(nodeOpts{}, priv)
				}
				a, b := mk(tt.a, "1.1.1.1", "10.0.0.0/24", "10.0.0.2"), mk(tt.b, "2.2.2.2", "192.168.0.0/24", "192.168.0.2")
				w.pair(a, b)
				start := time.Now()
				w.talk(15*time.Second, 20*time.Millisecond, a, b)
				for _, n := range []*inode{a, b} {
					pi := n.m.Path(n.peer.key)
					if n.direct() != tt.direct {
						t.Fatalf("path %+v, want direct %v", pi, tt.direct)
					}
					if tt.direct {
						if d := n.directAt.Sub(start); d > 500*time.Millisecond {
							t.Errorf("direct after %v", d)
						} else {
							t.Logf("direct after %v, %d packets by relay", d, n.byRelay)
						}
						if pi.WhyNotDirect != "" || pi.RTT < 9*time.Millisecond || pi.RTT > 15*time.Millisecond || pi.Since.Before(start) {
							t.Errorf("path %+v", pi)
						}
					}
					if n.maxGap > 100*time.Millisecond {
						t.Errorf("stalled for %v", n.maxGap)
					}
				}
				if why := a.m.Path(b.key).WhyNotDirect; !strings.Contains(why, tt.why) {
					t.Errorf("why not direct: %q", why)
				}
			})
		})
	}
}

// TestCutRebindRestore is a steady flow whose path is taken away and given back, twenty times and in several ways.
func TestCutRebindRestore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		router := w.nat("10.0.0.0/24", "2.2.2.2", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "10.0.0.2")
		w.pair(a, b)
		cut := false
		w.net.SetLink(func(_, _ netip.AddrPort, _ bool) memnet.Link {
			return memnet.Link{Latency: 5 * time.Millisecond, Down: cut}
		})
		w.talk(3*time.Second, 20*time.Millisecond, a, b)
		if !a.direct() || !b.direct() {
			t.Fatal("not direct")
		}
		var worst time.Duration
		for i := range 20 {
			a.resetGap()
			b.resetGap()
			what := ""
			switch i % 4 {
			case 0:
				what, cut = "cut", true
			case 1:
				what = "NAT rebound"
				w.net.SetLink(func(_, _ netip.AddrPort, _ bool) memnet.Link {
					return memnet.Link{Latency: 5 * time.Millisecond, Down: cut}
				}) // takes the network's lock, under which the router is used
				router.Rebind()
			case 2:
				what = "sockets rebound"
				if err := b.socks.Rebind(); err != nil {
					t.Fatal(err)
				}
				b.m.NetworkChanged()
			case 3:
				what = "link change without a new address"
				a.m.NetworkChanged()
			}
			w.talk(8*time.Second, 20*time.Millisecond, a, b)
			if cut && (a.direct() || b.direct()) {
				t.Fatalf("%d: still direct over a dead path", i)
			}
			cut = false
			w.talk(8*time.Second, 20*time.Millisecond, a, b)
			if !a.direct() || !b.direct() {
				t.Fatalf("%d: not direct again after %s: %+v, %+v", i, what, a.m.Path(b.key), b.m.Path(a.key))
			}
			gap := max(a.maxGap, b.maxGap)
			worst = max(worst, gap)
			t.Logf("%s: stalled for %v", what, gap)
			if gap > 1700*time.Millisecond {
				t.Errorf("%d: stalled for %v after %s", i, gap, what)
			}
		}
		t.Logf("longest stall %v", worst)
	})
}

// TestIdleNodesAreSilent: when the traffic has ended nothing is sent and no timer runs, and the first packet
// after a long time finds the path again.
func TestIdleNodesAreSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		w.nat("10.0.0.0/24", "1.1.1.1", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
		w.nat("10.0.1.0/24", "2.2.2.2", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
		a, b := w.node(nodeOpts{}, "10.0.0.2"), w.node(nodeOpts{}, "10.0.1.2")
		w.pair(a, b)
		w.talk(10*time.Second, 50*time.Millisecond, a, b)
		if !a.direct() || !b.direct() {
			t.Fatal("not direct")
		}
		time.Sleep(sessionFor + refreshMin + refreshSpread)
		w.mu.Lock()
		before := w.datagram
		w.mu.Unlock()
		time.Sleep(24 * time.Hour)
		w.mu.Lock()
		if n := w.datagram - before; n > 0 {
			t.Errorf("%d datagrams in a day without traffic", n)
		}
		w.mu.Unlock()
		if pi := a.m.Path(b.key); pi.Addr.IsValid() || pi.WhyNotDirect != "no traffic lately" {
			t.Errorf("path %+v", pi)
		}
		// The NATs have forgotten everything.
		a.directAt, b.directAt = time.Time{}, time.Time{}
		start := time.Now()
		w.talk(time.Second, 20*time.Millisecond, a, b)
		for _, n := range []*inode{a, b} {
			if d := n.directAt.Sub(start); n.directAt.IsZero() || d > 500*time.Millisecond {
				t.Errorf("direct again after %v", d)
			}
		}
	})
}

// TestEndpointsStayFresh: during traffic the STUN servers are asked again, often enough for any NAT, and control is told only of changes.
func TestEndpointsStayFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		router := w.nat("10.0.0.0/24", "2.2.2.2", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "10.0.0.2")
		w.pair(a, b)
		has := func(n *inode, typ tailcfg.EndpointType) (ap netip.AddrPort) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, e := range n.eps {
				if e.Type == typ {
					return e.Addr
				}
			}
			return
		}
		first := has(b, tailcfg.EndpointSTUN)
		if first.Addr().String() != "2.2.2.2" {
			t.Fatalf("endpoints %v", b.eps)
		}
		reports := b.reports
		w.talk(5*time.Minute, 250*time.Millisecond, a, b)
		if n := b.reports - reports; n != 0 {
			t.Errorf("%d reports of the same endpoints", n)
		}
		// Another mapping: found by the next round.
		w.net.SetRouter(nil)
		router.Rebind()
		w.net.SetRouter(w.lab)
		w.talk(refreshMin+refreshSpread+probesEnd, 250*time.Millisecond, a, b)
		if ap := has(b, tailcfg.EndpointSTUN); ap == first || !ap.IsValid() {
			t.Errorf("endpoint %v, was %v", ap, first)
		}
		// Moved to another network.
		a.m.SetMapped([]Endpoint{{netip.MustParseAddrPort("3.3.3.3:3"), tailcfg.EndpointPortmapped}})
		synctest.Wait()
		if ap := has(a, tailcfg.EndpointPortmapped); ap.Port() != 3 {
			t.Errorf("endpoints %v", a.eps)
		}
	})
}

// TestRelayLost: the direct path needs no relay once it is there.
func TestRelayLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "2.2.2.2")
		w.pair(a, b)
		w.down = func() bool { return true }
		w.talk(2*time.Minute, 100*time.Millisecond, a, b)
		if !a.direct() || !b.direct() || a.maxGap > 200*time.Millisecond {
			t.Errorf("%+v, %+v, stalled for %v", a.m.Path(b.key), b.m.Path(a.key), a.maxGap)
		}
	})
}

// TestPeerWithoutUDP: a node that uses relays only meets one that does not.
func TestPeerWithoutUDP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{noUDP: true}, "2.2.2.2")
		w.pair(a, b)
		w.talk(30*time.Second, 100*time.Millisecond, a, b)
		if a.direct() || b.direct() || a.byUDP+b.byUDP > 0 || len(b.received) != int(a.sent) {
			t.Errorf("%+v, %+v", a.m.Path(b.key), b.m.Path(a.key))
		}
		if why := a.m.Path(b.key).WhyNotDirect; why != "no endpoint of the peer is known" {
			t.Errorf("why: %s", why)
		}
		if why := b.m.Path(a.key).WhyNotDirect; why != "this node uses relays only" {
			t.Errorf("why: %s", why)
		}
	})
}

// TestRestartedPeer: the peer comes back with another disco key and another port.
func TestRestartedPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "2.2.2.2")
		w.pair(a, b)
		w.talk(2*time.Second, 50*time.Millisecond, a, b)
		b.close()
		c := w.node(nodeOpts{}, "2.2.2.2")
		w.mu.Lock()
		delete(w.nodes, c.key)
		c.key = b.key
		w.nodes[c.key] = c
		w.mu.Unlock()
		c.m.cfg.NodeKey = b.key
		w.pair(a, c)
		w.talk(time.Second, 50*time.Millisecond, a, c)
		if !a.direct() || !c.direct() {
			t.Errorf("%+v, %+v", a.m.Path(c.key), c.m.Path(a.key))
		}
	})
}

// TestSharedDiscoKey: two nodes of one process have one disco key; each is found.
func TestSharedDiscoKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "2.2.2.2")
		other := b.info()
		other.Key = key.NewNode().Public()
		w.pair(a, b)
		a.m.UpsertPeer(other) // in front of b in the list
		w.talk(2*time.Second, 50*time.Millisecond, a, b)
		if !a.direct() || !b.direct() {
			t.Errorf("%+v, %+v", a.m.Path(b.key), b.m.Path(a.key))
		}
		if pi := a.m.Path(other.Key); pi.Addr.IsValid() {
			t.Errorf("the other is reached by %+v", pi)
		}
		for range 3 {
			a.m.RemovePeer(other.Key)
			a.m.UpsertPeer(other)
			other.Disco = key.NewDisco().Public()
			a.m.UpsertPeer(other)
			other.Disco = b.disco.Public()
		}
		a.m.RemovePeer(other.Key)
		w.talk(20*time.Second, 50*time.Millisecond, a, b)
		if !a.direct() || a.maxGap > 100*time.Millisecond {
			t.Errorf("%+v, stalled for %v", a.m.Path(b.key), a.maxGap)
		}
	})
}

// TestWireGuardOnly: no discovery, the endpoint from control until the peer is heard elsewhere.
func TestWireGuardOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "2.2.2.2")
		a.peer, b.peer = b, a
		time.Sleep(probesEnd)
		p4, _ := b.socks.Ports()
		at := netip.AddrPortFrom(netip.MustParseAddr("2.2.2.2"), p4)
		a.m.UpsertPeer(PeerInfo{Key: b.key, WireGuardOnly: true, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::1]:1"), at}})
		b.m.UpsertPeer(a.info())
		a.send()
		time.Sleep(time.Second)
		synctest.Wait()
		if b.byUDP != 1 || a.m.Path(b.key).Addr != at {
			t.Fatalf("%d packets, %+v", b.byUDP, a.m.Path(b.key))
		}
		names := func(eps ...netip.AddrPort) netip.AddrPort {
			a.m.UpsertPeer(PeerInfo{Key: b.key, WireGuardOnly: true, Endpoints: eps})
			return a.m.Path(b.key).Addr
		}
		other, to := netip.MustParseAddrPort("3.3.3.3:3"), netip.MustParseAddrPort("4.4.4.4:4")
		if got := names(other, at); got != at {
			t.Errorf("control still names it: %v", got)
		}
		if got := names(other); got != other {
			t.Errorf("control names another: %v", got)
		}
		if got := names(); got.IsValid() {
			t.Errorf("control names none: %v", got)
		}
		names(at)
		a.m.Peer(b.key).Heard(Source{Addr: to})
		if pi := a.m.Path(b.key); pi.Addr != to {
			t.Errorf("%+v", pi)
		}
		if got := names(other); got != to {
			t.Errorf("control names another than where it was heard: %v", got)
		}
	})
}

// TestHandshakeWithoutRelay: a node that does not know where the other may be reached answers its handshake where its pings came
// from, and sends nothing else there.
func TestHandshakeWithoutRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "2.2.2.2")
		a.peer, b.peer = b, a
		time.Sleep(probesEnd)
		a.m.UpsertPeer(b.info())
		b.m.UpsertPeer(PeerInfo{Key: a.key, Disco: a.disco.Public()})
		w.down = func() bool { return true }
		response := wgPacket(92)
		response[0] = 2
		if err := b.m.Peer(a.key).Send(response, 92); err != ErrNoPath {
			t.Errorf("before a ping: %v", err)
		}
		a.send()                         // pings b
		time.Sleep(6 * time.Millisecond) // that has come, the pong not yet
		if err := b.m.Peer(a.key).Send(response, 92); err != nil {
			t.Errorf("after it: %v", err)
		}
		if err := b.m.Peer(a.key).Send(wgPacket(64), 64); err != ErrNoPath {
			t.Errorf("data: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.byUDP != 1 {
			t.Errorf("%d messages", a.byUDP)
		}
	})
}

// TestManyIdlePeers: peers that are only known cost no machine, no timer and no packet.
func TestManyIdlePeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a := w.node(nodeOpts{}, "1.1.1.1")
		time.Sleep(time.Minute)
		w.mu.Lock()
		before := w.datagram
		w.mu.Unlock()
		for round := range 2 {
			for i := range 10000 {
				var k [32]byte
				binary.BigEndian.PutUint32(k[:], uint32(i+1))
				a.m.UpsertPeer(PeerInfo{Key: key.NodePublicFromRaw(k), Disco: key.DiscoPublicFromRaw(k), HomeRegion: 1,
					Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{5, 5, byte(i >> 8), byte(i)}), uint16(round+1))}})
			}
		}
		time.Sleep(24 * time.Hour)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.datagram != before {
			t.Errorf("%d datagrams", w.datagram-before)
		}
		a.m.todo.mu.Lock()
		defer a.m.todo.mu.Unlock()
		if n := len(a.m.todo.peers); n > 0 {
			t.Errorf("%d peers waiting to be looked at", n)
		}
	})
}

// TestUserPingFindsThePath: pings alone, without traffic, come to show a direct path.
func TestUserPingFindsThePath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		w.nat("10.0.0.0/24", "1.1.1.1", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
		w.nat("10.0.1.0/24", "2.2.2.2", natlab.EndpointIndependent, natlab.AddressAndPortDependent)
		a, b := w.node(nodeOpts{}, "10.0.0.2"), w.node(nodeOpts{}, "10.0.1.2")
		w.pair(a, b)
		var r PingResult
		for i := range 5 {
			var err error
			if r, err = a.m.Ping(t.Context(), b.key, 0); err != nil {
				t.Fatal(err)
			}
			t.Log(i, r)
			if r.Addr.IsValid() {
				break
			}
			time.Sleep(time.Second)
		}
		if r.Addr.Addr().String() != "2.2.2.2" {
			t.Errorf("%+v", r)
		}
	})
}

func TestSTUNAnswersThatDoNotCount(t *testing.T) {
	now := time.Unix(1e9, 0)
	server := netip.MustParseAddrPort("9.9.9.9:3478")
	other := netip.MustParseAddrPort("9.9.9.8:3478")
	mapped := netip.MustParseAddrPort("1.2.3.4:5")
	for _, tt := range []struct {
		name string
		resp func(tx stun.TxID) ([]byte, netip.AddrPort)
		want int
	}{
		{"good", func(tx stun.TxID) ([]byte, netip.AddrPort) { return stun.AppendResponse(nil, tx, mapped), server }, 1},
		{"from elsewhere", func(tx stun.TxID) ([]byte, netip.AddrPort) { return stun.AppendResponse(nil, tx, mapped), other }, 0},
		{"another transaction", func(tx stun.TxID) ([]byte, netip.AddrPort) {
			return stun.AppendResponse(nil, stun.NewTxID(), mapped), server
		}, 0},
		{"an address of no use", func(tx stun.TxID) ([]byte, netip.AddrPort) {
			return stun.AppendResponse(nil, tx, netip.MustParseAddrPort("0.0.0.0:5")), server
		}, 0},
		{"a request", func(tx stun.TxID) ([]byte, netip.AddrPort) { return stun.AppendRequest(nil, tx), server }, 0},
	} {
		s := self{servers: []netip.AddrPort{server}, v4: 1}
		if !s.begin(now) {
			t.Fatal("no request")
		}
		b, src := tt.resp(s.probes[0].tx)
		for range 2 {
			s.answer(now.Add(time.Millisecond), src, b)
		}
		if len(s.public) != tt.want {
			t.Errorf("%s: %v", tt.name, s.public)
		}
	}
}

// FuzzFromUDP gives the demultiplexer arbitrary datagrams.
func FuzzFromUDP(f *testing.F) {
	f.Add(wgPacket(64), 32)
	f.Add(append([]byte(disco.Magic), make([]byte, 100)...), 1000)
	f.Add(stun.AppendResponse(nil, stun.NewTxID(), netip.MustParseAddrPort("1.2.3.4:5")), 0)
	f.Add([]byte{1, 0, 0, 0}, 1)
	f.Fuzz(func(t *testing.T, b []byte, seg int) {
		r, s := &fakeRelay{}, &nullSink{}
		m, err := New(Config{NodeKey: key.NewNode().Public(), DiscoKey: key.NewDisco(), Relay: r, NewSink: func() Sink { return s }, UDP: noUDP{}})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		m.SetSTUN([]netip.AddrPort{netip.MustParseAddrPort(stunAddr)})
		if len(b) >= disco.Overhead { // known to us
			if k, ok := disco.Sender(b); ok {
				m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), Disco: k})
			}
		}
		want := 0
		if seg > 0 {
			for x := b; len(x) > 0; x = x[min(seg, len(x)):] {
				if isWireGuard(x[:min(seg, len(x))]) {
					want++
				}
			}
		}
		m.FromUDP(0, netip.MustParseAddrPort(stunAddr), b, seg)
		if s.packets != want {
			t.Errorf("%d WireGuard packets, want %d", s.packets, want)
		}
	})
}

type noUDP struct{}

func (noUDP) Send(netip.AddrPort, []byte, int) error { return nil }
func (noUDP) Ports() (uint16, uint16)                { return 1, 1 }
