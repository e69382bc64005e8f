package path

import (
	"bytes"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/natlab"
	"github.com/tailnode/tailnode/internal/peerrelay"
	"github.com/tailnode/tailnode/internal/udp"
)

// prelay is a node that is a peer relay, in the open.
type prelay struct {
	*inode
	w     *internet
	addr  string
	srv   *peerrelay.Server
	deny  atomic.Bool
	asked atomic.Int32
}

func (w *internet) prelay(addr string) *prelay {
	r := &prelay{w: w, addr: addr}
	r.inode = w.node(nodeOpts{relay: r}, addr)
	r.start()
	w.t.Cleanup(func() { r.srv.Close() })
	return r
}

func (r *prelay) start() {
	var err error
	r.srv, err = peerrelay.Open(peerrelay.Config{Port: 4242, Listen: func(network, address string) (udp.PacketConn, error) {
		c, err := r.host.ListenPacket(network, address)
		if err != nil {
			return nil, err
		}
		return &counted{c, r.w}, nil
	}})
	if err != nil {
		r.w.t.Fatal(err)
	}
	r.srv.SetLocal([]netip.Addr{netip.MustParseAddr(r.addr)})
}

func (r *prelay) Allocate(from, other key.DiscoPublic, answer func(disco.RelayEndpoint)) {
	r.asked.Add(1)
	r.srv.Allocate(from, other, answer)
}

func (r *prelay) Allows(key.NodePublic) bool { return !r.deny.Load() }

// mayUse has control tell the nodes of the relay, and the relay of them.
func (w *internet) mayUse(r *prelay, nodes ...*inode) {
	for _, n := range nodes {
		info := r.info()
		info.Cap = relayCap
		n.m.UpsertPeer(info)
		info = n.info()
		info.Cap = relayCap
		r.m.UpsertPeer(info)
		if n.peer != nil {
			info = n.peer.info()
			info.Cap = relayCap
			n.m.UpsertPeer(info)
		}
		n.m.SetPeerRelays(true, false, []key.NodePublic{r.key})
	}
}

// shaking is on how many endpoints' relays n listens to.
func (n *inode) shaking() int {
	n.m.mu.RLock()
	defer n.m.mu.RUnlock()
	return len(n.m.shakes)
}

// sentAll is how many datagrams have been sent by anybody.
func (w *internet) sentAll() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.datagram
}

func (n *inode) byPeerRelay() bool { return n.m.Path(n.peer.key).VNI != 0 }

// hard is a pair without a direct path.
func hard(w *internet) (a, b *inode, na, nb *natlab.NAT) {
	const apd = natlab.AddressAndPortDependent
	na = w.nat("10.0.0.0/24", "1.1.1.1", apd, apd)
	nb = w.nat("10.0.1.0/24", "2.2.2.2", apd, apd)
	a, b = w.node(nodeOpts{}, "10.0.0.2"), w.node(nodeOpts{}, "10.0.1.2")
	w.pair(a, b)
	return a, b, na, nb
}

func TestPeerRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b, _, _ := hard(w)
		r := w.prelay("5.5.5.5")
		w.mayUse(r, a, b)
		w.talk(2*time.Second, 20*time.Millisecond, a, b)
		for _, n := range []*inode{a, b} {
			pi := n.m.Path(n.peer.key)
			if pi.VNI == 0 || pi.Relay != netip.MustParseAddrPort("5.5.5.5:4242") || pi.Addr.IsValid() || pi.Region != 0 || pi.WhyNotDirect == "" {
				t.Fatalf("path %+v", pi)
			}
			if pi.RTT < 19*time.Millisecond || pi.RTT > 25*time.Millisecond {
				t.Errorf("round trip %v", pi.RTT)
			}
			if d := n.directAt.Sub(pi.Since); d != 0 || n.maxGap > 100*time.Millisecond {
				t.Errorf("%v, stalled for %v", d, n.maxGap)
			}
			if got := pi.PeerRelay(); got[:18] != "5.5.5.5:4242:vni:"+got[17:18] {
				t.Error(got)
			}
		}
		// It carries all the data now.
		relayed := a.byRelay + b.byRelay
		w.talk(time.Minute, 20*time.Millisecond, a, b)
		if n := a.byRelay + b.byRelay - relayed; n > 5 || !a.byPeerRelay() || !b.byPeerRelay() {
			t.Errorf("%d packets by the relay of a region; %+v", n, a.m.Path(b.key))
		}
		if n := r.srv.Stats(); n.Endpoints != 1 || n.ForwardedBytes < 2*2500*100 {
			t.Errorf("%+v", n)
		}
		// A user's ping goes by it too.
		res, err := a.m.Ping(t.Context(), b.key, 0)
		if err != nil || res.VNI == 0 || res.Addr.Port() != 4242 {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

// TestPeerRelayDies: the pair falls back to the relay of a region, and comes back when the peer relay does.
func TestPeerRelayDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b, na, _ := hard(w)
		r := w.prelay("5.5.5.5")
		w.mayUse(r, a, b)
		w.talk(2*time.Second, 20*time.Millisecond, a, b)
		for i, what := range []string{"stopped", "stopped again", "NAT forgets", "network changed"} {
			if !a.byPeerRelay() || !b.byPeerRelay() {
				t.Fatalf("before %s: %+v, %+v", what, a.m.Path(b.key), b.m.Path(a.key))
			}
			a.resetGap()
			b.resetGap()
			switch i {
			case 0, 1:
				r.srv.Close()
				w.talk(5*time.Second, 20*time.Millisecond, a, b)
				if a.byPeerRelay() || b.byPeerRelay() {
					t.Errorf("%s: %+v", what, a.m.Path(b.key))
				}
				r.start()
				w.talk(40*time.Second, 20*time.Millisecond, a, b)
			case 2:
				w.net.SetRouter(nil)
				na.Rebind()
				w.net.SetRouter(w.lab)
				w.talk(10*time.Second, 20*time.Millisecond, a, b)
			case 3:
				a.m.NetworkChanged()
				w.talk(5*time.Second, 20*time.Millisecond, a, b)
			}
			if gap := max(a.maxGap, b.maxGap); gap > 1100*time.Millisecond {
				t.Errorf("%s: stalled for %v", what, gap)
			} else {
				t.Logf("%s: stalled for %v", what, gap)
			}
		}
		if !a.byPeerRelay() || !b.byPeerRelay() {
			t.Errorf("at the end: %+v, %+v", a.m.Path(b.key), b.m.Path(a.key))
		}
	})
}

// TestPeerRelayGivesWay: a direct path is taken as soon as there is one, and the peer relay stands by for its loss.
func TestPeerRelayGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b := w.node(nodeOpts{}, "1.1.1.1"), w.node(nodeOpts{}, "2.2.2.2")
		w.pair(a, b)
		r := w.prelay("5.5.5.5")
		w.mayUse(r, a, b)
		cut := true
		w.net.SetLink(func(src, dst netip.AddrPort, _ bool) memnet.Link {
			ends := []string{src.Addr().String(), dst.Addr().String()}
			return memnet.Link{Latency: 5 * time.Millisecond, Down: cut && !slices.Contains(ends, "5.5.5.5")}
		})
		for range 3 {
			w.talk(10*time.Second, 20*time.Millisecond, a, b)
			if !a.byPeerRelay() || !b.byPeerRelay() {
				t.Fatalf("not by the peer relay: %+v, %+v", a.m.Path(b.key), b.m.Path(a.key))
			}
			cut = false
			w.talk(8*time.Second, 20*time.Millisecond, a, b)
			if !a.direct() || !b.direct() {
				t.Fatalf("not direct: %+v, %+v", a.m.Path(b.key), b.m.Path(a.key))
			}
			cut = true
			a.resetGap()
			b.resetGap()
			w.talk(2*time.Second, 20*time.Millisecond, a, b)
			if !a.byPeerRelay() || !b.byPeerRelay() || max(a.maxGap, b.maxGap) > 700*time.Millisecond {
				t.Fatalf("after the cut: %+v, %+v, stalled for %v", a.m.Path(b.key), b.m.Path(a.key), max(a.maxGap, b.maxGap))
			}
		}
	})
}

// TestPeerRelaySilence: idle nodes and their relay send nothing, and keep nothing for long.
func TestPeerRelaySilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b, _, _ := hard(w)
		r := w.prelay("5.5.5.5")
		w.mayUse(r, a, b)
		w.talk(10*time.Second, 50*time.Millisecond, a, b)
		if !a.byPeerRelay() || !b.byPeerRelay() {
			t.Fatal("not by the peer relay")
		}
		time.Sleep(sessionFor + refreshMin + refreshSpread)
		before := w.sentAll()
		time.Sleep(24 * time.Hour)
		if n := w.sentAll() - before; n > 0 {
			t.Errorf("%d datagrams in a day without traffic", n)
		}
		if n := r.srv.Stats().Endpoints; n != 0 || a.shaking()+b.shaking() != 0 {
			t.Errorf("%d endpoints, %d and %d at the nodes", n, a.shaking(), b.shaking())
		}
		w.talk(2*time.Second, 50*time.Millisecond, a, b)
		if !a.byPeerRelay() || !b.byPeerRelay() {
			t.Error("not by the peer relay again")
		}
	})
}

// TestPeerRelayPermission: who may not, does not; one of the two who may is enough.
func TestPeerRelayPermission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		a, b, _, _ := hard(w)
		r := w.prelay("5.5.5.5")
		w.mayUse(r, a, b)
		r.deny.Store(true)
		before := w.sentAll()
		w.talk(2*time.Minute, 100*time.Millisecond, a, b)
		if a.byPeerRelay() || b.byPeerRelay() || r.asked.Load() != 0 {
			t.Errorf("%+v, asked %d times", a.m.Path(b.key), r.asked.Load())
		}
		t.Logf("%d datagrams in two minutes, 2400 of them data", w.sentAll()-before)
		r.deny.Store(false)
		b.m.SetPeerRelays(true, true, nil) // it may not ask
		w.talk(40*time.Second, 100*time.Millisecond, a, b)
		if !a.byPeerRelay() || !b.byPeerRelay() {
			t.Errorf("%+v, %+v", a.m.Path(b.key), b.m.Path(a.key))
		}
		// Control takes it back: nothing new is asked for.
		a.m.SetPeerRelays(false, false, nil)
		b.m.SetPeerRelays(false, false, nil)
		r.srv.Close()
		r.start()
		asked := r.asked.Load()
		w.talk(2*time.Minute, 100*time.Millisecond, a, b)
		if a.byPeerRelay() || r.asked.Load() != asked {
			t.Errorf("%+v, asked %d times", a.m.Path(b.key), r.asked.Load()-asked)
		}
	})
}

// TestPeerRelayIsItself: one of the two nodes is the relay.
func TestPeerRelayIsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newInternet(t)
		r := w.prelay("5.5.5.5")
		const apd = natlab.AddressAndPortDependent
		w.nat("10.0.0.0/24", "1.1.1.1", apd, apd)
		a := w.node(nodeOpts{}, "10.0.0.2")
		w.pair(a, r.inode)
		// What goes straight to the node does not arrive; the relay's port is open.
		w.net.SetLink(func(src, dst netip.AddrPort, _ bool) memnet.Link {
			inner := src.Addr() == dst.Addr() || src.Port() == 4242 || dst.Port() == 4242 || dst.Port() == 3478 || src.Port() == 3478
			return memnet.Link{Latency: 5 * time.Millisecond, Down: !inner}
		})
		w.mayUse(r, a)
		info := a.info()
		info.Cap = relayCap
		r.m.UpsertPeer(info)
		info = r.info()
		info.Cap = relayCap
		a.m.UpsertPeer(info)
		a.m.SetPeerRelays(true, false, nil) // it is the relay that asks
		r.m.SetPeerRelays(true, true, nil)
		w.talk(5*time.Second, 20*time.Millisecond, a, r.inode)
		if !a.byPeerRelay() || !r.byPeerRelay() {
			t.Errorf("%+v, %+v", a.m.Path(r.key), r.m.Path(a.key))
		}
	})
}

// wire notes what is sent.
type wire struct{ got [][]byte }

func (w *wire) Send(_ netip.AddrPort, b []byte, seg int) error {
	for len(b) > 0 {
		n := min(seg, len(b))
		w.got = append(w.got, bytes.Clone(b[:n]))
		b = b[n:]
	}
	return nil
}
func (w *wire) Ports() (v4, v6 uint16) { return 1, 1 }

func TestTransmitWraps(t *testing.T) {
	w := &wire{}
	m := &Manager{cfg: Config{UDP: w}}
	to := hop{netip.MustParseAddrPort("5.5.5.5:5"), 0xabcdef}
	for _, tt := range []struct{ total, seg int }{{1, 1}, {32, 32}, {1312 * 48, 1312}, {1312*3 + 5, 1312}, {65000, 100}, {65500, 65499}} {
		w.got = nil
		b := make([]byte, tt.total)
		for i := range b {
			b[i] = byte(i * 7 / 5)
		}
		if err := m.transmit(to, b, tt.seg); err != nil {
			t.Fatal(err)
		}
		var all []byte
		for i, x := range w.got {
			g, ok := disco.ParseGeneve(x)
			if !ok || g.VNI != 0xabcdef || g.Control || g.Protocol != disco.GeneveWireGuard {
				t.Fatalf("%+v: header %x", tt, x[:8])
			}
			if len(x)-8 != tt.seg && i < len(w.got)-1 {
				t.Fatalf("%+v: datagram of %d bytes", tt, len(x))
			}
			all = append(all, x[8:]...)
		}
		if !bytes.Equal(all, b) {
			t.Errorf("%+v: other bytes", tt)
		}
	}
	if err := m.transmit(to, make([]byte, 65501), 65501); err == nil {
		t.Error("too long")
	}
	count := &countUDP{}
	m.cfg.UDP = count
	b := make([]byte, 1312*48)
	if n := testing.AllocsPerRun(100, func() { m.transmit(to, b, 1312) }); n > 0 {
		t.Errorf("%v allocations for a batch", n)
	}
}

type countUDP struct{ n int }

func (c *countUDP) Send(netip.AddrPort, []byte, int) error { c.n++; return nil }
func (c *countUDP) Ports() (v4, v6 uint16)                 { return 1, 1 }

// TestRankRelays: of many that the policy names, those that say that they are relays are asked, and of others some others each time.
func TestRankRelays(t *testing.T) {
	m, _, _ := newManager(t)
	o := &owner{m: m}
	a := &active{p: m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), HomeRegion: 2})}
	m.RelayState(1, true, nil)
	var keys []key.NodePublic
	mk := func(i PeerInfo) *Peer {
		i.Key = key.NewNode().Public()
		keys = append(keys, i.Key)
		return m.UpsertPeer(i)
	}
	for range 30 {
		mk(PeerInfo{Cap: relayCap, HomeRegion: 3})
	}
	old := mk(PeerInfo{Cap: relayCap - 1, HomeRegion: 1, Relay: true})
	far := mk(PeerInfo{Cap: relayCap, HomeRegion: 3, Relay: true})
	near := mk(PeerInfo{Cap: relayCap, HomeRegion: 1})
	best := mk(PeerInfo{Cap: relayCap, HomeRegion: 2, Relay: true})
	keys = append(keys, key.NewNode().Public()) // not there
	seen := map[*Peer]bool{}
	for range 40 {
		got := o.rankRelays(keys, a)
		if len(got) < maxAsked || got[0] != best || got[1] != far || got[2] != near || slices.Contains(got, old) {
			t.Fatalf("%d relays, not in order", len(got))
		}
		for _, p := range got[:maxAsked] {
			seen[p] = true
		}
	}
	if len(seen) != 33 {
		t.Errorf("%d of 33 are asked in time", len(seen))
	}
}

// TestShakeOfTwoPeers: a peer that names the endpoint of another takes nothing away from it.
func TestShakeOfTwoPeers(t *testing.T) {
	me, relay := key.NewDisco(), key.NewDisco()
	o := newOwner(t, me, &wire{})
	o.m.SetPeerRelays(true, false, nil)
	now, at := time.Now(), netip.MustParseAddrPort("192.0.2.9:4242")
	k := shakeKey{relay.Public(), 77}
	via := func(lamport uint64) *active {
		d := key.NewDisco()
		p := o.m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), Disco: d.Public(), HomeRegion: 1})
		m := disco.CallMeMaybeVia{RelayEndpoint: disco.RelayEndpoint{Server: relay.Public(), Clients: [2]key.DiscoPublic{d.Public(), me.Public()},
			LamportID: lamport, VNI: 77, BindLifetime: shakeFor, Addrs: []netip.AddrPort{at}}}
		sh := d.Shared(me.Public())
		o.handle(now, event{kind: evDisco, p: p, src: Source{Region: 1, Key: p.key}, pkt: disco.Seal(nil, d.Public(), &sh, m.Append(nil))})
		return o.active[p]
	}
	// challenge has the relay challenge a, by way of the Manager's queue.
	sh := relay.Shared(me.Public())
	challenge := func(a *active, generation uint32) {
		m := disco.BindCommon{VNI: 77, Generation: generation, RemoteKey: a.disco}
		o.m.discoFromPeerRelay(Source{Addr: at, VNI: 77}, true, disco.Seal(nil, relay.Public(), &sh, m.Append(nil, disco.TypeBindEndpointChallenge)))
		for len(o.m.events) > 0 {
			o.handle(now, <-o.m.events)
		}
	}
	first, a, last := via(1), via(5), via(1)
	first.p.queued.Store(maxQueued) // it does not hold up the others' either
	s := a.mc.r.shakes[0]
	challenge(a, s.generation+2)
	challenge(first, s.generation)
	if s.at.IsValid() {
		t.Error("another one's challenge was taken")
	}
	challenge(a, s.generation)
	for _, x := range []*active{first, last} {
		if s.at != at || x.mc.r.shakes[0].at.IsValid() {
			t.Errorf("the challenge went to %v and %v", s.at, x.mc.r.shakes[0].at)
		}
	}
	for _, x := range []*active{first, last} {
		x.mc.dropShakes()
		o.run(now, x)
	}
	if got := o.m.shakes[k]; !slices.Equal(got, []*Peer{a.p}) {
		t.Errorf("%d peers are listened for, want the one whose endpoint is left", len(got))
	}
	o.drop(a)
	if len(o.m.shakes) != 0 {
		t.Error("the relay is listened to without an endpoint")
	}
}
