package control

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"time"

	"github.com/tailnode/tailnode/internal/http1"
	"github.com/tailnode/tailnode/internal/proxy"
)

const (
	tlsTimeout    = 15 * time.Second
	answerTimeout = 15 * time.Second // from a request to the head of its answer
	userAgent     = "tailnode"
)

// outer is a connection outside the Noise channel, to the server or to whoever control names: TCP, TLS or not, by
// way of a proxy or not, on which HTTP/1.1 is spoken. After a switch of protocol it is a plain connection.
type outer struct {
	net.Conn
	br     *bufio.Reader // the bytes that were read ahead
	scheme string
	host   string // with the port
}

// Read reads what was read ahead first.
func (o *outer) Read(p []byte) (int, error) { return o.br.Read(p) }

// errStale is wrapped where a connection ended before anything of an answer came.
var errStale = errors.New("the connection was closed")

// openOuter connects to u's host, or to ip if that is valid and no proxy is named. It blocks until the
// connection, TLS included, is up or ctx ends.
func (c *Client) openOuter(ctx context.Context, u *url.URL, ip netip.Addr) (*outer, error) {
	o := &outer{scheme: u.Scheme, host: hostPort(u)}
	via, err := proxy.Func(nil).For(u.Host, u.Scheme == "http")
	if err != nil {
		return nil, err
	}
	if via != nil {
		var roots *x509.CertPool
		if c.cfg.TLSConfig != nil {
			roots = c.cfg.TLSConfig.RootCAs
		}
		o.Conn, err = proxy.Dial(ctx, c.cfg.Dial, via, roots, o.host)
	} else {
		to := o.host
		if ip.IsValid() {
			_, port, _ := net.SplitHostPort(o.host)
			to = net.JoinHostPort(ip.String(), port)
		}
		o.Conn, err = c.cfg.Dial(ctx, "tcp", to)
	}
	if err != nil {
		return nil, err
	}
	o.br = bufio.NewReader(o.Conn)
	if u.Scheme != "https" {
		return o, nil
	}
	if err := c.secure(ctx, o, u.Hostname()); err != nil {
		o.Close()
		return nil, err
	}
	o.br = bufio.NewReader(o.Conn)
	return o, nil
}

// secure puts TLS on o. HTTP/2 cannot switch protocols, so it is not offered.
func (c *Client) secure(ctx context.Context, o *outer, name string) error {
	cfg := new(tls.Config)
	if c.cfg.TLSConfig != nil {
		cfg = c.cfg.TLSConfig.Clone()
	}
	cfg.NextProtos = []string{"http/1.1"}
	if cfg.ServerName == "" {
		cfg.ServerName = name
	}
	ctx, cancel := context.WithTimeoutCause(ctx, tlsTimeout, fmt.Errorf("no TLS within %v", tlsTimeout))
	defer cancel()
	tc := tls.Client(o.Conn, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return err
	}
	o.Conn = tc
	return nil
}

// do makes a request and reads the head of its answer. When ctx ends the connection is closed; so it is on error. The
// caller reads the body, with the connection's deadline unset again.
func (o *outer) do(ctx context.Context, method string, u *url.URL, h http1.Header, body []byte) (*http1.Response, error) {
	h = append(http1.Header{{Name: "User-Agent", Value: userAgent}}, h...)
	b, err := http1.AppendRequest(nil, method, u.RequestURI(), u.Host, h, body)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { o.Close() })
	resp, err := o.roundTrip(b, method)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		o.Close()
		return nil, err
	}
	return resp, nil
}

func (o *outer) roundTrip(req []byte, method string) (*http1.Response, error) {
	o.SetDeadline(time.Now().Add(answerTimeout))
	if _, err := o.Write(req); err != nil {
		return nil, fmt.Errorf("%w: %w", errStale, err)
	}
	if _, err := o.br.Peek(1); err != nil {
		if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
			return nil, fmt.Errorf("no answer within %v: %w", answerTimeout, err)
		}
		return nil, fmt.Errorf("%w: %w", errStale, err)
	}
	resp, err := http1.ReadResponse(o.br, method)
	if err != nil {
		return nil, err
	}
	return resp, o.SetDeadline(time.Time{})
}

// hostPort returns u's host and port as net.Dial takes them.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}
