// Package netmon knows the host's network as far as a node cares: which addresses it has, by which it reaches the
// Internet, and when that changes or the host has slept.
//
// Changes are found by polling, which works everywhere and costs one listing of the interfaces per interval.
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
}

// Get asks the system. It sends nothing.
func Get() (State, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return State{}, err
	}
	var s State
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
				}
			}
		}
	}
	s.Addrs = useful(s.Addrs)
	// Documentation addresses (RFC 5737, RFC 3849) take the default route like any other.
	s.Default4 = sourceFor("udp4", "192.0.2.1:9")
	s.Default6 = sourceFor("udp6", "[2001:db8::1]:9")
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
	return s.Default4 == t.Default4 && s.Default6 == t.Default6 && slices.Equal(s.Addrs, t.Addrs)
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
	lost := func(a, b netip.Addr) bool { return a.IsValid() && a != b }
	c.Major = slept > 0 || lost(old.Default4, new.Default4) || lost(old.Default6, new.Default6)
	if !c.Major && !old.Online() && new.Online() {
		c.Major = true
	}
	return c, slept > 0 || !old.Equal(new)
}

const (
	// DefaultInterval is the time between looks.
	DefaultInterval = 10 * time.Second
	// jump is how much later than planned a look may be on a busy host that has not slept.
	jump = 20 * time.Second
)

// Config is what a Monitor needs.
type Config struct {
	OnChange func(Change) // called on the Monitor's goroutine, which it may hold up; it must not call Close
	Interval time.Duration
	Get      func() (State, error) // nil: Get
	Logger   *slog.Logger          // nil: silent
}

// Monitor watches the host's network.
type Monitor struct {
	cfg  Config
	mu   sync.Mutex
	cur  State
	poke chan struct{}
	once sync.Once
	done chan struct{}
	wg   sync.WaitGroup
}

// New returns a running Monitor, which has one goroutine until Close.
func New(cfg Config) (*Monitor, error) {
	if cfg.Get == nil {
		cfg.Get = Get
	}
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := cfg.Get()
	if err != nil {
		return nil, err
	}
	m := &Monitor{cfg: cfg, cur: s, poke: make(chan struct{}, 1), done: make(chan struct{})}
	m.wg.Go(m.run)
	return m, nil
}

// State returns the network as last seen.
func (m *Monitor) State() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cur
}

// Poke makes the Monitor look soon, for instance because a send has failed. It does not wait.
func (m *Monitor) Poke() {
	select {
	case m.poke <- struct{}{}:
	default:
	}
}

// Close ends the Monitor and waits for it. It may be called more than once.
func (m *Monitor) Close() {
	m.once.Do(func() { close(m.done) })
	m.wg.Wait()
}

func (m *Monitor) run() {
	timer := time.NewTimer(m.cfg.Interval)
	defer timer.Stop()
	// The wall clock goes on while the host sleeps; the monotonic one does not on every system, so both are compared with the plan.
	last := time.Now().Round(0)
	for {
		select {
		case <-m.done:
			return
		case <-m.poke:
		case <-timer.C:
		}
		now := time.Now().Round(0)
		m.look(slept(now.Sub(last), m.cfg.Interval))
		last = now
		timer.Reset(m.cfg.Interval)
	}
}

// slept returns how long the host slept if elapsed passed where interval was meant to.
func slept(elapsed, interval time.Duration) time.Duration {
	if over := elapsed - interval; over > jump {
		return over
	}
	return 0
}

func (m *Monitor) look(slept time.Duration) {
	s, err := m.cfg.Get()
	if err != nil {
		m.cfg.Logger.Debug("netmon: cannot list interfaces", "err", err)
		return
	}
	m.mu.Lock()
	old := m.cur
	m.cur = s
	m.mu.Unlock()
	if c, ok := diff(old, s, slept); ok && m.cfg.OnChange != nil {
		m.cfg.OnChange(c)
	}
}
