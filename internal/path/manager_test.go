package path

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// fakeRelay counts what it is given.
type fakeRelay struct {
	mu   sync.Mutex
	last int
	n    int
	err  error
}

func (r *fakeRelay) Send(region int, _ key.NodePublic, _ []byte, _ int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = region
	r.n++
	return r.err
}

type nullSink struct{ packets, flushes int }

func (s *nullSink) WireGuard(Source, *Peer, []byte) { s.packets++ }
func (s *nullSink) Flush()                          { s.flushes++ }

func newManager(t testing.TB) (*Manager, *fakeRelay, *nullSink) {
	t.Helper()
	r, s := &fakeRelay{}, &nullSink{}
	m, err := New(Config{NodeKey: key.NewNode().Public(), DiscoKey: key.NewDisco(), Relay: r, NewSink: func() Sink { return s }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m, r, s
}

// newOwner returns the owner of a Manager whose own goroutine does not run: events and times are the test's.
func newOwner(t testing.TB, disco key.DiscoPrivate, u UDP) *owner {
	t.Helper()
	m, err := New(Config{NodeKey: key.NewNode().Public(), DiscoKey: disco, Relay: &fakeRelay{}, NewSink: func() Sink { return &nullSink{} }, UDP: u})
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	return &owner{m: m, active: make(map[*Peer]*active)}
}

func TestRegionChoice(t *testing.T) {
	// Each step is something that happens; want is the region of a send after all of them, 0 for ErrNoPath.
	type step = func(m *Manager, k key.NodePublic)
	home := func(r int) step {
		return func(m *Manager, k key.NodePublic) { m.UpsertPeer(PeerInfo{Key: k, HomeRegion: r}) }
	}
	heard := func(r int) step {
		return func(m *Manager, k key.NodePublic) { m.FromRelay(r, k, wgPacket(32)) }
	}
	up := func(r int) step { return func(m *Manager, _ key.NodePublic) { m.RelayState(r, true, nil) } }
	down := func(r int) step {
		return func(m *Manager, _ key.NodePublic) { m.RelayState(r, false, errors.New("gone")) }
	}
	gone := func(r int) step { return func(m *Manager, k key.NodePublic) { m.PeerGone(r, k, 1) } }
	for _, tt := range []struct {
		name  string
		steps []step
		want  int
	}{
		{"nothing known", []step{home(0)}, 0},
		{"region out of range", []step{home(70000)}, 0},
		{"home, not connected: dial it", []step{home(2)}, 2},
		{"no home, but heard", []step{home(0), up(5), heard(5)}, 5},
		{"home is not connected, heard elsewhere", []step{home(2), up(1), heard(1)}, 1},
		{"home is connected: it wins", []step{home(2), up(1), up(2), heard(1)}, 2},
		{"home says gone, heard elsewhere", []step{home(2), up(1), up(2), heard(1), gone(2)}, 1},
		{"home says gone, then delivers", []step{home(2), up(1), up(2), heard(1), gone(2), heard(2), heard(1)}, 2},
		{"home says gone, nothing else: keep trying", []step{home(2), up(2), gone(2)}, 2},
		{"gone from where it was heard", []step{home(2), up(1), heard(1), gone(1)}, 2},
		{"gone from a third region", []step{home(2), up(1), heard(1), gone(9)}, 1},
		{"the region where it was heard is lost", []step{home(2), up(1), heard(1), down(1)}, 2},
		{"home moves", []step{home(2), up(2), gone(2), up(1), heard(1), up(3), home(3)}, 3},
		{"told the same home again", []step{home(2), up(1), up(2), heard(1), gone(2), home(2)}, 1},
		{"everything is down: dial home", []step{home(2), up(1), up(2), heard(1), down(1), down(2)}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, r, _ := newManager(t)
			k := key.NewNode().Public()
			for _, s := range tt.steps {
				s(m, k)
			}
			err := m.Peer(k).Send(wgPacket(64), 64)
			if tt.want == 0 && !errors.Is(err, ErrNoPath) || tt.want != 0 && (err != nil || r.last != tt.want) {
				t.Errorf("sent by region %d, %v; want %d", r.last, err, tt.want)
			}
			if pi := m.Path(k); pi.Region != tt.want || pi.Since.IsZero() != (tt.want == 0) || pi.WhyNotDirect == "" {
				t.Errorf("path %+v", pi)
			}
		})
	}
}

func TestDemultiplexing(t *testing.T) {
	m, r, s := newManager(t)
	k := key.NewNode().Public()
	for _, tt := range []struct {
		name string
		b    []byte
		wg   bool
	}{
		{"data", wgPacket(32), true},
		{"initiation", append([]byte{1, 0, 0, 0}, make([]byte, 144)...), true},
		{"empty", nil, false},
		{"short", wgPacket(31), false},
		{"type 0", make([]byte, 64), false},
		{"type 5", append([]byte{5}, make([]byte, 63)...), false},
		{"reserved bytes set", append([]byte{4, 0, 1, 0}, make([]byte, 60)...), false},
		{"disco from a stranger", append([]byte(disco.Magic), make([]byte, 100)...), false},
		{"cut disco", []byte(disco.Magic + "12345678901234567890123456789012"), false},
	} {
		before := s.packets
		m.FromRelay(3, k, tt.b)
		if got := s.packets > before; got != tt.wg {
			t.Errorf("%s: to WireGuard: %v", tt.name, got)
		}
	}
	for _, region := range []int{0, -1, 1 << 16} {
		before := s.packets
		m.FromRelay(region, k, wgPacket(64))
		m.RelayState(region, true, nil)
		m.PeerGone(region, k, 0)
		if s.packets != before {
			t.Errorf("region %d was taken", region)
		}
	}
	m.FlushRelay(3)
	m.FlushRelay(4) // nothing came from there
	if s.flushes != 1 {
		t.Errorf("%d flushes", s.flushes)
	}
	if r.n != 0 {
		t.Errorf("%d packets in answer to strangers", r.n)
	}
}

func TestReplyGoesBackTheSameWay(t *testing.T) {
	m, r, _ := newManager(t)
	rep := m.Reply(Source{Region: 9, Key: key.NewNode().Public()})
	if err := rep.Send(wgPacket(64), 64); err != nil || r.last != 9 {
		t.Errorf("region %d, %v", r.last, err)
	}
	rep = m.Reply(Source{Addr: netip.MustParseAddrPort("192.0.2.1:1")})
	if err := rep.Send(wgPacket(64), 64); !errors.Is(err, ErrNoPath) {
		t.Errorf("%v", err)
	}
	if err := new(Reply).Send(nil, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("%v", err)
	}
}

func TestPingErrors(t *testing.T) {
	m, _, _ := newManager(t)
	d := key.NewDisco().Public()
	noDisco, noHome, ok := key.NewNode().Public(), key.NewNode().Public(), key.NewNode().Public()
	m.UpsertPeer(PeerInfo{Key: noDisco, HomeRegion: 1})
	m.UpsertPeer(PeerInfo{Key: noHome, Disco: d})
	m.UpsertPeer(PeerInfo{Key: ok, Disco: d, HomeRegion: 1})
	done, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	for _, tt := range []struct {
		name string
		ctx  context.Context
		k    key.NodePublic
		size int
		want error
	}{
		{"unknown", t.Context(), key.NewNode().Public(), 0, ErrUnknownPeer},
		{"no disco key", t.Context(), noDisco, 0, ErrNoDisco},
		{"no path", t.Context(), noHome, 0, ErrNoPath},
		{"too large", t.Context(), ok, MaxPingSize + 1, ErrPingSize},
		{"context", done, ok, 0, cause},
	} {
		if _, err := m.Ping(tt.ctx, tt.k, tt.size); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestCloseAndRemoveEndPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _, _ := newManager(t)
		k := key.NewNode().Public()
		p := m.UpsertPeer(PeerInfo{Key: k, Disco: key.NewDisco().Public(), HomeRegion: 1})
		ping := func() chan error {
			ch := make(chan error, 1)
			go func() {
				_, err := m.Ping(context.Background(), k, 0)
				ch <- err
			}()
			synctest.Wait()
			return ch
		}
		ch := ping()
		m.RemovePeer(k)
		m.RemovePeer(k)
		if err := <-ch; !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("after removal: %v", err)
		}
		if err := p.Send(wgPacket(64), 64); !errors.Is(err, ErrUnknownPeer) {
			t.Errorf("send after removal: %v", err)
		}
		p = m.UpsertPeer(PeerInfo{Key: k, Disco: key.NewDisco().Public(), HomeRegion: 1})
		ch = ping()
		for range 3 {
			go m.Close()
		}
		m.Close()
		if err := <-ch; !errors.Is(err, ErrClosed) {
			t.Errorf("after close: %v", err)
		}
		if err := p.Send(wgPacket(64), 64); !errors.Is(err, ErrClosed) {
			t.Errorf("send after close: %v", err)
		}
		if _, err := m.Ping(t.Context(), k, 0); !errors.Is(err, ErrClosed) {
			t.Errorf("ping after close: %v", err)
		}
		m.FromRelay(1, k, wgPacket(64))
		m.FlushRelay(1)
	})
}

// TestOnlyKnownPeersAreAnswered sends good and bad pings to a node and counts its answers.
func TestOnlyKnownPeersAreAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		me, friend, other, stranger := w.node(t, 1), w.node(t, 1), w.node(t, 1), w.node(t, 1)
		me.m.UpsertPeer(friend.info(1))
		me.m.UpsertPeer(other.info(1))
		pingOf := func(from *node, as key.DiscoPublic) []byte {
			sh := from.disco.Shared(me.disco.Public())
			return disco.Seal(nil, as, &sh, (&disco.Ping{TxID: disco.TxID{9}, NodeKey: from.key}).Append(nil))
		}
		raw := func(from *node, plain []byte) []byte {
			sh := from.disco.Shared(me.disco.Public())
			return disco.Seal(nil, from.disco.Public(), &sh, plain)
		}
		for _, tt := range []struct {
			name string
			src  key.NodePublic
			b    []byte
			want int
		}{
			{"friend", friend.key, pingOf(friend, friend.disco.Public()), 1},
			{"stranger", stranger.key, pingOf(stranger, stranger.disco.Public()), 0},
			{"friend's disco key under a stranger's node key", stranger.key, pingOf(friend, friend.disco.Public()), 0},
			{"friend's disco key under another friend's node key", other.key, pingOf(friend, friend.disco.Public()), 0},
			{"stranger's box under a friend's name", friend.key, pingOf(stranger, friend.disco.Public()), 0},
			{"unknown type", friend.key, raw(friend, []byte{0x77, 0, 1, 2, 3}), 0},
			{"short ping", friend.key, raw(friend, []byte{1, 0, 1, 2, 3}), 0},
			{"empty", friend.key, raw(friend, nil), 0},
			{"pong that nobody asked for", friend.key, raw(friend, (&disco.Pong{}).Append(nil)), 0},
			{"call-me-maybe", friend.key, raw(friend, (&disco.CallMeMaybe{}).Append(nil)), 0},
			{"too long", friend.key, raw(friend, (&disco.Ping{Padding: 10000}).Append(nil)), 0},
			{"friend again", friend.key, pingOf(friend, friend.disco.Public()), 1},
		} {
			before := len(w.sentBy(me))
			me.m.FromRelay(1, tt.src, bytes.Clone(tt.b))
			synctest.Wait()
			if got := len(w.sentBy(me)) - before; got != tt.want {
				t.Errorf("%s: %d answers, want %d", tt.name, got, tt.want)
			}
		}
	})
}

func TestDiscoKeyChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		a, b := w.node(t, 1), w.node(t, 1)
		a.m.UpsertPeer(b.info(1))
		b.m.UpsertPeer(a.info(1))
		if _, err := a.m.Ping(t.Context(), b.key, 0); err != nil {
			t.Fatal(err)
		}
		// b restarts with another disco key, and control tells a.
		b.m.Close()
		b.disco = key.NewDisco()
		m, err := New(Config{NodeKey: b.key, DiscoKey: b.disco, Relay: b, NewSink: func() Sink { return b }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.Close)
		w.mu.Lock()
		b.m = m
		w.mu.Unlock()
		m.RelayState(1, true, nil)
		m.UpsertPeer(a.info(1))
		a.m.UpsertPeer(b.info(1))
		if _, err := a.m.Ping(t.Context(), b.key, 0); err != nil {
			t.Fatal(err)
		}
	})
}

// TestFloodOfPings holds a peer to its allowance, and other peers' pings are answered meanwhile.
func TestFloodOfPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		me, bad, good := w.node(t, 1), w.node(t, 1), w.node(t, 1)
		for _, n := range []*node{bad, good} {
			me.m.UpsertPeer(n.info(1))
			n.m.UpsertPeer(me.info(1))
		}
		sh := bad.disco.Shared(me.disco.Public())
		start := time.Now()
		for range 1000 {
			me.m.FromRelay(1, bad.key, disco.Seal(nil, bad.disco.Public(), &sh, (&disco.Ping{NodeKey: bad.key}).Append(nil)))
			time.Sleep(time.Millisecond)
		}
		limit := pongBurst + int(time.Since(start).Seconds()*pongRate) + 1
		if n := len(w.sentBy(me)); n > limit || n < pongBurst {
			t.Errorf("%d answers, want at most %d", n, limit)
		}
		if r, err := good.m.Ping(t.Context(), me.key, 0); err != nil || r.Latency > time.Millisecond {
			t.Errorf("%+v, %v", r, err)
		}
		time.Sleep(2 * time.Minute)
		if n := bad.m.Peer(me.key).queued.Load() + me.m.Peer(bad.key).queued.Load(); n != 0 {
			t.Errorf("%d messages still counted as queued", n)
		}
	})
}

func TestSendDoesNotAllocate(t *testing.T) {
	m, r, s := newManager(t)
	k := key.NewNode().Public()
	p := m.UpsertPeer(PeerInfo{Key: k, Disco: key.NewDisco().Public(), HomeRegion: 2})
	m.RelayState(1, true, nil)
	b := wgPacket(1452)
	m.FromRelay(1, k, b)
	var rep Reply
	if n := testing.AllocsPerRun(100, func() {
		p.Send(b, len(b))
		m.FromRelay(1, k, b)
		m.FlushRelay(1)
		rep = m.Reply(Source{Region: 1, Key: k})
		rep.Send(b, len(b))
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if r.n == 0 || s.packets == 0 {
		t.Error("nothing moved")
	}
}

func TestRelayErrorIsReturned(t *testing.T) {
	m, r, _ := newManager(t)
	r.err = errors.New("queue full")
	p := m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), HomeRegion: 2})
	if err := p.Send(wgPacket(64), 64); !errors.Is(err, r.err) {
		t.Errorf("%v", err)
	}
}

// TestMachinesAreForgotten: those too that were made for nothing.
func TestMachinesAreForgotten(t *testing.T) {
	o := newOwner(t, key.NewDisco(), &wire{})
	now := time.Now()
	info := func(home int) PeerInfo {
		return PeerInfo{Key: key.NewNode().Public(), Disco: key.NewDisco().Public(), HomeRegion: home, Cap: relayCap}
	}
	// A message that does not open.
	p := o.m.UpsertPeer(info(1))
	forged := append(p.info.Load().Disco.AppendTo([]byte(disco.Magic)), make([]byte, 60)...)
	o.handle(now, event{kind: evDisco, p: p, src: Source{Region: 1}, pkt: forged})
	// Peer relays, of which one cannot be asked.
	r1, r2 := o.m.UpsertPeer(info(1)), o.m.UpsertPeer(info(0))
	o.m.SetPeerRelays(true, false, []key.NodePublic{r1.key, r2.key})
	a := o.get(now, o.m.UpsertPeer(info(1)))
	a.mc.askRelays(now)
	o.run(now, a)
	if o.active[p] == nil || len(a.asks) != 1 {
		t.Fatalf("%d relays were asked", len(a.asks))
	}
	for range 10 {
		now = now.Add(idleAfter)
		o.tick(now)
	}
	if len(o.active) != 0 {
		t.Errorf("%d machines are left, and %d of them ever due", len(o.active), len(o.due))
	}
}

func TestConcurrentUse(t *testing.T) {
	m, err := New(Config{NodeKey: key.NewNode().Public(), DiscoKey: key.NewDisco(), Relay: &fakeRelay{},
		NewSink: func() Sink { return &nullSink{} }})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	keys := make([]PeerInfo, 16)
	for i := range keys {
		keys[i] = PeerInfo{Key: key.NewNode().Public(), Disco: key.NewDisco().Public(), HomeRegion: 1 + i%3}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	for r := 1; r <= 3; r++ {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				k := keys[i%len(keys)]
				switch i % 7 {
				case 0:
					m.UpsertPeer(k)
				case 1:
					m.FromRelay(r, k.Key, wgPacket(64))
				case 2:
					m.RelayState(r, i%2 == 0, nil)
				case 3:
					m.PeerGone(r, k.Key, 0)
				case 4:
					if p := m.Peer(k.Key); p != nil {
						p.Send(wgPacket(64), 64)
					}
				case 5:
					m.RemovePeer(k.Key)
				case 6:
					m.Path(k.Key)
				}
			}
		})
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			m.Ping(ctx, keys[0].Key, 0)
		}
	})
	wg.Wait()
}

func FuzzFromRelay(f *testing.F) {
	nk, dk := key.NewNode().Public(), key.NewDisco()
	me := key.NewDisco()
	sh := dk.Shared(me.Public())
	f.Add([]byte{}, true)
	f.Add(wgPacket(64), true)
	f.Add((&disco.Ping{NodeKey: nk}).Append(nil), false)
	f.Add((&disco.Pong{}).Append(nil), false)
	f.Add((&disco.CallMeMaybe{Endpoints: []netip.AddrPort{netip.MustParseAddrPort("1.2.3.4:5")}}).Append(nil), false)
	f.Add(disco.Seal(nil, dk.Public(), &sh, []byte{1}), true)
	s := &nullSink{}
	m, err := New(Config{NodeKey: key.NewNode().Public(), DiscoKey: me, Relay: &fakeRelay{}, NewSink: func() Sink { return s }})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(m.Close)
	m.UpsertPeer(PeerInfo{Key: nk, Disco: dk.Public(), HomeRegion: 1})
	f.Fuzz(func(t *testing.T, b []byte, outside bool) {
		if !outside { // b is the content of a good box
			b = disco.Seal(nil, dk.Public(), &sh, b)
		}
		m.FromRelay(1, nk, b)
		m.FlushRelay(1)
	})
}

func BenchmarkSend(b *testing.B) {
	m, _, _ := newManager(b)
	p := m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), HomeRegion: 1})
	pkt := wgPacket(1452)
	b.ReportAllocs()
	for b.Loop() {
		p.Send(pkt, len(pkt))
	}
}

func BenchmarkFromRelay(b *testing.B) {
	m, _, _ := newManager(b)
	for range 10_000 {
		m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), HomeRegion: 1})
	}
	k := key.NewNode().Public()
	m.UpsertPeer(PeerInfo{Key: k, HomeRegion: 1})
	pkt := wgPacket(1452)
	b.ReportAllocs()
	for b.Loop() {
		m.FromRelay(1, k, pkt)
	}
}

func BenchmarkUpsertPeer(b *testing.B) {
	m, _, _ := newManager(b)
	info := PeerInfo{Key: key.NewNode().Public(), Disco: key.NewDisco().Public(), HomeRegion: 1}
	b.ReportAllocs()
	for b.Loop() {
		m.UpsertPeer(info)
	}
}
