// Package relay is an embeddable relay for a tailnet: a DERP server, by which nodes reach each
// other where no direct path is, and a STUN server, by which they learn their public
// addresses. Tailscale's own clients accept it as it is.
//
//	rs := &relay.Server{Addr: "127.0.0.1:0"}
//	if err := rs.Start(ctx); err != nil { ... }
//	defer rs.Close()
//	region := rs.Region(900) // goes into the DERP map of the tailnet
//
// Without a certificate it makes a self-signed one, which the region then pins.
package relay

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/derp/server"
	"github.com/tailnode/tailnode/internal/key"
)

var (
	// ErrClosed reports a use after Close or Shutdown.
	ErrClosed = errors.New("relay: closed")
	// ErrStarted reports a second Start.
	ErrStarted = errors.New("relay: already started")
)

// NodeKey is the public key of a tailnet node.
type NodeKey [32]byte

// String returns the text form, "nodekey:" and 64 hex digits.
func (k NodeKey) String() string { return "nodekey:" + hex.EncodeToString(k[:]) }

// MarshalText returns the text form.
func (k NodeKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText parses the text form.
func (k *NodeKey) UnmarshalText(b []byte) error {
	p, err := key.ParseNodePublic(string(b))
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	*k = p.Raw()
	return nil
}

// Server is a relay. Set the fields before Start and do not change them afterwards. The
// methods are safe for concurrent use.
type Server struct {
	// Addr is the TCP address to serve HTTPS and DERP on; ":443" if empty. Port 0 picks one.
	Addr string
	// STUNAddr is the UDP address to serve STUN on. Empty: the host of Addr with port 3478,
	// or with a free port if the port of Addr is 0. "none": no STUN.
	STUNAddr string
	// Hostname is how clients name the relay. Empty: the host of Addr, or "localhost".
	Hostname string
	// TLS, or CertFile and KeyFile (PEM), give the certificate. Neither: a self-signed one,
	// kept in Dir if that is set, which the DERP map must pin (Node does).
	TLS               *tls.Config
	CertFile, KeyFile string
	// PlainHTTP serves without TLS, for a network that is private or a proxy that adds it.
	// Only tailnode's own clients follow a DERP map to such a relay.
	PlainHTTP bool
	// Dir, if not empty, keeps the relay's key and its self-signed certificate over restarts.
	Dir string
	// PrivateKey, if not zero, is the relay's own Curve25519 key. Zero: that of Dir, or a new one.
	PrivateKey [32]byte
	// Admit, if not nil, decides who may use the relay: it gets a key that the client has
	// proved to hold and the client's address; an error refuses. It may block until ctx is done.
	Admit func(ctx context.Context, client NodeKey, from netip.Addr) error
	// MaxConns bounds the DERP connections at a time: all that were upgraded, whether they are
	// still in their handshake or admitted, several of one node each for itself; 0: 65536.
	// TLS and HTTP before the upgrade do not count: time limits alone bound them.
	MaxConns int
	// RateBytes, if not 0, bounds the bytes a second that each client may send.
	RateBytes int
	// Logger; nil means silent.
	Logger *slog.Logger

	mu       sync.Mutex
	started  bool
	closed   bool
	derp     *server.Server
	http     *http.Server
	ln       net.Listener
	stun     *stunServer
	node     Node
	wg       sync.WaitGroup
	serveErr error
	done     chan struct{} // closed when serving has ended
	drained  chan struct{} // closed when Shutdown has ended; nil before it began
}

// Node is a relay's entry in a DERP map. Its JSON is the map's own.
type Node struct {
	Name     string
	RegionID int
	HostName string
	CertName string `json:",omitempty"`
	IPv4     string `json:",omitempty"`
	IPv6     string `json:",omitempty"`
	STUNPort int    `json:",omitempty"`
	DERPPort int    `json:",omitempty"`
}

// Region is a region's entry in a DERP map. Its JSON is the map's own.
type Region struct {
	RegionID   int
	RegionCode string
	RegionName string
	Nodes      []Node
}

// Stats is a snapshot of what a relay does and did.
type Stats struct {
	Clients              int // node keys connected
	Connections          int
	PacketsIn, BytesIn   uint64
	PacketsOut, BytesOut uint64
	Dropped              uint64 // packets: no room, or no receiver
	Refused              uint64 // clients, by Admit
	STUNRequests         uint64 // answered
}

// Start opens the ports and serves in the background until Close or Shutdown. It blocks only
// while it opens them; ctx bounds that.
func (s *Server) Start(ctx context.Context) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if s.started {
		return ErrStarted
	}
	logger := s.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	addr := s.Addr
	if addr == "" {
		addr = ":443"
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("relay: Addr: %w", err)
	}
	priv, err := s.privateKey()
	if err != nil {
		return err
	}
	name := s.Hostname
	if name == "" {
		name = host
		if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
			name = "localhost"
		}
	}
	conf, pin, err := s.tlsConfig(name, host)
	if err != nil {
		return err
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	var st *stunServer
	if s.STUNAddr != "none" {
		stunAddr := s.STUNAddr
		if stunAddr == "" {
			stunAddr = net.JoinHostPort(host, "3478")
			if port == "0" {
				stunAddr = net.JoinHostPort(host, "0")
			}
		}
		if st, err = listenSTUN(ctx, stunAddr, logger); err != nil {
			ln.Close()
			return err
		}
	}
	cfg := server.Config{PrivateKey: priv, Logger: logger, MaxConns: s.MaxConns, RateBytes: s.RateBytes}
	if admit := s.Admit; admit != nil {
		cfg.Admit = func(ctx context.Context, k key.NodePublic, from netip.Addr) error {
			return admit(ctx, NodeKey(k.Raw()), from)
		}
	}
	s.derp = server.New(cfg)
	s.ln, s.stun = ln, st
	s.node = nodeOf(name, host, pin, ln.Addr(), st, conf == nil)
	s.http = httpServer(s.derp)
	var listen net.Listener = bufListener{ln}
	if conf != nil {
		listen = tls.NewListener(listen, s.derp.AddMetaCert(conf))
	}
	s.done = make(chan struct{})
	s.started = true
	s.wg.Go(func() {
		defer close(s.done)
		// Shutdown closes the listener itself, for http must go on until clients are told.
		if err := s.http.Serve(listen); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.mu.Lock()
			s.serveErr = fmt.Errorf("relay: %w", err)
			s.mu.Unlock()
		}
	})
	if st != nil {
		s.wg.Go(st.serve)
	}
	logger.Info("relay: serving", "addr", ln.Addr().String(), "hostname", name, "certname", s.node.CertName)
	return nil
}

func httpServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second, // the upgrade lifts this and the next
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          log.New(io.Discard, "", 0), // scanners make noise, and nothing of ours goes there
	}
}

// ListenAndServe is Start, and then blocks until ctx is done, which shuts the relay down within
// a few seconds, or until Close. It returns nil after either.
func (s *Server) ListenAndServe(ctx context.Context) error {
	if err := s.Start(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		s.Shutdown(grace)
	case <-s.done:
		s.mu.Lock()
		drained := s.drained
		s.mu.Unlock()
		if drained != nil { // another goroutine's Shutdown ended serving: let it finish
			<-drained
		}
		s.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serveErr
}

// Node returns what a DERP map needs to know of the relay. It is the zero value before Start.
func (s *Server) Node() Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node
}

// Region returns a region with the given ID and this relay alone.
func (s *Server) Region(id int) Region {
	n := s.Node()
	n.RegionID = id
	n.Name = fmt.Sprintf("%da", id)
	return Region{RegionID: id, RegionCode: "relay", RegionName: "relay " + n.HostName, Nodes: []Node{n}}
}

// PublicKey returns the relay's public key. It is the zero value before Start.
func (s *Server) PublicKey() NodeKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.derp == nil {
		return NodeKey{}
	}
	return s.derp.PublicKey().Raw()
}

// Addrs returns the addresses that are served, nil where nothing is: TCP, and UDP for STUN.
func (s *Server) Addrs() (tcp, udp net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ln != nil {
		tcp = s.ln.Addr()
	}
	if s.stun != nil {
		udp = s.stun.pc.LocalAddr()
	}
	return tcp, udp
}

// Disconnect closes the connections of a client, of which it returns the number.
func (s *Server) Disconnect(k NodeKey) int {
	s.mu.Lock()
	d := s.derp
	s.mu.Unlock()
	if d == nil {
		return 0
	}
	return d.Disconnect(key.NodePublicFromRaw(k))
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	d, st := s.derp, s.stun
	s.mu.Unlock()
	if d == nil {
		return Stats{}
	}
	ds := d.Stats()
	out := Stats{Clients: ds.Clients, Connections: ds.Connections,
		PacketsIn: ds.PacketsIn, BytesIn: ds.BytesIn, PacketsOut: ds.PacketsOut, BytesOut: ds.BytesOut,
		Dropped: ds.DroppedFull + ds.DroppedGone + ds.DroppedUnknown, Refused: ds.Refused}
	if st != nil {
		out.STUNRequests = st.answered.Load()
	}
	return out
}

// Shutdown tells the clients that the relay restarts, lets what is queued go out, and closes.
// It blocks until that is done or ctx is, and then returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	d := s.derp
	if s.drained == nil {
		s.drained = make(chan struct{})
		defer close(s.drained)
	}
	if s.ln != nil {
		s.ln.Close()
	}
	s.mu.Unlock()
	var err error
	if d != nil {
		err = d.Shutdown(ctx)
	}
	s.Close()
	return err
}

// Close closes the ports and every connection, and waits. It may be called at any time, any
// number of times.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	h, d, st := s.http, s.derp, s.stun
	s.mu.Unlock()
	// Not under the lock: this waits for Admit, which may ask the server something.
	if h != nil {
		h.Close()
		d.Close()
	}
	if st != nil {
		st.pc.Close()
	}
	s.wg.Wait()
	return nil
}

// bufListener puts a BufConn below TLS, so that the relay moves many records per system call.
type bufListener struct{ net.Listener }

func (l bufListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return derp.NewBufConn(nc), nil
}

// nodeOf describes the relay to a DERP map.
func nodeOf(name, host, pin string, tcp net.Addr, st *stunServer, plain bool) Node {
	n := Node{Name: "1a", HostName: name, CertName: pin, STUNPort: -1}
	if a, ok := tcp.(*net.TCPAddr); ok {
		n.DERPPort = a.Port
	}
	if st != nil {
		n.STUNPort = st.pc.LocalAddr().(*net.UDPAddr).Port
	}
	// An address to listen on says which to dial, unless it stands for all of them.
	if ip, err := netip.ParseAddr(host); err == nil && !ip.IsUnspecified() {
		if ip.Is4() {
			n.IPv4, n.IPv6 = host, "none"
		} else {
			n.IPv4, n.IPv6 = "none", host
		}
	}
	if plain {
		n.HostName = "http://" + name
		if strings.Contains(name, ":") {
			n.HostName = "http://[" + name + "]"
		}
	}
	return n
}
