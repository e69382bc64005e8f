// Package proxy opens streams by way of the HTTP proxy that the environment names (HTTPS_PROXY, HTTP_PROXY, NO_PROXY), with
// the method CONNECT (RFC 9110 §9.3.6). Control is reached through net/http, which does this by itself; this is for relays,
// which are not spoken to by a net/http client.
package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// ErrRefused reports a proxy that does not let the connection through.
var ErrRefused = errors.New("proxy: the proxy refuses")

// Func says which proxy a request for u is to go through; nil for none.
type Func func(u *url.URL) (*url.URL, error)

// FromEnvironment is net/http's choice, which reads the environment once. It names no proxy for loopback addresses.
func FromEnvironment(u *url.URL) (*url.URL, error) {
	return http.ProxyFromEnvironment(&http.Request{URL: u})
}

// None names no proxy.
func None(*url.URL) (*url.URL, error) { return nil, nil }

// For returns the proxy for a TLS connection to host, or a plain one, nil for none. A nil f is [FromEnvironment].
func (f Func) For(host string, plain bool) (*url.URL, error) {
	if f == nil {
		f = FromEnvironment
	}
	if strings.Contains(host, ":") && !strings.HasPrefix(host, "[") {
		host = "[" + host + "]"
	}
	u := &url.URL{Scheme: "https", Host: host, Path: "/"}
	if plain {
		u.Scheme = "http"
	}
	p, err := f(u)
	if err != nil {
		return nil, errors.New("proxy: the environment names a proxy that is not understood") // its text may hold a password
	}
	return p, nil
}

// maxHead bounds a proxy's answer.
const maxHead = 4 << 10

// Dial opens a stream to target, "host:port", through the proxy p, which dial reaches. It blocks until the proxy has answered or ctx
// ends. roots verify a proxy that is itself reached by TLS; nil is the system's. No error tells the proxy's password.
func Dial(ctx context.Context, dial func(ctx context.Context, network, addr string) (net.Conn, error), p *url.URL, roots *x509.CertPool, target string) (net.Conn, error) {
	port := ""
	switch p.Scheme {
	case "http":
		port = "80"
	case "https":
		port = "443"
	default:
		return nil, fmt.Errorf("proxy: %q is not a kind of proxy that relays can be reached through", p.Scheme)
	}
	if strings.ContainsFunc(target, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return nil, fmt.Errorf("proxy: %q is not a host and port", target)
	}
	c, err := dial(ctx, "tcp", net.JoinHostPort(p.Hostname(), cmp.Or(p.Port(), port)))
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	// The socket is all that what follows blocks on, so closing it is what cancels it.
	stop := context.AfterFunc(ctx, func() { c.Close() })
	conn, err := connect(ctx, c, p, roots, target)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return nil, err
	}
	return conn, nil
}

func connect(ctx context.Context, c net.Conn, p *url.URL, roots *x509.CertPool, target string) (net.Conn, error) {
	if p.Scheme == "https" {
		tc := tls.Client(c, &tls.Config{ServerName: p.Hostname(), RootCAs: roots, MinVersion: tls.VersionTLS12})
		if err := tc.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("proxy: TLS: %w", err)
		}
		c = tc
	}
	req := "CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\nUser-Agent: tailnode\r\n"
	if p.User != nil {
		password, _ := p.User.Password()
		req += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(p.User.Username()+":"+password)) + "\r\n"
	}
	if _, err := c.Write([]byte(req + "\r\n")); err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	// Byte by byte: what follows the answer's head is not ours to read.
	head := make([]byte, 0, 256)
	var b [1]byte
	for !strings.HasSuffix(string(head[max(0, len(head)-4):]), "\r\n\r\n") {
		if len(head) == maxHead {
			return nil, fmt.Errorf("%w: its answer is endless", ErrRefused)
		}
		if _, err := c.Read(b[:]); err != nil {
			return nil, fmt.Errorf("proxy: no answer to CONNECT: %w", err)
		}
		if head = append(head, b[0]); len(head) == 5 && string(head) != "HTTP/" {
			return nil, fmt.Errorf("%w: it does not speak HTTP", ErrRefused)
		}
	}
	status, _, _ := strings.Cut(string(head), "\r\n")
	if _, code, _ := strings.Cut(status, " "); !strings.HasPrefix(code, "2") || len(code) < 3 {
		return nil, fmt.Errorf("%w: it answers %q", ErrRefused, status[:min(len(status), 100)])
	}
	return c, nil
}
