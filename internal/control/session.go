package control

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// State is where a Session stands.
type State int

// The states. Failed and LoggedOut are final.
const (
	Connecting       State = iota // nothing heard from the server yet
	NeedsLogin                    // somebody has to visit the URL given to Handler.AuthURL
	NeedsMachineAuth              // an administrator has to approve the node
	Connected                     // the map stream is open and its first frame has come
	Disconnected                  // the last attempt failed, with the error given; another follows
	Failed                        // the server refused for good
	LoggedOut                     // Logout succeeded
)

var stateNames = [...]string{"Connecting", "NeedsLogin", "NeedsMachineAuth", "Connected", "Disconnected", "Failed", "LoggedOut"}

// String returns the state's name.
func (s State) String() string {
	if s < 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return stateNames[s]
}

// ErrKeyExpired is wrapped when the node key has expired by the server's account or clock.
var ErrKeyExpired = errors.New("control: the node key has expired")

// Handler is told what happens in a Session. All methods but Ping are called on the
// Session's one goroutine, in order, so what they do delays the stream. None may call
// Close or Logout.
type Handler interface {
	// NewNodeKey is called before a new node key is used for the first time. The handler must
	// have stored it when it returns nil; after an error the Session keeps the old one for now.
	NewNodeKey(key.NodePrivate) error
	// AuthURL is called once for every URL that somebody has to visit, and with "" when none
	// is to be visited any more.
	AuthURL(url string)
	// Registered is called when the server has accepted the node key.
	Registered(*tailcfg.RegisterResponse)
	// MapStart is called at the start of a map stream: the next Map is a full map, and what
	// came before it no longer counts.
	MapStart()
	// Map is called for every frame but keep-alives. The response belongs to the handler. An
	// error ends the stream; another is opened after a while.
	Map(*tailcfg.MapResponse) error
	// State is called when the state changes, and at every failed attempt. The error is nil
	// but for Disconnected and Failed.
	State(State, error)
	// Ping is called on a goroutine of its own for a PingRequest, with one kind in Types. The
	// Session posts the answer to the server.
	Ping(context.Context, *tailcfg.PingRequest) (*tailcfg.PingResponse, error)
}

// SessionConfig configures a Session.
type SessionConfig struct {
	ServerURL  string
	MachineKey key.MachinePrivate
	NodeKey    key.NodePrivate
	OldNodeKey key.NodePublic // the key that NodeKey replaces, if that replacement is not registered yet
	DiscoKey   key.DiscoPublic
	// Registered says that the server accepted NodeKey before. The Session then begins with
	// the map stream, and registers only if that is refused.
	Registered bool
	// ControlKey is the server's key as Session.ControlKey gave it in a former run, or zero.
	ControlKey key.MachinePublic

	AuthKey   string
	Ephemeral bool
	Tailnet   string            // the tailnet wanted, where the server lets choose
	Hostinfo  *tailcfg.Hostinfo // not changed afterwards by the caller

	Version   tailcfg.CapabilityVersion // 0: tailcfg.CurrentCapabilityVersion
	Dial      func(ctx context.Context, network, addr string) (net.Conn, error)
	TLSConfig *tls.Config
	Logger    *slog.Logger // nil: silent
	Handler   Handler
}

// Session keeps a node logged in and its map stream open. Its methods are safe for concurrent use.
type Session struct {
	cfg    SessionConfig
	client *Client
	log    *slog.Logger
	h      Handler

	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}
	start  sync.Once
	helper sync.WaitGroup // pings
	pings  chan struct{}  // a place for each that is being answered

	changed chan struct{} // something to tell the server
	nudged  chan struct{}
	polling atomic.Bool  // waiting for the server with nothing that keeps the connection alive
	skew    atomic.Int64 // the server's clock less ours, nanoseconds

	mu         sync.Mutex // guards what follows
	started    bool
	err        error
	node       key.NodePrivate
	old        key.NodePublic
	registered bool
	hostinfo   *tailcfg.Hostinfo
	hostJSON   []byte
	endpoints  []netip.AddrPort
	epTypes    []tailcfg.EndpointType
	disco      key.DiscoPublic
	logout     chan struct{} // closed when the logout under way is over; nil: none

	// Of the Session's goroutine alone.
	state    State
	stateSet bool
	followup string // the URL being waited for
	shown    string // the URL last given to the handler
	fresh    bool   // node was made in this session and has not been seen unexpired in a map
	lastPing string
}

// NewSession returns a session that Start starts. The caller must Close it.
func NewSession(cfg SessionConfig) (*Session, error) {
	if cfg.Handler == nil {
		return nil, errors.New("control: no handler")
	}
	if cfg.NodeKey.IsZero() {
		return nil, errors.New("control: no node key")
	}
	c, err := New(Config{
		ServerURL: cfg.ServerURL, MachineKey: cfg.MachineKey, ControlKey: cfg.ControlKey, Version: cfg.Version,
		Dial: cfg.Dial, TLSConfig: cfg.TLSConfig, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	s := &Session{
		cfg: cfg, client: c, log: c.log, h: cfg.Handler,
		done: make(chan struct{}), changed: make(chan struct{}, 1), nudged: make(chan struct{}, 1),
		pings: make(chan struct{}, maxPings),
		node:  cfg.NodeKey, old: cfg.OldNodeKey, registered: cfg.Registered,
		hostinfo: cfg.Hostinfo, disco: cfg.DiscoKey,
	}
	if s.hostinfo == nil {
		s.hostinfo = &tailcfg.Hostinfo{}
	}
	s.hostJSON, _ = json.Marshal(s.hostinfo)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s, nil
}

// Start starts the session's goroutine. It does not block. Further calls do nothing.
func (s *Session) Start() {
	s.start.Do(func() {
		s.mu.Lock()
		s.started = true
		s.mu.Unlock()
		go s.run()
	})
}

// Close ends the session and waits until its goroutines have returned and its connection is
// closed. It is idempotent and may be called at any time, but not by the Handler. It does not
// log out.
func (s *Session) Close() {
	s.cancel(ErrClosed)
	s.start.Do(func() { // never started, and cannot be any more
		s.mu.Lock()
		s.err = ErrClosed
		s.mu.Unlock()
		close(s.done)
	})
	<-s.done
	s.client.Close()
}

// Done is closed when the session has ended: after Close, a Logout, or a terminal failure.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err returns why the session ended, or nil while it runs.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// NodeKey returns the node key in use.
func (s *Session) NodeKey() key.NodePrivate {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node
}

// ControlKey returns the server's key, or zero before the first connection.
func (s *Session) ControlKey() key.MachinePublic { return s.client.ControlKey() }

// ControlTime returns now by the server's clock, as far as the server has told it. Key expiry is
// judged by it.
func (s *Session) ControlTime() time.Time {
	return time.Now().Add(time.Duration(s.skew.Load()))
}

// SetHostinfo tells the server of a new Hostinfo, which the caller does not change afterwards. It does
// not block.
func (s *Session) SetHostinfo(hi *tailcfg.Hostinfo) {
	j, err := json.Marshal(hi)
	if err != nil || hi == nil {
		s.log.Error("control: Hostinfo cannot be sent", "err", err)
		return
	}
	s.mu.Lock()
	same := bytes.Equal(j, s.hostJSON)
	s.hostinfo, s.hostJSON = hi, j
	s.mu.Unlock()
	if !same {
		signal(s.changed)
	}
}

// SetEndpoints tells the server where the node may be reached; types goes with eps entry by
// entry. It does not block and keeps neither slice.
func (s *Session) SetEndpoints(eps []netip.AddrPort, types []tailcfg.EndpointType) {
	s.mu.Lock()
	same := slices.Equal(eps, s.endpoints) && slices.Equal(types, s.epTypes)
	if !same {
		s.endpoints, s.epTypes = slices.Clone(eps), slices.Clone(types)
	}
	s.mu.Unlock()
	if !same {
		signal(s.changed)
	}
}

// SetDiscoKey tells the server of a new disco key. It does not block.
func (s *Session) SetDiscoKey(k key.DiscoPublic) {
	s.mu.Lock()
	same := k == s.disco
	s.disco = k
	s.mu.Unlock()
	if !same {
		signal(s.changed)
	}
}

// Nudge says that the network changed: a session that waits to try again does so at once, and
// one that is connected finds out whether its connection still works. It does not block.
func (s *Session) Nudge() {
	s.client.AbortDial()
	if s.polling.Load() {
		s.client.Drop()
	}
	signal(s.nudged) // last: what begins for it is not to be ended by the above
}

// signal fills a channel of one place.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Logout makes the server forget the node key and ends the session. It blocks until the server
// answered or ctx ends; after an error the session goes on.
func (s *Session) Logout(ctx context.Context) error {
	s.mu.Lock()
	if s.logout != nil {
		s.mu.Unlock()
		return errors.New("control: a logout is under way")
	}
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return context.Cause(s.ctx)
	}
	over := make(chan struct{})
	s.logout = over
	node, hi, registered := s.node.Public(), s.hostinfo, s.registered
	s.mu.Unlock()

	var err error
	if registered {
		lctx, cancel := context.WithCancelCause(ctx)
		stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
		err = s.client.Logout(lctx, node, hi)
		stop()
		cancel(nil)
	}
	s.mu.Lock()
	if err == nil {
		s.registered = false
		s.cancel(ErrLoggedOut)
	}
	s.logout = nil
	started := s.started
	s.mu.Unlock()
	close(over)
	if err != nil {
		return err
	}
	if started {
		select {
		case <-s.done:
		case <-ctx.Done():
		}
	}
	return nil
}

// waitLogout waits while a Logout is under way, whose effects look like failures.
func (s *Session) waitLogout() {
	s.mu.Lock()
	over := s.logout
	s.mu.Unlock()
	if over != nil {
		<-over
	}
}

// setState reports a change of state, and every failure.
func (s *Session) setState(st State, err error) {
	if s.stateSet && st == s.state && err == nil {
		return
	}
	s.state, s.stateSet = st, true
	s.h.State(st, err)
}

// run is the session's goroutine.
func (s *Session) run() {
	defer close(s.done)
	defer s.helper.Wait()
	s.setState(Connecting, nil)
	err := s.loop()
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	switch {
	case errors.Is(err, ErrLoggedOut):
		s.showURL("")
		s.setState(LoggedOut, nil)
	case !errors.Is(err, ErrClosed):
		s.showURL("")
		s.setState(Failed, err)
	}
}

// loop logs in and follows the map until the session ends, and says why it did.
func (s *Session) loop() error {
	var bo backoff
	rotate := false
	for {
		began := time.Now()
		err := s.once(rotate, &bo)
		rotate = false
		s.waitLogout()
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if time.Since(began) > 10*time.Second && s.state == Connected {
			bo.reset()
		}
		refused, isRefused := errors.AsType[*RegisterError](err)
		status, isStatus := errors.AsType[*HTTPError](err)
		limit, isLimit := errors.AsType[*RateLimitError](err)
		wait := time.Duration(-1)
		switch {
		case isRefused && refused.Terminal:
			return err
		case errors.Is(err, ErrKeyExpired):
			s.setRegistered(false)
			rotate = !s.fresh
			if bo.tries == 0 {
				wait = 0
			}
		case isLimit:
			wait = limit.RetryAfter
		case isStatus && status.Status >= 400 && status.Status < 500 && status.Status != 408:
			// The server does not know this node (any more).
			if s.setRegistered(false) && bo.tries == 0 {
				wait = 0
			}
		}
		next := bo.next()
		if wait < 0 {
			wait = next
		}
		s.log.Debug("control: disconnected", "err", err, "wait", wait)
		s.setState(Disconnected, err)
		if err := s.sleep(wait, limit == nil, &bo); err != nil {
			return err
		}
	}
}

// once logs in if need be and follows one map stream to its end.
func (s *Session) once(rotate bool, bo *backoff) error {
	s.mu.Lock()
	registered := s.registered
	s.mu.Unlock()
	if !registered {
		if err := s.login(rotate); err != nil {
			return err
		}
	}
	return s.stream(bo)
}

// setRegistered reports whether it changed anything.
func (s *Session) setRegistered(v bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.registered
	s.registered = v
	return was != v
}

// sleep waits for d, for a nudge if that may cut it short, or for the end of the session.
func (s *Session) sleep(d time.Duration, nudge bool, bo *backoff) error {
	var nudged chan struct{}
	if nudge {
		nudged = s.nudged
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-nudged:
		bo.reset()
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

// backoff is the time between attempts: doubling from half a second to half a minute, with
// jitter, so that the nodes of a restarted server do not come back together.
type backoff struct{ tries int }

func (b *backoff) reset() { b.tries = 0 }

func (b *backoff) next() time.Duration {
	const base, most = 500 * time.Millisecond, 30 * time.Second
	d := min(base<<min(b.tries, 10), most)
	b.tries++
	return d/2 + rand.N(d)
}
