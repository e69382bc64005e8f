package path

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a set of relay regions that deliver at once to the nodes connected to them.
type world struct {
	mu    sync.Mutex
	nodes map[key.NodePublic]*node
	delay time.Duration
	drop  func(region int, b []byte) bool
	sent  []sentPacket
}

type sentPacket struct {
	region   int
	from, to key.NodePublic
	b        []byte
}

type node struct {
	w       *world
	key     key.NodePublic
	disco   key.DiscoPrivate
	m       *Manager
	regions map[int]bool // connected

	mu  sync.Mutex
	got []gotPacket
}

type gotPacket struct {
	src  Source
	peer *Peer
	b    []byte
}

func newWorld() *world { return &world{nodes: make(map[key.NodePublic]*node)} }

func (w *world) node(t testing.TB, regions ...int) *node {
	t.Helper()
	n := &node{w: w, key: key.NewNode().Public(), disco: key.NewDisco(), regions: make(map[int]bool)}
	m, err := New(Config{NodeKey: n.key, DiscoKey: n.disco, Relay: n, NewSink: func() Sink { return n }})
	if err != nil {
		t.Fatal(err)
	}
	n.m = m
	t.Cleanup(m.Close)
	for _, r := range regions {
		n.regions[r] = true
		m.RelayState(r, true, nil)
	}
	w.mu.Lock()
	w.nodes[n.key] = n
	w.mu.Unlock()
	return n
}

// Send implements Relay.
func (n *node) Send(region int, dst key.NodePublic, b []byte, seg int) error {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(b) > 0 {
		pkt := slices.Clone(b[:min(seg, len(b))])
		b = b[len(pkt):]
		w.sent = append(w.sent, sentPacket{region, n.key, dst, pkt})
		to := w.nodes[dst]
		if w.drop != nil && w.drop(region, pkt) {
			continue
		}
		if to == nil || !to.regions[region] {
			go n.m.PeerGone(region, dst, 1)
			continue
		}
		m := to.m
		time.AfterFunc(w.delay, func() { m.FromRelay(region, n.key, pkt); m.FlushRelay(region) })
	}
	return nil
}

func (n *node) WireGuard(src Source, p *Peer, b []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.got = append(n.got, gotPacket{src, p, slices.Clone(b)})
}

func (n *node) Flush() {}

func (n *node) info(home int) PeerInfo {
	return PeerInfo{Key: n.key, Disco: n.disco.Public(), HomeRegion: home}
}

func (w *world) sentBy(n *node) (out []sentPacket) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sent {
		if s.from == n.key {
			out = append(out, s)
		}
	}
	return out
}

func wgPacket(n int) []byte {
	b := make([]byte, n)
	b[0] = 4
	return b
}

func TestPingOverRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.delay = 10 * time.Millisecond
		a, b := w.node(t, 1), w.node(t, 2)
		a.m.UpsertPeer(b.info(2))
		b.m.UpsertPeer(a.info(1))
		a.regions[2] = true
		a.m.RelayState(2, true, nil)
		for _, size := range []int{0, 1000, MaxPingSize} {
			r, err := a.m.Ping(t.Context(), b.key, size)
			if err != nil || r.Latency != 20*time.Millisecond || r.Region != 2 || r.Addr.IsValid() {
				t.Fatalf("size %d: %+v, %v", size, r, err)
			}
			if sent := w.sentBy(a); size > 0 && len(sent[len(sent)-1].b) != size {
				t.Errorf("ping of %d bytes, want %d", len(sent[len(sent)-1].b), size)
			}
		}
		if pi := a.m.Path(b.key); pi.Region != 2 || pi.RTT != 20*time.Millisecond {
			t.Errorf("path %+v", pi)
		}
	})
}

func TestPingRetriesAndCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		a, b := w.node(t, 1), w.node(t, 1)
		a.m.UpsertPeer(b.info(1))
		b.m.UpsertPeer(a.info(1))
		lost := 0
		w.drop = func(int, []byte) bool { lost++; return lost <= 3 }
		start := time.Now()
		if _, err := a.m.Ping(t.Context(), b.key, 0); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 3*retryPing {
			t.Errorf("answered after %v, want %v", d, 3*retryPing)
		}

		w.drop = func(int, []byte) bool { return true }
		ctx, cancel := context.WithTimeout(t.Context(), 89500*time.Millisecond)
		defer cancel()
		before := len(w.sentBy(a))
		if _, err := a.m.Ping(ctx, b.key, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		if n := len(w.sentBy(a)) - before; n != 90 {
			t.Errorf("%d pings in 89.5 s, want 90", n)
		}
		before = len(w.sentBy(a))
		time.Sleep(time.Hour)
		if n := len(w.sentBy(a)) - before; n != 0 {
			t.Errorf("%d packets after cancel", n)
		}
	})
}

func TestPongCarriesRegion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		a, b := w.node(t, 7), w.node(t, 7)
		b.m.UpsertPeer(a.info(7))
		sh := a.disco.Shared(b.disco.Public())
		ping := disco.Ping{TxID: disco.TxID{1}, NodeKey: a.key}
		b.m.FromRelay(7, a.key, disco.Seal(nil, a.disco.Public(), &sh, ping.Append(nil)))
		synctest.Wait()
		sent := w.sentBy(b)
		if len(sent) != 1 || sent[0].region != 7 || sent[0].to != a.key {
			t.Fatalf("sent %v", sent)
		}
		plain, err := disco.Open(nil, &sh, sent[0].b)
		if err != nil {
			t.Fatal(err)
		}
		_, _, body, _ := disco.Split(plain)
		pong, err := disco.ParsePong(body)
		if err != nil || pong.TxID != ping.TxID || pong.Src.String() != "127.3.3.40:7" {
			t.Errorf("pong %+v, %v", pong, err)
		}
	})
}
