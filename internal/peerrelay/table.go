// Package peerrelay is a relay that a node of a tailnet runs for other nodes: over UDP, for pairs of clients that find no direct
// path to each other. Upstream calls it a peer relay. docs/protocol/disco.md §6 is the protocol.
//
// [Table] is the relay without sockets: what has been allocated to whom, and what becomes of a packet. The time is an argument.
// [Server] puts it on two sockets and finds out where these can be reached.
//
// The relay sees sealed packets only. It learns who talks to whom, and how much.
package peerrelay

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/blake2s"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

const (
	// BindLifetime is how long an endpoint waits for both clients.
	BindLifetime = 30 * time.Second
	// SteadyStateLifetime is how long a bound endpoint lives after the last packet of either client.
	SteadyStateLifetime = 5 * time.Minute
	// secretEvery is how often the secret of the challenges changes. The one before counts for as long again.
	secretEvery = 2 * time.Minute

	// maxEndpoints bounds the table; an endpoint is about half a kilobyte.
	maxEndpoints = 16384
	// maxWaiting bounds the endpoints of one requester that are not bound by both clients, and maxOwned all of its.
	maxWaiting = 128
	maxOwned   = 2048
	// allocRate and allocBurst bound new endpoints of all requesters: each costs two scalar multiplications.
	allocRate  = 100
	allocBurst = 400
)

var (
	// ErrFull reports that there is no room for a further endpoint, or not for this requester.
	ErrFull = errors.New("peerrelay: no room for another endpoint")
	// ErrRate reports too many allocations at once.
	ErrRate = errors.New("peerrelay: too many allocations")
	// ErrClients reports a pair for which there can be no endpoint.
	ErrClients = errors.New("peerrelay: not a pair of clients")
)

// Sender transmits the datagrams in b, each seg bytes but for the last, to dst. It does not keep b.
type Sender interface {
	Send(dst netip.AddrPort, b []byte, seg int) error
}

// pair is two disco keys in order.
type pair [2]key.DiscoPublic

func pairOf(a, b key.DiscoPublic) pair {
	if a.Compare(b) > 0 {
		a, b = b, a
	}
	return pair{a, b}
}

// Table is what a relay has allocated. Its methods are safe for concurrent use.
type Table struct {
	disco key.DiscoPrivate
	pub   key.DiscoPublic

	mu      sync.RWMutex // guards what follows
	byVNI   map[uint32]*endpoint
	byPair  map[pair]*endpoint
	owners  map[key.DiscoPublic]*owned
	nextVNI uint32
	lamport uint64
	tokens  float64
	at      time.Time   // of tokens
	secrets [2][32]byte // of challenges; the first is the present one
	turned  time.Time   // when that became so
	made    bool        // there are secrets

	forwarded, dropped atomic.Uint64
}

// owned is what one requester has.
type owned struct{ waiting, all int }

// endpoint is one allocation.
type endpoint struct {
	vni     uint32
	lamport uint64
	clients pair
	shared  [2]key.Shared // with each client
	owner   key.DiscoPublic
	made    time.Time

	mu         sync.Mutex // guards what follows; taken after Table.mu
	gone       bool
	generation [2]uint32 // of the handshake in progress, 0: none
	bound      [2]netip.AddrPort
	seen       [2]time.Time
	packets    [2]uint64 // from each client
	bytes      [2]uint64
}

// NewTable returns an empty table whose relay has a disco key of its own, made anew.
func NewTable(now time.Time) *Table {
	t := &Table{
		disco:  key.NewDisco(),
		byVNI:  make(map[uint32]*endpoint),
		byPair: make(map[pair]*endpoint),
		owners: make(map[key.DiscoPublic]*owned),
		tokens: allocBurst,
		at:     now,
	}
	t.pub = t.disco.Public()
	var r [4]byte
	rand.Read(r[:])
	t.nextVNI = binary.BigEndian.Uint32(r[:]) & disco.MaxVNI
	return t
}

// Disco returns the relay's disco key.
func (t *Table) Disco() key.DiscoPublic { return t.pub }

// Len returns the number of endpoints.
func (t *Table) Len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.byVNI)
}

// Allocate returns the endpoint of the two clients, making it if there is none. from is the one of them that asks. The result has no
// addresses. Errors: [ErrClients], [ErrFull], [ErrRate].
func (t *Table) Allocate(now time.Time, from, other key.DiscoPublic) (disco.RelayEndpoint, error) {
	if from == other || from.IsZero() || other.IsZero() || from == t.pub || other == t.pub {
		return disco.RelayEndpoint{}, ErrClients
	}
	pr := pairOf(from, other)
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byPair[pr]
	if e != nil && e.expired(now) {
		t.remove(e)
		e = nil
	}
	if e == nil {
		var err error
		if e, err = t.make(now, pr, from); err != nil {
			return disco.RelayEndpoint{}, err
		}
	}
	return disco.RelayEndpoint{
		Server: t.pub, Clients: e.clients, LamportID: e.lamport, VNI: e.vni,
		BindLifetime: BindLifetime, SteadyStateLifetime: SteadyStateLifetime,
	}, nil
}

// make makes an endpoint. t.mu is held.
func (t *Table) make(now time.Time, pr pair, from key.DiscoPublic) (*endpoint, error) {
	t.tokens = min(allocBurst, t.tokens+max(0, now.Sub(t.at).Seconds())*allocRate)
	t.at = now
	o := t.owners[from]
	if len(t.byVNI) >= maxEndpoints || o != nil && (o.waiting >= maxWaiting || o.all >= maxOwned) {
		t.expire(now)
		if o = t.owners[from]; len(t.byVNI) >= maxEndpoints || o != nil && (o.waiting >= maxWaiting || o.all >= maxOwned) {
			return nil, ErrFull
		}
	}
	if t.tokens < 1 {
		return nil, ErrRate
	}
	t.tokens--
	for { // the table is far smaller than the pool
		t.nextVNI = (t.nextVNI + 1) & disco.MaxVNI
		if t.nextVNI != 0 && t.byVNI[t.nextVNI] == nil {
			break
		}
	}
	t.lamport++
	e := &endpoint{vni: t.nextVNI, lamport: t.lamport, clients: pr, owner: from, made: now}
	for i, k := range pr {
		e.shared[i] = t.disco.Shared(k)
	}
	t.byVNI[e.vni], t.byPair[pr] = e, e
	if o == nil {
		o = &owned{}
		t.owners[from] = o
	}
	o.waiting++
	o.all++
	return e, nil
}

// remove takes e out of the table. t.mu is held.
func (t *Table) remove(e *endpoint) {
	e.mu.Lock()
	e.gone = true
	waiting := !e.isBound()
	e.mu.Unlock()
	delete(t.byVNI, e.vni)
	delete(t.byPair, e.clients)
	o := t.owners[e.owner]
	o.all--
	if waiting {
		o.waiting--
	}
	if o.all == 0 {
		delete(t.owners, e.owner)
	}
}

// Expire removes the endpoints whose time is over, and returns how many remain.
func (t *Table) Expire(now time.Time) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.expire(now)
	return len(t.byVNI)
}

func (t *Table) expire(now time.Time) {
	for _, e := range t.byVNI {
		if e.expired(now) {
			t.remove(e)
		}
	}
}

// isBound reports whether both clients have completed their handshakes. e.mu is held.
func (e *endpoint) isBound() bool { return e.bound[0].IsValid() && e.bound[1].IsValid() }

func (e *endpoint) expired(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.isBound() {
		return now.Sub(e.made) > BindLifetime
	}
	return now.Sub(e.seen[0]) > SteadyStateLifetime || now.Sub(e.seen[1]) > SteadyStateLifetime
}

// Receive takes the datagrams in b, each seg bytes but for the last, that came from src, and sends what becomes of them. What
// is forwarded goes out as it came in, in batches as they came, and costs no allocation. Packets that belong to no endpoint,
// or come from elsewhere than its clients, are dropped.
func (t *Table) Receive(now time.Time, src netip.AddrPort, b []byte, seg int, out Sender) {
	if seg <= 0 {
		return
	}
	for len(b) > 0 {
		n := min(seg, len(b))
		g, ok := disco.ParseGeneve(b[:n])
		switch {
		case !ok:
		case g.Control:
			if g.Protocol == disco.GeneveDisco {
				t.handshake(now, src, g.VNI, b[disco.GeneveLen:n], out)
			}
		default:
			// A batch most often belongs to one endpoint: its headers are equal, and it goes on whole.
			for end := n; end < len(b) && len(b)-end >= disco.GeneveLen && string(b[end:end+disco.GeneveLen]) == string(b[:disco.GeneveLen]); {
				end = min(end+seg, len(b))
				n = end
			}
			t.forward(now, src, g.VNI, b[:n], seg, out)
		}
		b = b[n:]
	}
}

func (t *Table) endpoint(vni uint32) *endpoint {
	t.mu.RLock()
	e := t.byVNI[vni]
	t.mu.RUnlock()
	return e
}

// forward sends datagrams of one client to the other.
func (t *Table) forward(now time.Time, src netip.AddrPort, vni uint32, b []byte, seg int, out Sender) {
	e := t.endpoint(vni)
	if e == nil {
		t.dropped.Add(1)
		return
	}
	e.mu.Lock()
	var i int
	switch {
	case e.gone || !e.isBound():
		i = -1
	case src == e.bound[0]:
		i = 0
	case src == e.bound[1]:
		i = 1
	default:
		i = -1
	}
	if i < 0 {
		e.mu.Unlock()
		t.dropped.Add(1)
		return
	}
	e.seen[i] = now
	e.packets[i] += uint64((len(b) + seg - 1) / seg)
	e.bytes[i] += uint64(len(b))
	dst := e.bound[1-i]
	e.mu.Unlock()
	if out.Send(dst, b, seg) == nil {
		t.forwarded.Add(uint64(len(b)))
	}
}

// handshake acts on a message for the relay itself. What is not exactly right is dropped in silence.
func (t *Table) handshake(now time.Time, src netip.AddrPort, vni uint32, b []byte, out Sender) {
	e := t.endpoint(vni)
	sender, ok := disco.Sender(b)
	if e == nil || !ok || len(b) > 512 {
		return
	}
	i := 0
	switch sender {
	case e.clients[0]:
	case e.clients[1]:
		i = 1
	default:
		return
	}
	plain, err := disco.Open(make([]byte, 0, 512), &e.shared[i], b)
	if err != nil {
		return
	}
	typ, _, body, err := disco.Split(plain)
	if err != nil || typ != disco.TypeBindEndpoint && typ != disco.TypeBindEndpointAnswer {
		return
	}
	m, err := disco.ParseBind(body)
	if err != nil || m.VNI != e.vni || m.RemoteKey != e.clients[1-i] || m.Generation == 0 {
		return
	}
	if typ == disco.TypeBindEndpoint {
		t.challenge(now, e, i, src, &m, out)
		return
	}
	t.answer(now, e, i, src, &m)
}

// challenge answers a bind message with a MAC over where it came from. Whoever sends that back is there. The answer is as long as the question.
func (t *Table) challenge(now time.Time, e *endpoint, i int, src netip.AddrPort, m *disco.BindCommon, out Sender) {
	t.mu.Lock()
	t.turn(now)
	secret := t.secrets[0]
	t.mu.Unlock()
	e.mu.Lock()
	if e.gone {
		e.mu.Unlock()
		return
	}
	e.generation[i] = m.Generation
	e.mu.Unlock()
	m.Challenge = mac(&secret, src, m)
	b := disco.Geneve{VNI: e.vni, Protocol: disco.GeneveDisco, Control: true}.Append(make([]byte, 0, 256))
	b = disco.Seal(b, t.pub, &e.shared[i], m.Append(nil, disco.TypeBindEndpointChallenge))
	out.Send(src, b, len(b))
}

// answer completes a handshake.
func (t *Table) answer(now time.Time, e *endpoint, i int, src netip.AddrPort, m *disco.BindCommon) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	right := 0
	for k := range t.secrets {
		c := mac(&t.secrets[k], src, m)
		right |= subtle.ConstantTimeCompare(c[:], m.Challenge[:])
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if right != 1 || e.gone || e.generation[i] != m.Generation {
		return
	}
	was := e.isBound()
	e.generation[i] = 0
	e.bound[i], e.seen[i] = src, now
	if !was && e.isBound() {
		t.owners[e.owner].waiting--
	}
}

// turn changes the secret if it is time. t.mu is held.
func (t *Table) turn(now time.Time) {
	if t.made && now.Sub(t.turned) < secretEvery {
		return
	}
	if t.made && now.Sub(t.turned) < 2*secretEvery {
		t.secrets[1] = t.secrets[0]
	} else { // what is that old counts no more
		rand.Read(t.secrets[1][:])
	}
	rand.Read(t.secrets[0][:])
	t.turned, t.made = now, true
}

// mac is the challenge for a handshake from src.
func mac(secret *[32]byte, src netip.AddrPort, m *disco.BindCommon) (out [disco.ChallengeLen]byte) {
	h, err := blake2s.New256(secret[:])
	if err != nil {
		panic("peerrelay: " + err.Error()) // the key has the right length
	}
	var b [8 + key.Size + 18]byte
	binary.BigEndian.PutUint32(b[:], m.VNI)
	binary.BigEndian.PutUint32(b[4:], m.Generation)
	raw := m.RemoteKey.Raw()
	copy(b[8:], raw[:])
	a := src.Addr().As16()
	copy(b[8+key.Size:], a[:])
	binary.BigEndian.PutUint16(b[8+key.Size+16:], src.Port())
	h.Write(b[:])
	h.Sum(out[:0])
	return out
}
