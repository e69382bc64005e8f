package client

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/proxy"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	defaultIdle    = 60 * time.Second
	firstBackoff   = 250 * time.Millisecond
	maxBackoff     = 30 * time.Second
	settled        = 10 * time.Second // a connection that lived so long clears the backoff
	maxReconnectIn = 30 * time.Second // a relay may not keep us away longer
	maxTryFor      = 60 * time.Second
	restartRetry   = 200 * time.Millisecond
	closeWait      = 250 * time.Millisecond // for what is queued, in all
	maxGone        = 1024

	// firstReturn is how long after the region's first relay was passed over it is tried again, and maxReturn the longest time
	// between such tries, which double.
	firstReturn = time.Minute
	maxReturn   = 30 * time.Minute
)

// RegionsConfig configures [NewRegions].
type RegionsConfig struct {
	PrivateKey  key.NodePrivate // of the node; needed
	Handler     Handler         // needed
	Dial        DialFunc        // nil: net.Dialer
	Proxy       proxy.Func      // which HTTP proxy a relay is reached through; nil: as the environment says
	Roots       *x509.CertPool  // what certificates must chain to; nil: the system's
	PlainHTTP   bool            // speak plain HTTP to every relay (tests, private networks)
	CanAckPings bool            // announce that pings are answered
	AppName     string          // opaque, for the relay's statistics
	IdleTimeout time.Duration   // after which an unused connection other than home's is dropped; 0: 60 s
	Logger      *slog.Logger    // nil: silent
}

// Regions is the set of a node's relay connections: home is kept up, any other region is
// connected by the first Send to it and dropped when idle. A region that is not connected
// costs no goroutine and no buffer. All methods are safe for concurrent use and do not
// block, but for Ping and Close. A node that changes its key makes a new Regions.
type Regions struct {
	o    Options
	h    Handler
	log  *slog.Logger
	idle time.Duration

	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // the regions' goroutines

	byID atomic.Pointer[map[int]*region] // replaced, never changed

	mu     sync.Mutex
	home   int
	closed bool
}

// region is one region of the map. Regions.mu guards what is not marked otherwise.
type region struct {
	id     int
	out    *outbox // has its own lock
	ctx    context.Context
	cancel context.CancelCauseFunc
	nudge  chan struct{} // one token: something changed, look again

	def      *tailcfg.DERPRegion // never changed in place
	running  bool                // its goroutine is up
	conn     *Conn
	since    time.Time // of the connection
	err      error     // why it is not connected
	fails    int
	notBy    time.Time // no attempt before
	tryUntil time.Time // a restarting relay asked for quick retries until then
	next     *Conn     // to the region's first relay, in place of conn, which is being closed for it
	rtt      time.Duration

	goneMu  sync.Mutex
	gone    map[key.NodePublic]time.Time
	goneLen atomic.Int32
}

// NewRegions returns a set that knows no regions yet; it connects to nothing until SetMap
// and SetHome, or Send, say so. The caller must Close it.
func NewRegions(cfg RegionsConfig) *Regions {
	rs := &Regions{
		o: Options{PrivateKey: cfg.PrivateKey, Dial: cfg.Dial, Proxy: cfg.Proxy, Roots: cfg.Roots, PlainHTTP: cfg.PlainHTTP,
			CanAckPings: cfg.CanAckPings, AppName: cfg.AppName},
		h: cfg.Handler, log: cfg.Logger, idle: cfg.IdleTimeout,
	}
	if rs.log == nil {
		rs.log = slog.New(slog.DiscardHandler)
	}
	if rs.idle <= 0 {
		rs.idle = defaultIdle
	}
	rs.ctx, rs.cancel = context.WithCancelCause(context.Background())
	rs.byID.Store(&map[int]*region{})
	return rs
}

func newRegion(rs *Regions, id int) *region {
	r := &region{id: id, out: newOutbox(), nudge: make(chan struct{}, 1)}
	r.ctx, r.cancel = context.WithCancelCause(rs.ctx)
	return r
}

// SetMap replaces the DERP map. Connections to regions or relays that are no longer in it
// are closed; those to relays that are still there live on. m must not be changed afterwards.
func (rs *Regions) SetMap(m *tailcfg.DERPMap) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.closed {
		return
	}
	old := *rs.byID.Load()
	now := make(map[int]*region)
	if m != nil {
		for id, def := range m.Regions {
			if def == nil {
				continue
			}
			r := old[id]
			if r == nil {
				r = newRegion(rs, id)
			}
			if r.def != nil && !reflect.DeepEqual(r.def, def) {
				r.fails, r.notBy = 0, time.Time{}
				if c := r.conn; c != nil && !lists(def, c.node) {
					c.shut(errors.New("derp/client: the relay left the DERP map"))
				}
			}
			r.def = def
			r.poke()
			now[id] = r
		}
	}
	for id, r := range old {
		if now[id] == nil {
			r.cancel(ErrNoRegion)
			if r.conn != nil {
				r.conn.shut(ErrNoRegion)
			}
		}
	}
	rs.byID.Store(&now)
	rs.startLocked(now[rs.home])
}

// lists reports whether the region has the relay, unchanged.
func lists(def *tailcfg.DERPRegion, relay *tailcfg.DERPNode) bool {
	return slices.ContainsFunc(def.Nodes, func(n *tailcfg.DERPNode) bool { return n != nil && *n == *relay })
}

// SetHome makes the region the node's home, which is kept connected; 0 is none. The
// region may come into the map later. The former home stays connected until it is idle.
func (rs *Regions) SetHome(id int) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.closed || id == rs.home {
		return
	}
	m := *rs.byID.Load()
	if r := m[rs.home]; r != nil && r.conn != nil {
		r.conn.NotePreferred(false)
	}
	rs.home = id
	r := m[id]
	if r == nil {
		return
	}
	if r.conn != nil {
		r.conn.NotePreferred(true)
		return
	}
	r.poke()
	rs.startLocked(r)
}

// Home returns the home region, or 0.
func (rs *Regions) Home() int {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.home
}

// Send queues for dst, by way of the region, the packets in b: each seg bytes but for the
// last, which may be shorter; seg <= 0 says that b is one packet. It copies b and does not
// block. A region that is not connected gets connected; until then a little is kept. What
// does not fit pushes the oldest out, which is no error. Errors: [ErrNoRegion],
// [ErrTooLarge], [ErrRateLimited], [ErrClosed].
func (rs *Regions) Send(id int, dst key.NodePublic, b []byte, seg int) error {
	r := (*rs.byID.Load())[id]
	if r == nil {
		if rs.ctx.Err() != nil {
			return ErrClosed
		}
		return fmt.Errorf("%w: %d", ErrNoRegion, id)
	}
	live, err := r.out.send(dst, b, seg)
	if !live && err == nil {
		rs.mu.Lock()
		rs.startLocked(r)
		rs.mu.Unlock()
	}
	return err
}

// Connect connects to the region, as a Send would. It does not wait for the connection.
func (rs *Regions) Connect(id int) error {
	r := (*rs.byID.Load())[id]
	if r == nil {
		return fmt.Errorf("%w: %d", ErrNoRegion, id)
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.startLocked(r)
	return nil
}

// Gone reports since when the region has said that it does not reach peer. A packet from
// the peer, or a new connection to the region, clears it. At most 1024 peers a region are remembered.
func (rs *Regions) Gone(id int, peer key.NodePublic) (since time.Time, gone bool) {
	r := (*rs.byID.Load())[id]
	if r == nil || r.goneLen.Load() == 0 {
		return since, false
	}
	r.goneMu.Lock()
	defer r.goneMu.Unlock()
	since, gone = r.gone[peer]
	return since, gone
}

// Rebind closes every connection and makes those that are needed anew, without backoff:
// for a change of network.
func (rs *Regions) Rebind() {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for _, r := range *rs.byID.Load() {
		r.fails, r.notBy = 0, time.Time{}
		if r.conn != nil {
			r.conn.shut(errRebound)
		}
		r.poke()
	}
}

// Ping measures a round trip to the region's relay. It blocks until the answer, ctx or Close; a region
// that is not connected gives [ErrNoRegion].
func (rs *Regions) Ping(ctx context.Context, id int) (time.Duration, error) {
	r := (*rs.byID.Load())[id]
	if r == nil {
		return 0, fmt.Errorf("%w: %d", ErrNoRegion, id)
	}
	rs.mu.Lock()
	c := r.conn
	rs.mu.Unlock()
	if c == nil {
		return 0, fmt.Errorf("%w: %d is not connected", ErrNoRegion, id)
	}
	d, err := c.Ping(ctx)
	if err == nil {
		rs.mu.Lock()
		r.rtt = d
		rs.mu.Unlock()
	}
	return d, err
}

// RegionState is the state of one region.
type RegionState struct {
	ID         int
	Code       string
	Home       bool
	Connected  bool
	Connecting bool
	Since      time.Time     // of the connection
	Relay      string        // the connected relay's name in the map
	Local      net.Addr      // of the connection
	Remote     net.Addr      // of the connection
	RTT        time.Duration // last measured; 0: not yet
	Health     string        // the problem the relay reports with us
	Err        error         // why the last connection ended or was not made

	Sent, SentBytes         uint64 // packets queued to it
	Received, ReceivedBytes uint64 // packets of the present connection
	Dropped                 uint64 // packets that did not fit
}

// Stats returns the state of every region of the map, by ID.
func (rs *Regions) Stats() []RegionState {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	m := *rs.byID.Load()
	all := make([]RegionState, 0, len(m))
	for _, id := range slices.Sorted(maps.Keys(m)) {
		r := m[id]
		s := RegionState{ID: id, Code: r.def.RegionCode, Home: id == rs.home, Err: r.err, RTT: r.rtt,
			Connecting: r.running && r.conn == nil}
		if c := r.conn; c != nil {
			s.Connected, s.Since, s.Relay, s.Health = c.ready.Load(), r.since, c.node.Name, c.Health()
			s.Connecting = !s.Connected
			s.Local, s.Remote = c.nc.LocalAddr(), c.nc.RemoteAddr()
			s.Received, s.ReceivedBytes = c.received.Load(), c.recvByte.Load()
			if rtt := c.rtt.Load(); rtt > 0 && r.rtt == 0 {
				s.RTT = time.Duration(rtt)
			}
		}
		r.out.mu.Lock()
		s.Sent, s.SentBytes, s.Dropped = r.out.sent, r.out.bytes, r.out.dropped
		r.out.mu.Unlock()
		all = append(all, s)
	}
	return all
}

// Close has what is queued written, for closeWait at the most, ends all connections and waits for their
// goroutines. It may be called any number of times, from anywhere but a [Handler].
func (rs *Regions) Close() {
	rs.finish()
	rs.mu.Lock()
	rs.closed = true
	rs.cancel(ErrClosed)
	for _, r := range *rs.byID.Load() {
		if r.conn != nil {
			r.conn.shut(ErrClosed)
		}
	}
	rs.byID.Store(&map[int]*region{})
	rs.mu.Unlock()
	rs.wg.Wait()
}

// finish lets the writers write what is queued: the last words of a node's connections are among it, without which its peers wait for an answer.
func (rs *Regions) finish() {
	late := time.NewTimer(closeWait)
	defer late.Stop()
	for _, r := range *rs.byID.Load() {
		if w := r.out.written(); w != nil {
			select {
			case <-w:
			case <-late.C:
				return
			}
		}
	}
}

func (r *region) poke() {
	select {
	case r.nudge <- struct{}{}:
	default:
	}
}

// startLocked starts the region's goroutine unless it runs.
func (rs *Regions) startLocked(r *region) {
	if r == nil || r.running || rs.closed || r.ctx.Err() != nil {
		return
	}
	r.running = true
	rs.wg.Go(func() { rs.run(r) })
}

// wanted reports whether the region needs a connection; if not, its goroutine may end.
func (rs *Regions) wanted(r *region) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	// What a Send queued after this is followed by a startLocked.
	if r.ctx.Err() == nil && (r.id == rs.home || r.out.pending()) {
		return true
	}
	r.running = false
	return false
}

func (rs *Regions) run(r *region) {
	for again := true; again || rs.wanted(r); {
		again = false
		if !rs.await(r) {
			continue
		}
		rs.mu.Lock()
		def, c := r.def, r.next
		r.next = nil
		rs.mu.Unlock()
		var err error
		if c == nil {
			c, err = dialRegion(r.ctx, &rs.o, def, r.out)
		}
		if err != nil {
			rs.failed(r, err)
			continue
		}
		if !rs.up(r, c) {
			c.Close()
			again = true // who wanted this one wants another
			continue
		}
		idle := rs.watchIdle(r, c)
		back := rs.watchFirst(r, c)
		err = c.Serve(&relayed{rs, r})
		idle.Stop()
		back()
		rs.down(r, c, err)
	}
	rs.mu.Lock()
	next := r.next
	r.next = nil
	rs.mu.Unlock()
	if next != nil {
		next.Close()
	}
	if r.ctx.Err() != nil { // else the queue is empty, or another goroutine's by now
		r.out.clear()
	}
}

// await waits until the next attempt is due; false says to look whether it is still wanted.
func (rs *Regions) await(r *region) bool {
	rs.mu.Lock()
	wait := time.Until(r.notBy)
	rs.mu.Unlock()
	if r.ctx.Err() != nil {
		return false
	}
	if wait <= 0 {
		return true
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.nudge: // perhaps the backoff was lifted
		return false
	case <-r.ctx.Done():
		return false
	}
}

func (rs *Regions) failed(r *region, err error) {
	r.out.clear() // stale by the time of the next attempt
	rs.mu.Lock()
	r.fails++
	r.err = err
	r.backoffLocked()
	wait := time.Until(r.notBy)
	gone := r.ctx.Err() != nil
	rs.mu.Unlock()
	if gone {
		return
	}
	rs.log.Info("derp: no connection", "region", r.id, "err", err, "retry", wait.Round(time.Millisecond))
	rs.h.State(r.id, false, err)
}

// backoffLocked sets when the next attempt may be: doubling, with jitter of a half.
func (r *region) backoffLocked() {
	now := time.Now()
	if now.Before(r.tryUntil) {
		r.notBy = now.Add(restartRetry/2 + rand.N(restartRetry))
		return
	}
	d := min(maxBackoff, firstBackoff<<min(r.fails-1, 10))
	r.notBy = now.Add(d/2 + rand.N(d/2))
}

// up publishes a new connection, unless the map has lost the region or the relay while it was dialled.
func (rs *Regions) up(r *region, c *Conn) bool {
	rs.mu.Lock()
	if r.ctx.Err() != nil || !lists(r.def, c.node) {
		rs.mu.Unlock()
		return false
	}
	r.conn, r.since, r.err, r.rtt = c, time.Now(), nil, 0
	if r.id == rs.home {
		c.NotePreferred(true)
	}
	rs.mu.Unlock()
	c.admitted = func() { // packets may go out before, but the relay has not let us in yet
		rs.log.Info("derp: connected", "region", r.id, "relay", c.node.Name)
		rs.h.State(r.id, true, nil)
	}
	c.probe()
	r.goneMu.Lock()
	r.gone = nil
	r.goneLen.Store(0)
	r.goneMu.Unlock()
	return true
}

// down notes how a connection ended, and when the next may be made.
func (rs *Regions) down(r *region, c *Conn, err error) {
	rs.mu.Lock()
	r.conn = nil
	now := time.Now()
	if now.Sub(r.since) >= settled {
		r.fails = 0
	}
	wantedDown := errors.Is(err, errIdle) || errors.Is(err, ErrNoRegion) || errors.Is(err, ErrClosed) || errors.Is(err, errFirst)
	restarting, told := c.restarting()
	switch {
	case told:
		r.notBy, r.tryUntil = now.Add(restarting.in), now.Add(restarting.in+restarting.tryFor)
	case !wantedDown && !errors.Is(err, errRebound):
		r.fails++
		r.backoffLocked()
	}
	r.err = err
	if wantedDown {
		r.err, err = nil, nil
	}
	rs.mu.Unlock()
	rs.log.Info("derp: disconnected", "region", r.id, "err", err)
	rs.h.State(r.id, false, err)
}

var (
	errIdle    = errors.New("derp/client: idle")
	errFirst   = errors.New("derp/client: the region's first relay is back")
	errRebound = errors.New("derp/client: network changed")
)

// watchFirst tries the region's relays that come before the one of c again and again, for as long as c is the home's: peers
// expect a node at the first, and only where a region's relays are linked does it not matter. It costs nothing while
// c is with the first. The function it returns ends it and waits for it.
func (rs *Regions) watchFirst(r *region, c *Conn) (stop func()) {
	if len(rs.before(r, c)) == 0 {
		return func() {}
	}
	ctx, cancel := context.WithCancel(r.ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		wait := firstReturn
		timer := time.NewTimer(wait/2 + rand.N(wait))
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			if better := rs.before(r, c); len(better) > 0 && rs.Home() == r.id {
				next, err := dialRegion(ctx, &rs.o, &tailcfg.DERPRegion{RegionID: r.id, Nodes: better}, r.out)
				if err == nil {
					rs.mu.Lock()
					r.next = next
					rs.mu.Unlock()
					c.shut(errFirst)
					return
				}
				rs.log.Debug("derp: the region's first relay is still away", "region", r.id, "err", err)
			}
			wait = min(2*wait, maxReturn)
			timer.Reset(wait/2 + rand.N(wait))
		}
	})
	return func() { cancel(); wg.Wait() }
}

// before returns the region's relays that come before the one of c in the map.
func (rs *Regions) before(r *region, c *Conn) []*tailcfg.DERPNode {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for i, n := range r.def.Nodes {
		if n != nil && *n == *c.node {
			return slices.DeleteFunc(slices.Clone(r.def.Nodes[:i]), func(n *tailcfg.DERPNode) bool { return n == nil || n.STUNOnly })
		}
	}
	return nil
}

// watchIdle closes the connection once it carried nothing for the idle time and is not home's.
func (rs *Regions) watchIdle(r *region, c *Conn) *time.Timer {
	const looks = 4
	var last uint64
	quiet := 0
	var mu sync.Mutex // orders the assignment of t and its use
	mu.Lock()
	defer mu.Unlock()
	var t *time.Timer
	t = time.AfterFunc(rs.idle/looks, func() {
		mu.Lock()
		defer mu.Unlock()
		n := c.received.Load() + r.out.count()
		if n == last && rs.Home() != r.id { // a former home has its idle time yet to come
			quiet++
		} else {
			last, quiet = n, 0
		}
		if quiet >= looks {
			c.shut(errIdle)
			return
		}
		t.Reset(rs.idle / looks)
	})
	return t
}

// relayed is the Handler between a region's connection and the user's.
type relayed struct {
	rs *Regions
	r  *region
}

func (h *relayed) Packet(id int, src key.NodePublic, b []byte) {
	if h.r.goneLen.Load() != 0 {
		h.r.goneMu.Lock()
		delete(h.r.gone, src)
		h.r.goneLen.Store(int32(len(h.r.gone)))
		h.r.goneMu.Unlock()
	}
	h.rs.h.Packet(id, src, b)
}

func (h *relayed) Flush(id int) { h.rs.h.Flush(id) }

func (h *relayed) PeerGone(id int, peer key.NodePublic, reason byte) {
	r := h.r
	r.goneMu.Lock()
	if r.gone == nil {
		r.gone = make(map[key.NodePublic]time.Time)
	}
	if len(r.gone) >= maxGone {
		for k := range r.gone { // any one
			delete(r.gone, k)
			break
		}
	}
	r.gone[peer] = time.Now()
	r.goneLen.Store(int32(len(r.gone)))
	r.goneMu.Unlock()
	h.rs.h.PeerGone(id, peer, reason)
}

func (h *relayed) State(int, bool, error) {}

var _ Handler = (*relayed)(nil)
