package wg

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// A Peer is one other end. All methods are safe for concurrent use.
//
// Locks: sendMu orders what is sent; mu guards the handshake and which sessions there are.
// Neither is taken with the other held, and Conduits are called with mu free.
type Peer struct {
	dev     *Device
	pub     key.NodePublic
	conduit Conduit
	owner   any
	removed atomic.Bool

	// Any message sent or received touches these.
	current    atomic.Pointer[session] // the one to send with; written under mu
	rxBytes    atomic.Uint64
	txBytes    atomic.Uint64
	lastRx     atomic.Int64 // when the last authentic message came
	lastTx     atomic.Int64 // when the last message left
	owed       atomic.Int64 // since when the other end has waited for any answer to data; 0: it does not
	unanswered atomic.Int64 // since when data of ours has had no answer at all; 0: it has
	nextInit   atomic.Int64 // no initiation before then
	staged     atomic.Int32 // packets that wait for a session
	keepalive  atomic.Int64 // persistent keepalive interval; 0: none

	sendMu sync.Mutex

	mu             sync.Mutex
	previous, next *session
	ss             [32]byte  // secret of the two static keys, of the identity ssID
	ssID           *identity // nil: not computed
	psk            *[32]byte // nil: zeros
	hs             *pending  // our initiation that waits for its response
	retryAt        int64     // when to initiate again; 0: not
	attempts       int       // initiations since the last handshake was complete
	giveUpAt       int64     // when to stop that
	lastStamp      timestamp // of the last initiation accepted
	lastInitRx     int64     // when that was
	lastHandshake  int64
	cookie         *cookieJar
	lastMAC1       [16]byte // of the last handshake message sent, to which a cookie may be the reply
	hasMAC1        bool

	// The scheduler's; guarded by its lock, wakeAt readable without it.
	wakeAt atomic.Int64
	heapAt int32
}

// pending is our initiation in flight.
type pending struct {
	*initiator
	id    *identity
	index uint32
	bad   int // responses that did not authenticate
}

// maxBadResponses bounds what forged responses to one initiation can cost.
const maxBadResponses = 16

// initiationSpacing is how often a peer may initiate with us.
const initiationSpacing = int64(20 * time.Millisecond)

func (p *Peer) init(d *Device) {
	p.dev = d
	p.wakeAt.Store(never)
	p.heapAt = -1
}

// Owner returns what AddPeer was given.
func (p *Peer) Owner() any { return p.owner }

// Public returns the peer's static key.
func (p *Peer) Public() key.NodePublic { return p.pub }

// HasSession reports whether a packet could be sent right now, without a handshake first.
func (p *Peer) HasSession() bool {
	s := p.current.Load()
	return s != nil && p.dev.now()-s.created < p.dev.t.rejectAfterTime
}

// SetPresharedKey mixes psk into the handshakes to come; zeros are the same as none. A
// tailnet uses none. Sessions that exist go on.
func (p *Peer) SetPresharedKey(psk [32]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.psk != nil {
		clear(p.psk[:])
	}
	p.psk = nil
	if psk != [32]byte{} {
		p.psk = &psk
	}
}

// SetPersistentKeepalive makes the peer send something at least once in the given time, with a
// handshake if need be; 0, the default, turns that off. A tailnet keeps its paths open by
// other means. Times beyond a day are a day.
func (p *Peer) SetPersistentKeepalive(d time.Duration) {
	p.keepalive.Store(int64(min(max(d, 0), 24*time.Hour)))
	if d > 0 {
		p.dev.sched.wakeBy(p, p.dev.now())
	}
}

// Rekey begins a handshake now, unless one began within the last five seconds. It does not wait
// for it.
func (p *Peer) Rekey() error { return p.handshake(p.dev.now(), true) }

// PathUp says that there is a way to the peer where there was none. An initiation that went
// nowhere is then repeated now and not when its time is up.
func (p *Peer) PathUp() {
	p.mu.Lock()
	waiting := p.retryAt != 0 && p.current.Load() == nil
	if waiting {
		p.nextInit.Store(0)
		p.attempts = 0
	}
	p.mu.Unlock()
	if waiting {
		p.handshake(p.dev.now(), false)
	}
}

// Stats are a peer's counters. Times are zero if the thing never happened.
type Stats struct {
	TxBytes, RxBytes uint64 // of WireGuard messages, headers and tags included
	LastHandshake    time.Time
	LastReceive      time.Time // of any authentic message
	Staged           int       // packets that wait for a handshake
}

// Stats returns the peer's counters.
func (p *Peer) Stats() Stats {
	p.mu.Lock()
	at := p.lastHandshake
	p.mu.Unlock()
	return Stats{
		TxBytes:       p.txBytes.Load(),
		RxBytes:       p.rxBytes.Load(),
		LastHandshake: p.dev.wall(at),
		LastReceive:   p.dev.wall(p.lastRx.Load()),
		Staged:        int(p.staged.Load()),
	}
}

// Remove takes the peer off its device, wipes its keys and drops what it had staged. It may be
// called more than once, but not by the peer's Conduit or a Source.
func (p *Peer) Remove() {
	d := p.dev
	d.peersMu.Lock()
	if d.peers[p.pub] == p {
		delete(d.peers, p.pub)
	}
	d.peersMu.Unlock()
	p.mu.Lock()
	p.removed.Store(true)
	p.dropSessions()
	clear(p.ss[:])
	p.ssID, p.cookie = nil, nil
	if p.psk != nil {
		clear(p.psk[:])
		p.psk = nil
	}
	p.mu.Unlock()
	d.sched.remove(p)
	p.sendMu.Lock() // after whoever may be staging
	d.stage.drop(p)
	p.sendMu.Unlock()
}

// dropSessions ends all sessions and the handshake. mu is held.
func (p *Peer) dropSessions() {
	for _, s := range []*session{p.current.Load(), p.previous, p.next} {
		if s != nil {
			s.kill()
		}
	}
	p.current.Store(nil)
	p.previous, p.next = nil, nil
	p.dropHandshake()
	p.retryAt = 0
	p.owed.Store(0)
	p.unanswered.Store(0)
}

// dropHandshake forgets our initiation. mu is held.
func (p *Peer) dropHandshake() {
	if p.hs != nil {
		p.dev.table.cancel(p.hs.index)
		p.hs.wipe()
		p.hs.eph = nil
		p.hs = nil
	}
}

// staticStatic returns the secret of the two static keys, computing it the first time. mu is held.
func (p *Peer) staticStatic(id *identity) (*[32]byte, error) {
	if p.ssID != id {
		pub := p.pub.Raw()
		ss, err := dh(id.priv, &pub)
		if err != nil {
			return nil, err
		}
		p.ss, p.ssID = ss, id
	}
	return &p.ss, nil
}

var zeroPSK [32]byte

func (p *Peer) presharedKey() *[32]byte {
	if p.psk != nil {
		return p.psk
	}
	return &zeroPSK
}

// handshake sends an initiation, or sees to it that one is sent as soon as the last is long
// enough ago. want says that something new asks for it, which renews the time for which
// initiations are repeated; otherwise it is such a repetition.
func (p *Peer) handshake(now int64, want bool) error {
	d := p.dev
	t := &d.t
	p.mu.Lock()
	if p.removed.Load() || d.closed.Load() {
		p.mu.Unlock()
		return ErrClosed
	}
	if want {
		p.giveUpAt = now + t.rekeyAttemptTime
	}
	if at := p.nextInit.Load(); now < at {
		if p.retryAt == 0 {
			p.retryAt = at
		}
		at = p.retryAt
		p.mu.Unlock()
		d.sched.wakeBy(p, at)
		return nil
	}
	id := d.id.Load()
	ss, err := p.staticStatic(id)
	if err != nil {
		p.mu.Unlock()
		d.stage.drop(p)
		return err
	}
	p.dropHandshake()
	var msg [sizeInitiation]byte
	index := d.table.reserve(p)
	pub := p.pub.Raw()
	st, err := initiate(&msg, id, &pub, ss, newEphemeral(), index, d.stamp.next())
	if err != nil {
		d.table.cancel(index)
		p.mu.Unlock()
		d.stage.drop(p)
		return err
	}
	p.hs = &pending{initiator: st, id: id, index: index}
	p.putMACs(msg[:], &pub, now)
	wait := t.retryAfter(p.attempts, p.current.Load() != nil)
	p.attempts++
	p.nextInit.Store(now + wait)
	p.retryAt = now + wait + jitter(min(t.jitter, wait/4))
	at := p.retryAt
	p.mu.Unlock()

	d.log.Debug("wg: handshake initiation", "peer", p.pub.ShortString())
	err = p.transmit(msg[:], now)
	d.sched.wakeBy(p, at)
	return err
}

// putMACs adds the MACs to a handshake message. mu is held.
func (p *Peer) putMACs(msg []byte, pub *[32]byte, now int64) {
	var cookie *[16]byte
	if c := p.cookie; c != nil {
		if now-c.at < p.dev.t.cookieRefresh {
			cookie = &c.cookie
		} else {
			p.cookie = nil
		}
	}
	p.lastMAC1 = putMACs(msg, pub, cookie)
	p.hasMAC1 = true
}

// transmit sends one handshake message.
func (p *Peer) transmit(msg []byte, now int64) error {
	p.txBytes.Add(uint64(len(msg)))
	p.lastTx.Store(now)
	return p.conduit.Send(msg, len(msg))
}

// establish makes k the session that we initiated. mu is held.
func (p *Peer) establish(s *session, now int64) {
	d := p.dev
	if p.next != nil {
		// The other end initiated at the same time. It may be sending on that session, so it
		// stays, as the previous one.
		p.retire(p.next)
		p.next = nil
		if cur := p.current.Load(); cur != nil {
			cur.kill()
		}
	} else if cur := p.current.Load(); cur != nil {
		p.retire(cur)
	}
	d.table.insert(s)
	p.current.Store(s)
	p.nextInit.Store(now + d.t.rekeyTimeout)
	p.complete(now)
}

// retire makes s the previous session. mu is held.
func (p *Peer) retire(s *session) {
	if p.previous != nil {
		p.previous.kill()
	}
	p.previous = s
}

// promote makes next the current session once its initiator has used it. It reports whether
// s was next. mu is held.
func (p *Peer) promote(s *session, now int64) bool {
	if p.next != s {
		return false
	}
	if cur := p.current.Load(); cur != nil {
		p.retire(cur)
	}
	p.next = nil
	p.current.Store(s)
	p.dropHandshake()
	p.complete(now)
	return true
}

// complete notes that a handshake is done. mu is held.
func (p *Peer) complete(now int64) {
	p.retryAt = 0
	p.attempts = 0
	p.lastHandshake = now
}
