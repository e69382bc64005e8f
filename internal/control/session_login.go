package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// login registers the node key, or a new one if rotate, and waits for the user if the server
// asks for one. It returns nil when the server has accepted the key.
func (s *Session) login(rotate bool) error {
	if rotate {
		if err := s.rotate(); err != nil {
			return err
		}
	}
	rotated := rotate
	var bo backoff
	urls := 0 // that the server answered with
	for {
		req := s.registration()
		if req.Followup != "" {
			s.setState(NeedsLogin, nil)
			s.polling.Store(true)
		}
		resp, err := s.client.Register(s.ctx, req)
		s.polling.Store(false)
		s.waitLogout()
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		_, refused := errors.AsType[*RegisterError](err)
		switch {
		case req.Followup != "" && refused:
			// That URL is no good any more: ask for another.
			s.log.Info("control: the login by URL was refused", "err", err)
			s.followup = ""
			if err := s.sleep(bo.next(), false, &bo); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		case resp.NodeKeyExpired:
			s.followup = ""
			if rotated || s.fresh {
				return fmt.Errorf("%w, says the server of a new one", ErrKeyExpired)
			}
			if err := s.rotate(); err != nil {
				return err
			}
			rotated = true
			continue
		case resp.AuthURL != "":
			// Either it was to answer when somebody has visited the URL, and has not waited, or it wants another visited.
			again := resp.AuthURL == s.followup || urls > 0
			urls++
			s.followup = resp.AuthURL
			s.showURL(resp.AuthURL)
			s.setState(NeedsLogin, nil)
			if again {
				if err := s.sleep(bo.next(), true, &bo); err != nil {
					return err
				}
			}
			continue
		}
		s.followup = ""
		s.showURL("")
		s.mu.Lock()
		s.registered, s.old = true, key.NodePublic{}
		s.mu.Unlock()
		s.h.Registered(resp)
		if !resp.MachineAuthorized {
			s.setState(NeedsMachineAuth, nil)
		}
		return nil
	}
}

// registration returns the request to make now.
func (s *Session) registration() *tailcfg.RegisterRequest {
	now := time.Now().UTC().Round(time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &tailcfg.RegisterRequest{
		NodeKey: s.node.Public(), OldNodeKey: s.old, Followup: s.followup, Hostinfo: s.hostinfo,
		Ephemeral: s.cfg.Ephemeral, Tailnet: s.cfg.Tailnet, Timestamp: &now,
	}
	if s.cfg.AuthKey != "" {
		r.Auth = &tailcfg.RegisterResponseAuth{AuthKey: s.cfg.AuthKey}
	}
	return r
}

// rotate replaces the node key by a new one, which the handler stores first.
func (s *Session) rotate() error {
	k := key.NewNode()
	if err := s.h.NewNodeKey(k); err != nil {
		return fmt.Errorf("control: storing a new node key: %w", err)
	}
	s.mu.Lock()
	s.old, s.node, s.registered = s.node.Public(), k, false
	s.mu.Unlock()
	s.followup = ""
	s.fresh = true
	return nil
}

// showURL gives the handler a URL that it does not have yet.
func (s *Session) showURL(u string) {
	if u != s.shown {
		s.shown = u
		s.h.AuthURL(u)
	}
}
