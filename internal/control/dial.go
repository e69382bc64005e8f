package control

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	upgradePath     = "/ts2021"
	upgradeProtocol = "tailscale-control-protocol"
	handshakeHeader = "X-Tailscale-Handshake"

	// dialTimeout bounds opening a channel: key, connection, upgrade and handshake.
	dialTimeout = 30 * time.Second
	// fallbackDelay is how long port 80 may take before port 443 is tried beside it.
	fallbackDelay = 500 * time.Millisecond
	// recentDial is the time after opening a channel by way of port 80 within which opening
	// another one goes by way of TLS: some middleboxes let the upgrade pass and cut what follows.
	recentDial = 2 * time.Minute
	// maxCandidates bounds the addresses of a dial plan that are tried, as they may all be dialled at a time.
	maxCandidates = 16
	// maxKeyReply bounds the answer to the key fetch.
	maxKeyReply = 64 << 10
)

// newOuter returns the transport of the key fetch and of the upgrade. It keeps the key
// fetch's connection for a moment, so that an upgrade to the same port needs no other. Proxies
// are taken from the environment (HTTPS_PROXY, HTTP_PROXY, NO_PROXY).
func (c *Client) newOuter(dial func(context.Context, string, string) (net.Conn, error)) *http.Transport {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dial,
		DisableCompression:     true,
		TLSHandshakeTimeout:    15 * time.Second,
		ResponseHeaderTimeout:  15 * time.Second,
		IdleConnTimeout:        5 * time.Second,
		MaxIdleConnsPerHost:    1,
		MaxResponseHeaderBytes: 64 << 10,
		Protocols:              new(http.Protocols), // an HTTP/2 connection cannot switch protocols
	}
	t.Protocols.SetHTTP1(true)
	if c.cfg.TLSConfig != nil {
		t.TLSClientConfig = c.cfg.TLSConfig.Clone()
		t.TLSClientConfig.NextProtos = nil
	}
	return t
}

// newInner returns the transport that makes HTTP/2 connections within Noise channels. To
// net/http the channel is an unencrypted HTTP/2 connection with prior knowledge.
func (c *Client) newInner() *http.Transport {
	t := &http.Transport{
		Protocols:              new(http.Protocols),
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
		HTTP2: &http.HTTP2Config{
			// No SendPingTimeout: its timer would keep a closed connection's memory for as
			// long. Dead connections show in the map stream's watchdog and in the time
			// limits of the other requests.
			WriteByteTimeout:          30 * time.Second,
			MaxReceiveBufferPerStream: 1 << 20,
		},
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return ctx.Value(channelKey{}).(net.Conn), nil
		},
	}
	t.Protocols.SetUnencryptedHTTP2(true)
	return t
}

// channelKey is the context key by which connect hands the channel to newInner's dialer.
type channelKey struct{}

// connect opens a channel and the HTTP/2 connection within.
func (c *Client) connect(ctx context.Context) (*http.ClientConn, net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, fmt.Errorf("control: no connection to %s within %v", c.base, dialTimeout))
	defer cancel()
	nc, err := c.channel(ctx)
	c.outer.CloseIdleConnections() // the key fetch's, if the channel did not take it
	if err != nil {
		return nil, nil, err
	}
	raw := c.track(nc)
	conn, err := c.inner.NewClientConn(context.WithValue(ctx, channelKey{}, net.Conn(raw)), "https", hostPort(c.base))
	if err != nil {
		raw.Close()
		return nil, nil, fmt.Errorf("control: HTTP/2 to %s: %w", c.base, err)
	}
	return conn, raw, nil
}

// channel opens a Noise channel. Where a key that was known from before does not fit, it
// fetches the key and tries once more.
func (c *Client) channel(ctx context.Context) (*noise.Conn, error) {
	ckey := c.ControlKey()
	fetched := false
	for {
		if ckey.IsZero() {
			k, err := c.FetchKey(ctx)
			if err != nil {
				return nil, err
			}
			ckey, fetched = k, true
			c.mu.Lock()
			c.ckey = k
			c.mu.Unlock()
		}
		nc, err := c.dialChannel(ctx, ckey, fetched)
		switch {
		case err == nil:
			return nc, nil
		case !errors.Is(err, noise.ErrHandshake) || ctx.Err() != nil:
			return nil, err
		case fetched:
			// Most likely the server does not hold the key that it announces; but the
			// same happens where something cuts the connection after the upgrade.
			return nil, fmt.Errorf("%w: the handshake with %s failed with the key %s that it announces: %w", ErrWrongKey, c.base, ckey, err)
		}
		c.log.Info("control: the server's key does not fit any more; fetching it anew", "server", c.base.String())
		ckey = key.MachinePublic{}
	}
}

// FetchKey asks the server for its key, over TLS where the server's URL is https. It blocks
// until the answer or until ctx ends.
func (c *Client) FetchKey(ctx context.Context) (key.MachinePublic, error) {
	u := fmt.Sprintf("%s/key?v=%d", c.base, c.cfg.Version)
	fail := func(err error) (key.MachinePublic, error) {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return key.MachinePublic{}, fmt.Errorf("control: fetching the server's key from %s: %w", u, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return fail(err)
	}
	resp, err := c.outer.RoundTrip(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxKeyReply))
	if err != nil {
		return fail(err)
	}
	what := func() string {
		return fmt.Sprintf("got HTTP status %s with %s: %s", resp.Status, cmp.Or(resp.Header.Get("Content-Type"), "no content type"), excerpt(b))
	}
	switch {
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable:
		return fail(&RateLimitError{Path: "/key", Status: resp.StatusCode, Text: excerpt(b), RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now())})
	case resp.StatusCode >= 500:
		return fail(errors.New(what()))
	case resp.StatusCode != http.StatusOK:
		return fail(fmt.Errorf("%w: %s", ErrNotControl, what()))
	}
	var keys tailcfg.PublicKeyResponse
	if err := json.Unmarshal(b, &keys); err != nil {
		return fail(fmt.Errorf("%w: %s", ErrNotControl, what()))
	}
	if keys.PublicKey.IsZero() {
		return fail(fmt.Errorf("%w: it sends no key for the Noise protocol: %s", ErrNotControl, what()))
	}
	return keys.PublicKey, nil
}

// excerpt returns the beginning of what a server sent, quoted, for an error.
func excerpt(b []byte) string {
	s := strings.Join(strings.Fields(string(b[:min(len(b), 200)])), " ")
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return fmt.Sprintf("%q", s)
}

// route is one way to the server's upgrade handler.
type route struct {
	url *url.URL
	ip  netip.Addr // dial this instead of the host's addresses, if valid
}

// routes returns the way to try first, and the one to try if it fails or is slow, which may be
// nil. An explicit port with https is the only way. Without a port, port 80 comes first: what
// passes there is Noise, which needs no TLS around it; unless tls asks to begin with port 443.
func (c *Client) routes(tls bool) (first, second *url.URL) {
	at := func(scheme, port string) *url.URL {
		return &url.URL{Scheme: scheme, Host: net.JoinHostPort(c.base.Hostname(), port), Path: c.base.Path + upgradePath}
	}
	port := c.base.Port()
	if port != "" {
		return at(c.base.Scheme, port), nil
	}
	if c.base.Scheme == "http" && isPrivate(c.base.Hostname()) {
		return at("http", "80"), nil
	}
	if tls {
		return at("https", "443"), at("http", "80")
	}
	return at("http", "80"), at("https", "443")
}

// isPrivate reports whether no public certificate can be had for host.
func isPrivate(host string) bool {
	a, _ := netip.ParseAddr(host)
	return a.IsPrivate() || a.IsLoopback() || host == "localhost"
}

// dialChannel opens a channel to the server with the key ckey: by the dial plan if control
// gave one, and otherwise or if that fails by the server's name. fetched says that the key was
// just fetched, so that a connection to the server is open.
func (c *Client) dialChannel(ctx context.Context, ckey key.MachinePublic, fetched bool) (*noise.Conn, error) {
	last := c.lastDial.Load()
	tls := c.base.Scheme == "https" && fetched || last != 0 && time.Since(time.Unix(0, last)) < recentDial
	if plan := c.plan.Load(); plan != nil && !fetched {
		if nc, err := c.dialPlan(ctx, ckey, plan, tls); nc != nil {
			return nc, nil
		} else if err != nil {
			if errors.Is(err, noise.ErrHandshake) || ctx.Err() != nil {
				return nil, err
			}
			c.log.Debug("control: none of the dial plan's addresses answers; using the name", "err", err)
		}
	}
	return c.dialHost(ctx, ckey, netip.Addr{}, tls)
}

// dialPlan tries the plan's addresses, those of the highest priority if there are many. It returns nil and no error for a plan without any.
// Candidates that are reached by way of another host (ACEHost) are left out.
func (c *Client) dialPlan(ctx context.Context, ckey key.MachinePublic, plan *tailcfg.ControlDialPlan, tls bool) (*noise.Conn, error) {
	cands := slices.DeleteFunc(slices.Clone(plan.Candidates), func(p tailcfg.ControlIPCandidate) bool {
		return !p.IP.IsValid() || p.ACEHost != ""
	})
	if len(cands) == 0 {
		return nil, nil
	}
	sort.SliceStable(cands, func(i, j int) bool { return cands[i].Priority > cands[j].Priority })
	cands = cands[:min(len(cands), maxCandidates)]
	tries := make([]try, len(cands))
	for i, p := range cands {
		tries[i] = try{
			delay: seconds(p.DialStartDelaySec, 0, 10*time.Second),
			dial: func(ctx context.Context) (*noise.Conn, error) {
				ctx, cancel := context.WithTimeout(ctx, seconds(p.DialTimeoutSec, 5*time.Second, 20*time.Second))
				defer cancel()
				return c.dialHost(ctx, ckey, p.IP, tls)
			},
		}
	}
	return race(ctx, tries)
}

// seconds turns a server's number of seconds into a duration of at most max; def stands for what
// is not positive.
func seconds(s float64, def, max time.Duration) time.Duration {
	switch {
	case !(s > 0):
		return def
	case s > max.Seconds():
		return max
	}
	return time.Duration(s * float64(time.Second))
}

// dialHost opens a channel by the routes to the server, at ip if that is valid.
func (c *Client) dialHost(ctx context.Context, ckey key.MachinePublic, ip netip.Addr, tls bool) (*noise.Conn, error) {
	first, second := c.routes(tls)
	via := func(u *url.URL) func(context.Context) (*noise.Conn, error) {
		return func(ctx context.Context) (*noise.Conn, error) {
			nc, err := c.upgrade(ctx, route{u, ip}, ckey)
			if err == nil && second != nil && u.Scheme == "http" {
				c.lastDial.Store(time.Now().UnixNano())
			}
			return nc, err
		}
	}
	if second == nil {
		return via(first)(ctx)
	}
	return race(ctx, []try{{dial: via(first)}, {delay: fallbackDelay, early: true, dial: via(second)}})
}

// try is one contender of race.
type try struct {
	delay time.Duration // after the start
	early bool          // start at once when all before it failed
	dial  func(context.Context) (*noise.Conn, error)
}

// race runs the tries side by side, each after its delay, and returns the first channel that
// opens; the others are cancelled and waited for. If none opens, it returns all their errors.
func race(ctx context.Context, tries []try) (*noise.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var winner *noise.Conn
	errs := make([]error, len(tries))
	failed := make([]chan struct{}, len(tries))
	for i := range tries {
		failed[i] = make(chan struct{})
	}
	for i, t := range tries {
		wg.Go(func() {
			defer close(failed[i])
			if t.delay > 0 {
				timer := time.NewTimer(t.delay)
				defer timer.Stop()
				var before chan struct{}
				if t.early && i > 0 {
					before = failed[i-1]
				}
				select {
				case <-timer.C:
				case <-before:
				case <-ctx.Done():
				}
			}
			if ctx.Err() != nil {
				errs[i] = context.Cause(ctx)
				return
			}
			nc, err := t.dial(ctx)
			mu.Lock()
			defer mu.Unlock()
			errs[i] = err
			if err != nil {
				return
			}
			if winner != nil {
				nc.Close()
				return
			}
			winner = nc
			cancel()
		})
	}
	wg.Wait()
	cancel()
	if winner != nil {
		return winner, nil
	}
	return nil, errors.Join(errs...)
}

// upgrade connects by r, asks for the control protocol with the handshake's first message in
// the request's header, and completes the handshake.
func (c *Client) upgrade(ctx context.Context, r route, ckey key.MachinePublic) (*noise.Conn, error) {
	init, finish, err := noise.ClientDeferred(c.cfg.MachineKey, ckey, uint16(c.cfg.Version))
	if err != nil {
		return nil, err
	}
	t := c.outer
	if r.ip.IsValid() {
		t = c.newOuter(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if host, port, err := net.SplitHostPort(addr); err == nil && host == r.url.Hostname() {
				addr = net.JoinHostPort(r.ip.String(), port)
			}
			return c.cfg.Dial(ctx, network, addr)
		})
		defer t.CloseIdleConnections()
	}
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("control: opening a channel at %s: %w", r.url, err)
	}

	// The transport hands out the connection after the switch only as the body, which has
	// no deadlines; the trace tells which connection it is.
	var mu sync.Mutex
	var under net.Conn
	tctx := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		mu.Lock()
		under = i.Conn
		mu.Unlock()
	}})
	req, err := http.NewRequestWithContext(tctx, http.MethodPost, r.url.String(), nil)
	if err != nil {
		return nil, fail(err)
	}
	req.Header.Set("Upgrade", upgradeProtocol)
	req.Header.Set("Connection", "upgrade")
	req.Header.Set(handshakeHeader, base64.StdEncoding.EncodeToString(init))
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, fail(err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		if resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable {
			return nil, fail(&RateLimitError{Path: upgradePath, Status: resp.StatusCode, Text: excerpt(b), RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now())})
		}
		return nil, fail(fmt.Errorf("%w: want HTTP status 101, got %s: %s", ErrNotControl, resp.Status, excerpt(b)))
	}
	body, ok := resp.Body.(io.ReadWriteCloser)
	mu.Lock()
	conn := &switched{Conn: under, body: body}
	mu.Unlock()
	if p := resp.Header.Get("Upgrade"); !ok || !strings.EqualFold(p, upgradeProtocol) {
		resp.Body.Close()
		return nil, fail(fmt.Errorf("%w: it switched to the protocol %q", ErrNotControl, p))
	}
	nc, err := finish(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, fail(err)
	}
	return nc, nil
}

// switched is a connection after HTTP's switch of protocols: reads go through the body, which
// holds what was read ahead.
type switched struct {
	net.Conn
	body io.ReadWriteCloser
}

func (s *switched) Read(p []byte) (int, error)  { return s.body.Read(p) }
func (s *switched) Write(p []byte) (int, error) { return s.body.Write(p) }
func (s *switched) Close() error                { return s.body.Close() }

// hostPort returns u's host and port as net.Dial takes them.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}
