package tailnode

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/socks5"
)

// proxyUser is the user name of the SOCKS5 proxy; the password is its credential.
const proxyUser = "tsnet"

// Loopback serves two things on one TCP port of the loopback interface, for programs and libraries that can
// use the tailnet no other way, and starts the server if need be:
//
//   - A SOCKS5 proxy into the tailnet, for the user "tsnet" with proxyCred as the password. Names are
//     resolved by MagicDNS. It connects to the tailnet only.
//   - The LocalAPI's status, whois and ping over HTTP at /localapi/v0/, for requests with the header
//     "Sec-Tailscale: localapi" (which no browser sends by itself) and localAPICred as the password of basic authentication.
//
// A dial of the proxy takes a minute at most and ends when its client goes; of connections, those beyond 1,024 at a time are closed
// at once. Both end with Close. Every call gives the same answer.
func (s *Server) Loopback() (addr, proxyCred, localAPICred string, err error) {
	if _, err := s.start("loopback"); err != nil {
		return "", "", "", err
	}
	s.loop.mu.Lock()
	defer s.loop.mu.Unlock()
	if s.loop.closed {
		return "", "", "", opError("loopback", errClosed)
	}
	if s.loop.ln == nil {
		if err := s.loop.serve(s); err != nil {
			return "", "", "", opError("loopback", err)
		}
	}
	return s.loop.ln.Addr().String(), s.loop.proxyCred, s.loop.localCred, nil
}

// loopback is what Loopback serves.
type loopback struct {
	mu                   sync.Mutex
	ln                   net.Listener
	proxyCred, localCred string
	http                 *http.Server
	cancel               context.CancelFunc
	wg                   sync.WaitGroup
	closed               bool
}

const (
	loopbackConns = 1024 // at a time
	acceptRetry   = 100 * time.Millisecond
)

func (l *loopback) serve(s *Server) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	l.serveOn(ln, s)
	return nil
}

func (l *loopback) serveOn(ln net.Listener, s *Server) {
	l.ln = ln
	l.proxyCred, l.localCred = credential(), credential()
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	proxy := &socks5.Server{User: proxyUser, Password: l.proxyCred, Dial: s.Dial, Code: socksCode}
	api := &handOver{conns: make(chan net.Conn), addr: ln.Addr(), done: ctx.Done()}
	l.http = httpServer(localAPI{s, l.localCred})
	l.wg.Go(func() { l.http.Serve(api) })
	l.wg.Go(func() {
		slots := make(chan struct{}, loopbackConns)
		for {
			c, err := ln.Accept()
			if err != nil { // closed, or there is no descriptor left for the moment
				select {
				case <-ctx.Done():
					return
				case <-time.After(acceptRetry):
					continue
				}
			}
			select {
			case slots <- struct{}{}:
			default: // to wait here would be to keep the others waiting
				c.Close()
				continue
			}
			l.wg.Go(func() {
				stop := context.AfterFunc(ctx, func() { c.Close() })
				pc := &peeked{Conn: c, first: make([]byte, 1), done: sync.OnceFunc(func() { stop(); <-slots })}
				// SOCKS5 begins with the byte 5 (RFC 1928 §3), HTTP with a letter.
				c.SetReadDeadline(time.Now().Add(10 * time.Second))
				if _, err := c.Read(pc.first); err != nil {
					pc.Close()
					return
				}
				c.SetReadDeadline(time.Time{})
				if pc.first[0] == 5 {
					proxy.Serve(ctx, pc)
					return
				}
				api.give(pc)
			})
		}
	})
}

// httpServer returns a server on which those without a credential, too, keep a connection for a short time only.
func httpServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, MaxHeaderBytes: 16 << 10,
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, IdleTimeout: time.Minute,
	}
}

// close ends what was served and waits for it.
func (l *loopback) close() {
	l.mu.Lock()
	l.closed = true
	if l.ln != nil {
		l.cancel()
		l.ln.Close()
		l.http.Close()
	}
	l.mu.Unlock()
	l.wg.Wait()
}

// credential returns 32 hexadecimal digits.
func credential() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// socksCode translates an error of Dial into a reply of SOCKS5.
func socksCode(err error) byte {
	e, _ := errors.AsType[*Error](err)
	if e == nil {
		return socks5.GeneralFailure
	}
	switch e.Code {
	case CodeNotTailnet:
		return socks5.NotAllowed
	case CodeNoSuchHost, CodeUnreachable, CodeTimeout, CodeNotFound:
		return socks5.HostUnreachable
	case CodeRefused, CodeReset:
		return socks5.ConnectionRefused
	}
	return socks5.GeneralFailure
}

// peeked gives back the byte that told the protocols apart.
type peeked struct {
	net.Conn
	first []byte
	done  func() // gives its place to another; once
}

// Close implements net.Conn.
func (p *peeked) Close() error {
	defer p.done()
	return p.Conn.Close()
}

func (p *peeked) Read(b []byte) (int, error) {
	if len(p.first) > 0 && len(b) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// CloseWrite passes a half-close on.
func (p *peeked) CloseWrite() error { return p.Conn.(*net.TCPConn).CloseWrite() }

// handOver is a listener whose connections come from another one.
type handOver struct {
	conns chan net.Conn
	addr  net.Addr
	done  <-chan struct{}
}

func (h *handOver) give(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		c.Close()
	}
}

func (h *handOver) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handOver) Close() error   { return nil }
func (h *handOver) Addr() net.Addr { return h.addr }

// localAPI serves status, whois and ping in upstream's form.
type localAPI struct {
	s    *Server
	cred string
}

func (a localAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// The header keeps web pages out: a browser asks before it sends one like it to another origin, and nobody answers that.
	if r.Header.Get("Sec-Tailscale") != "localapi" {
		http.Error(w, "missing 'Sec-Tailscale: localapi' header", http.StatusForbidden)
		return
	}
	_, pass, _ := r.BasicAuth()
	if subtle.ConstantTimeCompare([]byte(pass), []byte(a.cred)) != 1 {
		w.Header().Set("WWW-Authenticate", `Basic realm="localapi"`)
		http.Error(w, "invalid credential", http.StatusUnauthorized)
		return
	}
	lc, err := a.s.LocalClient()
	if err != nil {
		a.fail(w, err)
		return
	}
	ctx, q := r.Context(), r.URL.Query()
	method := http.MethodGet
	var v any
	switch r.URL.Path {
	case "/localapi/v0/status":
		if q.Get("peers") == "false" {
			v, err = lc.StatusWithoutPeers(ctx)
		} else {
			v, err = lc.Status(ctx)
		}
	case "/localapi/v0/whois":
		v, err = lc.WhoIs(ctx, q.Get("addr"))
	case "/localapi/v0/ping":
		method = http.MethodPost
		if r.Method != method {
			break
		}
		var ip netip.Addr
		if ip, err = netip.ParseAddr(q.Get("ip")); err != nil {
			http.Error(w, "invalid 'ip' parameter", http.StatusBadRequest)
			return
		}
		v, err = lc.Ping(ctx, ip, PingType(q.Get("type")))
	default:
		http.NotFound(w, r)
		return
	}
	if r.Method != method && !(method == http.MethodGet && r.Method == http.MethodHead) {
		w.Header().Set("Allow", method)
		http.Error(w, "want "+method, http.StatusMethodNotAllowed)
		return
	}
	if err != nil {
		a.fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func (a localAPI) fail(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	if e, ok := errors.AsType[*Error](err); ok {
		switch e.Code {
		case CodeNotFound:
			status = http.StatusNotFound
		case CodeInvalidArgument, CodeUnsupported:
			status = http.StatusBadRequest
		}
	}
	http.Error(w, err.Error(), status)
}
