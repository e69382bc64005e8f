package coord

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tailnode/tailnode/coord/internal/channel"
	"github.com/tailnode/tailnode/coord/internal/mapframe"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	maxMapBody   = 128 << 10
	maxEndpoints = 64
	// keepAliveEvery is how long a stream may be silent; clients give up after two minutes.
	keepAliveEvery = 50 * time.Second
	// writeTime is how long one message may take. A node that reads more slowly has to come back.
	writeTime = time.Minute
)

// stream is a map stream: a cursor in the tailnet's changes. The server's mutex guards it, but
// for the channels. The goroutine of its request owns it.
type stream struct {
	node      *node
	cursor    uint64
	named     bool // takes packet filters by name
	omitPeers bool
	blind     bool // the node was last told of no peers
	kick      chan struct{}
	stop      chan struct{}
	once      sync.Once
}

// poke makes the stream look for changes.
func (st *stream) poke() {
	select {
	case st.kick <- struct{}{}:
	default:
	}
}

// end makes the stream stop.
func (st *stream) end() { st.once.Do(func() { close(st.stop) }) }

// serveMap answers POST /machine/map (docs/protocol/control.md § POST /machine/map).
func (s *Server) serveMap(w http.ResponseWriter, r *http.Request) {
	var req tailcfg.MapRequest
	if !readJSON(w, r, maxMapBody, &req) {
		return
	}
	if req.Version < minCap {
		http.Error(w, fmt.Sprintf("this client is too old: it speaks version %d, and this server %d and later", req.Version, minCap), http.StatusBadRequest)
		return
	}
	if req.Compress != "" && req.Compress != "zstd" {
		http.Error(w, "unknown compression", http.StatusBadRequest)
		return
	}
	m, now := channel.Machine(r), time.Now()
	if s.lock() != nil {
		http.Error(w, "coordination server is stopping", http.StatusServiceUnavailable)
		return
	}
	n := s.net.byKey[req.NodeKey]
	if n == nil || n.rec.Machine != m {
		s.mu.Unlock()
		http.Error(w, "node not found: it has to register first", http.StatusNotFound)
		return
	}
	update := !req.ReadOnly && !req.Stream
	if update {
		s.update(n, &req)
	}
	compress := req.Compress == "zstd"
	named := req.Version >= capNamedFilters
	if !req.Stream || req.ReadOnly {
		var f *mapframe.Frame
		if !update || !req.OmitPeers {
			f = s.full(n, req.Version, req.OmitPeers, now)
		}
		s.mu.Unlock()
		if f == nil { // an update: the status is the answer
			w.WriteHeader(http.StatusOK)
			return
		}
		s.send(w, f, compress)
		return
	}

	st := &stream{node: n, named: named, omitPeers: req.OmitPeers, kick: make(chan struct{}, 1), stop: make(chan struct{})}
	s.attach(n, st, &req, now)
	f := s.full(n, req.Version, req.OmitPeers, now)
	st.cursor, st.blind = f.To, n.blind(now)
	wake := s.wake
	if len(n.pings) > 0 {
		st.poke()
	}
	s.mu.Unlock()
	s.stream(w, r, st, f, wake, compress)

	s.mu.Lock()
	s.detach(n, st, time.Now())
	s.mu.Unlock()
}

// stream sends f and then what changes, until the client is gone or the stream is ended.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, st *stream, f *mapframe.Frame, wake chan struct{}, compress bool) {
	idle := time.NewTimer(keepAliveEvery)
	defer idle.Stop()
	for last := false; ; {
		if f != nil {
			if s.send(w, f, compress) != nil {
				return
			}
			idle.Reset(keepAliveEvery + rand.N(keepAliveEvery/10)) // a thousand streams, not at the same moment
		}
		if last {
			return
		}
		f = nil
		select {
		case <-r.Context().Done():
			return
		case <-s.ctx.Done():
			return
		case <-st.stop:
			last = true
		case <-wake:
		case <-st.kick:
		case <-idle.C:
			f = mapframe.KeepAlive
			continue
		}
		s.mu.Lock()
		wake = s.wake
		known := s.net.nodes[st.node.rec.ID] == st.node
		switch {
		case known && !last:
			f = s.delta(st, time.Now())
		case !known && last: // it was removed: tell it that its key is worth nothing any more
			f = s.farewell(st.node)
		}
		s.mu.Unlock()
	}
}

// send writes one message.
func (s *Server) send(w http.ResponseWriter, f *mapframe.Frame, compress bool) error {
	b, err := f.Bytes(compress)
	if err != nil {
		s.log.Error("encode map", "err", err)
		return err
	}
	rc := http.NewResponseController(w)
	rc.SetWriteDeadline(time.Now().Add(writeTime))
	if _, err := w.Write(b); err != nil {
		return err
	}
	if err := rc.Flush(); err != nil {
		return err
	}
	return rc.SetWriteDeadline(time.Time{})
}

// farewell makes the last message to a node that was removed: itself, expired.
func (s *Server) farewell(n *node) *mapframe.Frame {
	f := &mapframe.Frame{}
	w := s.net.wire(n, s.domain, true, time.Now())
	w.KeyExpiry, w.Expired = time.Now().Add(-time.Minute).UTC(), true
	f.Base.Node = w
	return f
}

// attach makes st the node's stream. The mutex is held.
func (s *Server) attach(n *node, st *stream, req *tailcfg.MapRequest, now time.Time) {
	if n.stream != nil {
		n.stream.end()
	}
	was := n.stream != nil
	n.stream = st
	if n.live.Cap != req.Version {
		n.live.Cap = req.Version
		s.net.touch(n, capVer)
		s.store.StageLazy(n.putLive())
		s.changed()
	}
	if n.live.Disco.IsZero() && !req.DiscoKey.IsZero() {
		n.live.Disco = req.DiscoKey
		s.net.touch(n, disco)
		s.changed()
	}
	if !was {
		s.net.touch(n, online)
		s.changed()
	}
}

// detach takes st away unless another has taken its place. The mutex is held.
func (s *Server) detach(n *node, st *stream, now time.Time) {
	st.end()
	if n.stream != st {
		return
	}
	n.stream = nil
	n.gone = now
	n.live.LastSeen = now.UTC().Truncate(time.Second)
	if s.net.nodes[n.rec.ID] != n {
		return // removed
	}
	s.net.touch(n, online)
	s.store.StageLazy(n.putLive())
	s.schedule(n, now)
	s.changed()
}

// update takes over what an update request carries. The mutex is held.
func (s *Server) update(n *node, req *tailcfg.MapRequest) {
	t := s.net
	changed := false
	name := n.rec.Name
	if !req.DiscoKey.IsZero() && req.DiscoKey != n.live.Disco {
		n.live.Disco = req.DiscoKey
		t.touch(n, disco)
		changed = true
	}
	if eps := usable(req.Endpoints); !slices.Equal(eps, n.live.Endpoints) {
		n.live.Endpoints = eps
		if len(eps) > 0 {
			t.touch(n, endpoints)
		} else {
			t.touch(n, whole) // a patch cannot say "none"
		}
		changed = true
	}
	if s.report(n, req.Version, req.Hostinfo) {
		changed = true
	}
	if changed {
		s.store.StageLazy(n.putLive())
		if n.rec.Name != name {
			s.store.StageLazy(n.put())
		}
		s.changed()
	}
}

// usable returns the endpoints that peers could use, at most maxEndpoints of them.
func usable(in []netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, ep := range in {
		a := ep.Addr()
		if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.Is6() && a.IsLinkLocalUnicast() || ep.Port() == 0 {
			continue
		}
		if out = append(out, ep); len(out) == maxEndpoints {
			break
		}
	}
	return out
}
