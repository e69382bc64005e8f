package datapath

import (
	"net/netip"
	"sync"

	"github.com/tailnode/tailnode/internal/netcheck"
)

// stunTap passes the STUN messages that come to the Engine's sockets to whoever checks the network. It outlives transports.
type stunTap struct {
	mu   sync.RWMutex
	next int
	f    map[int]func(b []byte, src netip.AddrPort)
}

// deliver runs on the receive loops.
func (t *stunTap) deliver(src netip.AddrPort, b []byte) {
	t.mu.RLock()
	defer t.mu.RUnlock() // held for the calls: after remove there are none
	for _, f := range t.f {
		f(b, src)
	}
}

func (t *stunTap) add(f func(b []byte, src netip.AddrPort)) (remove func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	id := t.next
	t.next++
	if t.f == nil {
		t.f = make(map[int]func([]byte, netip.AddrPort))
	}
	t.f[id] = f
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.f, id)
	}
}

// STUN returns the Engine's sockets as a network check wants them, nil if the Engine has none. It is good until Close.
func (e *Engine) STUN() netcheck.Transport {
	if e.direct == nil {
		return nil
	}
	return (*stunSockets)(e)
}

type stunSockets Engine

func (s *stunSockets) Families() (v4, v6 bool) {
	p4, p6 := s.direct.socks.Ports()
	return p4 != 0, p6 != 0
}

func (s *stunSockets) WriteSTUN(b []byte, dst netip.AddrPort) error {
	return s.direct.socks.Send(dst, b, len(b))
}

func (s *stunSockets) OnSTUN(f func(b []byte, src netip.AddrPort)) (stop func()) {
	return s.stun.add(f)
}
