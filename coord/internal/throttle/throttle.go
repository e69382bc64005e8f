// Package throttle slows down senders whose requests are refused again and again.
package throttle

import (
	"net/netip"
	"sync"
	"time"
)

// Limiter counts refusals by sender. What is accepted costs nothing. It is safe for concurrent use.
type Limiter struct {
	mu   sync.Mutex
	from map[netip.Prefix]*debt
}

// debt is paid off at one refusal per period.
type debt struct{ until time.Time }

const (
	period     = time.Second
	Burst      = 30 // refusals that may come at once
	maxDebtors = 10_000
)

// New returns an empty Limiter.
func New() *Limiter { return &Limiter{from: map[netip.Prefix]*debt{}} }

// Group is what counts as one sender: an IPv4 address, or an IPv6 network as a site gets it.
func Group(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits)
	return p
}

// Blocked returns how long the sender has to wait, or 0.
func (l *Limiter) Blocked(a netip.Addr, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.from[Group(a)]
	if d == nil {
		return 0
	}
	return max(0, d.until.Sub(now)-Burst*period)
}

// Failed counts a refusal.
func (l *Limiter) Failed(a netip.Addr, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := Group(a)
	d := l.from[g]
	if d == nil {
		if len(l.from) >= maxDebtors {
			for k, x := range l.from {
				if !now.Before(x.until) {
					delete(l.from, k)
				}
			}
			if len(l.from) >= maxDebtors {
				clear(l.from) // better forget than grow
			}
		}
		d = &debt{until: now}
		l.from[g] = d
	}
	if d.until.Before(now) {
		d.until = now
	}
	d.until = d.until.Add(period)
}
