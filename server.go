// Package tailnode puts a node of a tailnet inside a program: no daemon, no interface, no root.
//
// A [Server] joins the tailnet of a Tailscale-compatible coordination server, has its own
// addresses and its own MagicDNS name there, and listens and dials with the types of package
// net:
//
//	srv := &tailnode.Server{Hostname: "hello", AuthKey: os.Getenv("TS_AUTHKEY")}
//	defer srv.Close()
//	ln, err := srv.Listen("tcp", ":80")
//	if err != nil { ... }
//	err = http.Serve(ln, handler) // http://hello/ on every machine of the tailnet
//
// The fields and methods have the names and the meaning of tsnet.Server, so that a program
// moves by changing its import. Where tailnode does better than that, the method says so.
//
// # Failure
//
// Every error is an [*Error] with a [Code]. Nothing retries for ever in silence: a refused
// auth key ends [Server.Up] with the coordination server's own words, and a context that
// ends says what was still missing. Every call that blocks takes a context or ends with
// [Server.Close].
//
// # What it does to the process
//
// Nothing is logged unless Logf or Logger is set, but for the login URL. Nothing is sent to
// anybody but the coordination server, the relays that it names, and the peers.
package tailnode

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/node"
	"github.com/tailnode/tailnode/internal/state"
)

// Store keeps a node's identity between runs. ReadState returns an error for which
// errors.Is(err, fs.ErrNotExist) holds when there is nothing under id; WriteState returns when the
// value is safe. Values are secrets. A Store is used by one Server at a time, and must be
// safe for concurrent use.
type Store interface {
	ReadState(id string) ([]byte, error)
	WriteState(id string, value []byte) error
}

// NewMemoryStore returns a [Store] that forgets: the node is a new one in every process.
func NewMemoryStore() Store { return state.NewMemory() }

// Server is a node of a tailnet. The zero value with a Hostname works. Its fields may be set
// until the first method call and must not be changed after it. Its methods are safe for
// concurrent use. One process may have many Servers, each with a Dir or Store of its own.
type Server struct {
	// Dir holds the node's state: its identity, so that it stays the same node. It is made
	// if need be, with mode 0700, and locked while the server runs. Empty means
	// a directory "tailnode-PROGRAM" below [os.UserConfigDir].
	Dir string

	// Store keeps the state instead of Dir.
	Store Store

	// Hostname is the name to ask control for. Empty means the program's name.
	Hostname string

	// UserLogf gets what the user must see, which is the URL for interactive login, once.
	// Nil means [log.Printf]. It is called on a goroutine of its own, one call at a time, and may
	// call Close, which does not wait for it for longer than a second.
	UserLogf func(format string, args ...any)

	// Logf gets diagnostics. Nil means none. Logger is preferred where both are set. It is called by
	// goroutines that Close waits for, so it must not call Close.
	Logf func(format string, args ...any)

	// Logger gets diagnostics as structured records. Nil means none. Like Logf, it must not call Close.
	Logger *slog.Logger

	// Ephemeral makes the node leave the tailnet when it is closed, or when it is gone.
	Ephemeral bool

	// AuthKey registers the node. Empty means the environment's TS_AUTHKEY, then TS_AUTH_KEY,
	// then interactive login. A node that its state says is registered does not use it.
	AuthKey string

	// ControlURL is the coordination server. Empty means the environment's TS_CONTROL_URL,
	// then Tailscale's.
	ControlURL string

	// Port is the UDP port for direct traffic with peers; 0 lets the system choose.
	Port uint16

	// RelayServerPort makes the node a peer relay: it listens on this UDP port, 0 for one that the system chooses, and forwards
	// the sealed packets of nodes that find no direct path to each other, if the tailnet's policy grants them that (the
	// capability tailscale.com/cap/relay). Nil means it is none. It is named after upstream's preference; tsnet has no such field.
	RelayServerPort *uint16

	// RelayServerStaticEndpoints are addresses at which the relay can be reached beside those that it finds out, such as a port that
	// a router forwards.
	RelayServerStaticEndpoints []netip.AddrPort

	// DisablePortMapping keeps the server from asking the router for a port by PCP, NAT-PMP or
	// UPnP, which it does where it finds itself behind a NAT. It has no counterpart in tsnet.
	DisablePortMapping bool

	// Limits bounds what the server holds in memory. The zero value is good.
	Limits Limits

	// AdvertiseTags are the tags to ask control for, each "tag:name".
	AdvertiseTags []string

	// RootCAs verifies the certificates of control and relays. Nil means the system's. It has
	// no counterpart in tsnet.
	RootCAs *x509.CertPool

	mu        sync.Mutex
	node      *node.Node
	startErr  error
	started   bool
	closed    bool
	dir       string
	release   func() // unlocks Dir
	fallbacks fallbacks
	loop      loopback
	closing   chan struct{} // not nil once Close has begun; closed when it is done
}

// Start brings the server up without waiting for the network. It does not block on it; it
// reads and locks the state. Calling it is optional: the other methods do. After a failed
// Start the error stays, until Close.
func (s *Server) Start() error {
	_, err := s.start("start")
	return err
}

func (s *Server) start(op string) (*node.Node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, opError(op, errClosed)
	}
	if !s.started {
		s.started = true
		s.startErr = s.startLocked()
	}
	return s.node, opError(op, s.startErr)
}

var errClosed = fmt.Errorf("the server is closed: %w", net.ErrClosed)

func (s *Server) startLocked() (err error) {
	limits, err := s.Limits.check()
	if err != nil {
		return err
	}
	var prog string
	if exe, err := os.Executable(); err == nil {
		prog = node.ProgramName(exe)
	} else if s.Hostname == "" || s.Store == nil && s.Dir == "" {
		return errcode.New(errcode.InvalidArgument, "the program's name is not known (%w): set Hostname and Dir", err)
	}
	store, err := s.openStore(prog)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && s.release != nil {
			s.release()
			s.release = nil
		}
	}()
	s.node, err = node.Start(node.Config{
		Store:      store,
		Hostname:   cmp.Or(s.Hostname, prog),
		AuthKey:    cmp.Or(s.AuthKey, node.Getenv("TS_AUTHKEY"), node.Getenv("TS_AUTH_KEY")),
		ControlURL: cmp.Or(s.ControlURL, node.Getenv("TS_CONTROL_URL")),
		Ephemeral:  s.Ephemeral,
		Tags:       s.AdvertiseTags,
		Version:    Version,
		AuthURL:    s.showAuthURL,
		RootCA:     s.RootCAs,
		Port:       s.Port,
		PeerRelay:  s.peerRelay(),
		NoPortMap:  s.DisablePortMapping,
		Limits:     limits,
		Logger:     s.logger(),
	})
	if err != nil {
		return err
	}
	s.node.Engine().Stack().SetFallbackTCP(s.fallbacks.handle)
	return nil
}

// peerRelay returns how the node relays for others, nil if it does not.
func (s *Server) peerRelay() *datapath.PeerRelay {
	if s.RelayServerPort == nil {
		return nil
	}
	return &datapath.PeerRelay{Port: *s.RelayServerPort, Static: slices.Clone(s.RelayServerStaticEndpoints)}
}

// openStore returns the state store and puts what unlocks it in s.release.
func (s *Server) openStore(prog string) (state.Store, error) {
	s.dir = s.Dir
	if s.dir == "" && s.Store == nil {
		conf, err := os.UserConfigDir()
		if err != nil {
			return nil, errcode.New(errcode.InvalidArgument, "there is no place for the state (%w): set Dir", err)
		}
		s.dir = filepath.Join(conf, "tailnode-"+prog)
	}
	if s.Store != nil {
		return s.Store, nil
	}
	f, err := state.OpenFile(s.dir)
	if err != nil {
		return nil, node.StateError(err)
	}
	s.release = func() { f.Close() }
	return f, nil
}

func (s *Server) showAuthURL(url string) {
	logf := s.UserLogf
	if logf == nil {
		logf = log.Printf
	}
	logf("To let this node into the tailnet, visit: %s", url)
}

func (s *Server) logger() *slog.Logger {
	switch {
	case s.Logger != nil:
		return s.Logger
	case s.Logf != nil:
		return slog.New(logfHandler{logf: s.Logf})
	}
	return nil
}

// Up starts the server if need be and blocks until it is on the tailnet. It returns an error
// as soon as control refuses the node, with control's own words ([CodeAuthRefused]); while control
// cannot be reached, or somebody has yet to visit the login URL, it waits for ctx. Cancelling
// ctx does not stop the server.
func (s *Server) Up(ctx context.Context) (*Status, error) {
	n, err := s.start("up")
	if err != nil {
		return nil, err
	}
	st, err := n.AwaitRunning(ctx)
	if err != nil {
		return nil, opError("up", err)
	}
	return s.status(n, st, true), nil
}

// Close takes the node off the tailnet: it ends every listener, connection and blocked call,
// logs an Ephemeral node out (for up to three seconds), and returns when nothing of the
// server runs any more. It may be called at any time, from anywhere but Logf and Logger, also before
// Start and more than once; every call waits for the first. A closed Server stays closed.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closing != nil {
		done := s.closing
		s.mu.Unlock()
		<-done
		return nil
	}
	s.closing = make(chan struct{})
	s.closed = true
	n, release := s.node, s.release
	s.node, s.release = nil, nil // a closed Server that is kept holds nothing
	s.mu.Unlock()
	defer close(s.closing)
	s.loop.close()
	if n != nil {
		n.Close()
	}
	if release != nil {
		release()
	}
	return nil
}

// Listen announces the server on the tailnet for "tcp" (or ""), "tcp4" or "tcp6" and an address such
// as ":80". Without a host it takes connections to any of the node's addresses, also those it
// does not have yet, and does not wait for the network; with one of the node's addresses it waits until
// the node has it. The listener ends with Close of either.
func (s *Server) Listen(network, addr string) (net.Listener, error) {
	n, err := s.start("listen")
	if err != nil {
		return nil, err
	}
	ln, err := n.Listen(context.Background(), network, addr)
	return ln, opError("listen", err)
}

// ListenPacket is Listen for "udp", "udp4" and "udp6": each ReadFrom gives one datagram. The
// host may be left out, unlike in tsnet.
func (s *Server) ListenPacket(network, addr string) (net.PacketConn, error) {
	n, err := s.start("listen")
	if err != nil {
		return nil, err
	}
	pc, err := n.ListenPacket(context.Background(), network, addr)
	return pc, opError("listen", err)
}

// Dial connects to an address on the tailnet: "tcp", "tcp4", "tcp6", "udp", "udp4" or "udp6",
// and host:port, where the host is an address, a full MagicDNS name or a short one. It starts the server if
// need be and waits until it runs and knows the peer, as long as ctx lasts (ten seconds for an unknown peer where
// ctx has no deadline). It never leaves the tailnet: an address that is not on it gives
// [CodeNotTailnet]. A peer whose rules forbid the connection gives [CodeRefused].
func (s *Server) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	n, err := s.start("dial")
	if err != nil {
		return nil, err
	}
	c, err := n.Dial(ctx, network, address)
	return c, opError("dial", err)
}

// HTTPClient returns an HTTP client that connects through Dial. It has a connection pool of
// its own; the caller may set its fields.
func (s *Server) HTTPClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: s.Dial, ForceAttemptHTTP2: true}}
}

// TailscaleIPs returns the node's addresses; both are the zero Addr before it has any.
func (s *Server) TailscaleIPs() (ip4, ip6 netip.Addr) {
	s.mu.Lock()
	n := s.node
	s.mu.Unlock()
	if n == nil {
		return
	}
	st, _ := n.Status()
	if st.Netmap == nil {
		return
	}
	return st.Netmap.Self.Addr4(), st.Netmap.Self.Addr6()
}

// GetRootPath returns the directory of the state, "" before Start and where Store is set
// without Dir.
func (s *Server) GetRootPath() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dir
}

// FallbackTCPHandler decides over a TCP connection that no listener takes. With intercept
// false the next handler is asked; with true the connection is handled by handler, which
// owns it, or refused where handler is nil.
type FallbackTCPHandler func(src, dst netip.AddrPort) (handler func(net.Conn), intercept bool)

// RegisterFallbackTCPHandler adds a handler of last resort; handlers are asked in the order in which
// they were added. The function it returns takes it away again.
func (s *Server) RegisterFallbackTCPHandler(cb FallbackTCPHandler) func() { return s.fallbacks.add(cb) }

type fallbacks struct {
	mu   sync.Mutex
	list []*FallbackTCPHandler
}

func (f *fallbacks) add(cb FallbackTCPHandler) func() {
	p := &cb
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = append(f.list, p)
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		keep := make([]*FallbackTCPHandler, 0, len(f.list))
		for _, q := range f.list {
			if q != p {
				keep = append(keep, q)
			}
		}
		f.list = keep
	}
}

func (f *fallbacks) handle(src, dst netip.AddrPort) (func(net.Conn), bool) {
	f.mu.Lock()
	list := f.list // never changed in place
	f.mu.Unlock()
	for _, cb := range list {
		if h, ok := (*cb)(src, dst); ok {
			return h, true
		}
	}
	return nil, false
}

// Version is this module's version, which control shows to the tailnet's administrators.
var Version = sync.OnceValue(func() string {
	v := "0.1.0"
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, d := range append([]*debug.Module{&bi.Main}, bi.Deps...) {
			if d.Path == "github.com/tailnode/tailnode" && strings.HasPrefix(d.Version, "v") {
				v = d.Version[1:]
			}
		}
	}
	return v + "-tailnode"
})()
