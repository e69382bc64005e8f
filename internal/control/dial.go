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
	"net/netip"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/h2"
	"github.com/tailnode/tailnode/internal/http1"
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
	// maxKeyReply bounds the answer to the key fetch.
	maxKeyReply = 64 << 10
)

// connect opens a channel and the HTTP/2 connection within.
func (c *Client) connect(ctx context.Context) (*h2.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, dialTimeout, fmt.Errorf("control: no connection to %s within %v", c.base, dialTimeout))
	defer cancel()
	nc, err := c.channel(ctx)
	if o := c.spare.Swap(nil); o != nil { // the channel did not take it
		o.Close()
	}
	if err != nil {
		return nil, err
	}
	raw := c.track(nc)
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	conn, err := h2.NewConn(raw)
	if !stop() {
		if err == nil {
			conn.Close()
		}
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("control: HTTP/2 to %s: %w", c.base, err)
	}
	return conn, nil
}

// channel opens a Noise channel. Where a key that was known from before does not fit, it
// fetches the key and tries once more.
func (c *Client) channel(ctx context.Context) (*noise.Conn, error) {
	ckey := c.ControlKey()
	fetched := false
	for {
		if ckey.IsZero() {
			k, o, err := c.fetchKey(ctx)
			if err != nil {
				return nil, err
			}
			if o != nil {
				if old := c.spare.Swap(o); old != nil {
					old.Close()
				}
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
	k, o, err := c.fetchKey(ctx)
	if o != nil {
		o.Close()
	}
	return k, err
}

// fetchKey is FetchKey, and returns the connection if it is good for another request.
func (c *Client) fetchKey(ctx context.Context) (_ key.MachinePublic, spare *outer, _ error) {
	u := *c.base
	u.Path += "/key"
	u.RawQuery = "v=" + strconv.Itoa(int(c.cfg.Version))
	fail := func(err error) (key.MachinePublic, *outer, error) {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return key.MachinePublic{}, nil, fmt.Errorf("control: fetching the server's key from %s: %w", &u, err)
	}
	o, err := c.openOuter(ctx, &u, netip.Addr{})
	if err != nil {
		return fail(err)
	}
	defer func() {
		if spare == nil {
			o.Close()
		}
	}()
	resp, err := o.do(ctx, "GET", &u, nil, nil)
	if err != nil {
		return fail(err)
	}
	stop := context.AfterFunc(ctx, func() { o.Close() })
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxKeyReply))
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fail(err)
	}
	what := func() string {
		return fmt.Sprintf("got HTTP status %d %s with %s: %s", resp.Status, resp.Reason, cmp.Or(resp.Header.Get("Content-Type"), "no content type"), excerpt(b))
	}
	switch {
	case resp.Status == http.StatusTooManyRequests || resp.Status == http.StatusServiceUnavailable:
		return fail(&RateLimitError{Path: "/key", Status: resp.Status, Text: excerpt(b), RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now())})
	case resp.Status >= 500:
		return fail(errors.New(what()))
	case resp.Status != http.StatusOK:
		return fail(fmt.Errorf("%w: %s", ErrNotControl, what()))
	}
	var keys tailcfg.PublicKeyResponse
	if err := json.Unmarshal(b, &keys); err != nil {
		return fail(fmt.Errorf("%w: %s", ErrNotControl, what()))
	}
	if keys.PublicKey.IsZero() {
		return fail(fmt.Errorf("%w: it sends no key for the Noise protocol: %s", ErrNotControl, what()))
	}
	if resp.KeepAlive && len(b) < maxKeyReply {
		return keys.PublicKey, o, nil
	}
	return keys.PublicKey, nil, nil
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

// dialPlan tries the plan's addresses. It returns nil and no error for a plan without any.
// Candidates that are reached by way of another host (ACEHost) are left out.
func (c *Client) dialPlan(ctx context.Context, ckey key.MachinePublic, plan *tailcfg.ControlDialPlan, tls bool) (*noise.Conn, error) {
	cands := slices.DeleteFunc(slices.Clone(plan.Candidates), func(p tailcfg.ControlIPCandidate) bool {
		return !p.IP.IsValid() || p.ACEHost != ""
	})
	if len(cands) == 0 {
		return nil, nil
	}
	sort.SliceStable(cands, func(i, j int) bool { return cands[i].Priority > cands[j].Priority })
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
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("control: opening a channel at %s: %w", r.url, err)
	}

	h := http1.Header{{Name: "Upgrade", Value: upgradeProtocol}, {Name: "Connection", Value: "upgrade"},
		{Name: handshakeHeader, Value: base64.StdEncoding.EncodeToString(init)}}
	o := c.takeSpare(r)
	var resp *http1.Response
	for fresh := o == nil; ; fresh = true {
		if fresh {
			if o, err = c.openOuter(ctx, r.url, r.ip); err != nil {
				return nil, fail(err)
			}
		}
		if resp, err = o.do(ctx, "POST", r.url, h, nil); err == nil {
			break
		}
		if fresh || !errors.Is(err, errStale) || ctx.Err() != nil { // else the server had closed it meanwhile
			return nil, fail(err)
		}
	}
	if resp.Status != http.StatusSwitchingProtocols {
		defer o.Close()
		stop := context.AfterFunc(ctx, func() { o.Close() })
		defer stop()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		if resp.Status == http.StatusTooManyRequests || resp.Status == http.StatusServiceUnavailable {
			return nil, fail(&RateLimitError{Path: upgradePath, Status: resp.Status, Text: excerpt(b), RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now())})
		}
		return nil, fail(fmt.Errorf("%w: want HTTP status 101, got %d %s: %s", ErrNotControl, resp.Status, resp.Reason, excerpt(b)))
	}
	if p := resp.Header.Get("Upgrade"); !strings.EqualFold(p, upgradeProtocol) {
		o.Close()
		return nil, fail(fmt.Errorf("%w: it switched to the protocol %q", ErrNotControl, p))
	}
	nc, err := finish(ctx, o)
	if err != nil {
		o.Close()
		return nil, fail(err)
	}
	return nc, nil
}

// takeSpare returns the key fetch's connection, if it leads where r does.
func (c *Client) takeSpare(r route) *outer {
	o := c.spare.Load()
	if o == nil || r.ip.IsValid() || o.scheme != r.url.Scheme || o.host != hostPort(r.url) || !c.spare.CompareAndSwap(o, nil) {
		return nil
	}
	return o
}
