// Package channel serves HTTP/2 inside the Noise channels that nodes open (docs/protocol/control.md § Opening the channel).
package channel

import (
	"bufio"
	"context"
	"encoding/base64"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	// Protocol is what the request that opens a channel asks to switch to.
	Protocol = "tailscale-control-protocol"
	// HandshakeHeader holds the first message of the handshake, in base64.
	HandshakeHeader = "X-Tailscale-Handshake"

	handshakeTime = 10 * time.Second
	capEarlyNoise = 49 // the version from which on clients take an early payload
	// maxChannels bounds the channels open at a time: anybody can open one.
	maxChannels = 20_000
)

// Config is what a Server needs; all of it.
type Config struct {
	Key     key.MachinePrivate // by which nodes know the server
	Handler http.Handler       // of the requests inside; see Machine
	Context context.Context    // of those requests; its end ends handshakes under way
	Logger  *slog.Logger
}

// Server makes channels of the requests that ask for one and serves those. It is an http.Handler for the
// requests, and safe for concurrent use.
type Server struct {
	cfg       Config
	hs        *http.Server
	conns     chan net.Conn
	closed    chan struct{}
	once      sync.Once
	challenge key.ChallengePublic
	open      atomic.Int64
}

// New returns a Server. It must be served and closed.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, conns: make(chan net.Conn), closed: make(chan struct{}), challenge: key.NewChallenge().Public()}
	s.hs = &http.Server{
		Handler:           cfg.Handler,
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 32, SendPingTimeout: 2 * time.Minute, PingTimeout: 30 * time.Second, WriteByteTimeout: time.Minute, MaxReceiveBufferPerConnection: 256 << 10, MaxReceiveBufferPerStream: 128 << 10},
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
		ConnState: func(_ net.Conn, st http.ConnState) {
			if st == http.StateClosed {
				s.open.Add(-1)
			}
		},
		BaseContext: func(net.Listener) context.Context { return cfg.Context },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if nc, ok := c.(*noise.Conn); ok {
				return WithMachine(ctx, nc.Peer())
			}
			return ctx
		},
	}
	s.hs.Protocols.SetUnencryptedHTTP2(true) // encrypted all the same: by Noise, below
	return s
}

// Serve serves channels until Close.
func (s *Server) Serve() { s.hs.Serve((*listener)(s)) }

// Close ends the server and its channels. It may be called more than once: a channel that was being handed over the
// first time is closed the second time.
func (s *Server) Close() {
	(*listener)(s).Close()
	s.hs.Close()
}

// Open returns how many channels are open, handshakes under way included.
func (s *Server) Open() int { return int(s.open.Load()) }

type machineKey struct{}

// WithMachine returns a context for a request of the machine m.
func WithMachine(ctx context.Context, m key.MachinePublic) context.Context {
	return context.WithValue(ctx, machineKey{}, m)
}

// Machine returns the key of the machine at the other end of r's channel, zero if r came by none.
func Machine(r *http.Request) key.MachinePublic {
	m, _ := r.Context().Value(machineKey{}).(key.MachinePublic)
	return m
}

// ServeHTTP takes over the connection, runs the Noise handshake on it and hands it to the HTTP/2
// server (docs/protocol/control.md § Opening the channel).
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), Protocol) {
		http.Error(w, "want Upgrade: "+Protocol, http.StatusBadRequest)
		return
	}
	init, err := base64.StdEncoding.DecodeString(r.Header.Get(HandshakeHeader))
	if err != nil || len(init) == 0 {
		http.Error(w, "missing or malformed "+HandshakeHeader, http.StatusBadRequest)
		return
	}
	hj, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "want HTTP/1.1", http.StatusBadRequest)
		return
	}
	if s.open.Add(1) > maxChannels {
		s.open.Add(-1)
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	handed := false
	defer func() {
		if !handed {
			s.open.Add(-1)
		}
	}()
	w.Header().Set("Upgrade", Protocol)
	w.Header().Set("Connection", "upgrade")
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, rw, err := hj.Hijack()
	if err != nil {
		return
	}
	conn.SetDeadline(time.Now().Add(handshakeTime))
	if err := rw.Flush(); err != nil {
		conn.Close()
		return
	}
	if rw.Reader.Buffered() > 0 {
		conn = &bufferedConn{conn, rw.Reader}
	}
	ctx, cancel := context.WithTimeout(s.cfg.Context, handshakeTime)
	defer cancel()
	nc, err := noise.Server(ctx, conn, s.cfg.Key, init)
	if err != nil {
		s.cfg.Logger.Debug("handshake failed", "from", r.RemoteAddr, "err", err)
		conn.Close()
		return
	}
	if nc.ProtocolVersion() >= capEarlyNoise {
		if err := noise.WriteEarly(nc, &tailcfg.EarlyNoise{NodeKeyChallenge: s.challenge}); err != nil {
			nc.Close()
			return
		}
	}
	conn.SetDeadline(time.Time{})
	handed = s.hand(nc)
}

// bufferedConn reads first what the HTTP server had read ahead.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(b []byte) (int, error) {
	if c.r.Buffered() == 0 {
		return c.Conn.Read(b)
	}
	return c.r.Read(b[:min(len(b), c.r.Buffered())])
}

// hand gives a channel to the server, which owns it from then on. It closes the channel and returns false
// if the server has been closed.
func (s *Server) hand(c net.Conn) bool {
	select {
	case s.conns <- c:
		return true
	case <-s.closed:
		c.Close()
		return false
	}
}

// listener is a Server as the net.Listener of its channels.
type listener Server

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return &net.TCPAddr{} }
