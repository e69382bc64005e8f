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
	staged     atomic.Int32 // packets that wait for a session
	keepalive  atomic.Int64 // persistent keepalive interval; 0: none

	sendMu sync.Mutex
	kept   kept // what was sent last and may be lost; guarded by sendMu

	mu             sync.Mutex
	previous, next *session
	ss             [32]byte  // secret of the two static keys, of the identity ssID
	ssID           *identity // nil: not computed
	psk            *[32]byte // nil: zeros
	hs             *pending  // our initiation that waits for its response
	meet           meeting   // when to initiate
	lastStamp      timestamp // of the last initiation accepted
	lastInitRx     int64     // when that was
	lastHandshake  int64
	cookie         *cookieJar
	lastMAC1       [16]byte // of the last handshake message sent, to which a cookie may be the reply
	hasMAC1        bool
	doubts         int8 // handshakes because a session was unproved, since the last that was not

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

// Gone says that a relay has nobody to hand messages to, so that an initiation without an answer is
// known to be lost: the next goes sooner.
func (p *Peer) Gone() {
	now := p.dev.now()
	p.mu.Lock()
	p.meet.gone(&p.dev.t, now, p.current.Load() != nil)
	at := p.meet.at()
	p.mu.Unlock()
	p.dev.sched.wakeBy(p, at)
}

// Alive says that the peer has shown itself by other means than WireGuard, or that there is a new way to
// it; rtt is its round trip, 0 if that is not known. An initiation that must have been lost is then repeated now and
// not when its time is up.
func (p *Peer) Alive(rtt time.Duration) {
	now := p.dev.now()
	p.mu.Lock()
	again := p.meet.alive(&p.dev.t, now, int64(rtt), p.current.Load() != nil)
	p.mu.Unlock()
	if again {
		p.handshake(now, false)
	}
}

// Wanted says that the peer looks for ways to this node, as it does when it has something to send. If it does not
// get a session by itself within a moment, this node begins a handshake.
func (p *Peer) Wanted() {
	now := p.dev.now()
	session := p.HasSession()
	p.mu.Lock()
	p.meet.wanted(&p.dev.t, now, session)
	at := p.meet.at()
	p.mu.Unlock()
	p.dev.sched.wakeBy(p, at)
}

// Renew is for a peer that is known to have started anew: it holds no session of before, and drops
// in silence what comes on one, so that without Renew everything sent to it is lost until
// KEEPALIVE_TIMEOUT + REKEY_TIMEOUT (paper §6.5) have passed. Renew sends no more on the sessions that
// exist, stages what is to be sent and what was last sent without being answered, and initiates at once. Messages that come
// on the last session are still accepted, in case the peer has initiated one with its new life already.
//
// It does not block but for the Conduit. Without a session it is no more than a sign of the peer, as Alive is.
func (p *Peer) Renew() error {
	now := p.dev.now()
	p.mu.Lock()
	if p.removed.Load() {
		p.mu.Unlock()
		return nil
	}
	cur := p.current.Load()
	if cur == nil {
		p.mu.Unlock()
		p.Alive(0)
		return nil
	}
	p.retire(cur)
	p.current.Store(nil)
	p.meet.renew()
	p.mu.Unlock()
	p.sendMu.Lock() // after whoever may be sending on the last session
	p.dev.stage.add(p, p.kept.take(now, p.lastRx.Load()), now)
	p.sendMu.Unlock()
	return p.handshake(now, true)
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
	p.kept.drop()
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
	p.meet.reset()
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
// initiations are repeated; otherwise it is such a repetition. See meeting.
func (p *Peer) handshake(now int64, want bool) error {
	d := p.dev
	p.mu.Lock()
	if p.removed.Load() || d.closed.Load() {
		p.mu.Unlock()
		return ErrClosed
	}
	ready := false
	if want {
		ready = p.meet.want(&d.t, now)
	} else {
		ready = p.meet.ready(now)
	}
	if !ready {
		at := p.meet.at()
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
	p.meet.sent(&d.t, now, p.current.Load() != nil)
	at := p.meet.at()
	p.mu.Unlock()

	d.log.Debug("wg: handshake initiation", "peer", p.pub.ShortString())
	if err = p.transmit(msg[:], now); err != nil {
		p.mu.Lock()
		p.meet.failed(p.current.Load() != nil)
		p.mu.Unlock()
	}
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
	p.meet.next.Store(now + d.t.rekeyTimeout)
	p.complete(now)
}

// retire makes s the previous session. mu is held.
func (p *Peer) retire(s *session) {
	if p.previous != nil {
		p.previous.kill()
	}
	p.previous = s
}

// unproved reports whether cur, which we initiated, has most likely no other end: data has gone out on it for a while, and nothing came
// on it. That happens when the responder works on two initiations at once, or twice on one that it got by two paths: each
// response is good, but it has the keys of the last one alone. Upstream's does (it looks for replays and notes what it has seen under two
// locks), and waiting for KEEPALIVE_TIMEOUT + REKEY_TIMEOUT would be the end of most dials. mu is held.
func (p *Peer) unproved(cur *session, now int64, due func(int64) bool) bool {
	if cur == nil || cur.heard.Load() != 0 || p.doubts >= maxDoubts {
		return false
	}
	asked := cur.asked.Load()
	if asked == 0 {
		return false
	}
	wait := max(p.dev.t.prove, 4*cur.rtt) << (2 * p.doubts)
	if !due(asked + wait) {
		return false
	}
	cur.asked.Store(0) // or the next that is sent asks
	// A peer that has nothing to say on a new session is no sign of anything if it has had one before, but one that goes on to speak
	// on that is. Unless it has initiated that, and this node the other at the same time: then each may send on its own.
	if prev := p.previous; prev != nil && prev.heard.Load() != 0 && (!prev.initiator || p.lastRx.Load() < asked+wait/2) {
		return false
	}
	p.doubts++
	return true
}

// maxDoubts bounds what a peer costs that never says anything.
const maxDoubts = 2

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
	p.meet.done()
	p.lastHandshake = now
}
