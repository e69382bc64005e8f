// Package path decides how sealed packets reach a peer, and finds the ways: by the peer's home
// relay, by the relay on which it was last heard, and, once it has candidates for them, straight over UDP.
//
// Each peer's discovery is a pure machine (see machine.go): events and the time go in, actions
// come out. One goroutine owns all machines; it carries out their actions and keeps one timer for all
// of them. A peer without traffic has no machine and no timer, only its entry in the table.
//
// Data does not pass that goroutine. [Peer.Send] reads the decision from atomics and sends;
// [Manager.FromRelay] tells discovery messages from WireGuard's by their first bytes and hands the
// latter to the receive loop's own [Sink] at once.
//
// What goes over the wire is in docs/protocol/disco.md; how a path is chosen in docs/protocol/paths.md.
package path

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

var (
	// ErrClosed reports the use of a closed Manager.
	ErrClosed = errors.New("path: closed")
	// ErrUnknownPeer reports a peer that is not in the table, or has left it.
	ErrUnknownPeer = errors.New("path: unknown peer")
	// ErrNoPath reports a peer with no way to it: no home relay, never heard, no address.
	ErrNoPath = errors.New("path: no path to the peer")
	// ErrNoDisco reports a peer that does not take part in path discovery.
	ErrNoDisco = errors.New("path: the peer does not take part in path discovery")
	// ErrPingSize reports a ping larger than [MaxPingSize].
	ErrPingSize = errors.New("path: ping is too large")
)

// MaxPingSize is the greatest size of a [Manager.Ping]: a jumbo frame less the headers of IPv4 and UDP.
const MaxPingSize = 9000 - 20 - 8

// derpMagic stands for a relay where an address is wanted; the port is the region.
var derpMagic = netip.AddrFrom4([4]byte{127, 3, 3, 40})

// Relay transmits over relays.
type Relay interface {
	// Send transmits the messages in b, each seg bytes but for the last, which may be
	// shorter, to dst by way of region. It does not keep b and does not block long.
	Send(region int, dst key.NodePublic, b []byte, seg int) error
}

// Source is where a packet came from. Region != 0: that relay region, from the node Key. Otherwise from Addr over UDP.
// With a VNI, Addr is that of the peer relay through which it came.
type Source struct {
	Region int
	Key    key.NodePublic
	Addr   netip.AddrPort
	VNI    uint32
}

// Sink takes what one receive loop has received. Its methods are called by that loop alone, one at a time.
type Sink interface {
	// WireGuard takes a packet with the form of a WireGuard message. p is nil if the sender
	// is unknown; for a packet from a relay it is the peer of the key that the relay attests. b is borrowed and
	// may be changed in place.
	WireGuard(src Source, p *Peer, b []byte)
	// Flush says that no further packet is at hand for now.
	Flush()
}

// Config is what a [Manager] needs.
type Config struct {
	NodeKey  key.NodePublic
	DiscoKey key.DiscoPrivate
	Relay    Relay
	NewSink  func() Sink // called once for each receive loop
	// UDP sends to peers directly; nil: relays only. What it receives goes to [Manager.FromUDP].
	UDP UDP
	// FixedPort is the port that somebody has chosen for the sockets, 0 for none: behind a NAT whose mappings vary, a static
	// mapping to it may be guessed at.
	FixedPort uint16
	// STUN, if not nil, is told of each STUN message that comes over UDP. It runs on the receive loops, must not block, and
	// must not keep b.
	STUN func(src netip.AddrPort, b []byte)
	// Endpoints, if not nil, is told where this node may be reached whenever that changes. It runs on the
	// Manager's goroutine: it must not block, nor wait for the Manager. eps is its own.
	Endpoints func(eps []Endpoint)
	// DirectUp, if not nil, is told that a peer has got a direct path that it had not before, and whether a relay leads
	// to it as well. It runs on the Manager's goroutine, and may send to the peer.
	DirectUp func(p *Peer, relayed bool)
	// Alive, if not nil, is told of each authentic discovery message: the peer is there, and can be reached. looks says that it
	// was a ping or a call-me-maybe: the peer has something to send to this node, or looks after the path by which it
	// has been sending. It runs on the Manager's goroutine, may send to the peer, and must not block.
	Alive func(p *Peer, looks bool)
	// Called, if not nil, is told after each call-me-maybe to a peer. It runs on the Manager's goroutine, may send to the
	// peer, and must not block.
	Called func(p *Peer)
	// PeerRelay, if not nil, is the peer relay that this node is for others, and for itself.
	PeerRelay PeerRelay
	Logger    *slog.Logger // nil: silent
}

// PeerInfo is what control says of a peer.
type PeerInfo struct {
	Key           key.NodePublic
	Disco         key.DiscoPublic // zero: takes no part in discovery
	HomeRegion    int             // 0: none
	Endpoints     []netip.AddrPort
	WireGuardOnly bool // speaks neither disco nor DERP
	Cap           int  // capability version
	Relay         bool // says of itself that it is a peer relay
}

// PingResult is the answer to a ping.
type PingResult struct {
	Latency time.Duration
	Addr    netip.AddrPort // where a direct answer came from, or with a VNI the peer relay by which it came
	VNI     uint32
	Region  int // the relay region of a relayed answer
}

// PathInfo says how a peer is reached.
type PathInfo struct {
	Region int            // relay region, 0 if direct or by a peer relay
	Addr   netip.AddrPort // direct address, if direct
	Relay  netip.AddrPort // of the peer relay, if by one
	VNI    uint32         // at that
	RTT    time.Duration  // of the last pong; 0: none yet
	// Since is when this path was taken into use; zero before the first packet.
	Since        time.Time
	WhyNotDirect string // for a relayed path, of either kind
}

// Manager finds and chooses paths. Its methods are safe for concurrent use.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	discoPK key.DiscoPublic

	mu      sync.RWMutex // guards the three
	peers   map[key.NodePublic]*Peer
	byDisco map[key.DiscoPublic]*Peer // the first of those with this key; Peer.sibling is the next
	shakes  map[shakeKey][]*Peer      // who has an endpoint on a peer relay, by what the relay's messages say; maxShakes for each peer

	relays    atomic.Pointer[relayList] // peer relays that may be asked; nil: none
	connected atomic.Pointer[[]uint16]  // relay regions with a connection; never nil
	sinkMu    sync.Mutex                // guards changes of sinks
	sinks     atomic.Pointer[map[int]Sink]

	closed atomic.Bool
	done   chan struct{} // closed by Close
	wg     sync.WaitGroup
	events chan event

	start    time.Time    // what times in atomics count from
	clock    atomic.Int64 // when UDP packets last came, coarsely
	noAnswer atomic.Bool  // STUN servers do not answer
	stunWant atomic.Int32 // how many STUN responses may still be queued

	wake chan struct{} // has room for one: todo is not empty
	todo todo
}

// Peer is one peer. Its methods are safe for concurrent use.
type Peer struct {
	m    *Manager
	key  key.NodePublic
	info atomic.Pointer[PeerInfo]

	home    atomic.Uint32 // home region, with goneBit
	heard   atomic.Uint32 // region on which it was last heard, 0: none
	used    atomic.Uint32 // region that carried the last packet to it
	queued  atomic.Int32  // its messages in the Manager's queue
	removed atomic.Bool
	since   atomic.Int64 // unix ns, of used
	rtt     atomic.Int64 // ns

	route     atomic.Pointer[route] // nil: by relay
	pinged    atomic.Pointer[route] // where it last pinged from, for a while
	told      atomic.Int64          // when the owner was last told of traffic, since Manager.start
	heardAt   atomic.Int64          // when the path in use last showed life, since Manager.start
	bulkAt    atomic.Int64          // when the owner was last told of bulk traffic, since Manager.start
	bulkFrom  atomic.Int64          // since when bulkSum counts, since Manager.start
	bulkSum   atomic.Int64
	doubt     atomic.Int64  // until when data goes by the relay as well, since Manager.start
	flags     atomic.Uint32 // what the owner has not yet looked at
	active    atomic.Bool   // it has a machine
	relayedAt atomic.Int64  // when data by a relay last raised a doubt, since Manager.start
	why       atomic.Uint32 // why there is no direct path
	sibling   *Peer         // guarded by Manager.mu
}

// goneBit marks a home region whose relay said that the peer is not there.
const goneBit = 1 << 31

// New returns a Manager without peers. It starts one goroutine, which Close ends.
func New(cfg Config) (*Manager, error) {
	switch {
	case cfg.NodeKey.IsZero():
		return nil, errors.New("path: no node key")
	case cfg.DiscoKey.IsZero():
		return nil, errors.New("path: no disco key")
	case cfg.Relay == nil:
		return nil, errors.New("path: no relay")
	case cfg.NewSink == nil:
		return nil, errors.New("path: no sink")
	}
	m := &Manager{
		cfg:     cfg,
		log:     cfg.Logger,
		discoPK: cfg.DiscoKey.Public(),
		peers:   make(map[key.NodePublic]*Peer),
		byDisco: make(map[key.DiscoPublic]*Peer),
		shakes:  make(map[shakeKey][]*Peer),
		done:    make(chan struct{}),
		events:  make(chan event, 64),
		start:   time.Now(),
		wake:    make(chan struct{}, 1),
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.connected.Store(new([]uint16))
	m.sinks.Store(new(map[int]Sink))
	m.wg.Go(m.loop)
	return m, nil
}

// Close ends discovery: pings in progress end with [ErrClosed], and so does every later use.
// It waits for the Manager's goroutine, so it must not be called by a [Relay] or a [Sink].
func (m *Manager) Close() {
	if !m.closed.Swap(true) {
		close(m.done)
	}
	m.wg.Wait()
}

// UpsertPeer adds a peer or changes what is known of it. info's slices are kept.
func (m *Manager) UpsertPeer(info PeerInfo) *Peer {
	if info.HomeRegion < 0 || info.HomeRegion > 0xffff {
		info.HomeRegion = 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.peers[info.Key]
	if p == nil {
		p = &Peer{m: m, key: info.Key}
		m.peers[info.Key] = p
	} else if old := p.info.Load().Disco; old != info.Disco {
		m.dropDisco(p, old)
		if !old.IsZero() {
			p.route.Store(nil) // it has started anew, and is hardly where it was
			p.pinged.Store(nil)
		}
	}
	if old := p.info.Load(); !info.Disco.IsZero() && (old == nil || old.Disco != info.Disco) {
		p.sibling = m.byDisco[info.Disco]
		m.byDisco[info.Disco] = p
	}
	p.info.Store(&info)
	if h := uint32(info.HomeRegion); p.home.Load()&^goneBit != h {
		p.home.Store(h)
	}
	p.infoChanged(&info)
	return p
}

// dropDisco takes p off the list of those with disco key k.
func (m *Manager) dropDisco(p *Peer, k key.DiscoPublic) {
	if k.IsZero() {
		return
	}
	if first := m.byDisco[k]; first != p {
		for q := first; q != nil; q = q.sibling {
			if q.sibling == p {
				q.sibling = p.sibling
				break
			}
		}
	} else if p.sibling != nil {
		m.byDisco[k] = p.sibling
	} else {
		delete(m.byDisco, k)
	}
	p.sibling = nil
}

// RemovePeer removes a peer. Later sends by its [Peer] fail with [ErrUnknownPeer].
func (m *Manager) RemovePeer(k key.NodePublic) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.peers[k]; p != nil {
		p.removed.Store(true)
		delete(m.peers, k)
		m.dropDisco(p, p.info.Load().Disco)
		p.route.Store(nil)
		p.tell(flagInfo)
	}
}

// Peer returns the peer of key k, or nil.
func (m *Manager) Peer(k key.NodePublic) *Peer {
	m.mu.RLock()
	p := m.peers[k]
	m.mu.RUnlock()
	return p
}

// Public returns the peer's node key.
func (p *Peer) Public() key.NodePublic { return p.key }

// Send transmits the sealed messages in b, each seg bytes but for the last, by the best path. It
// does not keep b and blocks no longer than a [Relay] or a socket does. Errors: [ErrClosed], [ErrUnknownPeer], [ErrNoPath], or the
// relay's.
func (p *Peer) Send(b []byte, seg int) error {
	m := p.m
	if m.closed.Load() {
		return ErrClosed
	}
	if p.removed.Load() {
		return ErrUnknownPeer
	}
	tried := false
	if m.cfg.UDP != nil {
		var sure bool
		if tried, sure = p.sendDirect(b, seg); sure {
			return nil
		}
		if !tried {
			tried = p.sendHandshake(b, seg)
		}
	}
	r := p.region()
	if r == 0 {
		if tried {
			return nil
		}
		return ErrNoPath
	}
	if p.used.Load() != r {
		p.used.Store(r)
		p.since.Store(time.Now().UnixNano())
	}
	if err := m.cfg.Relay.Send(int(r), p.key, b, seg); err != nil && !tried {
		return err
	}
	return nil
}

// region returns the relay region by which to reach the peer, 0 for none: its home if that is
// connected; or else the region where it was last heard if that is connected, which spares a
// connection and is right while the peer cannot reach its home; or else its home, which the relay client then dials.
func (p *Peer) region() uint32 {
	h, heard := p.home.Load(), p.heard.Load()
	gone := h&goneBit != 0
	h &^= goneBit
	switch {
	case heard == 0 || heard == h:
		return h
	case h == 0:
		return heard
	}
	if p.m.isConnected(h) && !gone {
		return h
	}
	if p.m.isConnected(heard) {
		return heard
	}
	return h
}

func (m *Manager) isConnected(r uint32) bool {
	for _, c := range *m.connected.Load() {
		if uint32(c) == r {
			return true
		}
	}
	return false
}

// Reply answers to exactly where a packet came from, whoever sent it.
type Reply struct {
	m   *Manager
	src Source
}

// Reply returns a way back to src. It is a value so that a receive loop can keep one and
// overwrite it for each packet without allocating.
func (m *Manager) Reply(src Source) Reply { return Reply{m, src} }

// Send transmits as [Peer.Send] does.
func (r *Reply) Send(b []byte, seg int) error {
	switch {
	case r.m == nil || r.m.closed.Load():
		return ErrClosed
	case r.src.Region != 0:
		return r.m.cfg.Relay.Send(r.src.Region, r.src.Key, b, seg)
	case r.m.cfg.UDP != nil && r.src.Addr.IsValid():
		return r.m.transmit(hop{r.src.Addr, r.src.VNI}, b, seg)
	}
	return ErrNoPath
}

// AppendSource appends what tells this source from others, for package wg to bind a cookie to.
func (r *Reply) AppendSource(b []byte) []byte {
	if r.src.Region != 0 {
		b = append(b, byte(r.src.Region>>8), byte(r.src.Region))
		return r.src.Key.AppendTo(b)
	}
	a := r.src.Addr.Addr().As16()
	port, vni := r.src.Addr.Port(), r.src.VNI
	b = append(append(b, a[:]...), byte(port>>8), byte(port))
	return append(b, byte(vni>>16), byte(vni>>8), byte(vni))
}

// FromRelay takes a packet that region delivered from the node src. Calls for one region must come
// one at a time, those for different regions may be concurrent. b is borrowed and may be changed.
// Data causes no allocation here.
func (m *Manager) FromRelay(region int, src key.NodePublic, b []byte) {
	if region <= 0 || region > 0xffff || m.closed.Load() {
		return
	}
	isDisco := disco.Is(b)
	if !isDisco && !isWireGuard(b) {
		return
	}
	p := m.Peer(src)
	if p != nil {
		// A relay attests its clients' keys, so this is worth as much as the relay's word:
		// enough for choosing among relays, which is all it is used for.
		if r := uint32(region); p.heard.Load() != r {
			p.heard.Store(r)
		}
		if r := uint32(region); p.home.Load() == r|goneBit {
			p.home.CompareAndSwap(r|goneBit, r)
		}
	}
	s := Source{Region: region, Key: src}
	if isDisco {
		m.discoIn(s, p, b)
		return
	}
	if p != nil && m.cfg.UDP != nil {
		p.heardByRelay()
	}
	m.sink(region).WireGuard(s, p, b)
}

// isWireGuard reports whether b has the form of a WireGuard message: type 1 to 4, three zero bytes, at
// least an empty data message's length (WireGuard paper §5.4).
func isWireGuard(b []byte) bool {
	return len(b) >= 32 && b[0] >= 1 && b[0] <= 4 && b[1]|b[2]|b[3] == 0
}

// FlushRelay says that region has delivered all it has for now. It counts as a call of [Manager.FromRelay].
func (m *Manager) FlushRelay(region int) {
	if s := (*m.sinks.Load())[region]; s != nil && !m.closed.Load() {
		s.Flush()
	}
}

func (m *Manager) sink(region int) Sink {
	if s := (*m.sinks.Load())[region]; s != nil {
		return s
	}
	m.sinkMu.Lock()
	defer m.sinkMu.Unlock()
	old := *m.sinks.Load()
	if s := old[region]; s != nil {
		return s
	}
	sinks := maps.Clone(old)
	if sinks == nil {
		sinks = make(map[int]Sink)
	}
	s := m.cfg.NewSink()
	sinks[region] = s
	m.sinks.Store(&sinks)
	return s
}

// RelayState says whether there is a connection to region. err is why there is none.
func (m *Manager) RelayState(region int, connected bool, err error) {
	if region <= 0 || region > 0xffff {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := *m.connected.Load()
	i := slices.Index(old, uint16(region))
	if (i >= 0) == connected {
		return
	}
	list := slices.Clone(old)
	if connected {
		list = append(list, uint16(region))
	} else {
		list = slices.Delete(list, i, i+1)
	}
	m.connected.Store(&list)
}

// PeerGone says that region's relay reports the node k as not connected to it.
func (m *Manager) PeerGone(region int, k key.NodePublic, reason byte) {
	p := m.Peer(k)
	if p == nil || region <= 0 || region > 0xffff {
		return
	}
	r := uint32(region)
	p.heard.CompareAndSwap(r, 0)
	p.home.CompareAndSwap(r, r|goneBit)
}

// Path says how the peer is reached now; the zero PathInfo with WhyNotDirect set if it cannot be.
func (m *Manager) Path(k key.NodePublic) PathInfo {
	p := m.Peer(k)
	if p == nil {
		return PathInfo{WhyNotDirect: "unknown peer"}
	}
	return p.Path()
}

// PeerRelay writes the path by a peer relay as upstream does, "" for others.
func (pi PathInfo) PeerRelay() string { return relayText(pi.Relay, pi.VNI) }

// PeerRelay writes the peer relay by which the answer came as upstream does, "" for others.
func (r PingResult) PeerRelay() string { return relayText(r.Addr, r.VNI) }

// Path says how the peer is reached now.
func (p *Peer) Path() PathInfo {
	if rt := p.direct(); rt != nil {
		pi := PathInfo{Addr: rt.addr, RTT: time.Duration(p.rtt.Load()), Since: rt.since}
		if rt.vni != 0 {
			pi.Addr, pi.Relay, pi.VNI, pi.WhyNotDirect = netip.AddrPort{}, rt.addr, rt.vni, p.whyNotDirect()
		}
		return pi
	}
	pi := PathInfo{Region: int(p.region()), RTT: time.Duration(p.rtt.Load())}
	if ns := p.since.Load(); ns != 0 && int(p.used.Load()) == pi.Region {
		pi.Since = time.Unix(0, ns)
	}
	pi.WhyNotDirect = p.whyNotDirect()
	return pi
}

// Ping sends a discovery ping to the peer of key k, again every second, until it is answered
// or ctx ends. size is the length of the whole message, padded up to it, 0 for the least. Errors: [ErrUnknownPeer],
// [ErrNoDisco], [ErrNoPath], [ErrPingSize], [ErrClosed], or ctx's, wrapped.
func (m *Manager) Ping(ctx context.Context, k key.NodePublic, size int) (PingResult, error) {
	if size > MaxPingSize {
		return PingResult{}, ErrPingSize
	}
	p := m.Peer(k)
	switch {
	case m.closed.Load():
		return PingResult{}, ErrClosed
	case p == nil:
		return PingResult{}, ErrUnknownPeer
	case p.info.Load().Disco.IsZero():
		return PingResult{}, ErrNoDisco
	case p.region() == 0 && (m.cfg.UDP == nil || p.direct() == nil && len(p.info.Load().Endpoints) == 0):
		return PingResult{}, ErrNoPath
	}
	req := &pingRequest{
		pad:  max(0, size-disco.Overhead-disco.PlainHeaderLen-disco.PingLen),
		done: make(chan PingResult, 1),
	}
	select {
	case m.events <- event{kind: evPing, p: p, req: req}:
	case <-ctx.Done():
		return PingResult{}, fmt.Errorf("path: ping: %w", context.Cause(ctx))
	case <-m.done:
		return PingResult{}, ErrClosed
	}
	select {
	case r, ok := <-req.done:
		if !ok {
			return PingResult{}, ErrUnknownPeer
		}
		return r, nil
	case <-m.done:
		return PingResult{}, ErrClosed
	case <-ctx.Done():
	}
	select {
	case m.events <- event{kind: evCancel, p: p, req: req}:
	case <-m.done:
	}
	return PingResult{}, fmt.Errorf("path: ping: %w", context.Cause(ctx))
}

func randomTx() (tx disco.TxID) {
	rand.Read(tx[:])
	return tx
}
