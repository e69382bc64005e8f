// Package control speaks the coordination protocol that docs/protocol/control.md describes:
// it fetches the server's key, opens the Noise channel behind POST /ts2021, and inside it
// registers the node, follows the map stream and sends updates.
//
// [Client] makes single requests. [Session] is built on it and keeps a node logged in and its
// map stream open for as long as it runs.
package control

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	// maxReply bounds the body of every answer but the map stream's.
	maxReply = 1 << 20
	// maxErrorText bounds what is kept of the text of an HTTP error.
	maxErrorText = 512
	// lbHeader carries the node key in the clear of the HTTP/2 channel, for the server's
	// load balancers.
	lbHeader = "Ts-Lb"
)

// Config says how to reach a control server and as whom.
type Config struct {
	ServerURL  string // http or https
	MachineKey key.MachinePrivate
	// ControlKey is the server's key as a former Client learned it. It spares the fetch; a
	// server that has a new key meanwhile costs one more round. Zero: fetch.
	ControlKey key.MachinePublic
	Version    tailcfg.CapabilityVersion // 0: tailcfg.CurrentCapabilityVersion
	// Dial opens connections to the server. nil: a net.Dialer.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// TLSConfig is cloned for every TLS connection. nil: the system's roots.
	TLSConfig *tls.Config
	Logger    *slog.Logger // nil: silent
}

// Client makes requests of a control server, all over one Noise connection which it opens when
// the first request needs it and opens anew when it broke. It is safe for concurrent use.
type Client struct {
	cfg   Config
	base  *url.URL // without a trailing slash
	log   *slog.Logger
	outer *http.Transport // key fetch and upgrade
	inner *http.Transport // HTTP/2 within the Noise channel

	plan     atomic.Pointer[tailcfg.ControlDialPlan]
	lastDial atomic.Int64 // when a channel was last opened by way of port 80, Unix nanoseconds

	mu      sync.Mutex // guards what follows; never held while waiting
	closed  bool
	conn    *http.ClientConn
	raw     net.Conn                // beneath conn
	open    map[*tracked]struct{}   // every channel not closed yet: an old one may still carry a stream
	dialing chan struct{}           // closed when the dial under way is over; nil: none
	stop    context.CancelCauseFunc // of the dial under way
	dialErr error                   // of the last dial
	ckey    key.MachinePublic

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // dials under way
}

// New returns a client. It does no I/O. The caller must Close it.
func New(cfg Config) (*Client, error) {
	u, err := url.Parse(cfg.ServerURL)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" {
		return nil, fmt.Errorf("control: server URL %q: want http://HOST or https://HOST", cfg.ServerURL)
	}
	if cfg.MachineKey.IsZero() {
		return nil, errors.New("control: no machine key")
	}
	u.Path = strings.TrimRight(u.Path, "/")
	u.RawQuery, u.Fragment = "", ""
	if cfg.Version == 0 {
		cfg.Version = tailcfg.CurrentCapabilityVersion
	}
	if cfg.Dial == nil {
		d := &net.Dialer{Timeout: 30 * time.Second}
		cfg.Dial = d.DialContext
	}
	c := &Client{cfg: cfg, base: u, log: cfg.Logger, ckey: cfg.ControlKey, open: make(map[*tracked]struct{})}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.outer = c.newOuter(cfg.Dial)
	c.inner = c.newInner()
	return c, nil
}

// Close ends every request, closes the connection and waits for dials under way. It is
// idempotent and safe at any time.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	conn := c.conn
	c.conn, c.raw = nil, nil
	open := slices.Collect(maps.Keys(c.open))
	c.mu.Unlock()
	c.cancel()
	if conn != nil {
		conn.Close()
	}
	for _, t := range open {
		t.Close()
	}
	c.wg.Wait()
	c.outer.CloseIdleConnections()
}

// ControlKey returns the server's key, or zero before the first connection. A caller may keep it
// for the Config of its next Client.
func (c *Client) ControlKey() key.MachinePublic {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ckey
}

// SetDialPlan sets the addresses that the next connection tries before the host's own.
func (c *Client) SetDialPlan(p *tailcfg.ControlDialPlan) { c.plan.Store(p) }

// Drop closes the present connection, if any; requests in flight fail and the next one opens
// a new connection.
func (c *Client) Drop() {
	c.mu.Lock()
	conn, raw := c.conn, c.raw
	c.conn, c.raw = nil, nil
	c.mu.Unlock()
	if conn != nil {
		conn.Close()
		raw.Close()
	}
}

// tracked is a channel that its Client knows of until it is closed.
type tracked struct {
	*noise.EarlyConn
	c *Client
}

func (c *Client) track(nc *noise.Conn) *tracked {
	t := &tracked{noise.NewEarlyConn(nc), c}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open[t] = struct{}{}
	return t
}

func (t *tracked) Close() error {
	t.c.mu.Lock()
	delete(t.c.open, t)
	t.c.mu.Unlock()
	return t.EarlyConn.Close()
}

// AbortDial gives up a dial under way, if any: after a change of network it may wait for an
// answer that cannot come.
func (c *Client) AbortDial() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dialing != nil {
		c.stop(ErrAborted) // not context.Canceled, which would look like the caller's
	}
}

// get returns the connection, and opens one if there is none that works; used says that it
// was open already. Callers that come while one is being opened wait for that one.
func (c *Client) get(ctx context.Context) (conn *http.ClientConn, used bool, err error) {
	for first := true; ; first = false {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, false, ErrClosed
		}
		if c.conn != nil {
			if c.conn.Err() == nil {
				defer c.mu.Unlock()
				return c.conn, first, nil
			}
			c.conn, c.raw = nil, nil
		}
		if !first && c.dialing == nil && c.dialErr != nil {
			defer c.mu.Unlock()
			return nil, false, c.dialErr
		}
		if c.dialing == nil {
			c.dialing = make(chan struct{})
			ctx, cancel := context.WithCancelCause(c.ctx)
			c.stop = cancel
			c.wg.Add(1)
			go c.connectFor(ctx, cancel, c.dialing)
		}
		wait := c.dialing
		c.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, false, fmt.Errorf("control: connecting to %s: %w", c.base, context.Cause(ctx))
		}
	}
}

// connectFor opens a connection for all who wait on done.
func (c *Client) connectFor(ctx context.Context, cancel context.CancelCauseFunc, done chan struct{}) {
	defer c.wg.Done()
	defer cancel(nil)
	conn, raw, err := c.connect(ctx)
	c.mu.Lock()
	c.dialing, c.dialErr = nil, err
	closed := c.closed
	if err == nil && !closed {
		c.conn, c.raw = conn, raw
	}
	c.mu.Unlock()
	close(done)
	if err == nil && closed {
		conn.Close()
		raw.Close()
	}
}

// post posts v as JSON to path within the Noise channel. The caller closes the answer's body.
func (c *Client) post(ctx context.Context, path string, v any, nodes ...key.NodePublic) (*http.Response, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("control: %s: %w", path, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.innerURL(path), bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("control: %s: %w", path, err)
	}
	req.Header.Set("Content-Type", "application/json")
	for _, n := range nodes {
		if !n.IsZero() {
			req.Header.Add(lbHeader, n.String())
		}
	}
	return c.do(req)
}

// innerURL returns the URL of path as requests within the channel give it. The scheme is
// always https there.
func (c *Client) innerURL(path string) string {
	return "https://" + c.base.Host + c.base.Path + path
}

// do makes a request within the Noise channel. Where the connection turns out to have ended
// before an answer came, the request is made once more on a new one; all requests of this
// protocol can be repeated.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	for try := 0; ; try++ {
		conn, used, err := c.get(req.Context())
		if err != nil {
			return nil, err
		}
		resp, err := conn.RoundTrip(req)
		if err == nil {
			return resp, nil
		}
		if cause := context.Cause(req.Context()); cause != nil {
			return nil, fmt.Errorf("control: %s: %w", req.URL.Path, cause)
		}
		if try == 0 && used && conn.Err() != nil && req.GetBody != nil {
			if req.Body, err = req.GetBody(); err == nil {
				continue
			}
		}
		return nil, fmt.Errorf("control: %s: %w", req.URL.Path, err)
	}
}

// readReply reads a whole answer, at most maxReply bytes of it, and closes it.
func readReply(resp *http.Response) ([]byte, error) {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err == nil && len(b) > maxReply {
		err = fmt.Errorf("%w: more than %d bytes", ErrTooLarge, maxReply)
	}
	return b, err
}

// httpError turns an answer that is no 200 into an error, and closes it.
func httpError(path string, resp *http.Response, now time.Time) error {
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorText))
	text := strings.TrimSpace(string(b))
	if resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable {
		return &RateLimitError{Path: path, Status: resp.StatusCode, Text: text, RetryAfter: retryAfter(resp.Header.Get("Retry-After"), now)}
	}
	return &HTTPError{Path: path, Status: resp.StatusCode, Text: text}
}
