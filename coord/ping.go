package coord

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/coord/internal/alloc"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// pendingPing is a ping that waits for its answer.
type pendingPing struct {
	req  *tailcfg.PingRequest
	sent time.Time
	done chan PingResult // capacity 1
}

const maxPings = 16 // to one node at a time

// Ping asks a node to prove that it is there and blocks until it has or ctx ends. With an empty kind the
// node answers the server itself. With "disco", "TSMP", "ICMP" or "peerapi" it pings ip, an address of
// another node, in that way and reports.
func (s *Server) Ping(ctx context.Context, id, kind string, ip netip.Addr) (PingResult, error) {
	if err := s.lock(); err != nil {
		return PingResult{}, err
	}
	n := s.net.find(id)
	if n == nil {
		s.mu.Unlock()
		return PingResult{}, notFound("node", id)
	}
	if len(n.pings) >= maxPings {
		s.mu.Unlock()
		return PingResult{}, fmt.Errorf("coord: %w: too many pings to %s wait already", ErrNotAllowed, id)
	}
	token := alloc.ID(16)
	p := &pendingPing{sent: time.Now(), done: make(chan PingResult, 1)}
	p.req = &tailcfg.PingRequest{URL: s.base + "/ping/" + token, Types: kind, IP: ip}
	n.pings = append(n.pings, p)
	s.pinging[token] = p
	if n.stream != nil {
		n.stream.poke()
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.pinging, token)
		for i, q := range n.pings {
			if q == p {
				n.pings = append(n.pings[:i], n.pings[i+1:]...)
				break
			}
		}
		s.mu.Unlock()
	}()
	select {
	case res := <-p.done:
		return res, nil
	case <-ctx.Done():
		return PingResult{}, fmt.Errorf("coord: ping %s: %w", id, context.Cause(ctx))
	case <-s.ctx.Done():
		return PingResult{}, fmt.Errorf("coord: ping %s: %w", id, ErrClosed)
	}
}

// servePong takes a node's answer. The token in the URL is what authenticates it.
func (s *Server) servePong(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	p := s.pinging[r.PathValue("token")]
	s.mu.Unlock()
	if p == nil {
		http.Error(w, "no such ping", http.StatusNotFound)
		return
	}
	res := PingResult{RTT: time.Since(p.sent)}
	if r.Method == http.MethodPost {
		var in tailcfg.PingResponse
		if !readJSON(w, r, 16<<10, &in) {
			return
		}
		res = PingResult{Type: in.Type, RTT: time.Duration(in.LatencySeconds * float64(time.Second)), Err: in.Err, Endpoint: in.Endpoint,
			RegionID: in.DERPRegionID, NodeName: in.NodeName, NodeIP: in.NodeIP, IsLocalIP: in.IsLocalIP}
	}
	select {
	case p.done <- res:
	default: // answered already
	}
	w.WriteHeader(http.StatusOK)
}
