package coord

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	upgradeProtocol = "tailscale-control-protocol"
	handshakeHeader = "X-Tailscale-Handshake"
	handshakeTime   = 10 * time.Second
	capEarlyNoise   = 49 // the version from which on clients take an early payload
)

// enter counts the caller among those that Close waits for, unless the server does not run.
func (s *Server) enter() bool {
	if s.lock() != nil {
		return false
	}
	s.wg.Add(1)
	s.mu.Unlock()
	return true
}

// counted makes Close wait for h's requests.
func (s *Server) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.enter() {
			http.Error(w, "coordination server is not running", http.StatusServiceUnavailable)
			return
		}
		defer s.wg.Done()
		h.ServeHTTP(w, r)
	})
}

// publicMux serves what is outside Noise.
func (s *Server) publicMux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /key", s.serveKey)
	mux.HandleFunc("POST /ts2021", s.serveUpgrade)
	mux.HandleFunc("GET /register/{id}", s.servePage)
	mux.HandleFunc("POST /relay/admit", s.serveAdmit)
	mux.HandleFunc("HEAD /ping/{token}", s.servePong)
	mux.HandleFunc("POST /ping/{token}", s.servePong)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "This is the coordination server of a tailnet. Point a node's control URL here.\n")
	})
	return s.counted(mux)
}

// serveKey answers with the Noise public key (docs/protocol/control.md § The server's key).
func (s *Server) serveKey(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(&tailcfg.PublicKeyResponse{PublicKey: s.net.srv.Key.Public()})
}

// serveUpgrade takes over the connection, runs the Noise handshake on it and hands it to the HTTP/2
// server (docs/protocol/control.md § Opening the channel).
func (s *Server) serveUpgrade(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), upgradeProtocol) {
		http.Error(w, "want Upgrade: "+upgradeProtocol, http.StatusBadRequest)
		return
	}
	init, err := base64.StdEncoding.DecodeString(r.Header.Get(handshakeHeader))
	if err != nil || len(init) == 0 {
		http.Error(w, "missing or malformed "+handshakeHeader, http.StatusBadRequest)
		return
	}
	hj, ok := w.(http.Hijacker)
	if !ok {
		http.Error(w, "want HTTP/1.1", http.StatusBadRequest)
		return
	}
	if s.noise.open.Add(1) > maxChannels {
		s.noise.open.Add(-1)
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	handed := false
	defer func() {
		if !handed {
			s.noise.open.Add(-1)
		}
	}()
	w.Header().Set("Upgrade", upgradeProtocol)
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
	ctx, cancel := context.WithTimeout(s.ctx, handshakeTime)
	defer cancel()
	nc, err := noise.Server(ctx, conn, s.net.srv.Key, init)
	if err != nil {
		s.log.Debug("handshake failed", "from", r.RemoteAddr, "err", err)
		conn.Close()
		return
	}
	if nc.ProtocolVersion() >= capEarlyNoise {
		if err := noise.WriteEarly(nc, &tailcfg.EarlyNoise{NodeKeyChallenge: s.noise.challenge}); err != nil {
			nc.Close()
			return
		}
	}
	conn.SetDeadline(time.Time{})
	handed = s.noise.hand(nc)
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

// noiseServer is the HTTP/2 server inside the Noise channels. It is a net.Listener for the
// channels that serveUpgrade makes.
type noiseServer struct {
	hs        *http.Server
	conns     chan net.Conn
	closed    chan struct{}
	once      sync.Once
	challenge key.ChallengePublic
	open      atomic.Int64 // channels
}

// maxChannels bounds the Noise channels open at a time: anybody can open one.
const maxChannels = 20_000

type machineKey struct{}

func newNoiseServer(s *Server) *noiseServer {
	n := &noiseServer{conns: make(chan net.Conn), closed: make(chan struct{}), challenge: key.NewChallenge().Public()}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /machine/register", s.serveRegister)
	mux.HandleFunc("POST /machine/map", s.serveMap)
	mux.HandleFunc("HEAD /ping/{token}", s.servePong)
	mux.HandleFunc("POST /ping/{token}", s.servePong)
	mux.HandleFunc("POST /machine/update-health", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNoContent) // nothing is done with it
	})
	mux.HandleFunc("/machine/", func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "this coordination server does not offer "+r.URL.Path, http.StatusNotImplemented)
	})
	n.hs = &http.Server{
		Handler:           s.counted(mux),
		Protocols:         new(http.Protocols),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 32, SendPingTimeout: 2 * time.Minute, PingTimeout: 30 * time.Second, WriteByteTimeout: time.Minute, MaxReceiveBufferPerConnection: 256 << 10, MaxReceiveBufferPerStream: 128 << 10},
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnState: func(_ net.Conn, st http.ConnState) {
			if st == http.StateClosed {
				n.open.Add(-1)
			}
		},
		BaseContext: func(net.Listener) context.Context { return s.ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if nc, ok := c.(*noise.Conn); ok {
				return context.WithValue(ctx, machineKey{}, nc.Peer())
			}
			return ctx
		},
	}
	n.hs.Protocols.SetUnencryptedHTTP2(true) // encrypted all the same: by Noise, below
	return n
}

func (n *noiseServer) serve() { n.hs.Serve(n) }

// close ends the server and its channels.
func (n *noiseServer) close() {
	n.once.Do(func() { close(n.closed) })
	n.hs.Close()
}

// hand gives a channel to the server, which owns it from then on. It closes the channel and returns false
// if the server has been closed.
func (n *noiseServer) hand(c net.Conn) bool {
	select {
	case n.conns <- c:
		return true
	case <-n.closed:
		c.Close()
		return false
	}
}

// Accept, Close and Addr make the net.Listener.
func (n *noiseServer) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *noiseServer) Close() error {
	n.once.Do(func() { close(n.closed) })
	return nil
}

func (n *noiseServer) Addr() net.Addr { return &net.TCPAddr{} }

// machine returns the key of the machine at the other end of r's channel.
func machine(r *http.Request) key.MachinePublic {
	m, _ := r.Context().Value(machineKey{}).(key.MachinePublic)
	return m
}

// remoteIP returns the address that r came from, as far as it is known.
func remoteIP(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// readJSON decodes r's body of at most limit bytes into v, or answers with an error.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64, v any) bool {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		http.Error(w, "request body is too large or was cut off", http.StatusBadRequest)
		return false
	}
	if err := json.Unmarshal(b, v); err != nil {
		http.Error(w, "request body is not the JSON expected: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// servePage is what the person sees who follows a login URL. It approves nothing: that takes the
// Go API or the administrator's command, so there is nothing here for another site to forge.
func (s *Server) servePage(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	s.mu.Lock()
	l := s.logins[id]
	text := "This login is not known here. It may have expired: start it again on the node."
	switch {
	case l == nil:
	case l.outcome == loginApproved:
		text = "This node has been approved. You can close this page."
	case l.outcome == loginPending:
		text = "To let the node \u201c" + l.req.hostname() + "\u201d into the tailnet, its administrator runs:"
	}
	pending := l != nil && l.outcome == loginPending
	s.mu.Unlock()
	if l == nil {
		w.WriteHeader(http.StatusNotFound)
	}
	body := "<p>" + html.EscapeString(text) + "</p>"
	if pending {
		body += "<pre>tailnode control approve " + html.EscapeString(id) + "</pre><p>The node goes on by itself then.</p>"
	}
	io.WriteString(w, `<!doctype html><meta charset="utf-8"><title>Join the tailnet</title>`+
		`<style>body{font:16px/1.5 sans-serif;max-width:40em;margin:4em auto;padding:0 1em}pre{background:#eee;padding:1em}</style>`+
		`<h1>Join the tailnet</h1>`+body)
}
