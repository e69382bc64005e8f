package datapath

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/wg"
)

// transport is everything that is bound to one node key.
type transport struct {
	e      *Engine
	dev    device
	paths  *path.Manager
	relays *client.Regions

	mu    sync.RWMutex
	peers map[key.NodePublic]*peer // those that have sent or been sent to

	saidMu sync.Mutex // guards peer.said; taken before mu

	knocks knocks
}

// peer is a peer that has been heard of on the data path. Its node is looked up in the
// netmap by key, never kept, so that a delta takes effect at once.
type peer struct {
	t      *transport
	wg     *wg.Peer
	ready  atomic.Bool // wg is set
	path   *path.Peer
	gather gather
	disco  key.DiscoPublic // of the process that the session is with; guarded by t.mu
	said   said
}

// device is a wg.Device whose peers can be used as soon as they come out of Receive.
type device struct {
	*wg.Device
	t *transport
}

// Receive works as wg's, and waits for peer where that has made the sender known to wg and not yet set peer.wg.
func (d device) Receive(dst, msg []byte, reply wg.Conduit) ([]byte, *wg.Peer, error) {
	plain, w, err := d.Device.Receive(dst, msg, reply)
	if w != nil {
		if p, ok := w.Owner().(*peer); ok && !p.ready.Load() {
			d.t.known(w.Public()) // takes the lock that peer holds
		}
	}
	return plain, w, err
}

func (e *Engine) newTransport(k key.NodePrivate) (*transport, error) {
	t := &transport{e: e, peers: map[key.NodePublic]*peer{}}
	var traffic func(bool)
	if !e.cfg.Limits.KeepMemory {
		traffic = e.reclaim.traffic
	}
	dev, err := wg.NewDevice(wg.Config{
		Traffic:    traffic,
		StageBytes: e.cfg.Limits.StageMemory,
		Workers:    e.cfg.Limits.Workers,
		PrivateKey: k,
		MTU:        MTU,
		Unknown:    func(pub key.NodePublic) bool { return t.peer(pub) != nil },
		Logger:     e.log,
	})
	if err != nil {
		return nil, fmt.Errorf("datapath: %w", err)
	}
	t.dev = device{dev, t}
	feed := &relayFeed{t: t, told: e.cfg.RelayState}
	t.relays = client.NewRegions(client.RegionsConfig{
		PrivateKey: k,
		Dial:       e.cfg.Dial,
		Roots:      e.cfg.RootCAs,
		Handler:    feed,
		Logger:     e.log,
	})
	pc := path.Config{
		NodeKey:   k.Public(),
		DiscoKey:  e.cfg.DiscoKey,
		Relay:     t.relays,
		NewSink:   func() path.Sink { return t.newSink() },
		FixedPort: e.cfg.Port,
		STUN:      e.stun.deliver,
		Endpoints: e.cfg.Endpoints,
		Alive:     t.alive,
		PeerRelay: &e.peerRelays,
		Called:    t.called,
		Logger:    e.log,
	}
	if e.direct != nil {
		pc.UDP = e.direct.socks
	}
	t.paths, err = path.New(pc)
	if err != nil {
		t.relays.Close()
		t.dev.Close()
		return nil, fmt.Errorf("datapath: %w", err)
	}
	feed.Manager = t.paths // no relay is connected before SetMap
	return t, nil
}

func (t *transport) close() {
	t.relays.Close()
	t.paths.Close()
	t.dev.Close()
}

// peer returns the peer with this key, making it if the netmap has it, or nil.
func (t *transport) peer(pub key.NodePublic) *peer {
	t.mu.RLock()
	p := t.peers[pub]
	t.mu.RUnlock()
	if p != nil {
		return p
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers[pub]; p != nil {
		return p
	}
	m := t.e.netmap.Load()
	if m == nil {
		return nil
	}
	n := m.PeerByKey(pub)
	if n == nil || m.Expired(n, now()) {
		return nil
	}
	conduit := t.paths.Peer(pub)
	if conduit == nil {
		return nil
	}
	p = &peer{t: t, path: conduit, disco: n.DiscoKey}
	w, err := t.dev.AddPeer(pub, conduit, p)
	if err != nil {
		t.e.log.Warn("peer not usable", "peer", pub.ShortString(), "err", err)
		return nil
	}
	p.wg = w
	p.ready.Store(true)
	t.peers[pub] = p
	return p
}

// setPeers brings paths and WireGuard in line with m, which differs from was by ch; nil: they know of nobody yet.
func (t *transport) setPeers(was, m *netmap.Map, ch netmap.Change) {
	if was == nil {
		for n := range m.All() {
			t.upsert(n)
			t.restarted(n)
		}
		t.answerKnocks()
		return
	}
	for _, n := range ch.Removed {
		t.remove(n.Key)
	}
	for _, n := range ch.Changed {
		if old := was.PeerByID(n.ID); old != nil && old.Key != n.Key && m.PeerByKey(old.Key) == nil {
			t.remove(old.Key) // it has logged in again
		}
	}
	for _, n := range ch.Changed {
		before := t.paths.Path(n.Key)
		t.upsert(n)
		if now := t.paths.Path(n.Key); now.Region != before.Region || now.Addr != before.Addr {
			if p := t.known(n.Key); p != nil {
				p.wg.Alive(0) // there is a new way to it
			}
		}
		t.restarted(n)
	}
	for _, n := range ch.Added {
		t.upsert(n)
	}
	t.answerKnocks()
}

func (t *transport) remove(pub key.NodePublic) {
	t.mu.Lock()
	p := t.peers[pub]
	delete(t.peers, pub)
	t.mu.Unlock()
	if p != nil {
		p.wg.Remove()
	}
	t.paths.RemovePeer(pub)
}

func peerInfo(n *netmap.Node) path.PeerInfo {
	return path.PeerInfo{
		Key:           n.Key,
		Disco:         n.DiscoKey,
		HomeRegion:    n.HomeDERP,
		Endpoints:     n.Endpoints,
		WireGuardOnly: n.IsWireGuardOnly,
		Cap:           int(n.Cap),
		Relay:         n.PeerRelay,
	}
}

// relayFeed hands what relays deliver to the path manager.
type relayFeed struct {
	*path.Manager
	t    *transport
	told func(region int, connected bool, err error) // may be nil
}

func (f *relayFeed) Packet(region int, src key.NodePublic, b []byte) { f.FromRelay(region, src, b) }
func (f *relayFeed) Flush(region int)                                { f.FlushRelay(region) }
func (f *relayFeed) PeerGone(region int, peer key.NodePublic, reason byte) {
	f.Manager.PeerGone(region, peer, reason)
	f.t.gone(peer)
}
func (f *relayFeed) State(region int, connected bool, err error) {
	f.RelayState(region, connected, err)
	if f.told != nil {
		f.told(region, connected, err)
	}
}
