package datapath

import (
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// A peer may tell its disco key through the session with it, which counts as much as control's word and may come sooner, or
// while control is away (docs/protocol/tsmp.md). It holds until control names another key than it did at that time.

const (
	// sayEvery is the least time between keys that a peer is taken at its word for: each costs a scalar multiplication.
	sayEvery = 250 * time.Millisecond
	// advertiseEvery is the least time between advertisements to one peer that nobody has asked for.
	advertiseEvery = 2 * time.Minute
	// attrCacheNetmaps is the node attribute by which control asks for advertisements: its nodes keep netmaps, and
	// may learn of a new key in no other way.
	attrCacheNetmaps tailcfg.NodeCapability = "cache-network-maps"
)

// said is what a peer says of itself. It is guarded by transport.saidMu.
type said struct {
	disco key.DiscoPublic // zero: nothing
	over  key.DiscoPublic // what control said at the time
	at    time.Time

	advertised time.Time // when this node last told the peer its own key
}

// upsert tells the path manager of n.
func (t *transport) upsert(n *netmap.Node) {
	t.saidMu.Lock()
	defer t.saidMu.Unlock() // for the call as well: learn and setPeers come on different goroutines
	info := peerInfo(n)
	info.Disco = t.discoOf(n)
	t.paths.UpsertPeer(info)
}

// discoOf returns the disco key of n: its own word, or control's. t.saidMu is held.
func (t *transport) discoOf(n *netmap.Node) key.DiscoPublic {
	p := t.known(n.Key)
	if p == nil || p.said.disco.IsZero() {
		return n.DiscoKey
	}
	if p.said.over != n.DiscoKey {
		p.said.disco = key.DiscoPublic{} // control has caught up, or knows better
		return n.DiscoKey
	}
	return p.said.disco
}

// learn takes the disco key k that p says through its session that it has. The session shows that it is the process that it was with, so it
// is not renewed.
func (t *transport) learn(p *peer, k key.DiscoPublic) {
	m := t.e.netmap.Load()
	n := m.PeerByKey(p.wg.Public())
	if n == nil || k.IsZero() || n.IsWireGuardOnly {
		return
	}
	at := now()
	t.saidMu.Lock()
	old := t.discoOf(n)
	if old == k || at.Sub(p.said.at) < sayEvery {
		t.saidMu.Unlock()
		return
	}
	p.said.disco, p.said.over, p.said.at = k, n.DiscoKey, at
	t.mu.Lock()
	p.disco = k
	t.mu.Unlock()
	t.saidMu.Unlock()
	t.e.log.Debug("peer tells its disco key", "peer", n.Key.ShortString())
	// What control may have said since then counts as well.
	if n := t.e.netmap.Load().PeerByKey(p.wg.Public()); n != nil {
		t.upsert(n)
	}
}

// called follows a call-me-maybe to a peer: where control asks for it, the peer is told this node's disco key, without which
// it can neither read that call nor answer it. It runs on the path manager's goroutine.
func (t *transport) called(at *path.Peer) {
	m := t.e.netmap.Load()
	if m == nil || !m.Self.HasCap(attrCacheNetmaps) {
		return
	}
	n := m.PeerByKey(at.Public())
	if n == nil || len(n.Addresses) == 0 {
		return
	}
	p := t.peer(at.Public())
	if p == nil {
		return
	}
	now := now()
	t.saidMu.Lock()
	due := p.said.advertised.IsZero() || now.Sub(p.said.advertised) > advertiseEvery && !at.Path().Addr.IsValid()
	if due {
		p.said.advertised = now
	}
	t.saidMu.Unlock()
	if due {
		t.e.advertise(p, n.Addresses[0].Addr())
	}
}

// advertise tells p, which has addr, this node's disco key.
func (e *Engine) advertise(p *peer, addr netip.Addr) {
	self, ok := e.selfAddr(addr.Is4())
	if !ok {
		return
	}
	if b, err := packet.AppendTSMPDisco(nil, self, addr, e.cfg.DiscoKey.Public()); err == nil {
		p.send(b) // an error is a lost packet
	}
}
