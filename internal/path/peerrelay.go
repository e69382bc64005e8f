package path

import (
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// PeerRelay is the peer relay that this node runs.
type PeerRelay interface {
	// Allocate asks for the endpoint of two clients, of which from is the one that asks. answer is called with it, once and at
	// any time, or never. Neither blocks.
	Allocate(from, other key.DiscoPublic, answer func(disco.RelayEndpoint))
	// Allows reports whether the peer may ask. It runs on the Manager's goroutine and must not block.
	Allows(peer key.NodePublic) bool
}

const (
	// relayCap is from which capability version on nodes understand peer relays and the allocation of their endpoints.
	relayCap = 121
	// maxAsked bounds the relays that are asked for one peer at a time.
	maxAsked = 8
	// askTTL is how long a relay's answer may take.
	askTTL = 10 * time.Second
)

// relayList is which relays may be asked. It is immutable.
type relayList struct {
	peers []key.NodePublic // in order
	self  bool             // this node's own
}

// shakeKey is what tells the messages of a relay about one endpoint from all others.
type shakeKey struct {
	relay key.DiscoPublic
	vni   uint32
}

// ask is a request for an endpoint that a relay has not answered yet.
type ask struct {
	relay      *Peer
	generation uint32
	at         time.Time
}

// SetPeerRelays says which peers this node may ask for endpoints on the relays that they are, and with self that it may use its own.
// With use false none is asked, and what peers have allocated is not used either. It does not block; peers is kept.
func (m *Manager) SetPeerRelays(use, self bool, peers []key.NodePublic) {
	if !use {
		m.relays.Store(nil)
		return
	}
	slices.SortFunc(peers, key.NodePublic.Compare)
	m.relays.Store(&relayList{peers, self && m.cfg.PeerRelay != nil})
}

// wraps has room for a batch with its Geneve headers.
var wraps = sync.Pool{New: func() any { return new([wrapSize]byte) }}

const (
	// wrapSize is what one datagram, and so one batch, may have at most.
	wrapSize = 65507
	// maxWrapped is how many datagrams go into one batch: more do not go out by one call either.
	maxWrapped = 64
)

// transmit sends WireGuard messages to a hop: with a VNI, each behind a Geneve header.
func (m *Manager) transmit(h hop, b []byte, seg int) error {
	if h.vni == 0 {
		return m.cfg.UDP.Send(h.addr, b, seg)
	}
	if seg <= 0 || seg > len(b) {
		seg = len(b)
	}
	if seg+disco.GeneveLen > wrapSize {
		return ErrNoPath
	}
	buf := wraps.Get().(*[wrapSize]byte)
	defer wraps.Put(buf)
	g := disco.Geneve{VNI: h.vni, Protocol: disco.GeneveWireGuard}
	for len(b) > 0 {
		out := buf[:0]
		for n := 0; len(b) > 0 && n < maxWrapped && len(out)+disco.GeneveLen+min(seg, len(b)) <= wrapSize; n++ {
			k := min(seg, len(b))
			out = append(g.Append(out), b[:k]...)
			b = b[k:]
		}
		if err := m.cfg.UDP.Send(h.addr, out, seg+disco.GeneveLen); err != nil {
			return err
		}
	}
	return nil
}

// sendTo sends a sealed discovery message to a hop. control says that it is for the peer relay there and not for what is behind it.
func (o *owner) sendTo(h hop, control bool, sealed []byte) {
	if h.vni != 0 {
		g := disco.Geneve{VNI: h.vni, Protocol: disco.GeneveDisco, Control: control}
		o.wrapped = append(g.Append(o.wrapped[:0]), sealed...)
		sealed = o.wrapped
	}
	o.m.cfg.UDP.Send(h.addr, sealed, len(sealed))
}

// isGeneve reports whether a packet begins with the header of what peer relays carry.
func isGeneve(b []byte) bool {
	_, ok := disco.ParseGeneve(b)
	return ok
}

// discoFromPeerRelay takes a discovery message that came through a relay, or with control from the relay itself.
func (m *Manager) discoFromPeerRelay(src Source, control bool, b []byte) {
	if !control {
		m.discoFromUDP(src, b)
		return
	}
	sender, ok := disco.Sender(b)
	if !ok || len(b) > 512 {
		return
	}
	var p *Peer // on whose account the message waits: that of any whose it may be
	m.mu.RLock()
	for _, x := range m.shakes[shakeKey{sender, src.VNI}] {
		if x.queued.Add(1) <= maxQueued {
			p = x
			break
		}
		x.queued.Add(-1)
	}
	m.mu.RUnlock()
	if p == nil {
		return // of no handshake of ours, or too many
	}
	select {
	case m.events <- event{kind: evBind, p: p, src: src, pkt: slices.Clone(b)}:
	default:
		p.queued.Add(-1)
	}
}

// fromPeerRelay acts on a relay's message about a handshake. Any peer may name any endpoint, so that the message says with which of
// them it is.
func (o *owner) fromPeerRelay(now time.Time, ev event) {
	sender, _ := disco.Sender(ev.pkt)
	k := shakeKey{sender, ev.src.VNI}
	var m disco.BindCommon
	opened := false
	for _, p := range o.m.shakes[k] { // only the owner writes it
		a := o.active[p]
		if a == nil {
			continue
		}
		for _, s := range a.mc.r.shakes {
			if s.key() != k || !s.keyed {
				continue
			}
			if !opened { // all have the same key with the relay
				plain, err := disco.Open(o.plain[:0], &s.shared, ev.pkt)
				if err != nil {
					return
				}
				o.plain = plain
				typ, _, body, err := disco.Split(plain)
				if err != nil || typ != disco.TypeBindEndpointChallenge {
					return
				}
				if m, err = disco.ParseBind(body); err != nil || m.VNI != k.vni {
					return
				}
				opened = true
			}
			if m.Generation == s.generation && m.RemoteKey == a.disco {
				a.mc.challenged(now, s, ev.src.Addr, m.Challenge)
				o.run(now, a)
				return
			}
		}
	}
}

// sendBind sends a message of the handshake to the relay.
func (o *owner) sendBind(a *active, act *action) {
	s := act.shake
	if !s.keyed {
		s.shared, s.keyed = o.m.cfg.DiscoKey.Shared(s.ep.Server), true
	}
	m := disco.BindCommon{VNI: s.ep.VNI, Generation: s.generation, RemoteKey: a.disco}
	typ := disco.TypeBindEndpoint
	if act.kind == sendAnswer {
		typ, m.Challenge = disco.TypeBindEndpointAnswer, s.challenge
	}
	o.plain = m.Append(o.plain[:0], typ)
	o.out = disco.Seal(o.out[:0], o.m.discoPK, &s.shared, o.plain)
	o.sendTo(act.to.hop(), true, o.out)
}

// setShake notes that messages of an endpoint's relay are awaited, or no more.
func (o *owner) setShake(a *active, s *shake, on bool) {
	k := s.key()
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	peers := o.m.shakes[k]
	i := slices.Index(peers, a.p)
	switch {
	case on && i < 0:
		o.m.shakes[k] = append(peers, a.p)
	case on || i < 0 || slices.ContainsFunc(a.mc.r.shakes, func(x *shake) bool { return x.key() == k }):
	case len(peers) == 1:
		delete(o.m.shakes, k)
	default:
		o.m.shakes[k] = slices.Delete(peers, i, i+1)
	}
}

// endShakes carries out that a's machine has dropped its endpoints, and nothing else that it may want.
func (o *owner) endShakes(a *active) {
	for i := range a.mc.acts {
		if act := &a.mc.acts[i]; act.kind == shaken {
			o.setShake(a, act.shake, false)
		}
	}
	a.mc.acts = a.mc.acts[:0]
}

// askRelays asks the relays that there are for an endpoint to a's peer.
func (o *owner) askRelays(now time.Time, a *active) {
	l := o.m.relays.Load()
	if l == nil || o.m.cfg.UDP == nil || a.p.info.Load().Cap < relayCap {
		return
	}
	a.asks = slices.DeleteFunc(a.asks, func(x ask) bool { return now.Sub(x.at) > askTTL })
	if o.generation++; o.generation == 0 {
		o.generation++
	}
	n := 0
	if l.self {
		n++
		o.m.cfg.PeerRelay.Allocate(o.m.discoPK, a.disco, o.m.endpointFor(a.p, o.generation, true))
	}
	for _, r := range o.rankRelays(l.peers, a) {
		if n == maxAsked || len(a.asks) >= 2*maxAsked {
			break
		}
		if r.region() == 0 {
			continue
		}
		b := a
		if r != a.p {
			b = o.get(now, r)
		}
		if b == nil {
			continue
		}
		n++
		a.asks = append(a.asks, ask{r, o.generation, now})
		m := disco.AllocateRequest{Clients: [2]key.DiscoPublic{o.m.discoPK, a.disco}, Generation: o.generation}
		o.plain = m.Append(o.plain[:0])
		o.send(b, via{})
		if b != a {
			b.mc.lastUsed = now
			o.run(now, b)
		}
	}
}

// rankRelays returns which relays to ask for an endpoint to a's peer, the best first: those that say of themselves that they are relays,
// then those that are near one of the two, then others, of these some others each time. A policy may name nodes as relays that are none.
func (o *owner) rankRelays(keys []key.NodePublic, a *active) []*Peer {
	var ranks [4][]*Peer
	home := a.p.home.Load() &^ goneBit
	if len(keys) > maxAsked {
		a.turn = (a.turn + maxAsked) % len(keys)
	}
	for i := range keys {
		r := o.m.Peer(keys[(i+a.turn)%len(keys)])
		if r == nil {
			continue
		}
		info, rank := r.info.Load(), 3
		if info.Cap < relayCap {
			continue
		}
		if info.Relay {
			rank -= 2
		}
		if h := r.home.Load() &^ goneBit; h == home || o.m.isConnected(h) {
			rank--
		}
		if len(ranks[rank]) < maxAsked {
			ranks[rank] = append(ranks[rank], r)
		}
	}
	return slices.Concat(ranks[:]...)
}

// endpointFor returns what takes the answer of this node's own relay.
func (m *Manager) endpointFor(p *Peer, generation uint32, own bool) func(disco.RelayEndpoint) {
	return func(ep disco.RelayEndpoint) {
		select {
		case m.events <- event{kind: evEndpoint, p: p, relay: &ep, generation: generation, own: own}:
		default: // as good as lost on the way
		}
	}
}

// ownEndpoint takes an endpoint on this node's own relay: for itself, or for the peer that has asked.
func (o *owner) ownEndpoint(now time.Time, ev event) {
	a := o.get(now, ev.p)
	if a == nil {
		return
	}
	if !ev.own {
		m := disco.AllocateResponse{Generation: ev.generation, RelayEndpoint: *ev.relay}
		o.plain = m.Append(o.plain[:0])
		o.send(a, via{})
	} else if pairIs(ev.relay, o.m.discoPK, a.disco) {
		a.mc.relayEndpoint(now, ev.relay, true)
	}
	o.run(now, a)
}

// pairIs reports whether the endpoint is for the two.
func pairIs(ep *disco.RelayEndpoint, a, b key.DiscoPublic) bool {
	return ep.Clients == [2]key.DiscoPublic{a, b} || ep.Clients == [2]key.DiscoPublic{b, a}
}

// relayMessage acts on a message about peer relays that a's peer has sent by a relay of a region.
func (o *owner) relayMessage(now time.Time, a *active, typ disco.Type, version byte, body []byte) {
	switch typ {
	case disco.TypeCallMeMaybeVia:
		m, err := disco.ParseCallMeMaybeVia(version, body)
		if err == nil && o.m.relays.Load() != nil && pairIs(&m.RelayEndpoint, o.m.discoPK, a.disco) {
			a.mc.relayEndpoint(now, &m.RelayEndpoint, false)
		}
	case disco.TypeAllocateRequest:
		m, err := disco.ParseAllocateRequest(version, body)
		if err != nil || o.m.cfg.PeerRelay == nil || m.Clients[0] != a.disco && m.Clients[1] != a.disco || !o.m.cfg.PeerRelay.Allows(a.p.key) {
			return
		}
		other := m.Clients[0]
		if other == a.disco {
			other = m.Clients[1]
		}
		o.m.cfg.PeerRelay.Allocate(a.disco, other, o.m.endpointFor(a.p, m.Generation, false))
	case disco.TypeAllocateResponse:
		m, err := disco.ParseAllocateResponse(version, body)
		if err != nil {
			return
		}
		for _, other := range m.Clients {
			if other == o.m.discoPK || !pairIs(&m.RelayEndpoint, o.m.discoPK, other) {
				continue
			}
			for _, p := range o.siblings(other) {
				if b := o.active[p]; b != nil && b.disco == other && b.answered(now, a.p, m.Generation) {
					b.mc.relayEndpoint(now, &m.RelayEndpoint, true)
					if b != a { // whose turn it is anyway
						o.run(now, b)
					}
					return
				}
			}
		}
	}
}

// answered reports whether a relay's answer is one to a request of ours, and takes note that it has come.
func (a *active) answered(now time.Time, relay *Peer, generation uint32) bool {
	for i, x := range a.asks {
		if x.relay == relay && x.generation == generation && now.Sub(x.at) <= askTTL {
			a.asks = slices.Delete(a.asks, i, i+1)
			return true
		}
	}
	return false
}

// relayText writes an address at a peer relay.
func relayText(addr netip.AddrPort, vni uint32) string {
	if vni == 0 {
		return ""
	}
	return addr.String() + ":vni:" + strconv.FormatUint(uint64(vni), 10)
}
