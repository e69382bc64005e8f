package peerrelay

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/udp"
)

// Config says how to run a [Server].
type Config struct {
	// Port is the UDP port, 0 for one that the system chooses.
	Port uint16
	// Static are addresses at which the relay can be reached beside those that it finds out, such as a port forwarded on the router.
	Static []netip.AddrPort
	// Listen opens a socket; nil is the system's. See [udp.Config].
	Listen func(network, address string) (udp.PacketConn, error)
	Logger *slog.Logger // nil: silent
}

const (
	// maxPending bounds the allocations that wait for addresses.
	maxPending = 256
	// expireEvery is how often the table is looked through while there is something in it.
	expireEvery = 10 * time.Second
)

// Server is a [Table] on two sockets. Its methods are safe for concurrent use and do not block, but for Close and Rebind. Without
// endpoints it sends nothing and has no timer.
type Server struct {
	cfg   Config
	log   *slog.Logger
	table *Table
	socks *udp.Sockets

	mu      sync.Mutex // guards what follows: what the goroutine is to look at
	closed  bool
	local   []netip.Addr
	stun    []netip.AddrPort
	fresh   bool // what was found before does not count any more
	changed bool
	pending []request
	answers []answer

	awaits chan struct{} // capacity 1: there is something to look at
	done   chan struct{}
	wg     sync.WaitGroup
}

type request struct {
	from, other key.DiscoPublic
	answer      func(disco.RelayEndpoint)
}

// answer is what may be a STUN server's.
type answer struct {
	src netip.AddrPort
	pkt []byte
}

// Open opens the sockets and begins to serve. It fails if there is no socket in either address family.
func Open(cfg Config) (*Server, error) {
	s := &Server{cfg: cfg, log: cfg.Logger, table: NewTable(time.Now()), awaits: make(chan struct{}, 1), done: make(chan struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	s.socks, err = udp.Open(udp.Config{Port: cfg.Port, Listen: cfg.Listen, Logger: cfg.Logger})
	if err != nil {
		return nil, fmt.Errorf("peerrelay: %w", err)
	}
	s.wg.Go(s.loop)
	s.socks.Start(s.receive)
	return s, nil
}

// Close ends the relay and waits for everything of it. It may be called more than once. No answer is given after it.
func (s *Server) Close() {
	s.mu.Lock()
	was := s.closed
	s.closed = true
	s.mu.Unlock()
	if !was {
		close(s.done)
	}
	s.socks.Close()
	s.wg.Wait()
}

// Ports returns the ports of the sockets, 0 for a family without one.
func (s *Server) Ports() (v4, v6 uint16) { return s.socks.Ports() }

// Disco returns the relay's disco key.
func (s *Server) Disco() key.DiscoPublic { return s.table.Disco() }

// Stats says what the relay does.
type Stats struct {
	Endpoints      int
	ForwardedBytes uint64
	Dropped        uint64 // batches that belong to no endpoint, or come from nobody who is bound to it
}

// Stats returns what the relay has done since it was opened.
func (s *Server) Stats() Stats {
	return Stats{Endpoints: s.table.Len(), ForwardedBytes: s.table.forwarded.Load(), Dropped: s.table.dropped.Load()}
}

func (s *Server) receive(_ int, src netip.AddrPort, b []byte, seg int) {
	if stun.Is(b) {
		s.stunIn(src, b[:min(seg, len(b))])
		return
	}
	s.table.Receive(time.Now(), src, b, seg, s.socks)
}

func (s *Server) stunIn(src netip.AddrPort, b []byte) {
	if len(b) > 512 {
		return
	}
	s.look(func() {
		if len(s.answers) < 4*maxProbes {
			s.answers = append(s.answers, answer{src, slices.Clone(b)})
		}
	})
}

// look has the goroutine look at what f puts there.
func (s *Server) look(f func()) {
	s.mu.Lock()
	f()
	s.mu.Unlock()
	select {
	case s.awaits <- struct{}{}:
	default:
	}
}

// SetLocal names the addresses of this host's interfaces.
func (s *Server) SetLocal(addrs []netip.Addr) {
	s.look(func() { s.local, s.changed = slices.Clone(addrs), true })
}

// SetSTUN names the STUN servers, those to prefer first.
func (s *Server) SetSTUN(servers []netip.AddrPort) {
	s.look(func() {
		if !slices.Equal(s.stun, servers) {
			s.stun, s.changed, s.fresh = slices.Clone(servers), true, true
		}
	})
}

// Rebind opens the sockets anew, for a host whose network has changed. It waits for packets that are under way.
func (s *Server) Rebind() error {
	if err := s.socks.Rebind(); err != nil {
		return fmt.Errorf("peerrelay: %w", err)
	}
	s.look(func() { s.changed, s.fresh = true, true })
	return nil
}

// Allocate asks for the endpoint of two clients, of which from is the one that asks. answer is called with it, once, by the Server's
// goroutine, on which it must not block; or never, if there is no room or nothing is known yet of where the relay can be reached.
func (s *Server) Allocate(from, other key.DiscoPublic, answer func(disco.RelayEndpoint)) {
	s.look(func() {
		if len(s.pending) < maxPending && !s.closed {
			s.pending = append(s.pending, request{from, other, answer})
		}
	})
}

// loop owns the finder until Close.
func (s *Server) loop() {
	f := finder{fixed: s.cfg.Static, port: s.cfg.Port}
	f.v4, f.v6 = s.socks.Ports()
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	var waiting []request
	var expireAt, refreshAt time.Time
	for {
		next := time.Time{}
		for _, t := range [...]time.Time{f.resendAt, f.endAt, expireAt, refreshAt} {
			if !t.IsZero() && (next.IsZero() || t.Before(next)) {
				next = t
			}
		}
		if next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(max(0, time.Until(next)))
		}
		select {
		case <-s.done:
			return
		case <-s.awaits:
		case <-timer.C:
		}
		now := time.Now()
		s.mu.Lock()
		pending, answers := s.pending, s.answers
		s.pending, s.answers = nil, nil
		anew := s.changed && s.fresh
		if s.changed {
			f.local, f.stun = s.local, s.stun
			s.changed, s.fresh = false, false
			f.v4, f.v6 = s.socks.Ports()
		}
		s.mu.Unlock()
		if anew {
			f.fresh, f.endAt, f.resendAt = time.Time{}, time.Time{}, time.Time{}
			s.probe(&f, now)
		}
		for _, a := range answers {
			f.answer(now, a.src, a.pkt)
		}
		if due(now, f.endAt) {
			f.finish(now)
			refreshAt = time.Time{}
		} else if due(now, f.resendAt) {
			f.resendAt = time.Time{}
			s.send(&f)
		}
		if due(now, refreshAt) {
			refreshAt = time.Time{}
			s.probe(&f, now)
		}
		if waiting = append(waiting, pending...); len(waiting) > 0 {
			if f.isFresh(now) {
				s.answerAll(&f, now, waiting)
				waiting = nil
			} else {
				waiting = waiting[:min(len(waiting), maxPending)]
				s.probe(&f, now)
				if f.endAt.IsZero() { // no server can be asked
					s.answerAll(&f, now, waiting)
					waiting = nil
				}
			}
		}
		n := s.table.Len()
		if n > 0 && due(now, expireAt) {
			n = s.table.Expire(now)
			expireAt = time.Time{}
		}
		switch {
		case n == 0:
			expireAt, refreshAt = time.Time{}, time.Time{}
		default:
			if expireAt.IsZero() {
				expireAt = now.Add(expireEvery)
			}
			if refreshAt.IsZero() {
				refreshAt = f.refreshAt()
			}
		}
	}
}

func due(now, t time.Time) bool { return !t.IsZero() && !now.Before(t) }

// probe starts a round of STUN requests unless one is in progress.
func (s *Server) probe(f *finder, now time.Time) {
	if f.begin(now) {
		s.send(f)
	}
}

func (s *Server) send(f *finder) {
	for _, p := range f.probes {
		if !p.done {
			b := stun.AppendRequest(nil, p.tx)
			s.socks.Send(p.dst, b, len(b)) // as good as lost if it fails
		}
	}
}

func (s *Server) answerAll(f *finder, now time.Time, rs []request) {
	addrs := f.addrs()
	if len(addrs) == 0 {
		return
	}
	for _, r := range rs {
		ep, err := s.table.Allocate(now, r.from, r.other)
		if err != nil {
			s.log.Warn("peer relay: no endpoint", "client", r.from.ShortString(), "err", err)
			continue
		}
		ep.Addrs = addrs
		s.log.Debug("peer relay: endpoint", "vni", ep.VNI, "client", r.from.ShortString(), "other", r.other.ShortString())
		r.answer(ep)
	}
}
