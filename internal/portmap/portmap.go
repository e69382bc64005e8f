// Package portmap asks the router for a port on its public address, by PCP (RFC 6887), NAT-PMP (RFC 6886) or
// UPnP IGD, whichever it has (docs/protocol/portmap.md).
//
// A [Client] keeps one mapping for one UDP port. It costs nothing while it is not wanted, and no goroutine but
// while it talks to the router: between renewals there is one timer. Nothing that a router says is
// trusted further than that this node may be reached at a public address of it: only its own address is listened to
// and connected to, whatever its answers name.
package portmap

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/netmon"
)

const (
	// lifetime is what is asked for (RFC 6886 §3.3 recommends two hours).
	lifetime = 2 * time.Hour
	// minLifetime is the shortest that is of use, and minRenew the least time between requests for it.
	minLifetime = 30 * time.Second
	minRenew    = 10 * time.Second
	upnpRenew   = 20 * time.Minute
	// maxLifetime bounds what a router may promise (RFC 6887 §15: at most a day is expected of one).
	maxLifetime = 24 * time.Hour

	// probeWindow is how long Probe listens, and quickWindow how long an attempt does at most: devices may take
	// their time, up to the MX of a search.
	probeWindow = 400 * time.Millisecond
	quickWindow = 1200 * time.Millisecond
	// attemptTimeout bounds an attempt as a whole, and releaseTimeout what Close waits for.
	attemptTimeout = 20 * time.Second
	releaseTimeout = 500 * time.Millisecond

	// minRetry and maxRetry bound the time after an attempt that failed.
	minRetry = time.Minute
	maxRetry = 30 * time.Minute
)

// Protocol is how a router is spoken to.
type Protocol string

// The protocols.
const (
	PCP  Protocol = "pcp"
	PMP  Protocol = "nat-pmp"
	UPnP Protocol = "upnp"
)

// Config is what a Client needs.
type Config struct {
	// LocalPort returns the UDP port to be reached at, 0 if there is none now. It must not block.
	LocalPort func() uint16
	// Changed is called on a goroutine of the Client's after Mapping has changed. It must not call Close. It may be nil.
	Changed func()
	// Disabled turns everything off: nothing is ever sent.
	Disabled bool
	// DisablePCP, DisablePMP and DisableUPnP turn off one protocol.
	DisablePCP, DisablePMP, DisableUPnP bool
	// IPv6 has the Client keep a pinhole instead: a port of the node's own IPv6 address that the router's firewall lets in, by PCP
	// alone.
	IPv6 bool
	// AllowPrivate accepts an external address that is private: for laboratories. The mapping of a router that is
	// behind another one is of no use to anyone outside.
	AllowPrivate bool

	// Gateway returns the router's address, of the family in question, and this host's own on that network. Nil: the system's default gateway.
	Gateway func() (gateway, self netip.Addr, err error)
	// The system's own if nil.
	ListenPacket func(ctx context.Context, network, address string) (net.PacketConn, error)
	DialContext  func(ctx context.Context, network, address string) (net.Conn, error)
	Logger       *slog.Logger // nil: silent
}

// Result says which protocols a network has.
type Result struct{ PMP, PCP, UPnP bool }

// target is what a mapping leads to, and through which router.
type target struct {
	gw, self netip.Addr
	port     uint16
}

// mapping is one that a router has given. It is not changed.
type mapping struct {
	target
	proto        Protocol
	external     netip.AddrPort
	nonce        [12]byte // PCP: who owns it, RFC 6887 §11.2
	service      service  // UPnP
	epoch        epoch    // not UPnP
	got, expires time.Time
}

// Client keeps a mapping. All methods may be called at any time by any goroutine.
type Client struct {
	cfg    Config
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	m       *mapping
	wanted  bool
	lost    bool // the router has forgotten m, or may have
	running bool // work runs
	again   bool // work is to look once more
	fails   int
	retry   time.Time // no attempt before
	gen     int       // how often there has been a reason to try at once; the failure of an attempt of before counts for nothing
	timer   *time.Timer
	closed  bool

	wg   sync.WaitGroup // the worker and callers of Probe
	once sync.Once
}

// New returns a Client that does nothing until it is wanted.
func New(cfg Config) *Client {
	if cfg.Gateway == nil {
		find := netmon.DefaultGateway
		if cfg.IPv6 {
			find = netmon.DefaultGateway6
		}
		cfg.Gateway = func() (netip.Addr, netip.Addr, error) {
			g, err := find()
			return g.Gateway, g.Self, err
		}
	}
	if cfg.IPv6 {
		cfg.DisablePMP, cfg.DisableUPnP = true, true
	}
	if cfg.ListenPacket == nil {
		cfg.ListenPacket = new(net.ListenConfig).ListenPacket
	}
	if cfg.DialContext == nil {
		cfg.DialContext = new(net.Dialer).DialContext
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{cfg: cfg, log: cfg.Logger}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// network is that of the sockets that speak to the router.
func (c *Client) network() string {
	if c.cfg.IPv6 {
		return "udp6"
	}
	return "udp4"
}

// sane reports whether t names a router and an address of the Client's family.
func (c *Client) sane(t target) bool {
	if c.cfg.IPv6 { // a pinhole to an address that nobody outside can send to would be of no use
		return t.gw.Is6() && c.usable(t.self)
	}
	return t.gw.Is4() && t.self.Is4()
}

func (c *Client) off() bool {
	return c.cfg.Disabled || c.cfg.DisablePCP && c.cfg.DisablePMP && c.cfg.DisableUPnP
}

// Mapping returns the public address and port at which the local port can be reached, if there is one. It does not block.
func (c *Client) Mapping() (netip.AddrPort, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || !time.Now().Before(c.m.expires) {
		return netip.AddrPort{}, false
	}
	return c.m.external, true
}

// Protocol returns what the present mapping was made with, "" without one.
func (c *Client) Protocol() Protocol {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		return ""
	}
	return c.m.proto
}

// Want says whether a mapping is of use. If so, one is made and kept in the background; if not, as when the node is idle, the one
// there is lapses at its time without a packet. It does not block, and costs little to repeat.
func (c *Client) Want(on bool) {
	if c.off() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wanted == on {
		return
	}
	c.wanted = on
	c.scheduleLocked()
}

// NetworkChanged says that the router, the addresses or the local port may be others than before, or that the router may have
// restarted, as when a link goes and comes back. The mapping is asked for again, once in ten seconds at most. It does not block.
func (c *Client) NetworkChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fails, c.retry = 0, time.Time{}
	c.gen++
	if c.m != nil && c.wanted && time.Since(c.m.got) >= minRenew {
		c.lost = true
	}
	if c.wanted || c.m != nil {
		c.startLocked()
	}
}

// Close gives the mapping back, as well as half a second allows, and ends the Client.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
	c.once.Do(func() { // a second caller waits for the first
		c.mu.Lock()
		m := c.m
		c.m = nil
		c.mu.Unlock()
		if m != nil {
			ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
			c.release(ctx, m)
			cancel()
		}
	})
}

// scheduleLocked sets the timer for what is next, or starts it.
func (c *Client) scheduleLocked() {
	if c.closed || c.running {
		c.again = c.running
		return
	}
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	now := time.Now()
	var at time.Time
	switch {
	case c.m != nil && !c.wanted:
		at = c.m.expires
	case c.m != nil:
		if at = renewAt(c.m); c.retry.After(at) {
			at = c.retry
		}
		if c.m.expires.Before(at) {
			at = c.m.expires
		}
	case c.wanted:
		at = c.retry
	default:
		return
	}
	if !at.After(now) {
		c.startLocked()
		return
	}
	c.timer = time.AfterFunc(at.Sub(now), func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.startLocked()
	})
}

// renewAt returns when a mapping is asked for again: at half its time (RFC 6887 §11.2.1), by UPnP sooner, because only
// asking shows whether a router has restarted.
func renewAt(m *mapping) time.Time {
	d := m.expires.Sub(m.got) / 2
	if m.proto == UPnP {
		d = min(d, upnpRenew)
	}
	return m.got.Add(d)
}

func (c *Client) startLocked() {
	if c.closed || c.off() {
		return
	}
	if c.running {
		c.again = true
		return
	}
	c.running = true
	c.wg.Go(c.work)
}

// work does what is due, and ends.
func (c *Client) work() {
	for {
		changed := c.step()
		if changed && c.cfg.Changed != nil && c.ctx.Err() == nil {
			c.cfg.Changed()
		}
		c.mu.Lock()
		if c.again && !c.closed {
			c.again = false
			c.mu.Unlock()
			continue
		}
		c.running, c.again = false, false
		c.scheduleLocked()
		c.mu.Unlock()
		return
	}
}

// step renews the mapping or makes one, and reports whether Mapping has changed.
func (c *Client) step() (changed bool) {
	ctx, cancel := context.WithTimeout(c.ctx, attemptTimeout)
	defer cancel()
	c.mu.Lock()
	gen := c.gen
	c.mu.Unlock()
	gw, self, err := c.cfg.Gateway()
	t := target{gw.Unmap(), self.Unmap(), c.cfg.LocalPort()}
	if err == nil && (!c.sane(t) || t.port == 0) {
		err = ErrNoService
	}
	now := time.Now()
	c.mu.Lock()
	old, lost, wanted := c.m, c.lost, c.wanted
	if old != nil && (old.target != t || err != nil || !now.Before(old.expires)) {
		c.m, c.lost = nil, false
		changed = true
	}
	cur, retry := c.m, c.retry
	c.mu.Unlock()
	if changed && err == nil && now.Before(old.expires) && old.gw == t.gw && old.self == t.self {
		c.release(ctx, old) // the local port is another
	}
	switch {
	case !wanted || now.Before(retry):
		return changed
	case cur != nil && !lost && now.Before(renewAt(cur)):
		return changed
	}
	var m *mapping
	if err == nil {
		m, err = c.acquire(ctx, t, old)
	}
	now = time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		if m != nil {
			c.m = m // for Close to release
		}
		return false
	}
	if err != nil {
		c.log.Debug("portmap: no mapping", "err", err)
		if c.gen != gen {
			return changed // the next attempt is due
		}
		c.fails++
		c.retry = now.Add(min(minRetry<<min(c.fails-1, 10), maxRetry))
		if c.m != nil && lost {
			c.m, c.lost = nil, false
			return true
		}
		if c.m != nil {
			// Again at half of what is left, as RFC 6887 §11.2.1 has it, or sooner.
			c.retry = now.Add(max(min(c.m.expires.Sub(now)/2, upnpRenew), minRenew))
		}
		return changed
	}
	c.log.Debug("portmap: mapped", "by", string(m.proto), "external", m.external, "for", m.expires.Sub(m.got))
	c.fails, c.retry = 0, time.Time{}
	changed = changed || old == nil || old.external != m.external
	c.m, c.lost = m, false
	return changed
}

// acquire renews old, which may be nil, or makes a mapping with the best protocol that there is.
func (c *Client) acquire(ctx context.Context, t target, old *mapping) (*mapping, error) {
	var prev netip.AddrPort
	if old != nil && old.target != t {
		old = nil
	}
	if old != nil {
		prev = old.external
		if m, err := c.renew(ctx, t, old); err == nil || ctx.Err() != nil {
			return m, err
		}
	}
	var nonce [12]byte
	rand.Read(nonce[:])
	if old != nil && old.proto == PCP {
		nonce = old.nonce
	}
	err := ErrNoService
	var tried found
	for _, quick := range []bool{true, false} { // if what answers first does not map after all, all have time to answer
		f, e := c.discover(ctx, t, quickWindow, quick)
		if e != nil {
			return nil, e
		}
		var m *mapping
		if f.pcp && !tried.pcp {
			if m, err = c.mapPCP(ctx, t, prev, nonce); err == nil || ctx.Err() != nil {
				return m, err
			}
		}
		if f.pmp && !tried.pmp {
			if m, err = c.mapPMP(ctx, t, prev.Port(), f.pmpAddr); err == nil || ctx.Err() != nil {
				return m, err
			}
		}
		if len(f.locations) > 0 {
			if m, err = c.tryUPnP(ctx, t, f.locations, prev.Port()); err == nil || ctx.Err() != nil {
				return m, err
			}
		}
		if tried = f; len(f.locations) > 0 || !f.any() {
			break
		}
	}
	return nil, err
}

func (c *Client) tryUPnP(ctx context.Context, t target, locations []location, prev uint16) (m *mapping, err error) {
	for _, u := range locations {
		var services []service
		if services, err = c.describe(ctx, t.gw, u); err == nil {
			if m, err = c.mapUPnP(ctx, services, t, prev); err == nil {
				return m, nil
			}
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// renew asks for old once more, with the protocol that gave it.
func (c *Client) renew(ctx context.Context, t target, old *mapping) (*mapping, error) {
	switch old.proto {
	case PCP:
		return c.mapPCP(ctx, t, old.external, old.nonce)
	case PMP:
		return c.mapPMP(ctx, t, old.external.Port(), netip.Addr{})
	}
	return c.mapUPnP(ctx, []service{old.service}, t, old.external.Port())
}

// usable reports whether a router may have a as its external address.
func (c *Client) usable(a netip.Addr) bool {
	if c.cfg.IPv6 {
		return global6.Contains(a) || c.cfg.AllowPrivate && a.Is6() && a.IsPrivate()
	}
	return public(a) || c.cfg.AllowPrivate && a.Is4() && a.IsPrivate()
}

// granted makes a mapping of what a router gave, if it is of use.
func (c *Client) granted(proto Protocol, t target, external netip.AddrPort, seconds, serverEpoch uint32) (*mapping, error) {
	d := min(time.Duration(seconds)*time.Second, maxLifetime)
	switch {
	case !c.usable(external.Addr()):
		return nil, fmt.Errorf("%w: external address %v", ErrUseless, external.Addr())
	case external.Port() == 0:
		return nil, fmt.Errorf("%w: external port 0", ErrUseless)
	case d < minLifetime:
		return nil, fmt.Errorf("%w: for %v", ErrUseless, d)
	}
	now := time.Now()
	return &mapping{proto: proto, target: t, external: external, epoch: epoch{serverEpoch, now}, got: now, expires: now.Add(d)}, nil
}

func (c *Client) mapPCP(ctx context.Context, t target, prev netip.AddrPort, nonce [12]byte) (m *mapping, err error) {
	if prev.Port() == 0 {
		any := netip.IPv4Unspecified()
		if c.cfg.IPv6 {
			any = netip.IPv6Unspecified()
		}
		prev = netip.AddrPortFrom(any, t.port)
	}
	req := appendPCPMap(nil, t.self, nonce, t.port, prev, uint32(lifetime/time.Second))
	err = c.ask(ctx, t, req, func(r *pxpReply) (bool, error) {
		if r.version == pmpVersion && r.result == resultUnsupportedVersion {
			return true, errVersion
		}
		if r.version != pcpVersion || r.op != pcpOpMap || r.nonce != nonce || r.protocol != protoUDP || r.internal != t.port {
			return false, nil // not the answer to this
		}
		if err := r.resultError(); err != nil {
			return true, err
		}
		var err error
		if m, err = c.granted(PCP, t, r.external, r.lifetime, r.epoch); err == nil {
			m.nonce = nonce
		}
		return true, err
	})
	if errors.Is(err, ErrUseless) { // it is there nevertheless
		c.tell(ctx, t, appendPCPMap(nil, t.self, nonce, t.port, prev, 0))
	}
	return m, err
}

// mapPMP takes two requests: the address, unless it is known of just now, and the port.
func (c *Client) mapPMP(ctx context.Context, t target, prev uint16, addr netip.Addr) (m *mapping, err error) {
	if !addr.IsValid() {
		err := c.ask(ctx, t, appendPMPAddress(nil), func(r *pxpReply) (bool, error) {
			if r.version != pmpVersion || r.op != pmpOpAddress {
				return false, nil
			}
			addr = r.external.Addr()
			return true, r.resultError()
		})
		if err != nil {
			return nil, err
		}
	}
	if !c.usable(addr) {
		return nil, fmt.Errorf("%w: external address %v", ErrUseless, addr)
	}
	if prev == 0 {
		prev = t.port
	}
	err = c.ask(ctx, t, appendPMPMap(nil, t.port, prev, uint32(lifetime/time.Second)), func(r *pxpReply) (bool, error) {
		if r.version != pmpVersion || r.op != pmpOpMapUDP || r.result == 0 && r.internal != t.port {
			return false, nil
		}
		if err := r.resultError(); err != nil {
			return true, err
		}
		var err error
		m, err = c.granted(PMP, t, netip.AddrPortFrom(addr, r.external.Port()), r.lifetime, r.epoch)
		return true, err
	})
	if errors.Is(err, ErrUseless) {
		c.tell(ctx, t, appendPMPMap(nil, t.port, 0, 0))
	}
	return m, err
}

// tell sends a request whose answer is of no interest.
func (c *Client) tell(ctx context.Context, t target, req []byte) {
	pc, err := c.cfg.ListenPacket(ctx, c.network(), netip.AddrPortFrom(t.self, 0).String())
	if err != nil {
		return
	}
	writeTo(pc, req, netip.AddrPortFrom(t.gw, pxpPort))
	pc.Close()
}

// release gives m back.
func (c *Client) release(ctx context.Context, m *mapping) {
	switch m.proto {
	case PCP:
		c.tell(ctx, m.target, appendPCPMap(nil, m.self, m.nonce, m.port, m.external, 0))
	case PMP: // §3.4: with a suggested port of 0
		c.tell(ctx, m.target, appendPMPMap(nil, m.port, 0, 0))
	case UPnP:
		c.deleteUPnP(ctx, m)
	}
}

// Probe finds out which protocols the network has, and whether the router has lost the mapping, in
// which case another is asked for in the background. It sends a handful of packets and takes 400 ms where a protocol is missing.
func (c *Client) Probe(ctx context.Context) (Result, error) {
	if c.off() {
		return Result{}, ErrDisabled
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return Result{}, net.ErrClosed
	}
	c.wg.Add(1)
	c.mu.Unlock()
	defer c.wg.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(c.ctx, cancel)
	defer stop()
	gw, self, err := c.cfg.Gateway()
	if err != nil {
		return Result{}, fmt.Errorf("portmap: gateway: %w", err)
	}
	t := target{gw: gw.Unmap(), self: self.Unmap()}
	if !c.sane(t) {
		return Result{}, ErrNoService
	}
	f, err := c.discover(ctx, t, probeWindow, false)
	if err != nil {
		return Result{}, err
	}
	c.heard(t, &f)
	return Result{PMP: f.pmp, PCP: f.pcp, UPnP: len(f.locations) > 0}, nil
}

// heard draws conclusions on the mapping from what a router said of its own accord.
func (c *Client) heard(t target, f *found) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		if c.wanted && f.any() && c.fails > 0 {
			c.fails, c.retry = 0, time.Time{} // it may be new
			c.gen++
			c.scheduleLocked()
		}
		return
	}
	if c.m.gw != t.gw {
		return
	}
	now := time.Now()
	switch {
	case c.m.proto == PCP && f.pcpHeard && f.pcp:
		c.lost = c.lost || c.m.epoch.next(f.pcpEpoch, now)
	case c.m.proto == PMP && f.pmp:
		c.lost = c.lost || c.m.epoch.next(f.pmpEpoch, now) || f.pmpAddr != c.m.external.Addr()
	}
	if c.lost && c.wanted {
		c.log.Debug("portmap: the router has lost the mapping")
		c.retry = time.Time{}
		c.gen++
		c.startLocked()
	}
}
