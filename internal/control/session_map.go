package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
	"golang.org/x/time/rate"
)

const (
	// maxSleep bounds how long the server can make the session pause.
	maxSleep = 5 * time.Minute
	// probeTimeout is how long a connection may take to prove that it works after a Nudge.
	probeTimeout = 5 * time.Second
	// updateRate and updateBurst bound the non-streaming requests.
	updateRate  = 1
	updateBurst = 6
)

// sane is a time that has passed wherever this program runs. A server's clock that is behind it
// says nothing.
var sane = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// mapRequest returns the request that says what the node is now.
func (s *Session) mapRequest() *tailcfg.MapRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &tailcfg.MapRequest{
		NodeKey: s.node.Public(), DiscoKey: s.disco, Hostinfo: s.hostinfo,
		Endpoints: s.endpoints, EndpointTypes: s.epTypes,
	}
}

// stream follows one map stream to its end, and sends updates beside it.
func (s *Session) stream(bo *backoff) error {
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	var updates sync.WaitGroup
	updates.Go(func() { s.update(ctx) })
	defer updates.Wait()
	defer cancel(nil) // before waiting

	var expiry *time.Timer
	defer func() {
		if expiry != nil {
			expiry.Stop()
		}
	}()
	began := false
	return s.client.Map(ctx, s.mapRequest(), func(m *tailcfg.MapResponse) error {
		if err := s.aside(ctx, m); err != nil || m.KeepAlive {
			return err
		}
		if !began {
			if m.Node == nil {
				if m.PingRequest != nil {
					return nil // nothing else in it
				}
				return fmt.Errorf("%w: the first one says nothing of this node", ErrBadMap)
			}
			began = true
			s.h.MapStart()
		}
		node := m.Node // the handler owns m from here on
		var at time.Time
		var authorized, expired bool
		if node != nil {
			at, authorized = node.KeyExpiry, node.MachineAuthorized
			expired = node.Expired || !at.IsZero() && !at.After(s.ControlTime())
		}
		if err := s.h.Map(m); err != nil {
			return fmt.Errorf("control: applying a map response: %w", err)
		}
		if node == nil {
			return nil
		}
		if expired {
			return ErrKeyExpired
		}
		s.fresh = false
		if expiry != nil {
			expiry.Stop()
		}
		if !at.IsZero() {
			expiry = time.AfterFunc(at.Sub(s.ControlTime()), func() { cancel(ErrKeyExpired) })
		}
		if authorized {
			s.setState(Connected, nil)
		} else {
			s.setState(NeedsMachineAuth, nil)
		}
		return nil
	})
}

// aside does what a frame asks of the session itself.
func (s *Session) aside(ctx context.Context, m *tailcfg.MapResponse) error {
	if t := m.ControlTime; t != nil && t.After(sane) {
		s.skew.Store(int64(time.Until(*t)))
	}
	if m.ControlDialPlan != nil {
		s.client.SetDialPlan(m.ControlDialPlan)
	}
	if p := m.PingRequest; p != nil && p.URL != "" && p.URL != s.lastPing && s.ping(p) {
		s.lastPing = p.URL
	}
	if m.Debug != nil && m.Debug.SleepSeconds > 0 {
		t := time.NewTimer(seconds(m.Debug.SleepSeconds, 0, maxSleep))
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// update tells the server what the node is: once when a stream begins, since the stream's own
// request does not count for that, and whenever something changed.
func (s *Session) update(ctx context.Context) {
	limit := rate.NewLimiter(updateRate, updateBurst)
	var bo backoff
	timeout := updateTimeout
	for {
		if limit.Wait(ctx) != nil {
			return
		}
		select { // what is pending goes with this one
		case <-s.changed:
		default:
		}
		err := s.client.bounded(ctx, timeout, func(ctx context.Context) error {
			return s.client.Update(ctx, s.mapRequest())
		})
		timeout = updateTimeout
		var retry *time.Timer
		var again <-chan time.Time
		if err == nil {
			bo.reset()
		} else {
			if ctx.Err() != nil {
				return
			}
			s.log.Debug("control: update failed", "err", err)
			wait := bo.next()
			if rl, ok := errors.AsType[*RateLimitError](err); ok {
				wait = rl.RetryAfter
			}
			retry = time.NewTimer(wait)
			again = retry.C
		}
		select {
		case <-s.changed:
		case <-again:
		case <-s.nudged:
			timeout = probeTimeout
		case <-ctx.Done():
		}
		if retry != nil {
			retry.Stop()
		}
	}
}
