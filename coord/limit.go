package coord

import (
	"net/netip"
	"sync"
	"time"
)

// limiter slows down whoever has its registrations refused again and again. What is accepted costs nothing.
type limiter struct {
	mu   sync.Mutex
	from map[netip.Prefix]*debt
}

// debt is paid off at one refusal per refusalPeriod.
type debt struct{ until time.Time }

const (
	refusalPeriod = time.Second
	refusalBurst  = 30 // refusals that may come at once
	maxDebtors    = 10_000
)

func newLimiter() *limiter { return &limiter{from: map[netip.Prefix]*debt{}} }

// group is what counts as one sender: an IPv4 address, or an IPv6 network as a site gets it.
func group(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits)
	return p
}

// blocked returns how long the sender has to wait, or 0.
func (l *limiter) blocked(a netip.Addr, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.from[group(a)]
	if d == nil {
		return 0
	}
	return max(0, d.until.Sub(now)-refusalBurst*refusalPeriod)
}

// failed counts a refusal.
func (l *limiter) failed(a netip.Addr, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := group(a)
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
	d.until = d.until.Add(refusalPeriod)
}
