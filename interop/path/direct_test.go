package path

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"tailscale.com/envknob"
	"tailscale.com/tsnet"

	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/node"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/state"
	"github.com/tailnode/tailnode/interop/harness"
)

// The harness keeps upstream's nodes on relays; here they are to be as they are.
func init() { envknob.Setenv("TS_DEBUG_NEVER_DIRECT_UDP", "false") }

// watch is a logger that remembers when a path became direct.
type watch struct {
	slog.Handler
	t  *testing.T
	mu *sync.Mutex
	at *time.Time
}

func newWatch(t *testing.T) *watch {
	return &watch{Handler: slog.DiscardHandler, t: t, mu: new(sync.Mutex), at: new(time.Time)}
}

func (w *watch) Enabled(context.Context, slog.Level) bool { return true }
func (w *watch) WithAttrs([]slog.Attr) slog.Handler       { return w }
func (w *watch) WithGroup(string) slog.Handler            { return w }
func (w *watch) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "path: direct" {
		w.mu.Lock()
		if w.at.IsZero() {
			*w.at = r.Time
		}
		w.mu.Unlock()
	}
	return nil
}

func (w *watch) direct() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return *w.at
}

// tailnet is a control server and a relay, both ours.
type tailnet struct {
	t       *testing.T
	control harness.Control
}

func newTailnet(t *testing.T) *tailnet {
	t.Helper()
	relay, err := harness.OurRelay(func(string, ...any) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { relay.Close() })
	control, err := harness.OurControl(relay.Info(), func(string, ...any) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	return &tailnet{t, control}
}

func (tn *tailnet) authKey() string {
	tn.t.Helper()
	k, err := tn.control.AuthKey(false)
	if err != nil {
		tn.t.Fatal(err)
	}
	return k
}

func (tn *tailnet) ours(ctx context.Context, name string) (*node.Node, *watch) {
	tn.t.Helper()
	w := newWatch(tn.t)
	n, err := node.Start(node.Config{Store: state.NewMemory(), Hostname: name, AuthKey: tn.authKey(), ControlURL: tn.control.URL(), Logger: slog.New(w)})
	if err != nil {
		tn.t.Fatal(err)
	}
	tn.t.Cleanup(n.Close)
	if _, err := n.AwaitRunning(ctx); err != nil {
		tn.t.Fatal(err)
	}
	return n, w
}

func (tn *tailnet) upstream(ctx context.Context, name string) *tsnet.Server {
	tn.t.Helper()
	s := &tsnet.Server{Dir: tn.t.TempDir(), Hostname: name, ControlURL: tn.control.URL(), AuthKey: tn.authKey(),
		Logf: func(string, ...any) {}, UserLogf: func(string, ...any) {}}
	tn.t.Cleanup(func() { s.Close() })
	if _, err := s.Up(ctx); err != nil {
		tn.t.Fatal(err)
	}
	return s
}

func ourIP(n *node.Node) netip.Addr {
	st, _ := n.Status()
	return st.Netmap.Self.Addresses[0].Addr()
}

// ourPath returns how n reaches the peer with address ip.
func ourPath(n *node.Node, ip netip.Addr) path.PathInfo {
	st, _ := n.Status()
	p := st.Netmap.Route(ip)
	if p == nil {
		return path.PathInfo{}
	}
	return n.Engine().Live(p.Key).Path
}

const maxStall = 15 * time.Second

// transfer sends size bytes over c to what is accepted from ln, calling during after each eighth, and compares.
// It returns the longest time for which nothing arrived. How long that is depends on what else the machine does; longer than maxStall it is
// only where a path that is over was not given up.
func transfer(t *testing.T, c net.Conn, accepted func() (net.Conn, error), size int, during func(i int)) time.Duration {
	t.Helper()
	msg := make([]byte, size)
	rnd := rand.NewChaCha8([32]byte{1})
	rnd.Read(msg)
	type result struct {
		sum  [32]byte
		gap  time.Duration
		read int
		err  error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		s, err := accepted()
		if err != nil {
			r.err = err
			done <- r
			return
		}
		defer s.Close()
		h, b, last := sha256.New(), make([]byte, 256<<10), time.Now()
		for {
			n, err := s.Read(b)
			h.Write(b[:n])
			r.read += n
			now := time.Now()
			r.gap = max(r.gap, now.Sub(last))
			last = now
			if err != nil {
				if err != io.EOF {
					r.err = err
				}
				break
			}
		}
		h.Sum(r.sum[:0])
		done <- r
	}()
	for i := range 8 {
		if _, err := c.Write(msg[i*size/8 : (i+1)*size/8]); err != nil {
			t.Fatal(err)
		}
		if during != nil {
			during(i)
		}
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	if want := sha256.Sum256(msg); !bytes.Equal(r.sum[:], want[:]) || r.read != size {
		t.Fatalf("%d bytes arrived of %d, or not the same", r.read, size)
	}
	return r.gap
}

// TestDirectWithUpstream: tsnet and we reach each other directly, whoever dials, and go on when either's sockets are bound anew.
func TestDirectWithUpstream(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for _, weDial := range []bool{true, false} {
		t.Run(fmt.Sprintf("we dial: %v", weDial), func(t *testing.T) {
			tn := newTailnet(t)
			theirs := tn.upstream(ctx, "theirs")
			us, seen := tn.ours(ctx, "ours")
			theirIP, _ := theirs.TailscaleIPs()
			lc, err := theirs.LocalClient()
			if err != nil {
				t.Fatal(err)
			}
			// Upstream tells control where it is a while after it is up; what is measured is what comes then.
			if _, err := us.Await(ctx, func(st node.Status) (bool, error) {
				p := st.Netmap.Route(theirIP)
				return p != nil && p.HomeDERP != 0 && len(p.Endpoints) > 0, nil
			}); err != nil {
				t.Fatal(err)
			}
			var c net.Conn
			var accept func() (net.Conn, error)
			var began time.Time
			if weDial {
				ln, err := theirs.Listen("tcp", ":80")
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				accept = ln.Accept
				began = time.Now()
				c, err = us.Dial(ctx, "tcp", net.JoinHostPort(theirIP.String(), "80"))
				if err != nil {
					t.Fatal(err)
				}
			} else {
				ln, err := us.Listen(ctx, "tcp", ":80")
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				accept = ln.Accept
				// Without our home relay upstream would lose its first handshake message and wait 5 s, and its TCP take
				// those for the round trip.
				if err := harness.Until(ctx, "upstream knows our home", func() (bool, error) {
					st, err := lc.Status(ctx)
					return err == nil && len(st.Peer) > 0 && st.Peer[st.Peers()[0]].Relay != "", err
				}); err != nil {
					t.Fatal(err)
				}
				began = time.Now()
				c, err = theirs.Dial(ctx, "tcp", net.JoinHostPort(ourIP(us).String(), "80"))
				if err != nil {
					t.Fatal(err)
				}
			}
			defer c.Close()
			t.Logf("dial took %v", time.Since(began))
			gap := transfer(t, c, accept, 64<<20, func(i int) {
				switch i {
				case 2:
					us.Engine().Rebind()
				case 4:
					if err := lc.DebugAction(ctx, "rebind"); err != nil {
						t.Error(err)
					}
				case 5:
					us.Engine().Rebind()
				}
			})
			t.Logf("direct after %v, longest stall %v", seen.direct().Sub(began), gap)
			if gap > maxStall {
				t.Errorf("stalled for %v", gap)
			}
			if seen.direct().IsZero() {
				t.Error("we were never direct")
			}
			// After the last rebind each comes back to a direct path under traffic.
			ping := func() {
				pctx, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				us.Ping(pctx, theirIP, node.PingTSMP)
			}
			if err := harness.Until(ctx, "we are direct", func() (bool, error) {
				ping()
				return ourPath(us, theirIP).Addr.IsValid(), fmt.Errorf("%+v", ourPath(us, theirIP))
			}); err != nil {
				t.Error(err)
			}
			if err := harness.Until(ctx, "upstream is direct", func() (bool, error) {
				ping()
				st, err := lc.Status(ctx)
				if err != nil {
					return false, err
				}
				for _, p := range st.Peer {
					if p.CurAddr != "" {
						return true, nil
					}
				}
				return false, nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDirectWithOurselves is the same between two nodes of ours, and tells how long the first packet is ahead of the direct path.
func TestDirectWithOurselves(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	tn := newTailnet(t)
	a, seen := tn.ours(ctx, "a")
	b, _ := tn.ours(ctx, "b")
	ln, err := b.Listen(ctx, "tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	began := time.Now()
	c, err := a.Dial(ctx, "tcp", net.JoinHostPort(ourIP(b).String(), "80"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Logf("dial took %v", time.Since(began))
	start := time.Now()
	gap := transfer(t, c, ln.Accept, 256<<20, func(i int) {
		if i == 3 {
			a.Engine().Rebind()
		}
		if i == 5 {
			b.Engine().Rebind()
		}
	})
	d := time.Since(start)
	t.Logf("direct after %v, longest stall %v, %.2f Gbit/s", seen.direct().Sub(began), gap, 8*256*float64(1<<20)/d.Seconds()/1e9)
	if seen.direct().IsZero() || gap > maxStall {
		t.Errorf("direct at %v, stalled for %v", seen.direct(), gap)
	}
}

// TestForcedRelay: the knob of the tests works.
func TestForcedRelay(t *testing.T) {
	datapath.ForceRelay.Store(true)
	defer datapath.ForceRelay.Store(false)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	tn := newTailnet(t)
	a, _ := tn.ours(ctx, "a")
	theirs := tn.upstream(ctx, "theirs")
	theirIP, _ := theirs.TailscaleIPs()
	r, err := a.Ping(ctx, theirIP, node.PingTSMP)
	if err != nil {
		t.Fatal(err)
	}
	if pi := ourPath(a, theirIP); pi.Addr.IsValid() || pi.Region == 0 || pi.WhyNotDirect == "" {
		t.Errorf("%+v after %+v", pi, r)
	}
}
