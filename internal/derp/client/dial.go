// Package client holds a node's connections to the relays of its tailnet.
//
// [Regions] is what a node uses: one connection to its home region kept up, those to other
// regions made on demand and dropped when idle. [Dial] and [Conn] are the single connection
// underneath. The protocol is described in docs/protocol/derp.md.
package client

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/proxy"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

var (
	// ErrClosed reports a use after Close.
	ErrClosed = errors.New("derp/client: closed")
	// ErrNoRegion reports a region that the DERP map does not have, or one without relays.
	ErrNoRegion = errors.New("derp/client: no such region")
	// ErrPin reports a relay whose certificate is not the one the DERP map pins.
	ErrPin = errors.New("derp/client: certificate does not match the pin in the DERP map")
	// ErrUpgrade reports an HTTP server that does not switch to DERP.
	ErrUpgrade = errors.New("derp/client: server refused the DERP upgrade")
	// ErrNotAdmitted reports a relay that hung up on our greeting: as a rule it does not admit this node.
	ErrNotAdmitted = errors.New("derp/client: the relay does not admit this node")
	// ErrTooLarge reports a packet above the 64 KiB that a relay carries.
	ErrTooLarge = errors.New("derp/client: packet too large")
	// ErrRateLimited reports packets dropped to stay within the rate that the relay asked for.
	ErrRateLimited = errors.New("derp/client: over the relay's rate limit")
	// ErrTimeout reports a relay that fell silent.
	ErrTimeout = errors.New("derp/client: relay does not answer")
)

// DialFunc opens a stream to addr, "host:port" with a name or an address as host, on the
// network "tcp", "tcp4" or "tcp6". It must return when ctx is done.
type DialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// Options is what every connection of a node shares.
type Options struct {
	PrivateKey  key.NodePrivate // of the node; needed
	Dial        DialFunc        // nil: net.Dialer
	Proxy       proxy.Func      // which HTTP proxy a relay is reached through; nil: as the environment says
	Roots       *x509.CertPool  // what certificates must chain to; nil: the system's
	PlainHTTP   bool            // speak plain HTTP to every relay, port 3340 unless the map says otherwise
	CanAckPings bool            // tell the relay that we answer its pings (we do in any case)
	AppName     string          // opaque, for the relay's statistics
}

const (
	nodeDialTimeout = 1500 * time.Millisecond // TCP to one relay while there are others to try
	lastDialTimeout = 5 * time.Second         // and when it is the last
	upgradeTimeout  = 8 * time.Second         // TLS, HTTP and DERP on one relay
	plainPort       = 3340
)

// Dial connects to the region: its relays in order, the addresses of each at once, the first
// that completes the DERP handshake wins. It blocks until then, or until every relay
// failed; ctx cancels it. The caller must call [Conn.Serve] or Close.
func Dial(ctx context.Context, o Options, region *tailcfg.DERPRegion) (*Conn, error) {
	return dialRegion(ctx, &o, region, newOutbox())
}

func dialRegion(ctx context.Context, o *Options, region *tailcfg.DERPRegion, out *outbox) (*Conn, error) {
	if region == nil {
		return nil, ErrNoRegion
	}
	var relays []*tailcfg.DERPNode
	for _, n := range region.Nodes {
		if n != nil && !n.STUNOnly {
			relays = append(relays, n)
		}
	}
	if len(relays) == 0 {
		return nil, fmt.Errorf("%w: region %d has no relay", ErrNoRegion, region.RegionID)
	}
	var errs []error
	for i, n := range relays {
		timeout := nodeDialTimeout
		if i == len(relays)-1 {
			timeout = lastDialTimeout
		}
		ideal := ""
		if first := region.Nodes[0]; n != first && first != nil {
			ideal = first.Name
		}
		c, err := dialNode(ctx, o, n, timeout, ideal, out)
		if err == nil {
			c.region = region.RegionID
			return c, nil
		}
		errs = append(errs, fmt.Errorf("derp/client: relay %q: %w", n.Name, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func dialNode(ctx context.Context, o *Options, n *tailcfg.DERPNode, timeout time.Duration, ideal string, out *outbox) (*Conn, error) {
	t := targetOf(o, n)
	nc, err := dialStream(ctx, o, t, timeout)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
	defer cancel()
	// The socket is all that TLS and HTTP block on, so closing it is what cancels them.
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	c, err := handshake(ctx, o, n, t, derp.NewBufConn(nc), ideal, out)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		nc.Close()
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return nil, err
	}
	return c, nil
}

// target is where a relay is, as the DERP map says it.
type target struct {
	host   string // for TLS and HTTP
	port   int
	v4, v6 string // what to dial; empty: do not
	plain  bool
}

func targetOf(o *Options, n *tailcfg.DERPNode) (t target) {
	t.host, t.port, t.plain = n.HostName, 443, o.PlainHTTP
	// The map can ask for plain HTTP by a URL in place of a host name,
	// docs/protocol/derp.md#plain-http.
	if rest, ok := strings.CutPrefix(n.HostName, "http://"); ok {
		t.plain, t.host = true, strings.TrimSuffix(rest, "/")
		t.port = 80
		if h, p, err := net.SplitHostPort(t.host); err == nil {
			t.host = h
			if v, err := strconv.Atoi(p); err == nil {
				t.port = v
			}
		}
		t.host = strings.Trim(t.host, "[]")
	} else if t.plain {
		t.port = plainPort
	}
	if n.DERPPort != 0 {
		t.port = n.DERPPort
	}
	pick := func(s string, is func(netip.Addr) bool) string {
		if s != "" {
			if a, err := netip.ParseAddr(s); err == nil && is(a) {
				return s
			}
			return ""
		}
		if a, err := netip.ParseAddr(t.host); err == nil && !is(a) {
			return ""
		}
		return t.host
	}
	t.v4, t.v6 = pick(n.IPv4, netip.Addr.Is4), pick(n.IPv6, netip.Addr.Is6)
	return t
}

// dialStream opens a stream to the relay, through a proxy where there is one: then by the relay's name, which the proxy looks up.
func dialStream(ctx context.Context, o *Options, t target, timeout time.Duration) (net.Conn, error) {
	dial := o.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	host := cmp.Or(t.host, t.v4, t.v6)
	p, err := o.Proxy.For(host, t.plain)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return dialTCP(ctx, dial, t, timeout)
	}
	ctx, cancel := context.WithTimeout(ctx, lastDialTimeout) // it takes two connections, one after the other
	defer cancel()
	return proxy.Dial(ctx, dial, p, o.Roots, net.JoinHostPort(host, strconv.Itoa(t.port)))
}

// dialTCP races the relay's IPv4 and IPv6 addresses.
func dialTCP(ctx context.Context, dial DialFunc, t target, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	type result struct {
		nc  net.Conn
		err error
	}
	results := make(chan result, 2)
	started := 0
	start := func(network, host string) {
		if host == "" {
			return
		}
		started++
		addr := net.JoinHostPort(host, strconv.Itoa(t.port))
		go func() {
			nc, err := dial(ctx, network, addr)
			results <- result{nc, err}
		}()
	}
	start("tcp4", t.v4)
	start("tcp6", t.v6)
	if started == 0 {
		return nil, fmt.Errorf("%w: the map gives no address for %q", ErrNoRegion, t.host)
	}
	var won net.Conn
	var errs []error
	for range started { // all are waited for; the winner cancels the rest
		switch r := <-results; {
		case r.err != nil:
			errs = append(errs, r.err)
		case won != nil:
			r.nc.Close()
		default:
			won = r.nc
			cancel()
		}
	}
	if won == nil {
		return nil, errors.Join(errs...)
	}
	return won, nil
}

func tlsConfig(o *Options, n *tailcfg.DERPNode, t target) *tls.Config {
	c := &tls.Config{
		ServerName:                  t.host,
		RootCAs:                     o.Roots,
		MinVersion:                  tls.VersionTLS12,
		DynamicRecordSizingDisabled: true, // batches are large; short records would undo that
	}
	switch pin, pinned := strings.CutPrefix(n.CertName, "sha256-raw:"); {
	case pinned:
		c.InsecureSkipVerify = true // in favour of the pin
		c.VerifyConnection = func(cs tls.ConnectionState) error { return verifyPin(cs, pin, t.host) }
	case n.InsecureForTests:
		c.InsecureSkipVerify = true
	case n.CertName != "" && n.CertName != t.host:
		c.InsecureSkipVerify = true // in favour of another name
		c.VerifyConnection = func(cs tls.ConnectionState) error { return verifyName(cs, o.Roots, n.CertName) }
	}
	return c
}

// verifyPin accepts exactly one certificate besides the meta certificate: the pinned one,
// in date, and made for the host. The first is never taken for a meta certificate: the handshake
// proves the key of that one alone.
func verifyPin(cs tls.ConnectionState, pin, host string) error {
	var leaf *x509.Certificate
	for i, c := range cs.PeerCertificates {
		if i > 0 && strings.HasPrefix(c.Subject.CommonName, derp.MetaCertPrefix) {
			continue
		}
		if leaf != nil {
			return fmt.Errorf("%w: more than one certificate", ErrPin)
		}
		leaf = c
	}
	if leaf == nil {
		return fmt.Errorf("%w: none presented", ErrPin)
	}
	// The pin is public: no constant-time comparison is called for.
	if sum := sha256.Sum256(leaf.Raw); !strings.EqualFold(hex.EncodeToString(sum[:]), pin) {
		return fmt.Errorf("%w: the relay presents sha256-raw:%x", ErrPin, sum)
	}
	if host != "" {
		if err := leaf.VerifyHostname(host); err != nil {
			return fmt.Errorf("%w: %w", ErrPin, err)
		}
	}
	if now := time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return fmt.Errorf("%w: valid from %v to %v only", ErrPin, leaf.NotBefore, leaf.NotAfter)
	}
	return nil
}

func verifyName(cs tls.ConnectionState, roots *x509.CertPool, name string) error {
	opts := x509.VerifyOptions{Roots: roots, DNSName: name, Intermediates: x509.NewCertPool()}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := cs.PeerCertificates[0].Verify(opts)
	return err
}

// handshake turns a fresh socket into a DERP connection.
func handshake(ctx context.Context, o *Options, n *tailcfg.DERPNode, t target, bc *derp.BufConn, ideal string, out *outbox) (*Conn, error) {
	var nc net.Conn = bc
	var server key.NodePublic
	fast := false
	if !t.plain {
		tc := tls.Client(bc, tlsConfig(o, n, t))
		if err := tc.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		// Only in TLS 1.3 does the server's signature cover the whole chain.
		if cs := tc.ConnectionState(); cs.Version >= tls.VersionTLS13 {
			server, _, fast = derp.MetaCert(cs.PeerCertificates)
		}
		nc = tc
	}
	req := request(t, fast, ideal)
	var pre []byte
	if !fast {
		if _, err := nc.Write(req); err != nil {
			return nil, err
		}
		req = nil
		var err error
		if pre, err = readUpgrade(nc); err != nil {
			return nil, err
		}
	}
	rd := derp.NewReader(nc, restingBuffer, pre)
	if !fast {
		ft, p, err := rd.Next()
		if err != nil {
			return nil, fmt.Errorf("no greeting: %w", err)
		}
		if ft != derp.ServerKey {
			return nil, fmt.Errorf("%w: first comes %v", derp.ErrGreeting, ft)
		}
		if server, err = derp.ParseServerKey(p); err != nil {
			return nil, err
		}
	}
	info := derp.ClientInfo{Version: derp.Version, CanAckPings: o.CanAckPings, AppName: o.AppName}
	hello, err := derp.AppendClientInfo(req, o.PrivateKey, server, info)
	if err != nil {
		return nil, err
	}
	if _, err := nc.Write(hello); err != nil {
		return nil, err
	}
	return newConn(o, n, nc, bc, rd, server, out), nil
}

// request is the HTTP request of docs/protocol/derp.md#http.
func request(t target, fast bool, ideal string) []byte {
	host := t.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if t.plain && t.port != 80 || !t.plain && t.port != 443 {
		host += ":" + strconv.Itoa(t.port)
	}
	s := "GET /derp HTTP/1.1\r\nHost: " + clean(host) + "\r\nUser-Agent: tailnode\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n"
	if ideal != "" {
		s += derp.IdealNodeHeader + ": " + clean(ideal) + "\r\n"
	}
	if fast {
		s += derp.FastStartHeader + ": 1\r\n"
	}
	return []byte(s + "\r\n")
}

// clean keeps what control put into the map from ending a header line.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r == 0x7f {
			return -1
		}
		return r
	}, s)
}

// readUpgrade reads the response head, and returns what was read past it.
func readUpgrade(nc net.Conn) (pre []byte, err error) {
	buf := make([]byte, 0, 4<<10)
	for {
		if len(buf) == cap(buf) {
			return nil, fmt.Errorf("%w: response head is endless", ErrUpgrade)
		}
		n, err := nc.Read(buf[len(buf):cap(buf)])
		from := max(0, len(buf)-3)
		buf = buf[:len(buf)+n]
		if i := strings.Index(string(buf[from:]), "\r\n\r\n"); i >= 0 {
			head, rest := string(buf[:from+i]), buf[from+i+4:]
			status, _, _ := strings.Cut(head, "\r\n")
			proto, code, _ := strings.Cut(status, " ")
			if !strings.HasPrefix(proto, "HTTP/1.") || !strings.HasPrefix(code, "101") {
				return nil, fmt.Errorf("%w: it answers %q", ErrUpgrade, status[:min(len(status), 100)])
			}
			return rest, nil
		}
		if len(buf) >= 5 && string(buf[:5]) != "HTTP/" {
			return nil, fmt.Errorf("%w: it does not speak HTTP", ErrUpgrade)
		}
		if err != nil {
			return nil, fmt.Errorf("no HTTP response: %w", err)
		}
	}
}
