package node

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/control"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// handler is the Node as the control session sees it. Its methods run on the session's goroutine.
type handler Node

// NewNodeKey stores the key before anything is done with it, and moves the data path to it.
func (h *handler) NewNodeKey(k key.NodePrivate) error {
	n := (*Node)(h)
	n.mu.Lock()
	next := n.saved
	next.OldNodeKey = next.NodeKey.Public()
	next.NodeKey, next.Registered = k, false
	err := n.save(next)
	n.mu.Unlock()
	if err != nil {
		return err
	}
	return n.engine.SetNodeKey(k)
}

// AuthURL shows the URL that lets the node in, once each.
func (h *handler) AuthURL(url string) {
	n := (*Node)(h)
	fresh := false
	n.update(func(s *Status) {
		fresh = url != "" && url != s.AuthURL
		s.AuthURL = url
		if url != "" {
			s.State, s.Err = NeedsLogin, nil // now, for who is shown the URL may look at the state
		}
	})
	if fresh {
		n.urls.add(url)
	}
}

// Registered remembers that control knows the node key, so that the next start needs no auth key.
func (h *handler) Registered(*tailcfg.RegisterResponse) {
	n := (*Node)(h)
	control := n.sess.ControlKey()
	var err error
	n.mu.Lock()
	if !n.saved.Registered || n.saved.ControlKey != control {
		next := n.saved
		next.Registered, next.OldNodeKey, next.ControlKey = true, key.NodePublic{}, control
		err = n.save(next)
	}
	n.mu.Unlock() // now, for a Logger may ask for the state
	if err != nil {
		n.log.Error("the registration could not be stored; the next start will register again", "err", err)
	}
}

// MapStart begins a new map stream, whose first response is whole.
func (h *handler) MapStart() { (*Node)(h).build.Restart() }

// Map applies one response of the map stream.
func (h *handler) Map(resp *tailcfg.MapResponse) error {
	n := (*Node)(h)
	m, ch, err := n.build.Apply(resp, time.Now())
	if err != nil {
		return fmt.Errorf("map response: %w", err)
	}
	if err := n.engine.SetNetmap(m, ch); err != nil {
		return err
	}
	n.update(func(s *Status) {
		s.Netmap = m
		s.Health = health(m)
	})
	if ch.DERPMap {
		n.kickHome()
	}
	if resp.EachPeer != nil && !n.cfg.Limits.KeepMemory { // it was large
		n.settle()
	}
	return nil
}

// State follows the session.
func (h *handler) State(st control.State, err error) {
	n := (*Node)(h)
	if err != nil {
		n.log.Warn("control", "state", st, "err", err)
	}
	n.update(func(s *Status) {
		s.Err = err
		switch st {
		case control.NeedsLogin:
			s.State = NeedsLogin
		case control.NeedsMachineAuth:
			s.State = NeedsApproval
		case control.Connected:
			s.State, s.AuthURL, s.Err = Running, "", nil
		case control.Failed:
			s.State, s.Err = Failed, errcode.With(errcode.AuthRefused, err)
		case control.LoggedOut:
			s.State = NeedsLogin
		}
		// Connecting and Disconnected leave the state: a node that was running stays so
		// while control is away, with Err saying why.
	})
}

// health puts what control says is wrong into words.
func health(m *netmap.Map) []string {
	h := slices.Clone(m.Health)
	for _, id := range slices.Sorted(maps.Keys(m.Messages)) {
		msg := m.Messages[id]
		h = append(h, strings.Trim(msg.Title+": "+msg.Text, ": "))
	}
	return h
}

// Ping answers control's request to ping a peer.
func (h *handler) Ping(ctx context.Context, req *tailcfg.PingRequest) (*tailcfg.PingResponse, error) {
	n := (*Node)(h)
	r, err := n.Ping(ctx, req.IP, req.Types)
	if err != nil {
		return nil, err
	}
	return &tailcfg.PingResponse{
		Type: req.Types, IP: r.IP.String(), NodeIP: r.NodeIP.String(), NodeName: r.NodeName,
		LatencySeconds: r.Latency.Seconds(), DERPRegionID: r.Region, DERPRegionCode: r.RegionCode,
		Endpoint: endpointText(r.Endpoint), PeerRelay: r.PeerRelay, PeerAPIPort: r.PeerAPIPort,
	}, nil
}

func endpointText(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.String()
}
