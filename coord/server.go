package coord

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tailnode/tailnode/coord/internal/channel"
	"github.com/tailnode/tailnode/coord/internal/throttle"
	"github.com/tailnode/tailnode/internal/coordstore"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Defaults of the fields of [Server].
const (
	DefaultDomain           = "tailnode.internal" // .internal is reserved for private use
	DefaultNodeKeyExpiry    = 180 * 24 * time.Hour
	DefaultEphemeralTimeout = 5 * time.Minute
	DefaultAuthKeyExpiry    = 90 * 24 * time.Hour
)

// The default address ranges: the shared address space that tailnets use (RFC 6598), and a unique
// local prefix (RFC 4193).
var (
	DefaultPrefix4 = netip.MustParsePrefix("100.64.0.0/10")
	DefaultPrefix6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")
)

const (
	databaseFile = "coord.db"
	adminFile    = "admin.json"
)

// Server is a coordination server. Set its fields before [Server.Start] and leave them alone
// afterwards. The methods are safe for concurrent use; those that look into or change the tailnet
// give [ErrClosed] before Start and after Close.
type Server struct {
	// Dir is the folder that holds the database and what a separate process needs to
	// administer the server ([OpenAdmin]). It is made with mode 0700 if it is not there. Empty: everything
	// is kept in memory and forgotten.
	Dir string
	// Addr is the TCP address to listen on. Empty: a free port on 127.0.0.1. "none": do not
	// listen; URL must be set and [Server.Handler] mounted somewhere.
	Addr string
	// URL is where nodes reach the server, if not at the address it listens on.
	URL string
	// TLSConfig makes the server speak HTTPS. Without it the server speaks plain HTTP, which is
	// as safe for nodes that already know its key: all they say goes through Noise.
	TLSConfig *tls.Config
	// Domain is the domain of the nodes' names. Empty: [DefaultDomain].
	Domain string
	// Prefix4 and Prefix6 are the ranges of the nodes' addresses. Zero: the defaults. A change
	// concerns new nodes only.
	Prefix4, Prefix6 netip.Prefix
	// Relays are the relays that nodes are told of. See also [Server.SetRelays].
	Relays []Region
	// NodeKeyExpiry is how long a login lasts. Zero: [DefaultNodeKeyExpiry]; negative: for good.
	NodeKeyExpiry time.Duration
	// EphemeralTimeout is how long an ephemeral node may be away before it is removed. Zero:
	// [DefaultEphemeralTimeout].
	EphemeralTimeout time.Duration
	// RequireMachineApproval makes new nodes wait for [Server.ApproveNode], unless their auth key is preauthorized.
	RequireMachineApproval bool
	// AdminAddr is where [Admin] clients are served, if Dir is set. Empty: a free port on 127.0.0.1.
	// Whoever reaches it still needs the token in Dir.
	AdminAddr string
	// Logger gets what happens. Nil: silence.
	Logger *slog.Logger

	log      *slog.Logger
	domain   string
	expiry   time.Duration
	ephemera time.Duration
	p4, p6   netip.Prefix
	base     string // URL without a slash at the end
	public   http.Handler
	failures *throttle.Limiter

	mu       sync.Mutex
	state    int // what of Start and Close was called
	store    *coordstore.Store
	net      *tailnet
	wake     chan struct{} // closed when streams should look for changes
	woken    time.Time
	waking   *time.Timer // set while a wake-up is due
	chores   *time.Timer // runs housekeeping
	choresAt time.Time
	logins   map[string]*login
	pinging  map[string]*pendingPing

	ctx    context.Context
	cancel context.CancelFunc
	noise  *channel.Server
	https  []*http.Server
	wg     sync.WaitGroup
	done   chan struct{} // closed when Close is through
}

const (
	stateNew = iota
	stateRunning
	stateClosed
)

// Start opens the database, begins to listen and returns. The context bounds the start only. After an error
// the server is as if it had not been started.
func (s *Server) Start(ctx context.Context) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.state {
	case stateRunning:
		return errors.New("coord: already started")
	case stateClosed:
		return fmt.Errorf("coord: %w", ErrClosed)
	}
	if err := s.settings(); err != nil {
		return err
	}
	dm, err := derpMap(s.Relays)
	if err != nil {
		return err
	}

	store := coordstore.NewMemory()
	if s.Dir != "" {
		if err := os.MkdirAll(s.Dir, 0o700); err != nil {
			return fmt.Errorf("coord: %w", err)
		}
		if store, err = coordstore.Open(filepath.Join(s.Dir, databaseFile)); err != nil {
			return fmt.Errorf("coord: %w", err)
		}
	}
	var open []interface{ Close() error }
	defer func() {
		if err != nil {
			for _, c := range open {
				c.Close()
			}
		}
	}()
	open = append(open, store)

	now := time.Now()
	net_ := newTailnet()
	if err := net_.load(store, now); err != nil {
		return fmt.Errorf("coord: %w", err)
	}
	net_.derp = dm
	s.store, s.net = store, net_
	if err := s.firstStart(now); err != nil {
		return err
	}

	var lc net.ListenConfig
	var ln net.Listener
	if s.Addr != "none" {
		if ln, err = lc.Listen(ctx, "tcp", cmp.Or(s.Addr, "127.0.0.1:0")); err != nil {
			return fmt.Errorf("coord: %w", err)
		}
		open = append(open, ln)
	}
	s.base = strings.TrimRight(s.URL, "/")
	if s.base == "" {
		s.base = listenURL(ln.Addr(), s.TLSConfig != nil)
	}

	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.noise = channel.New(channel.Config{Key: s.net.srv.Key, Handler: s.innerMux(), Context: s.ctx, Logger: s.log})
	s.failures = throttle.New()
	s.logins = map[string]*login{}
	s.pinging = map[string]*pendingPing{}
	s.wake = make(chan struct{})
	s.done = make(chan struct{})
	s.public = s.publicMux()
	s.wg.Go(s.noise.Serve)
	if ln != nil {
		if s.TLSConfig != nil {
			cfg := s.TLSConfig.Clone()
			cfg.NextProtos = []string{"http/1.1"} // the upgrade to Noise needs HTTP/1.1
			ln = tls.NewListener(ln, cfg)
		}
		s.serve(ln, s.public)
	}
	if s.Dir != "" {
		aln, err := lc.Listen(ctx, "tcp", cmp.Or(s.AdminAddr, "127.0.0.1:0"))
		if err == nil {
			var h http.Handler
			if h, err = s.adminHandler(aln.Addr()); err == nil {
				s.serve(aln, h)
			} else {
				aln.Close()
			}
		}
		if err != nil {
			s.cancel()
			s.noise.Close()
			for _, h := range s.https {
				h.Close()
			}
			s.https = nil
			s.wg.Wait()
			return fmt.Errorf("coord: admin listener: %w", err)
		}
	}
	s.state = stateRunning
	s.chores = time.AfterFunc(0, s.housekeep)
	s.choresAt = now
	s.log.Info("coordination server started", "url", s.base, "domain", s.domain, "nodes", len(s.net.nodes), "persistent", s.Dir != "")
	return nil
}

// settings fills in the defaults and checks the fields.
func (s *Server) settings() error {
	s.log = s.Logger
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.domain = strings.Trim(strings.ToLower(cmp.Or(s.Domain, DefaultDomain)), ".")
	for l := range strings.SplitSeq(s.domain, ".") {
		if l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || l[0] == '-' {
			return fmt.Errorf("coord: %w: Domain %q", ErrInvalid, s.Domain)
		}
	}
	if len(s.domain) > 180 {
		return fmt.Errorf("coord: %w: Domain is too long", ErrInvalid)
	}
	s.p4, s.p6 = s.Prefix4, s.Prefix6
	if !s.p4.IsValid() {
		s.p4 = DefaultPrefix4
	}
	if !s.p6.IsValid() {
		s.p6 = DefaultPrefix6
	}
	if !s.p4.Addr().Is4() || s.p4.Bits() < 8 || s.p4.Bits() > 30 {
		return fmt.Errorf("coord: %w: Prefix4 %v", ErrInvalid, s.p4)
	}
	if !s.p6.Addr().Is6() || s.p6.Addr().Is4In6() || s.p6.Bits() > 96 {
		return fmt.Errorf("coord: %w: Prefix6 %v", ErrInvalid, s.p6)
	}
	s.expiry = cmp.Or(s.NodeKeyExpiry, DefaultNodeKeyExpiry)
	s.ephemera = cmp.Or(s.EphemeralTimeout, DefaultEphemeralTimeout)
	if s.Addr == "none" && s.URL == "" {
		return fmt.Errorf("coord: %w: URL must be set if the server does not listen", ErrInvalid)
	}
	if s.URL != "" {
		if u, err := url.Parse(s.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return fmt.Errorf("coord: %w: URL %q", ErrInvalid, s.URL)
		}
	}
	return nil
}

// firstStart makes what a new database lacks.
func (s *Server) firstStart(now time.Time) error {
	t := s.net
	if !t.srv.Key.IsZero() {
		return nil
	}
	t.srv = serverRec{Key: key.NewMachine(), Created: now, NextNode: 1, NextUser: 3}
	def := &userRec{ID: 1, Name: DefaultUser, DisplayName: "Default user", Created: now}
	tagged := &userRec{ID: taggedUserID, Name: TaggedUser, DisplayName: "Tagged devices", Created: now}
	t.setUser(def)
	t.setUser(tagged)
	return s.store.Stage(coordstore.Put(coordstore.Meta, metaServer, &t.srv),
		s.putUser(def), s.putUser(tagged)).Wait()
}

const taggedUserID tailcfg.UserID = 2

// serve runs an HTTP server on ln until Close.
func (s *Server) serve(ln net.Listener, h http.Handler) {
	hs := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second, // not for Noise channels, which are taken over
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.https = append(s.https, hs)
	s.wg.Go(func() { hs.Serve(ln) })
}

func listenURL(a net.Addr, secure bool) string {
	scheme := "http://"
	if secure {
		scheme = "https://"
	}
	if t, ok := a.(*net.TCPAddr); ok && t.IP.IsUnspecified() {
		return fmt.Sprintf("%s127.0.0.1:%d", scheme, t.Port)
	}
	return scheme + a.String()
}

// BaseURL returns the URL that nodes use, without a slash at the end; empty before Start.
func (s *Server) BaseURL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.base
}

// Handler returns the handler that serves nodes, to mount at the root of another HTTP/1.1 server. It
// answers 503 while the server does not run.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		h, ok := s.public, s.state == stateRunning
		s.mu.Unlock()
		if !ok {
			http.Error(w, "coordination server is not running", http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// Close ends all connections, commits what is pending and waits until everything has stopped. It may be called
// at any time, more than once, from any goroutine.
func (s *Server) Close() error {
	s.mu.Lock()
	switch s.state {
	case stateNew:
		s.state = stateClosed
		s.mu.Unlock()
		return nil
	case stateClosed:
		done := s.done
		s.mu.Unlock()
		if done != nil {
			<-done
		}
		return nil
	}
	s.state = stateClosed
	s.chores.Stop()
	if s.waking != nil {
		s.waking.Stop()
	}
	s.mu.Unlock()

	s.cancel() // ends the map streams and long polls
	for _, h := range s.https {
		h.Close()
	}
	s.noise.Close()
	s.wg.Wait()
	for _, h := range s.https {
		h.Close() // once more, for a connection that was being accepted the first time
	}
	s.noise.Close()
	if s.Dir != "" {
		os.Remove(filepath.Join(s.Dir, adminFile)) // its address leads nowhere now
	}
	err := s.store.Close()
	if err != nil {
		err = fmt.Errorf("coord: %w", err)
	}
	s.log.Info("coordination server stopped")
	close(s.done)
	return err
}

// lock takes the mutex if the server runs.
func (s *Server) lock() error {
	s.mu.Lock()
	if s.state != stateRunning {
		s.mu.Unlock()
		return fmt.Errorf("coord: %w", ErrClosed)
	}
	return nil
}

// changed wakes the map streams: at once if the last time was long ago, else soon. It is called with the
// mutex held after every change. The more streams there are, the more changes share a wake-up.
func (s *Server) changed() {
	if s.waking != nil || s.state == stateClosed {
		return
	}
	gap := 5*time.Millisecond + time.Duration(len(s.net.nodes))*100*time.Microsecond
	if wait := gap - time.Since(s.woken); wait > 0 {
		s.waking = time.AfterFunc(wait, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.waking = nil
			s.wakeAll()
		})
		return
	}
	s.wakeAll()
}

func (s *Server) wakeAll() {
	s.woken = time.Now()
	close(s.wake)
	s.wake = make(chan struct{})
}

// due makes sure that housekeeping runs at the time at. The mutex is held.
func (s *Server) due(at time.Time) {
	if s.chores == nil || s.state == stateClosed || !s.choresAt.IsZero() && !at.Before(s.choresAt) {
		return
	}
	s.choresAt = at
	s.chores.Reset(max(0, time.Until(at)))
}

// housekeep does what has come due, and arranges for what is due next.
func (s *Server) housekeep() {
	if s.lock() != nil {
		return
	}
	defer s.mu.Unlock()
	now := time.Now()
	s.choresAt = time.Time{}
	next := func(at time.Time) { s.due(at) }
	for _, n := range s.net.nodes {
		if n.rec.Ephemeral && n.stream == nil {
			if at := n.gone.Add(s.ephemera); now.Before(at) {
				next(at)
			} else {
				s.log.Info("ephemeral node removed", "node", n.rec.Name)
				s.drop(n)
				continue
			}
		}
		if e := n.rec.KeyExpiry; !e.IsZero() {
			if now.Before(e) {
				next(e)
			} else if !n.told {
				s.log.Info("node key expired", "node", n.rec.Name)
				n.told = true
				s.net.touch(n, whole)
				s.changed()
			}
		}
	}
	for id, l := range s.logins {
		if now.Before(l.expires) {
			next(l.expires)
		} else {
			l.finish(loginExpired)
			delete(s.logins, id)
		}
	}
}

// drop removes n for good and returns the write to wait for. The mutex is held.
func (s *Server) drop(n *node) coordstore.Ticket {
	s.net.remove(n)
	if n.stream != nil {
		n.stream.end()
	}
	s.changed()
	return s.store.Stage(coordstore.Del(coordstore.Nodes, n.nodeKey()), coordstore.Del(coordstore.Live, n.liveKey()))
}

func (s *Server) putUser(u *userRec) coordstore.Change {
	return coordstore.Put(coordstore.Users, fmt.Sprintf("%016x", int64(u.ID)), u)
}
