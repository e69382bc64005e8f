package path

import (
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// UDP is this node's sockets.
type UDP interface {
	// Send transmits the datagrams in b, each seg bytes but for the last, which may be shorter, to dst. It
	// does not keep b, and blocks no longer than a socket does.
	Send(dst netip.AddrPort, b []byte, seg int) error
	// Ports returns the local ports, 0 for a family without a socket.
	Ports() (v4, v6 uint16)
}

// Endpoint is an address at which this node may be reached.
type Endpoint struct {
	Addr netip.AddrPort
	Type tailcfg.EndpointType
}

// route is the decision to send to an address. It is immutable.
type route struct {
	hop
	until int64 // since Manager.start
	since time.Time
	size  int  // of the longest message that it is known to carry, 0: baseMessage
	named bool // a WireGuard-only peer's, by control
}

// tellEvery is how often the owner is told of traffic that goes on.
const tellEvery = 250 * time.Millisecond

// The flags of a Peer: what has happened.
const (
	flagTraffic uint32 = 1 << iota
	flagInfo           // control said something new of it, or it was removed
	flagFailed         // a socket refused to send to it
	flagRelayed        // its data comes by a relay although there is a direct path
	flagBulk           // much is being sent to it
)

// todo is what the owner is to look at; the rest of the Manager puts it there without waiting.
type todo struct {
	mu      sync.Mutex
	peers   []*Peer
	self    bool // one of the following is new
	changed bool
	stun    []netip.AddrPort
	local   []netip.Addr
	mapped  []Endpoint
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// tell has the owner look at p.
func (p *Peer) tell(flag uint32) {
	if p.flags.Or(flag) != 0 {
		return // it is in the list already
	}
	t := &p.m.todo
	t.mu.Lock()
	t.peers = append(t.peers, p)
	t.mu.Unlock()
	p.m.poke()
}

// now is the time since m.start.
func (m *Manager) now() int64 { return int64(time.Since(m.start)) }

// direct returns the route in force, nil if there is none.
func (p *Peer) direct() *route {
	if rt := p.route.Load(); rt != nil && p.m.now() < rt.until {
		return rt
	}
	return nil
}

// sendDirect sends by the direct path if there is one, and reports whether it did and whether that will do.
func (p *Peer) sendDirect(b []byte, seg int) (sent, sure bool) {
	now := p.m.now()
	if told := p.told.Load(); (now-told >= int64(tellEvery) || told == 0) && p.told.CompareAndSwap(told, max(now, 1)) && !p.info.Load().WireGuardOnly {
		p.tell(flagTraffic)
	}
	rt := p.route.Load()
	if rt == nil || now >= rt.until || !rt.carries(seg) {
		return false, false // too long: cut for the path before
	}
	if p.m.transmit(rt.hop, b, seg) != nil {
		p.tell(flagFailed)
		return false, false
	}
	return true, now >= p.doubt.Load()
}

const (
	// relayedAfter is how old a direct path must be for data by the relay to mean anything: some was under way.
	relayedAfter = 100 * time.Millisecond
	// relayedEvery is how often it may raise a doubt.
	relayedEvery = 2 * time.Second
)

// heardByRelay says that data of the peer came by a relay.
func (p *Peer) heardByRelay() {
	rt := p.route.Load()
	if rt == nil || p.info.Load().WireGuardOnly {
		return
	}
	now := p.m.now()
	last := p.relayedAt.Load()
	if now >= rt.until || now-int64(rt.since.Sub(p.m.start)) < int64(relayedAfter) || last != 0 && now-last < int64(relayedEvery) {
		return
	}
	if p.relayedAt.CompareAndSwap(last, now) {
		p.doubt.Store(now + int64(suspectWait)) // at once, for the answer to this packet
		p.tell(flagRelayed)
	}
}

// pingedFor is how long handshake messages go to where a ping came from.
const pingedFor = 5 * time.Second

// sendHandshake sends a handshake message, and nothing else, to where an authentic ping of the peer has just come from,
// besides the relay: of two nodes that meet as one of them joins, one may not know the other's relay yet, or not be connected to
// its own. It reports whether it has. That the peer is there is not certain, but all that is risked is a message
// that only the peer can read.
func (p *Peer) sendHandshake(b []byte, seg int) bool {
	if len(b) > maxHandshake || seg < len(b) || len(b) == 0 || b[0] > 3 {
		return false
	}
	at := p.pinged.Load()
	return at != nil && p.m.now() < at.until && p.m.transmit(at.hop, b, seg) == nil
}

// maxHandshake is the length of the longest message of types 1 to 3, the initiation (WireGuard paper §5.4.2).
const maxHandshake = 148

// Heard says that an authentic WireGuard message of this peer came from src, over UDP. It is what shows that
// the path in use lives; for a WireGuard-only peer it also says where the peer is now (WireGuard paper §2.1).
func (p *Peer) Heard(src Source) {
	rt, at := p.route.Load(), hop{src.Addr, src.VNI}
	if rt != nil && rt.hop == at {
		if now := p.m.clock.Load(); p.heardAt.Load() != now {
			p.heardAt.Store(now)
		}
		return
	}
	if at.IsValid() && at.vni == 0 && p.info.Load().WireGuardOnly && p.m.cfg.UDP != nil {
		p.route.Store(&route{hop: at, until: math.MaxInt64, since: time.Now()})
	}
}

// infoChanged acts on what control says of the peer. The Manager is locked.
func (p *Peer) infoChanged(info *PeerInfo) {
	if p.m.cfg.UDP == nil {
		return
	}
	if p.active.Load() {
		p.tell(flagInfo)
	}
	if !info.WireGuardOnly {
		return
	}
	old := p.route.Load()
	if old != nil && (!old.named || slices.Contains(info.Endpoints, old.addr)) {
		return
	}
	var rt *route // nil: control names none now
	v4, v6 := p.m.cfg.UDP.Ports()
	for _, ap := range info.Endpoints {
		if usable(ap) && (ap.Addr().Is4() && v4 != 0 || ap.Addr().Is6() && v6 != 0) {
			rt = &route{hop: hop{addr: ap}, until: math.MaxInt64, since: time.Now(), named: true}
			break
		}
	}
	p.route.CompareAndSwap(old, rt) // unless it has just been heard elsewhere
}

// FromUDP takes the datagrams in b, each seg bytes but for the last, that came from src. socket tells the receive
// loops apart; calls for one socket come one at a time. b is borrowed and may be changed. Data causes no allocation here.
func (m *Manager) FromUDP(socket int, src netip.AddrPort, b []byte, seg int) {
	if m.closed.Load() || m.cfg.UDP == nil || socket < 0 || seg <= 0 {
		return
	}
	if src.Addr().Is4In6() {
		src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	}
	m.clock.Store(m.now())
	var s Sink
	for len(b) > 0 {
		n := min(seg, len(b))
		pkt := b[:n:n]
		b = b[n:]
		switch {
		case isWireGuard(pkt):
			if s == nil {
				s = m.sink(-1 - socket)
			}
			s.WireGuard(Source{Addr: src}, nil, pkt)
		case disco.Is(pkt):
			m.discoFromUDP(Source{Addr: src}, pkt)
		case isGeneve(pkt):
			g, _ := disco.ParseGeneve(pkt)
			pkt, from := pkt[disco.GeneveLen:], Source{Addr: src, VNI: g.VNI}
			switch {
			case g.VNI == 0:
			case g.Protocol == disco.GeneveDisco:
				m.discoFromPeerRelay(from, g.Control, pkt)
			case !g.Control && isWireGuard(pkt):
				if s == nil {
					s = m.sink(-1 - socket)
				}
				s.WireGuard(from, nil, pkt)
			}
		case stun.Is(pkt):
			m.stunIn(src, pkt)
		}
	}
	if s != nil {
		s.Flush()
	}
}

func (m *Manager) discoFromUDP(src Source, b []byte) {
	sender, ok := disco.Sender(b)
	if !ok {
		return
	}
	m.mu.RLock()
	p := m.byDisco[sender]
	m.mu.RUnlock()
	m.discoIn(src, p, b)
}

// stunIn queues what may be an answer of a STUN server, as long as answers are awaited.
func (m *Manager) stunIn(src netip.AddrPort, b []byte) {
	if f := m.cfg.STUN; f != nil {
		f(src, b)
	}
	if len(b) > 512 || m.stunWant.Add(-1) < 0 {
		m.stunWant.Add(1)
		return
	}
	select {
	case m.events <- event{kind: evStun, src: Source{Addr: src}, pkt: slices.Clone(b)}:
	default:
		m.stunWant.Add(1)
	}
}

// SetSTUN names the STUN servers, those to prefer first; some of them are asked. It does not block.
func (m *Manager) SetSTUN(servers []netip.AddrPort) {
	m.setSelf(func(t *todo) { t.stun = slices.Clone(servers) })
}

// SetLocal names the addresses of this host's interfaces. It does not block.
func (m *Manager) SetLocal(addrs []netip.Addr) {
	m.setSelf(func(t *todo) { t.local = slices.Clone(addrs) })
}

// SetMapped names endpoints that come from elsewhere, such as port mappings on the router. It does not block.
func (m *Manager) SetMapped(eps []Endpoint) {
	m.setSelf(func(t *todo) { t.mapped = slices.Clone(eps) })
}

// NetworkChanged says that the network of this host has changed or that the host has slept: paths and public
// endpoints that were found before do not count any more. It does not block.
func (m *Manager) NetworkChanged() { m.setSelf(func(t *todo) { t.changed = true }) }

func (m *Manager) setSelf(f func(*todo)) {
	if m.cfg.UDP == nil {
		return
	}
	m.todo.mu.Lock()
	f(&m.todo)
	m.todo.self = true
	m.todo.mu.Unlock()
	m.poke()
}

// Why a peer is not reached directly, in Peer.why.
const (
	whyIdle uint32 = iota
	whyNoEndpoints
	whySearching
	whyNoReply
)

func (p *Peer) whyNotDirect() string {
	switch info := p.info.Load(); {
	case p.m.cfg.UDP == nil:
		return "this node uses relays only"
	case info.Disco.IsZero() && !info.WireGuardOnly:
		return "the peer does not take part in path discovery"
	case info.WireGuardOnly:
		return "no usable endpoint of the peer is known"
	}
	switch why := p.why.Load(); {
	case why == whyIdle:
		return "no traffic lately"
	case p.m.noAnswer.Load():
		return "UDP seems to be blocked: no STUN server answers"
	case why == whyNoEndpoints:
		return "no endpoint of the peer is known"
	case why == whySearching:
		return "still looking for a direct path"
	}
	return "the peer answers on none of its endpoints"
}
