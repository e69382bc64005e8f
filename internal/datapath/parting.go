package datapath

import (
	"sync"
	"sync/atomic"

	"github.com/tailnode/tailnode/internal/netstack"
)

// parting gathers what the stack has to say when it is closed: a reset for each connection. One by one they would cost a
// system call each, which is most of what closing thousands of connections takes; together, 64 cost one.
type parting struct {
	on atomic.Bool
	mu sync.Mutex
	of map[*peer]*packets
}

const (
	// partingSize is the length of the longest packet that is gathered: a reset, over IPv6, with options.
	partingSize = 100
	// partingCount is how many are sent at a time.
	partingCount = maxPackets
)

// take gathers a packet, or reports that it is to be sent as usual.
func (g *parting) take(pr *peer, p *netstack.Packet) bool {
	if p.Len() > partingSize {
		return false
	}
	g.mu.Lock()
	s := g.of[pr]
	if s == nil {
		s = &packets{buf: make([]byte, 0, partingCount*partingSize)}
		if g.of == nil {
			g.of = make(map[*peer]*packets)
		}
		g.of[pr] = s
	}
	s.add(p)
	full := !s.fits(partingSize)
	if full {
		delete(g.of, pr)
	}
	g.mu.Unlock()
	if full {
		pr.segment(s, 0)
	}
	return true
}

// flush sends what is gathered, and gathers no more.
func (g *parting) flush() {
	g.on.Store(false)
	g.mu.Lock()
	of := g.of
	g.of = nil
	g.mu.Unlock()
	for pr, s := range of {
		pr.segment(s, 0)
	}
}
