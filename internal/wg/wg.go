// Package wg is a WireGuard engine for programs that hold thousands of peers and carry few
// of them at a time. It does the cryptographic work of the protocol and nothing else: it
// opens no socket and knows no address. Messages leave through a [Conduit], which decides
// where they go; messages that arrived anywhere are given to [Device.Receive].
//
// Everything runs to completion on the caller's goroutine. [Peer.Send] seals packets into one
// contiguous batch and transmits it before it returns; [Device.Receive] opens a message where
// it lies. One timer serves the whole device, so an idle peer has no goroutine, no timer and
// no buffer.
//
// The protocol is that of J. A. Donenfeld, "WireGuard: Next Generation Kernel Network
// Tunnel" (cited here as "paper §"). The choices it leaves open are set down in
// docs/protocol/wireguard.md.
package wg

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

var (
	// ErrClosed reports a call on a closed Device or a removed Peer.
	ErrClosed = errors.New("wg: closed")
	// ErrPeerExists reports an AddPeer for a key that the device has already.
	ErrPeerExists = errors.New("wg: peer exists")
	// ErrMalformed reports a message that no WireGuard implementation sends: wrong type,
	// length, or an authentic plaintext that is not an IP packet.
	ErrMalformed = errors.New("wg: malformed message")
	// ErrUnknownIndex reports a message for a session or handshake that does not exist (any more).
	ErrUnknownIndex = errors.New("wg: no such session")
	// ErrUnknownPeer reports a valid initiation from a key that is no peer's.
	ErrUnknownPeer = errors.New("wg: unknown peer")
	// ErrAuth reports a message that does not authenticate.
	ErrAuth = errors.New("wg: message does not authenticate")
	// ErrReplay reports an authentic message that was received before, or is too old to tell.
	ErrReplay = errors.New("wg: replayed message")
	// ErrExpired reports a data message for a session past its reject time.
	ErrExpired = errors.New("wg: session expired")
	// ErrLoad reports a handshake message that was not worked on because there are too many of
	// them. The sender may have been given a cookie.
	ErrLoad = errors.New("wg: too many handshakes")
	// ErrShortBuffer reports a dst too small for the plaintext.
	ErrShortBuffer = errors.New("wg: destination too small")
	// ErrKey reports a public key with which no secret can be agreed on.
	ErrKey = errors.New("wg: unusable public key")
)

// A Conduit transmits messages to one destination. The packages above implement it once per
// peer; it chooses the path.
type Conduit interface {
	// Send transmits the messages in b, each seg bytes long but for the last, which may be
	// shorter. It must not keep b, must not block for long, and must not call into this
	// package. Data messages of one peer come one call at a time and in order; a handshake
	// message may come beside them. An error means that some of the messages were lost.
	Send(b []byte, seg int) error
}

// A Sourcer is a [Conduit] for replies that can tell where the message being answered came
// from. Under load the device makes cookies out of it (paper §5.3): two sources must not give
// the same bytes, and one source must give the same bytes each time (for UDP: address and
// port; for a relay: region and key). Sources without it share one cookie and one rate.
type Sourcer interface {
	// AppendSource appends the source to b. 48 bytes are used at most.
	AppendSource(b []byte) []byte
}

// A Source yields the packets of one [Peer.Send].
type Source interface {
	// Next writes the next plaintext IP packet into dst, whose length is the MTU, or what
	// [Peer.SendSized] was given if that is more, and returns the packet's length; 0 means that there are no more. It may use all of dst as scratch
	// space. It is called with the peer's send lock held: it must not call the peer's Send.
	Next(dst []byte) int
}

// Bounds of Config.MTU.
const (
	MinMTU = 576
	MaxMTU = 16384
)

// Config is what [NewDevice] needs.
type Config struct {
	// PrivateKey is the node's key. It must not be zero.
	PrivateKey key.NodePrivate
	// MTU is the longest plaintext packet in bytes, from MinMTU to MaxMTU; 0 means 1280.
	MTU int
	// Unknown, if not nil, is called when a valid initiation came from a static key that is no
	// peer's. It may call AddPeer and then returns true. It runs on the goroutine of Receive
	// with no lock of this package held; the rate of handshakes bounds the rate of calls.
	Unknown func(key.NodePublic) bool
	// Handshaked, if not nil, is called each time a handshake with a peer has completed, so that
	// packets can be sent. It runs on the goroutine of Receive with no lock of this package held.
	Handshaked func(*Peer)
	// StageBytes bounds the plaintext kept, on all peers together, for handshakes to
	// complete. 0 means 4 MiB.
	StageBytes int
	// Workers is how many goroutines may have a batch buffer of 64 KiB at a time; whoever finds none left seals into a small one. 0 means
	// twice GOMAXPROCS.
	Workers int
	// Traffic, if not nil, is called every ten seconds with true while a lot is sent, and then once with false, when
	// for ten seconds it was little: what was kept for speed may be given back. It runs on the timer's goroutine with no lock
	// of this package held, and must not block. Without traffic there is no timer.
	Traffic func(heavy bool)
	// Logger, if not nil, is told about handshakes at debug level. It gets no secret.
	Logger *slog.Logger
}

// timing holds the constants of paper §6.1; tests shorten some.
type timing struct {
	rekeyAfterTime, rejectAfterTime, rekeyAttemptTime int64 // nanoseconds, as all below
	rekeyTimeout, keepaliveTimeout, cookieRefresh     int64
	firstRetry, lostRetry, callBack, spacing          int64 // see meeting
	prove                                             int64 // see Peer.unproved
	jitter                                            int64 // added at random to rekeyTimeout
	rekeyAfterMessages, rejectAfterMessages           uint64
}

var defaultTiming = timing{
	rekeyAfterTime:      int64(120 * time.Second),
	rejectAfterTime:     int64(180 * time.Second),
	rekeyAttemptTime:    int64(90 * time.Second),
	rekeyTimeout:        int64(5 * time.Second),
	firstRetry:          int64(250 * time.Millisecond),
	lostRetry:           int64(25 * time.Millisecond),
	callBack:            int64(150 * time.Millisecond),
	spacing:             int64(25 * time.Millisecond), // initiationSpacing and some
	prove:               int64(500 * time.Millisecond),
	keepaliveTimeout:    int64(10 * time.Second),
	cookieRefresh:       int64(120 * time.Second),
	jitter:              int64(333 * time.Millisecond),
	rekeyAfterMessages:  1 << 60,
	rejectAfterMessages: math.MaxUint64 - 1<<13,
}

// never is a time that does not come.
const never = math.MaxInt64

// A Device is one WireGuard identity and its peers. All methods are safe for concurrent use.
type Device struct {
	cfg    Config
	mtu    int
	t      timing
	log    *slog.Logger
	start  time.Time // the origin of all int64 times, monotonic
	closed atomic.Bool

	id    atomic.Pointer[identity]
	idMu  sync.Mutex // held while the identity changes
	stamp stamper

	peersMu sync.RWMutex
	peers   map[key.NodePublic]*Peer

	table   table     // sessions and pending handshakes by receiver index
	sched   scheduler // the one timer
	janitor Peer      // no peer: its tick trims the pool
	heavy   bool      // what the last one saw; of the timer's goroutine
	pool    pool      // batch buffers
	stage   stage     // packets waiting for a session
	gate    gate      // how much handshake work is done
	cookies cookieMaker
}

// NewDevice returns a device with no peers. It does not block.
func NewDevice(cfg Config) (*Device, error) {
	if cfg.MTU == 0 {
		cfg.MTU = 1280
	}
	if cfg.MTU < MinMTU || cfg.MTU > MaxMTU {
		return nil, fmt.Errorf("wg: MTU %d is not in %d to %d", cfg.MTU, MinMTU, MaxMTU)
	}
	if cfg.StageBytes <= 0 {
		cfg.StageBytes = 4 << 20
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	id, err := newIdentity(cfg.PrivateKey)
	if err != nil {
		return nil, err
	}
	cfg.PrivateKey = key.NodePrivate{} // the identity has it
	d := &Device{
		cfg:   cfg,
		mtu:   cfg.MTU,
		t:     defaultTiming,
		log:   cfg.Logger,
		start: time.Now(),
		peers: make(map[key.NodePublic]*Peer),
	}
	d.id.Store(id)
	d.table.init()
	d.sched.init(d)
	d.janitor.init(d)
	d.pool.init(d.mtu, cfg.Workers)
	d.stage.init(cfg.StageBytes)
	return d, nil
}

// now returns the time since the device was made, in nanoseconds, and never 0.
func (d *Device) now() int64 { return int64(time.Since(d.start)) + 1 }

func (d *Device) wall(at int64) time.Time {
	if at == 0 {
		return time.Time{}
	}
	return d.start.Add(time.Duration(at - 1))
}

// Public returns the device's public key.
func (d *Device) Public() key.NodePublic { return key.NodePublicFromRaw(d.id.Load().pub) }

// SetPrivateKey gives the device a new identity. All sessions and handshakes end; peers stay,
// and packets that wait for a session go on waiting.
func (d *Device) SetPrivateKey(k key.NodePrivate) error {
	id, err := newIdentity(k)
	if err != nil {
		return err
	}
	if d.closed.Load() {
		return ErrClosed
	}
	d.idMu.Lock()
	d.id.Store(id)
	peers := d.allPeers()
	for _, p := range peers {
		p.mu.Lock()
		p.dropSessions()
		clear(p.ss[:])
		p.ssID, p.cookie = nil, nil
		p.mu.Unlock()
	}
	d.idMu.Unlock()
	for _, p := range peers {
		if p.staged.Load() > 0 {
			p.handshake(d.now(), true)
		}
	}
	return nil
}

func (d *Device) allPeers() []*Peer {
	d.peersMu.RLock()
	defer d.peersMu.RUnlock()
	s := make([]*Peer, 0, len(d.peers))
	for _, p := range d.peers {
		s = append(s, p)
	}
	return s
}

// AddPeer adds the peer whose static key is pub and whose messages leave through c. owner is
// any value the caller wants back from [Peer.Owner]. It is cheap: no arithmetic is done until
// the first handshake.
func (d *Device) AddPeer(pub key.NodePublic, c Conduit, owner any) (*Peer, error) {
	if pub.IsZero() || pub == d.Public() {
		return nil, ErrKey
	}
	if c == nil {
		return nil, errors.New("wg: AddPeer without a Conduit")
	}
	p := &Peer{pub: pub, conduit: c, owner: owner}
	p.init(d)
	d.peersMu.Lock()
	defer d.peersMu.Unlock()
	if d.closed.Load() {
		return nil, ErrClosed
	}
	if _, ok := d.peers[pub]; ok {
		return nil, ErrPeerExists
	}
	d.peers[pub] = p
	return p, nil
}

// Peer returns the peer whose static key is pub, or nil.
func (d *Device) Peer(pub key.NodePublic) *Peer {
	d.peersMu.RLock()
	defer d.peersMu.RUnlock()
	return d.peers[pub]
}

// DeviceStats are a device's counters.
type DeviceStats struct {
	Peers, Sessions int
	StagedBytes     int    // plaintext that waits for handshakes
	Handshakes      uint64 // initiations from others that were worked on, good or not
	Cookies         uint64 // initiations answered with a cookie
	Shed            uint64 // initiations dropped unread, for want of time
}

// Stats returns the device's counters.
func (d *Device) Stats() (s DeviceStats) {
	d.peersMu.RLock()
	s.Peers = len(d.peers)
	d.peersMu.RUnlock()
	d.table.mu.Lock()
	s.Sessions = d.table.live
	d.table.mu.Unlock()
	d.stage.mu.Lock()
	s.StagedBytes = d.stage.bytes
	d.stage.mu.Unlock()
	d.gate.mu.Lock()
	s.Handshakes, s.Cookies, s.Shed = d.gate.worked, d.gate.cookies, d.gate.shed
	d.gate.mu.Unlock()
	return s
}

// Close removes all peers, wipes their keys and stops the timer. It waits for the timer's work
// to end, but not for calls of Send and Receive that run: those end by themselves. It may be
// called more than once, but not by a Conduit or a Source.
func (d *Device) Close() {
	if d.closed.Swap(true) {
		d.sched.close()
		return
	}
	d.sched.close()
	for _, p := range d.allPeers() {
		p.Remove()
	}
	d.pool.close()
}
