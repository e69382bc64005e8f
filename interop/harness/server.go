package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"
)

// server is an HTTP server that can be stopped like a killed process and started again at the same
// address. It closes connections that the handler has hijacked too, which net/http does not.
type server struct {
	addr string
	tls  *tls.Config // nil for plain HTTP

	mu    sync.Mutex
	http  *http.Server
	conns map[net.Conn]struct{}
	done  chan struct{}
}

type trackListener struct {
	net.Listener
	s *server
}

type trackConn struct {
	net.Conn
	s *server
}

func (l trackListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tc := &trackConn{c, l.s}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.s.http == nil {
		c.Close()
		return nil, net.ErrClosed
	}
	l.s.conns[tc] = struct{}{}
	return tc, nil
}

func (c *trackConn) Close() error {
	c.s.mu.Lock()
	delete(c.s.conns, c)
	c.s.mu.Unlock()
	return c.Conn.Close()
}

// start listens on s.addr, or on a free port of loopback the first time.
func (s *server) start(h http.Handler) error {
	if s.addr == "" {
		s.addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", s.addr)
	if err != nil {
		return err
	}
	s.addr = ln.Addr().String()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = map[net.Conn]struct{}{}
	s.http = &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	if s.tls != nil {
		// DERP and ts2021 upgrade the connection, which HTTP/2 cannot.
		s.http.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	}
	s.done = make(chan struct{})
	var l net.Listener = trackListener{ln, s}
	if s.tls != nil {
		l = tls.NewListener(l, s.tls)
	}
	go func(srv *http.Server, done chan struct{}) {
		defer close(done)
		srv.Serve(l)
	}(s.http, s.done)
	return nil
}

func (s *server) stop() error {
	s.mu.Lock()
	srv, done := s.http, s.done
	s.http = nil
	var open []net.Conn
	for c := range s.conns {
		open = append(open, c)
	}
	s.mu.Unlock()
	if srv == nil {
		return nil
	}
	err := srv.Close()
	for _, c := range open {
		c.Close()
	}
	<-done
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}

// selfSigned returns a TLS configuration for 127.0.0.1 and the certificate's CertName for a DERP map.
func selfSigned() (*tls.Config, string, error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "127.0.0.1"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &priv.PublicKey, priv)
	if err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(der)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: priv}}},
		"sha256-raw:" + hex.EncodeToString(sum[:]), nil
}
