package datapath

import (
	"sync"
	"sync/atomic"

	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/wg"
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
	partingCount = 64
)

// take gathers a packet, or reports that it is to be sent as usual.
func (g *parting) take(pr *peer, p *netstack.Packet) bool {
	if p.Len() > partingSize {
		return false
	}
	g.mu.Lock()
	s := g.of[pr]
	if s == nil {
		s = new(packets)
		if g.of == nil {
			g.of = make(map[*peer]*packets)
		}
		g.of[pr] = s
	}
	full := s.add(p)
	if full {
		delete(g.of, pr)
	}
	g.mu.Unlock()
	if full {
		pr.wg.Send(s)
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
		pr.wg.Send(s)
	}
}

// packets is a wg.Source of several short packets.
type packets struct {
	buf  []byte
	n    [partingCount]uint8
	k, i int // there are k, of which i have been read
}

var _ wg.Source = (*packets)(nil)

// add adds a packet and reports whether there is room for no more.
func (s *packets) add(p wg.Source) (full bool) {
	if s.buf == nil {
		s.buf = make([]byte, 0, partingCount*partingSize)
	}
	at := len(s.buf)
	n := p.Next(s.buf[at : at+partingSize : at+partingSize])
	if n > 0 {
		s.buf = s.buf[:at+n]
		s.n[s.k] = uint8(n)
		s.k++
	}
	return s.k == partingCount
}

// Next implements wg.Source.
func (s *packets) Next(dst []byte) int {
	if s.i == s.k {
		return 0
	}
	n := int(s.n[s.i])
	s.i++
	copy(dst, s.buf[:n])
	s.buf = s.buf[n:]
	return n
}
