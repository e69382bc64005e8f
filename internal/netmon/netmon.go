// Package netmon knows the host's network as far as a node cares: which addresses it has, by which it reaches the
// Internet, and when that changes or the host has slept.
//
// The system tells of changes where it can (netlink on Linux, a routing socket on macOS and the BSDs); a burst of
// them, as of a host that starts thirty containers, costs few looks. Elsewhere, and where a sandbox denies the socket,
// changes are found by polling, which costs one listing of the interfaces per interval.
package netmon

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sort"
	"sync"
	"time"
)

// State is the host's network at one moment. It must not be changed.
type State struct {
	// Addrs are the unicast addresses of interfaces that are up, sorted, without loopback and, for IPv6, link-local
	// ones, which mean nothing to another node.
	Addrs []netip.Addr
	// Default4 and Default6 are the addresses from which packets to the Internet leave; invalid if there is no route.
	Default4, Default6 netip.Addr
	// DefaultInterface is the name of the interface that has Default4, or else Default6; "" without either.
	DefaultInterface string
}

// Get asks the system. It sends nothing.
func Get() (State, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return State{}, err
	}
	var s State
	// Documentation addresses (RFC 5737, RFC 3849) take the default route like any other.
	s.Default4 = sourceFor("udp4", "192.0.2.1:9")
	s.Default6 = sourceFor("udp6", "[2001:db8::1]:9")
	def := s.Default4
	if !def.IsValid() {
		def = s.Default6
	}
	for _, i := range ifs {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // it has just gone
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok {
					s.Addrs = append(s.Addrs, ip.Unmap())
					if ip.Unmap() == def {
						s.DefaultInterface = i.Name
					}
				}
			}
		}
	}
	s.Addrs = useful(s.Addrs)
	return s, nil
}

// sourceFor returns the local address of a connected UDP socket, for which the system looks the route up and sends nothing.
func sourceFor(network, address string) netip.Addr {
	c, err := net.Dial(network, address)
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok {
		if ip := a.AddrPort().Addr().Unmap(); !ip.IsUnspecified() && !ip.IsLoopback() {
			return ip
		}
	}
	return netip.Addr{}
}

// tailnet6 holds the addresses of tailnets, which another client on this host may have.
var tailnet6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")

func useful(addrs []netip.Addr) []netip.Addr {
	addrs = slices.DeleteFunc(addrs, func(a netip.Addr) bool {
		return !a.IsValid() || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() ||
			a.Is6() && a.IsLinkLocalUnicast() || tailnet6.Contains(a)
	})
	sort.Slice(addrs, func(i, j int) bool { return addrs[i].Less(addrs[j]) })
	return slices.Compact(addrs)
}

// Online reports whether there is a route to the Internet, or at least an address.
func (s State) Online() bool { return s.Default4.IsValid() || s.Default6.IsValid() || len(s.Addrs) > 0 }

// Equal reports whether s and t are the same network.
func (s State) Equal(t State) bool {
	return s.Default4 == t.Default4 && s.Default6 == t.Default6 && s.DefaultInterface == t.DefaultInterface && slices.Equal(s.Addrs, t.Addrs)
}

// Change is what a [Monitor] reports.
type Change struct {
	Old, New State
	// Slept says that the clock jumped: the host was suspended for about so long.
	Slept time.Duration
	// Major says that connections made before are likely dead: a default address changed or went, or the host slept.
	Major bool
}

func diff(old, new State, slept time.Duration) (Change, bool) {
	c := Change{Old: old, New: new, Slept: slept}
	// An address that is still there has only given way to a newer one, as temporary IPv6 addresses do (RFC 8981).
	lost := func(a, b netip.Addr) bool {
		return a.IsValid() && a != b && (!b.IsValid() || !slices.Contains(new.Addrs, a))
	}
	c.Major = slept > 0 || lost(old.Default4, new.Default4) || lost(old.Default6, new.Default6) ||
		old.DefaultInterface != "" && old.DefaultInterface != new.DefaultInterface
	if !c.Major && !old.Online() && new.Online() {
		c.Major = true
	}
	return c, slept > 0 || !old.Equal(new)
}

const (
	// DefaultInterval is the time between looks at the clocks, and between looks at the network where the system does not tell.
	DefaultInterval = 10 * time.Second
	// watchedInterval is the time between looks at the network where the system does.
	watchedInterval = time.Minute
	// settle is how long after a first event the rest of it is waited for, and gap the least time between looks after events.
	settle = 20 * time.Millisecond
	gap    = time.Second
	// jump is how much later than planned a look may be on a busy host that has not slept, and nap how far
	// the clocks may drift apart, or be set apart, without it.
	jump = 20 * time.Second
	nap  = 5 * time.Second
)

// Config is what a Monitor needs.
type Config struct {
	OnChange func(Change) // called on the Monitor's goroutine, which it may hold up; it must not call Close
	Interval time.Duration
	Get      func() (State, error) // nil: Get
	// Watch begins to call event, which does not block, whenever the network may have changed, until stop is called and has
	// returned. Nil: the system's own, if Get is nil too.
	Watch  func(event func()) (stop func(), err error)
	Logger *slog.Logger // nil: silent

	suspended func() time.Duration // nil: the system's
}

// Monitor watches the host's network.
type Monitor struct {
	cfg     Config
	mu      sync.Mutex
	cur     State
	poke    chan struct{}
	event   chan struct{}
	watched bool
	once    sync.Once
	done    chan struct{}
	wg      sync.WaitGroup
}

// New returns a running Monitor, which has a goroutine, or two where the system tells, until Close.
func New(cfg Config) (*Monitor, error) {
	if cfg.Get == nil {
		cfg.Get = Get
		if cfg.Watch == nil {
			cfg.Watch = watch
		}
	}
	if cfg.suspended == nil {
		cfg.suspended = suspended
	}
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Monitor{cfg: cfg, poke: make(chan struct{}, 1), event: make(chan struct{}, 1), done: make(chan struct{})}
	stop := func() {}
	if cfg.Watch != nil { // before the first look, so that nothing is missed in between
		if s, err := cfg.Watch(func() { signal(m.event) }); err == nil {
			stop, m.watched = s, true
		} else {
			cfg.Logger.Debug("netmon: the system does not tell, so poll", "err", err)
		}
	}
	s, err := cfg.Get()
	if err != nil {
		stop()
		return nil, err
	}
	m.cur = s
	asleep := cfg.suspended()
	m.wg.Go(func() {
		defer stop()
		m.run(asleep)
	})
	return m, nil
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// State returns the network as last seen.
func (m *Monitor) State() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cur
}

// Poke makes the Monitor look soon, for instance because a send has failed. It does not wait.
func (m *Monitor) Poke() { signal(m.poke) }

// Close ends the Monitor and waits for it. It may be called more than once.
func (m *Monitor) Close() {
	m.once.Do(func() { close(m.done) })
	m.wg.Wait()
}

func (m *Monitor) run(asleep time.Duration) {
	timer := time.NewTimer(m.cfg.Interval)
	defer timer.Stop()
	interval := m.cfg.Interval
	if m.watched {
		interval = max(interval, watchedInterval)
	}
	// The wall clock goes on while the host sleeps; the monotonic one does not on every system, so both are compared with the plan.
	last := time.Now().Round(0)
	looked := time.Now()
	tick, due := looked.Add(m.cfg.Interval), looked.Add(interval)
	var owed time.Duration // of a sleep that could not be told, for the system would not say what the network is
	for {
		select {
		case <-m.done:
			return
		case <-m.poke:
			due = time.Now()
		case <-m.event:
			due = earlier(due, later(time.Now().Add(settle), looked.Add(gap)))
		case <-timer.C:
		}
		now := time.Now()
		d := slept(now.Round(0).Sub(last), m.cfg.Interval)
		s := m.cfg.suspended()
		if s-asleep > nap {
			d = max(d, s-asleep)
		}
		asleep, last = s, now.Round(0)
		if owed = max(owed, d); d > 0 || !now.Before(due) {
			ok := m.look(owed)
			looked = time.Now()
			due = looked.Add(interval)
			if ok {
				owed = 0
			} else if owed > 0 {
				due = looked.Add(gap)
			}
		}
		if !now.Before(tick) {
			tick = now.Add(m.cfg.Interval)
		}
		timer.Reset(time.Until(earlier(due, tick)))
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// slept returns how long the host slept if elapsed passed where interval was meant to.
func slept(elapsed, interval time.Duration) time.Duration {
	if over := elapsed - interval; over > jump {
		return over
	}
	return 0
}

// look asks the system and tells of a change. It reports whether the system has answered.
func (m *Monitor) look(slept time.Duration) bool {
	s, err := m.cfg.Get()
	if err != nil {
		m.cfg.Logger.Debug("netmon: cannot list interfaces", "err", err)
		return false
	}
	m.mu.Lock()
	old := m.cur
	m.cur = s
	m.mu.Unlock()
	if c, ok := diff(old, s, slept); ok && m.cfg.OnChange != nil {
		m.cfg.OnChange(c)
	}
	return true
}
