package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// log is a Handler that writes down what it is told, as words.
type log struct {
	t       *testing.T
	events  chan string
	newKey  func(key.NodePrivate) error
	onMap   func(*tailcfg.MapResponse) error
	lastMap *tailcfg.MapResponse
}

func newLog(t *testing.T) *log { return &log{t: t, events: make(chan string, 1000)} }

func (l *log) say(format string, a ...any) { l.events <- fmt.Sprintf(format, a...) }

func (l *log) NewNodeKey(k key.NodePrivate) error {
	l.say("new key")
	if l.newKey != nil {
		return l.newKey(k)
	}
	return nil
}
func (l *log) AuthURL(u string)                     { l.say("url %q", u) }
func (l *log) Registered(*tailcfg.RegisterResponse) { l.say("registered") }
func (l *log) MapStart()                            { l.say("start") }
func (l *log) Map(m *tailcfg.MapResponse) error {
	l.lastMap = m
	l.say("map")
	if l.onMap != nil {
		return l.onMap(m)
	}
	return nil
}
func (l *log) State(s State, err error) {
	if err != nil {
		l.say("%v: %v", s, err)
		return
	}
	l.say("%v", s)
}
func (l *log) Ping(_ context.Context, p *tailcfg.PingRequest) (*tailcfg.PingResponse, error) {
	l.say("ping %s", p.Types)
	return &tailcfg.PingResponse{LatencySeconds: 0.25}, nil
}

// want reads the next events; one that ends in "..." is a prefix.
func (l *log) want(events ...string) {
	l.t.Helper()
	for _, want := range events {
		select {
		case got := <-l.events:
			if p, ok := strings.CutSuffix(want, "..."); got != want && (!ok || !strings.HasPrefix(got, p)) {
				l.t.Fatalf("got %q, want %q", got, want)
			}
		case <-time.After(24 * time.Hour): // of the bubble's time
			l.t.Fatalf("nothing, want %q", want)
		}
	}
}

// session starts a session with f.
func (f *fake) session(t *testing.T, l *log, edit ...func(*SessionConfig)) *Session {
	cfg := SessionConfig{
		ServerURL: "http://control.test:8080", MachineKey: key.NewMachine(), NodeKey: key.NewNode(),
		DiscoKey: key.NewDisco().Public(), Hostinfo: &tailcfg.Hostinfo{Hostname: "h"}, Dial: f.dial, Handler: l,
	}
	for _, e := range edit {
		e(&cfg)
	}
	s, err := NewSession(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.Start()
	return s
}

func bubble(name string, t *testing.T, fn func(*testing.T, *fake, *log)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { fn(t, newFake(t), newLog(t)) })
	})
}

func self(s *stream) *tailcfg.Node {
	return &tailcfg.Node{ID: 1, Key: s.req.NodeKey, MachineAuthorized: true}
}

var up = []string{"Connecting", "registered", "start", "map", "Connected"}

func TestSessionLogin(t *testing.T) {
	bubble("auth key", t, func(t *testing.T, f *fake, l *log) {
		s := f.session(t, l, func(c *SessionConfig) { c.AuthKey = "tskey-x"; c.Ephemeral = true; c.Tailnet = "example.org" })
		began := time.Now()
		l.want(up...)
		if d := time.Since(began); d != 0 {
			t.Errorf("took %v of waiting", d)
		}
		synctest.Wait()
		r := f.regs[0]
		if r.Auth.AuthKey != "tskey-x" || !r.Ephemeral || r.Tailnet != "example.org" || r.Version != tailcfg.CurrentCapabilityVersion || r.Hostinfo.Hostname != "h" {
			t.Errorf("registration %+v", r)
		}
		if f.dials != 1 || f.keys != 1 || len(f.updates) != 1 {
			t.Errorf("%d dials, %d key fetches, %d updates", f.dials, f.keys, len(f.updates))
		}
		if u := f.updates[0]; u.DiscoKey.IsZero() || !u.OmitPeers || u.Hostinfo == nil {
			t.Errorf("update %+v", u)
		}
		if s.ControlKey() != f.key.Public() {
			t.Error("wrong control key")
		}
	})
	bubble("registered before", t, func(t *testing.T, f *fake, l *log) {
		f.session(t, l, func(c *SessionConfig) { c.Registered = true; c.ControlKey = f.key.Public() })
		l.want("Connecting", "start", "map", "Connected")
		if f.keys != 0 || len(f.regs) != 0 || f.dials != 1 {
			t.Errorf("%d key fetches, %d registrations, %d dials", f.keys, len(f.regs), f.dials)
		}
	})
	bubble("registered before but forgotten", t, func(t *testing.T, f *fake, l *log) {
		good := f.mapFn
		known := false
		f.mapFn = func(s *stream) {
			if !known {
				http.Error(s.w, "node not found", 404)
				return
			}
			good(s)
		}
		f.register = func(*tailcfg.RegisterRequest) any {
			known = true
			return &tailcfg.RegisterResponse{MachineAuthorized: true}
		}
		began := time.Now()
		f.session(t, l, func(c *SessionConfig) { c.Registered = true; c.AuthKey = "k" })
		l.want("Connecting", "Disconnected: control: /machine/map: HTTP status 404: node not found", "registered", "start", "map", "Connected")
		if time.Since(began) != 0 {
			t.Error("waited")
		}
	})
	for _, answer := range []any{
		&tailcfg.RegisterResponse{Error: "authkey expired"},
		func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "authkey expired", http.StatusUnauthorized)
		},
	} {
		bubble("refused auth key", t, func(t *testing.T, f *fake, l *log) {
			f.register = func(*tailcfg.RegisterRequest) any { return answer }
			began := time.Now()
			s := f.session(t, l, func(c *SessionConfig) { c.AuthKey = "bad" })
			l.want("Connecting", "Failed: control: registration refused: authkey expired...")
			<-s.Done()
			var re *RegisterError
			if !errors.As(s.Err(), &re) || re.Message != "authkey expired" || !re.Terminal || time.Since(began) != 0 {
				t.Errorf("ended with %v after %v", s.Err(), time.Since(began))
			}
		})
	}
	bubble("interactive", t, func(t *testing.T, f *fake, l *log) {
		visited := make(chan struct{})
		f.register = func(r *tailcfg.RegisterRequest) any {
			switch {
			case r.Followup == "":
				return &tailcfg.RegisterResponse{AuthURL: "http://control.test/a/1"}
			case r.Followup == "http://control.test/a/1" && len(f.regs) == 2:
				// expired: another
				return &tailcfg.RegisterResponse{AuthURL: "http://control.test/a/2"}
			}
			<-visited
			return &tailcfg.RegisterResponse{MachineAuthorized: true}
		}
		f.session(t, l)
		l.want("Connecting", `url "http://control.test/a/1"`, "NeedsLogin", `url "http://control.test/a/2"`)
		synctest.Wait()
		close(visited)
		l.want(`url ""`, "registered", "start", "map", "Connected")
	})
	bubble("interactive with a lost connection", t, func(t *testing.T, f *fake, l *log) {
		visited := make(chan struct{})
		f.register = func(r *tailcfg.RegisterRequest) any {
			if r.Followup == "" {
				return &tailcfg.RegisterResponse{AuthURL: "http://control.test/a/1"}
			}
			<-visited
			return &tailcfg.RegisterResponse{MachineAuthorized: true}
		}
		s := f.session(t, l)
		l.want("Connecting", `url "http://control.test/a/1"`, "NeedsLogin")
		synctest.Wait()
		f.cut() // made good without a word
		synctest.Wait()
		s.Nudge()
		l.want("Disconnected: ...", "NeedsLogin")
		synctest.Wait()
		close(visited)
		l.want(`url ""`, "registered", "start", "map", "Connected")
	})
	bubble("interactive, server that does not wait", t, func(t *testing.T, f *fake, l *log) {
		f.register = func(r *tailcfg.RegisterRequest) any {
			if len(f.regs) < 6 {
				return &tailcfg.RegisterResponse{AuthURL: "http://control.test/a/1"}
			}
			return &tailcfg.RegisterResponse{MachineAuthorized: true}
		}
		began := time.Now()
		f.session(t, l)
		l.want("Connecting", `url "http://control.test/a/1"`, "NeedsLogin", `url ""`, "registered", "start", "map", "Connected")
		if time.Since(began) < time.Second {
			t.Error("busy loop")
		}
	})
	bubble("URL refused", t, func(t *testing.T, f *fake, l *log) {
		f.register = func(r *tailcfg.RegisterRequest) any {
			switch len(f.regs) {
			case 1:
				return &tailcfg.RegisterResponse{AuthURL: "http://control.test/a/1"}
			case 2:
				return &tailcfg.RegisterResponse{Error: "login timed out"}
			case 3:
				if r.Followup != "" {
					t.Error("asked for the refused URL again")
				}
				return &tailcfg.RegisterResponse{AuthURL: "http://control.test/a/2"}
			}
			return &tailcfg.RegisterResponse{MachineAuthorized: true}
		}
		f.session(t, l)
		l.want("Connecting", `url "http://control.test/a/1"`, "NeedsLogin", `url "http://control.test/a/2"`, `url ""`, "registered")
	})
	bubble("machine approval", t, func(t *testing.T, f *fake, l *log) {
		approved := make(chan struct{})
		f.register = func(*tailcfg.RegisterRequest) any { return &tailcfg.RegisterResponse{} }
		f.mapFn = func(s *stream) {
			n := self(s)
			n.MachineAuthorized = false
			s.send(&tailcfg.MapResponse{Node: n})
			<-approved
			s.send(&tailcfg.MapResponse{Node: self(s)})
			<-s.ctx.Done()
		}
		f.session(t, l)
		l.want("Connecting", "registered", "NeedsMachineAuth", "start", "map")
		close(approved)
		l.want("map", "Connected")
	})
	bubble("rate limit", t, func(t *testing.T, f *fake, l *log) {
		f.register = func(*tailcfg.RegisterRequest) any {
			if len(f.regs) == 1 {
				return 429
			}
			return &tailcfg.RegisterResponse{MachineAuthorized: true}
		}
		began := time.Now()
		f.session(t, l)
		l.want("Connecting", "Disconnected: control: /machine/register: the server asks to wait 7s: HTTP status 429: status by test", "registered")
		if d := time.Since(began); d != 7*time.Second {
			t.Errorf("came back after %v", d)
		}
	})
}

func TestSessionExpiry(t *testing.T) {
	bubble("server says expired at registration", t, func(t *testing.T, f *fake, l *log) {
		var stored key.NodePrivate
		l.newKey = func(k key.NodePrivate) error { stored = k; return nil }
		f.register = func(r *tailcfg.RegisterRequest) any {
			return &tailcfg.RegisterResponse{MachineAuthorized: true, NodeKeyExpired: len(f.regs) == 1}
		}
		s := f.session(t, l)
		l.want("Connecting", "new key", "registered", "start", "map", "Connected")
		r := f.regs[1]
		if r.OldNodeKey != f.regs[0].NodeKey || r.NodeKey != stored.Public() || !s.NodeKey().Equal(stored) {
			t.Error("wrong keys")
		}
	})
	bubble("expires while connected", t, func(t *testing.T, f *fake, l *log) {
		// The server's clock is an hour ahead of ours, and the key expires in two by ours.
		time.Sleep(time.Until(sane)) // the bubble's time begins in 2000
		f.mapFn = func(s *stream) {
			n := self(s)
			if len(f.regs) == 1 {
				n.KeyExpiry = time.Now().Add(2 * time.Hour)
			}
			at := time.Now().Add(time.Hour)
			s.send(&tailcfg.MapResponse{Node: n, ControlTime: &at})
			for s.ctx.Err() == nil {
				select {
				case <-time.After(time.Minute):
					s.send(&tailcfg.MapResponse{KeepAlive: true})
				case <-s.ctx.Done():
				}
			}
		}
		began := time.Now()
		f.session(t, l)
		l.want(up...)
		l.want("Disconnected: control: map stream: control: the node key has expired", "new key", "registered", "start", "map", "Connected")
		if d := time.Since(began).Round(time.Minute); d != time.Hour {
			t.Errorf("after %v", d)
		}
	})
	bubble("stays expired", t, func(t *testing.T, f *fake, l *log) {
		f.mapFn = func(s *stream) {
			n := self(s)
			n.Expired = true
			s.send(&tailcfg.MapResponse{Node: n})
			<-s.ctx.Done()
		}
		f.session(t, l)
		l.want("Connecting", "registered", "start", "map", "Disconnected: control: the node key has expired", "new key")
		began := time.Now()
		for range 5 {
			l.want("registered", "start", "map", "Disconnected: control: the node key has expired")
		}
		if time.Since(began) < 5*time.Second {
			t.Error("busy loop")
		}
	})
	bubble("key cannot be stored", t, func(t *testing.T, f *fake, l *log) {
		l.newKey = func(k key.NodePrivate) error { return errors.New("disk full") }
		f.register = func(r *tailcfg.RegisterRequest) any { return &tailcfg.RegisterResponse{NodeKeyExpired: true} }
		s := f.session(t, l)
		l.want("Connecting", "new key", "Disconnected: control: storing a new node key: disk full")
		if s.NodeKey().Public() != f.regs[0].NodeKey {
			t.Error("a key that is not stored is in use")
		}
	})
}

func TestSessionReconnect(t *testing.T) {
	bubble("stream ends", t, func(t *testing.T, f *fake, l *log) {
		f.session(t, l)
		l.want(up...)
		time.Sleep(30 * time.Second)
		f.cut()
		l.want("Disconnected: control: map stream: ...", "start", "map", "Connected")
		if len(f.regs) != 1 || f.keys != 1 || f.dials != 2 {
			t.Errorf("%d registrations, %d key fetches, %d dials", len(f.regs), f.keys, f.dials)
		}
		synctest.Wait()
		if len(f.updates) != 2 {
			t.Errorf("%d updates, want one for each stream", len(f.updates))
		}
	})
	bubble("silence", t, func(t *testing.T, f *fake, l *log) {
		began := time.Now()
		f.session(t, l)
		l.want(up...)
		l.want("Disconnected: control: map stream: control: the server fell silent: nothing for 2m0s on the map stream", "start")
		if d := time.Since(began); d < watchdog || d > watchdog+2*time.Second {
			t.Errorf("after %v", d)
		}
	})
	bubble("keep-alives", t, func(t *testing.T, f *fake, l *log) {
		f.mapFn = func(s *stream) {
			s.send(&tailcfg.MapResponse{Node: self(s)})
			for range 60 {
				time.Sleep(time.Minute)
				s.send(&tailcfg.MapResponse{KeepAlive: true})
			}
		}
		f.session(t, l)
		began := time.Now()
		l.want(up...)
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		if len(l.events) > 0 {
			t.Errorf("after %v: %s", time.Since(began), <-l.events)
		}
		l.want("Disconnected: ...")
	})
	bubble("unreachable, then a nudge", t, func(t *testing.T, f *fake, l *log) {
		down := true
		s := f.session(t, l, func(c *SessionConfig) {
			c.Dial = func(ctx context.Context, n, a string) (net.Conn, error) {
				if down {
					return nil, errors.New("no route to host")
				}
				return f.dial(ctx, n, a)
			}
		})
		l.want("Connecting")
		var at []time.Duration
		began := time.Now()
		for range 8 {
			l.want(fmt.Sprintf("Disconnected: control: fetching the server's key from http://control.test:8080/key?v=%d: no route to host", tailcfg.CurrentCapabilityVersion))
			at = append(at, time.Since(began))
		}
		if at[3] > 15*time.Second || at[7] < 30*time.Second || at[7] > 3*time.Minute {
			t.Errorf("attempts at %v", at)
		}
		synctest.Wait()
		down = false
		began = time.Now()
		s.Nudge()
		l.want("registered", "start", "map", "Connected")
		if time.Since(began) != 0 {
			t.Errorf("the nudge took %v", time.Since(began))
		}
	})
	bubble("dead connection, found by a nudge", t, func(t *testing.T, f *fake, l *log) {
		s := f.session(t, l)
		l.want(up...)
		synctest.Wait()
		f.mu.Lock()
		release := make(chan struct{})
		defer close(release)
		f.update = func(*tailcfg.MapRequest) int { <-release; return 200 }
		f.mu.Unlock()
		began := time.Now()
		s.Nudge()
		l.want("Disconnected: ...", "start")
		if d := time.Since(began); d < probeTimeout || d > probeTimeout+time.Second {
			t.Errorf("took %v", d)
		}
	})
	bubble("handler error", t, func(t *testing.T, f *fake, l *log) {
		n := 0
		l.onMap = func(*tailcfg.MapResponse) error {
			if n++; n == 1 {
				return errors.New("cannot apply")
			}
			return nil
		}
		f.session(t, l)
		l.want("Connecting", "registered", "start", "map", "Disconnected: control: applying a map response: cannot apply", "start", "map", "Connected")
	})
}

// TestAbortDial has a dial given up; whose context that was must not look like the caller's.
func TestAbortDial(t *testing.T) {
	bubble("network changed", t, func(t *testing.T, f *fake, _ *log) {
		c := f.client(t, func(c *Config) {
			c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
		})
		go func() {
			synctest.Wait()
			c.AbortDial()
		}()
		if _, _, err := c.get(t.Context()); !errors.Is(err, ErrAborted) || errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestManyURLs has every answer be another URL.
func TestManyURLs(t *testing.T) {
	bubble("hostile server", t, func(t *testing.T, f *fake, l *log) {
		n := 0
		f.register = func(*tailcfg.RegisterRequest) any {
			n++
			return &tailcfg.RegisterResponse{AuthURL: fmt.Sprint("http://login.test/", n)}
		}
		began := time.Now()
		f.session(t, l)
		l.want("Connecting", `url "http://login.test/1"`, "NeedsLogin")
		for i := range 20 {
			l.want(fmt.Sprintf("url %q", fmt.Sprint("http://login.test/", i+2)))
			if i == 0 && time.Since(began) != 0 {
				t.Errorf("the first was followed up after %v", time.Since(began))
			}
		}
		if d := time.Since(began); d < 2*time.Minute {
			t.Errorf("21 URLs within %v", d)
		}
	})
}

// hanging returns a dial function for addresses that nobody answers at, and how many were dialled at a time.
func hanging(addr func(host string) bool, f *fake) (dial func(ctx context.Context, network, addr string) (net.Conn, error), most *atomic.Int32) {
	var open atomic.Int32
	most = new(atomic.Int32)
	return func(ctx context.Context, network, to string) (net.Conn, error) {
		if host, _, _ := net.SplitHostPort(to); !addr(host) {
			return f.dial(ctx, network, to)
		}
		n := open.Add(1)
		defer open.Add(-1)
		for m := most.Load(); m < n && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}, most
}

// TestManyPings has more asked for than are answered at a time.
func TestManyPings(t *testing.T) {
	bubble("hostile server", t, func(t *testing.T, f *fake, l *log) {
		more := make(chan struct{})
		answered := make(chan string, 1)
		f.inner = func(w http.ResponseWriter, r *http.Request) { answered <- r.URL.Path }
		f.mapFn = func(s *stream) {
			s.send(&tailcfg.MapResponse{Node: self(s)})
			for i := range 100 {
				s.send(&tailcfg.MapResponse{PingRequest: &tailcfg.PingRequest{URL: fmt.Sprintf("http://192.0.2.1:81/%d", i)}})
			}
			later := &tailcfg.MapResponse{PingRequest: &tailcfg.PingRequest{URL: "http://control.test/later", URLIsNoise: true}}
			s.send(later)
			<-more
			s.send(later)
			<-s.ctx.Done()
		}
		dial, most := hanging(func(host string) bool { return host == "192.0.2.1" }, f)
		f.session(t, l, func(c *SessionConfig) { c.Dial = dial })
		synctest.Wait()
		if n := most.Load(); n != maxPings {
			t.Errorf("%d dials at a time", n)
		}
		time.Sleep(pingTimeout)
		synctest.Wait() // all have given up
		close(more)
		select {
		case path := <-answered:
			if path != "/later" {
				t.Errorf("answered %s", path)
			}
		case <-time.After(time.Hour):
			t.Error("none is answered any more")
		}
	})
}

// TestLongDialPlan has a plan of more addresses than are tried.
func TestLongDialPlan(t *testing.T) {
	bubble("hostile server", t, func(t *testing.T, f *fake, _ *log) {
		plan := &tailcfg.ControlDialPlan{}
		for i := range 200 {
			plan.Candidates = append(plan.Candidates, tailcfg.ControlIPCandidate{IP: netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), Priority: i})
		}
		dial, most := hanging(func(host string) bool {
			a, err := netip.ParseAddr(host)
			if err == nil && int(a.As4()[3]) < len(plan.Candidates)-maxCandidates {
				t.Errorf("dialled %v, which is not of the first priorities", a)
			}
			return err == nil
		}, f)
		c := f.client(t, func(c *Config) { c.Dial, c.ControlKey = dial, f.key.Public() })
		c.SetDialPlan(plan)
		if _, _, err := c.get(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := most.Load(); n != maxCandidates {
			t.Errorf("%d dials at a time", n)
		}
	})
}

func TestSessionStream(t *testing.T) {
	bubble("deltas, pings and a dial plan", t, func(t *testing.T, f *fake, l *log) {
		var path, method, body string
		answered := make(chan struct{}, 4)
		f.inner = func(w http.ResponseWriter, r *http.Request) {
			b := make([]byte, 4096)
			n, _ := r.Body.Read(b)
			path, method, body = r.URL.Path, r.Method, string(b[:n])
			answered <- struct{}{}
		}
		step := make(chan struct{})
		f.mapFn = func(s *stream) {
			s.send(&tailcfg.MapResponse{KeepAlive: true})
			s.send(&tailcfg.MapResponse{Node: self(s)})
			<-step
			s.send(&tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{7}})
			<-step
			s.send(&tailcfg.MapResponse{KeepAlive: true, PingRequest: &tailcfg.PingRequest{URL: "https://unused/p/1", URLIsNoise: true}})
			<-step
			s.send(&tailcfg.MapResponse{PingRequest: &tailcfg.PingRequest{URL: "https://unused/p/2", Types: "c2n", Payload: []byte("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")}})
			<-step
			s.send(&tailcfg.MapResponse{KeepAlive: true, PingRequest: &tailcfg.PingRequest{URL: "https://unused/p/3", URLIsNoise: true, Types: "TSMP", IP: netip.MustParseAddr("100.64.0.1")}})
			<-s.ctx.Done()
		}
		f.session(t, l)
		l.want(up...)
		step <- struct{}{}
		l.want("map")
		if !reflect.DeepEqual(l.lastMap.PeersRemoved, []tailcfg.NodeID{7}) {
			t.Errorf("delta %+v", l.lastMap)
		}
		step <- struct{}{}
		<-answered
		if path != "/p/1" || method != "HEAD" {
			t.Errorf("%s %s", method, path)
		}
		step <- struct{}{}
		<-answered
		if path != "/p/2" || method != "POST" || !strings.HasPrefix(body, "HTTP/1.1 200 OK\r\n") || !strings.HasSuffix(body, "\r\n\r\nhi") {
			t.Errorf("%s %s %q", method, path, body)
		}
		l.want("map")
		step <- struct{}{}
		<-answered
		l.want("ping TSMP")
		if path != "/p/3" || method != "POST" || body != `{"Type":"TSMP","LatencySeconds":0.25}` {
			t.Errorf("%s %s %q", method, path, body)
		}
	})
	bubble("updates", t, func(t *testing.T, f *fake, l *log) {
		s := f.session(t, l)
		l.want(up...)
		synctest.Wait()
		began := time.Now()
		eps := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:41641")}
		s.SetEndpoints(eps, []tailcfg.EndpointType{tailcfg.EndpointSTUN})
		s.SetEndpoints(eps, []tailcfg.EndpointType{tailcfg.EndpointSTUN})
		synctest.Wait()
		if len(f.updates) != 2 || !reflect.DeepEqual(f.updates[1].Endpoints, eps) || time.Since(began) != 0 {
			t.Fatalf("updates %+v", f.updates)
		}
		for i := range 1000 {
			s.SetHostinfo(&tailcfg.Hostinfo{Hostname: "h", NetInfo: &tailcfg.NetInfo{PreferredDERP: i + 1}})
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if n := len(f.updates); n > 25 || f.updates[n-1].Hostinfo.NetInfo.PreferredDERP != 1000 {
			t.Errorf("%d updates, the last one %+v", n, f.updates[n-1].Hostinfo)
		}
		// A refused one is made again.
		n := len(f.updates)
		f.mu.Lock()
		f.update = func(*tailcfg.MapRequest) int { return map[bool]int{true: 500, false: 200}[len(f.updates) == n+1] }
		f.mu.Unlock()
		s.SetDiscoKey(key.NewDisco().Public())
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if len(f.updates) != n+2 {
			t.Errorf("%d updates after one that failed", len(f.updates)-n)
		}
	})
	bubble("frame without the node", t, func(t *testing.T, f *fake, l *log) {
		f.mapFn = func(s *stream) { s.send(&tailcfg.MapResponse{Domain: "x"}); <-s.ctx.Done() }
		f.session(t, l)
		l.want("Connecting", "registered", "Disconnected: control: malformed map response: the first one says nothing of this node")
	})
	bubble("control asks to sleep", t, func(t *testing.T, f *fake, l *log) {
		f.mapFn = func(s *stream) {
			s.send(&tailcfg.MapResponse{Node: self(s), Debug: &tailcfg.Debug{SleepSeconds: 1e9}})
			<-s.ctx.Done()
		}
		began := time.Now()
		f.session(t, l)
		l.want(up...)
		if d := time.Since(began); d != maxSleep {
			t.Errorf("slept %v", d)
		}
	})
}

func TestSessionEnd(t *testing.T) {
	bubble("logout", t, func(t *testing.T, f *fake, l *log) {
		s := f.session(t, l)
		l.want(up...)
		f.mu.Lock()
		f.register = func(r *tailcfg.RegisterRequest) any {
			f.cut() // and what the session sees of it does not make it register again
			return &tailcfg.RegisterResponse{}
		}
		f.mu.Unlock()
		err := s.Logout(t.Context())
		if err == nil {
			t.Error("a logout whose answer was lost succeeded")
		}
		f.mu.Lock()
		f.register = func(r *tailcfg.RegisterRequest) any { return &tailcfg.RegisterResponse{} }
		n := len(f.regs)
		f.mu.Unlock()
		if err := s.Logout(t.Context()); err != nil {
			t.Fatal(err)
		}
		if r := f.regs[n]; !r.Expiry.Equal(time.Unix(123, 0)) || r.NodeKey != s.NodeKey().Public() {
			t.Errorf("logout request %+v", r)
		}
		<-s.Done()
		if !errors.Is(s.Err(), ErrLoggedOut) {
			t.Error(s.Err())
		}
		for {
			if e := <-l.events; e == "LoggedOut" {
				break
			}
		}
	})
	bubble("logout of a session that never registered", t, func(t *testing.T, f *fake, l *log) {
		f.register = func(*tailcfg.RegisterRequest) any { return &tailcfg.RegisterResponse{AuthURL: "u"} }
		s := f.session(t, l)
		l.want("Connecting", `url "u"`, "NeedsLogin")
		if err := s.Logout(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.want(`url ""`, "LoggedOut")
	})
	bubble("close at any time", t, func(t *testing.T, f *fake, l *log) {
		for i := range 200 {
			s := f.session(t, l)
			go s.Nudge()
			go s.Close()
			for range i % 40 {
				// let others run
				<-time.After(0)
			}
			s.Close()
			s.Close()
			if err := s.Logout(t.Context()); !errors.Is(err, ErrClosed) {
				t.Fatal(err)
			}
			for len(l.events) > 0 {
				<-l.events
			}
		}
	})
	t.Run("close without start", func(t *testing.T) {
		s, err := NewSession(SessionConfig{ServerURL: "https://x", MachineKey: key.NewMachine(), NodeKey: key.NewNode(), Handler: newLog(t)})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		s.Start()
		s.Close()
	})
}
