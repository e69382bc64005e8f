package control

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestNewRefuses(t *testing.T) {
	for _, u := range []string{"", "control.test", "ftp://x", "http://", "https://:443", "http://[::1"} {
		if _, err := New(Config{ServerURL: u, MachineKey: key.NewMachine()}); err == nil {
			t.Errorf("New accepts the URL %q", u)
		}
	}
	if _, err := New(Config{ServerURL: "https://x"}); err == nil {
		t.Error("New accepts no machine key")
	}
}

// What answers under a control URL and is no control server gives an error that names the URL
// and says what came.
func TestNotControl(t *testing.T) {
	page := func(status int, ct, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", ct)
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	key := func(h http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/key" {
				page(200, "application/json", `{"publicKey":"mkey:`+strings.Repeat("5e", 32)+`"}`)(w, r)
				return
			}
			h(w, r)
		}
	}
	tests := []struct {
		name  string
		serve http.HandlerFunc
		want  []string
		not   bool // wraps ErrNotControl
	}{
		{"HTML", page(200, "text/html", "<!doctype html>\n<title>Log in to the hotel</title>"), []string{"http://control.test:8080/key?v=", "text/html", "hotel"}, true},
		{"not found", page(404, "text/plain", "no such page"), []string{"404", "no such page"}, true},
		{"redirect", page(302, "text/plain", ""), []string{"302"}, true},
		{"server error", page(502, "text/html", "bad gateway"), []string{"502", "bad gateway"}, false},
		{"garbage", page(200, "", "\x00\x01\x02\xff"), []string{`\x00`}, true},
		{"endless", func(w http.ResponseWriter, r *http.Request) {
			b := bytes.Repeat([]byte("x"), 1<<16)
			for range 1000 { // the connection holds whatever is not read yet
				if _, err := w.Write(b); err != nil {
					return
				}
			}
			<-r.Context().Done()
		}, []string{"xxx"}, true},
		{"old key form", page(200, "text/plain", strings.Repeat("0", 64)), []string{"000"}, true},
		{"no key", page(200, "application/json", "{}"), []string{"no key for the Noise protocol"}, true},
		{"short key", page(200, "application/json", `{"publicKey":"mkey:00"}`), []string{"mkey:00"}, true},
		{"no upgrade", key(page(200, "text/html", "welcome")), []string{"/ts2021", "200 OK", "welcome"}, true},
		{"upgrade to something else", key(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Upgrade", "websocket")
			w.Header().Set("Connection", "upgrade")
			w.WriteHeader(101)
			c, _, _ := w.(http.Hijacker).Hijack()
			c.Close()
		}), []string{"websocket"}, true},
		{"busy", page(503, "text/plain", "later"), []string{"asks to wait", "later"}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.outer = test.serve
				_, err := f.client(t).Register(t.Context(), &tailcfg.RegisterRequest{})
				if err == nil {
					t.Fatal("no error")
				}
				for _, w := range test.want {
					if !strings.Contains(err.Error(), w) {
						t.Errorf("%v\nsays nothing of %q", err, w)
					}
				}
				if errors.Is(err, ErrNotControl) != test.not {
					t.Errorf("ErrNotControl: %v, want %v: %v", !test.not, test.not, err)
				}
				if len(err.Error()) > 500 {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
			})
		})
	}
}

func TestServerNeverAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		release := make(chan struct{})
		defer close(release)
		f.outer = func(w http.ResponseWriter, r *http.Request) { <-release }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := f.client(t).Register(ctx, &tailcfg.RegisterRequest{})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		began := time.Now()
		if _, err := f.client(t).Register(t.Context(), &tailcfg.RegisterRequest{}); err == nil || time.Since(began) > dialTimeout {
			t.Errorf("without a deadline: %v after %v", err, time.Since(began))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		release := make(chan struct{})
		defer close(release)
		f.register = func(*tailcfg.RegisterRequest) any { <-release; return 500 }
		c := f.client(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Register(ctx, &tailcfg.RegisterRequest{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("within the channel: %v", err)
		}
		done := make(chan error)
		go func() { _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); done <- err }()
		synctest.Wait()
		c.Close()
		if err := <-done; err == nil {
			t.Error("Close does not end a request")
		}
	})
}

func TestControlKey(t *testing.T) {
	t.Run("changed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			c := f.client(t, func(c *Config) { c.ControlKey = key.NewMachine().Public() })
			if _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); err != nil {
				t.Fatal(err)
			}
			if c.ControlKey() != f.key.Public() || f.keys != 1 {
				t.Error("the new key was not fetched")
			}
			// And again, while connected.
			f.mu.Lock()
			f.key = key.NewMachine()
			f.mu.Unlock()
			f.cut()
			synctest.Wait()
			if _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("wrong", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.announce = key.NewMachine().Public()
			_, err := f.client(t).Register(t.Context(), &tailcfg.RegisterRequest{})
			if !errors.Is(err, ErrWrongKey) || !strings.Contains(err.Error(), f.announce.String()) || f.keys != 1 {
				t.Errorf("%d fetches: %v", f.keys, err)
			}
		})
	})
}

func TestRegisterAnswers(t *testing.T) {
	tests := []struct {
		name     string
		answer   any
		followup string
		check    func(error) bool
	}{
		{"error text", &tailcfg.RegisterResponse{Error: "no"}, "", func(err error) bool {
			var e *RegisterError
			return errors.As(err, &e) && e.Message == "no" && e.Terminal
		}},
		{"error text for a follow-up", &tailcfg.RegisterResponse{Error: "no"}, "u", func(err error) bool {
			var e *RegisterError
			return errors.As(err, &e) && !e.Terminal
		}},
		{"429", 429, "", func(err error) bool {
			var e *RateLimitError
			return errors.As(err, &e) && e.RetryAfter == 7*time.Second && e.Text == "status by test"
		}},
		{"500", 500, "", func(err error) bool {
			var e *HTTPError
			var r *RegisterError
			return errors.As(err, &e) && e.Status == 500 && !errors.As(err, &r)
		}},
		{"403", 403, "", func(err error) bool {
			var e *RegisterError
			return errors.As(err, &e) && e.Terminal && e.Message == "status by test"
		}},
		{"text with the auth key", &tailcfg.RegisterResponse{Error: "no tskey-secret here"}, "", func(err error) bool {
			return !strings.Contains(err.Error(), "tskey-secret") && strings.Contains(err.Error(), "here")
		}},
		{"malformed", "{", "", func(err error) bool { return strings.Contains(err.Error(), "malformed answer") }},
		{"too long", strings.Repeat(" ", maxReply+1), "", func(err error) bool { return errors.Is(err, ErrTooLarge) }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.register = func(*tailcfg.RegisterRequest) any { return test.answer }
				_, err := f.client(t).Register(t.Context(), &tailcfg.RegisterRequest{Followup: test.followup, Auth: &tailcfg.RegisterResponseAuth{AuthKey: "tskey-secret"}})
				if err == nil || !test.check(err) {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for v, want := range map[string]time.Duration{
		"7": 7 * time.Second, "3600": time.Hour, "Fri, 02 Jan 2026 03:05:05 GMT": time.Minute,
		"": 0, "-1": 0, "0": 0, "3601": 0, "99999999999999999999": 0, "x": 0, "Fri, 02 Jan 2026 03:04:04 GMT": 0,
	} {
		d := retryAfter(v, now)
		if want != 0 && d != want || want == 0 && (d < 5*time.Second || d > 10*time.Second) {
			t.Errorf("%q: %v, want %v", v, d, want)
		}
	}
}

// bomb is a frame that unpacks to n bytes.
func bomb(n int) []byte {
	var b bytes.Buffer
	e, _ := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1)) // streaming: no content size in the header
	chunk := make([]byte, 1<<20)
	for range n >> 20 {
		e.Write(chunk)
	}
	e.Close()
	return b.Bytes()
}

func TestMapStreamBadInput(t *testing.T) {
	good := func(s *stream) { s.send(&tailcfg.MapResponse{Node: self(s)}) }
	tests := []struct {
		name string
		send func(*stream)
		is   error
		text string
	}{
		{"100 MB announced", func(s *stream) { s.raw(binary.LittleEndian.AppendUint32(nil, 100<<20)) }, ErrTooLarge, "104857600 bytes"},
		{"length with the top bit", func(s *stream) { s.raw([]byte{0, 0, 0, 0x80}) }, ErrTooLarge, ""},
		{"unpacks to 100 MB", func(s *stream) { s.raw(frame(bomb(100 << 20))) }, ErrTooLarge, "unpacks"},
		{"malformed JSON", func(s *stream) { s.raw(frame(compress([]byte(`{"Node":`)))) }, ErrBadMap, "unexpected end"},
		{"wrong JSON type", func(s *stream) { s.raw(frame(compress([]byte(`{"Peers":7}`)))) }, ErrBadMap, "Peers"},
		{"JSON not compressed", func(s *stream) { s.raw(frame([]byte(`{"KeepAlive":true}`))) }, ErrBadMap, ""},
		{"empty frame", func(s *stream) { s.raw(frame(nil)) }, ErrBadMap, ""},
		{"ends", func(s *stream) {}, io.EOF, "the server ended it"},
		{"ends within a frame", func(s *stream) { s.raw(frame(make([]byte, 100))[:50]) }, io.ErrUnexpectedEOF, ""},
		{"ends within a length", func(s *stream) { s.raw([]byte{1}) }, io.ErrUnexpectedEOF, ""},
		{"aborts", func(s *stream) { panic(http.ErrAbortHandler) }, nil, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.mapFn = func(s *stream) { good(s); test.send(s) }
				n := 0
				err := f.client(t).Map(t.Context(), &tailcfg.MapRequest{}, func(*tailcfg.MapResponse) error { n++; return nil })
				if n != 1 || err == nil || test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.text) {
					t.Errorf("%d frames, then %v", n, err)
				}
			})
		})
	}
	t.Run("refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.mapFn = func(s *stream) { http.Error(s.w, "who?", http.StatusUnauthorized) }
			err := f.client(t).Map(t.Context(), &tailcfg.MapRequest{}, nil)
			var e *HTTPError
			if !errors.As(err, &e) || e.Status != 401 || e.Text != "who?" {
				t.Errorf("got %v", err)
			}
		})
	})
}

// An announced length costs memory only as the bytes come.
func TestMapStreamMemory(t *testing.T) {
	least := uint64(math.MaxUint64)
	for range 10 { // others may allocate meanwhile
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := newFrames(bytes.NewReader(binary.LittleEndian.AppendUint32(nil, maxFrame))).next()
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Fatal("a frame that has not come")
		}
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	if least > 1<<20 {
		t.Errorf("allocated %d bytes", least)
	}
}

func TestMapStreamKeepsNoLargeBuffers(t *testing.T) {
	var b bytes.Buffer
	b.Write(frame(compress(bigMap(1000))))
	f := newFrames(&b)
	if _, err := f.next(); err != nil {
		t.Fatal(err)
	}
	if cap(f.in)+cap(f.out) > 2*keepBuffer || f.dec != nil {
		t.Errorf("keeps %d and %d bytes", cap(f.in), cap(f.out))
	}
}

// refuser is a network on which nothing but what it lists answers.
type refuser struct {
	f     *fake
	allow map[string]bool
	tried chan string
}

func (r *refuser) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	r.tried <- addr
	if !r.allow[addr] {
		return nil, fmt.Errorf("connection refused by %s", addr)
	}
	return r.f.dial(ctx, network, addr)
}

func TestRoutes(t *testing.T) {
	for _, test := range []struct{ url, first, second string }{
		{"https://control.test", "http://control.test:80/ts2021", "https://control.test:443/ts2021"},
		{"https://control.test/", "http://control.test:80/ts2021", "https://control.test:443/ts2021"},
		{"https://control.test:443", "https://control.test:443/ts2021", ""},
		{"https://control.test:8443/base/", "https://control.test:8443/base/ts2021", ""},
		{"http://control.test:8080", "http://control.test:8080/ts2021", ""},
		{"http://control.test", "http://control.test:80/ts2021", "https://control.test:443/ts2021"},
		{"http://10.1.2.3", "http://10.1.2.3:80/ts2021", ""},
		{"http://localhost", "http://localhost:80/ts2021", ""},
		{"http://[::1]:7000", "http://[::1]:7000/ts2021", ""},
	} {
		c, err := New(Config{ServerURL: test.url, MachineKey: key.NewMachine()})
		if err != nil {
			t.Fatal(err)
		}
		first, second := c.routes(false)
		got := ""
		if second != nil {
			got = second.String()
		}
		if first.String() != test.first || got != test.second {
			t.Errorf("%s: %s, then %q", test.url, first, got)
		}
		c.Close()
	}
}

func TestDialPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		r := &refuser{f: f, allow: map[string]bool{"192.0.2.2:8080": true, "control.test:8080": true}, tried: make(chan string, 100)}
		c := f.client(t, func(c *Config) { c.Dial = r.dial; c.ControlKey = f.key.Public() })
		plan := &tailcfg.ControlDialPlan{Candidates: []tailcfg.ControlIPCandidate{
			{IP: netip.MustParseAddr("192.0.2.1"), Priority: 2},
			{IP: netip.MustParseAddr("192.0.2.2"), Priority: 1, DialStartDelaySec: 1e300},
			{ACEHost: "ace.test"},
		}}
		c.SetDialPlan(plan)
		began := time.Now()
		if _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); err != nil {
			t.Fatal(err)
		}
		if a, b := <-r.tried, <-r.tried; a != "192.0.2.1:8080" || b != "192.0.2.2:8080" || time.Since(began) != 10*time.Second {
			t.Errorf("tried %s and %s, %v", a, b, time.Since(began))
		}
		// None answers: the name does.
		plan.Candidates = plan.Candidates[:1]
		c.Drop()
		if _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); err != nil {
			t.Fatal(err)
		}
		if a, b := <-r.tried, <-r.tried; a != "192.0.2.1:8080" || b != "control.test:8080" {
			t.Errorf("tried %s and %s", a, b)
		}
	})
}

// Port 80 comes first where the key is known, and port 443 when that is slow or refuses.
func TestPortFallback(t *testing.T) {
	for _, slow := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			type at struct {
				addr string
				d    time.Duration
			}
			tried := make(chan at, 10)
			began := time.Now()
			c := f.client(t, func(c *Config) {
				c.ServerURL = "https://control.test"
				c.ControlKey = f.key.Public()
				c.Dial = func(ctx context.Context, n, a string) (net.Conn, error) {
					tried <- at{a, time.Since(began)}
					if slow && a == "control.test:80" {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					return nil, errors.New("refused " + a)
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := c.Register(ctx, &tailcfg.RegisterRequest{})
			if err == nil {
				t.Fatal("no error")
			}
			want := map[bool]time.Duration{true: fallbackDelay, false: 0}[slow]
			if a, b := <-tried, <-tried; a.addr != "control.test:80" || b != (at{"control.test:443", want}) {
				t.Errorf("slow %v: tried %v and %v", slow, a, b)
			}
			if !slow && (!strings.Contains(err.Error(), "refused control.test:80") || !strings.Contains(err.Error(), "refused control.test:443")) {
				t.Errorf("the error keeps something back: %v", err)
			}
		})
	}
}

func TestC2N(t *testing.T) {
	for _, test := range []struct{ in, status, body string }{
		{"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK", ""},
		{"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "HTTP/1.1 200 OK", "abc"},
		{"GET /debug/goroutines HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 400 Bad Request", "unknown c2n path\n"},
		{"", "HTTP/1.1 400 Bad Request", "malformed request\n"},
		{"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", "HTTP/1.1 400 Bad Request", "malformed body\n"},
	} {
		out := string(c2n([]byte(test.in)))
		if !strings.HasPrefix(out, test.status+"\r\n") || !strings.HasSuffix(out, "\r\n\r\n"+test.body) {
			t.Errorf("%q: %q", test.in, out)
		}
	}
}

// bigMap is the JSON of a map with n peers.
func bigMap(n int) []byte {
	m := &tailcfg.MapResponse{Node: &tailcfg.Node{ID: 1, Key: key.NewNode().Public()}, Domain: "example.org"}
	online := true
	for i := range n {
		k := key.NewNode().Public()
		ip := netip.AddrFrom4([4]byte{100, 64 + byte(i>>16), byte(i >> 8), byte(i)})
		m.Peers = append(m.Peers, &tailcfg.Node{
			ID: tailcfg.NodeID(i + 2), StableID: tailcfg.StableNodeID(fmt.Sprintf("n%08xCNTRL", i)), Name: fmt.Sprintf("node-%d.example.ts.net.", i),
			User: 1, Key: k, Machine: key.MachinePublicFromRaw(k.Raw()), DiscoKey: key.DiscoPublicFromRaw(k.Raw()),
			Addresses: []netip.Prefix{netip.PrefixFrom(ip, 32)}, AllowedIPs: []netip.Prefix{netip.PrefixFrom(ip, 32)},
			Endpoints: []netip.AddrPort{netip.AddrPortFrom(ip, 41641), netip.AddrPortFrom(ip, 1234)},
			HomeDERP:  i%20 + 1, Hostinfo: &tailcfg.Hostinfo{OS: "linux", Hostname: fmt.Sprintf("node-%d", i), Services: []tailcfg.Service{{Proto: "peerapi4", Port: 5000}}},
			Created: time.Unix(1700000000, 0).UTC(), Cap: 119, Online: &online, MachineAuthorized: true,
		})
	}
	j, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return j
}

func BenchmarkMapDecode10k(b *testing.B) {
	j := bigMap(10000)
	fr := frame(compress(j))
	b.SetBytes(int64(len(j)))
	b.ReportMetric(float64(len(fr)), "wire-bytes")
	b.ReportAllocs()
	for b.Loop() {
		f := newFrames(bytes.NewReader(fr))
		m, err := f.next()
		if err != nil {
			b.Fatal(err)
		}
		n := 0
		if err := m.EachPeer(func(*tailcfg.Node) error { n++; return nil }); err != nil || n != 10000 {
			b.Fatal(n, err)
		}
	}
}

func FuzzMapFrames(f *testing.F) {
	f.Add(frame(compress([]byte(`{"KeepAlive":true}`))))
	f.Add(append(frame(compress([]byte(`{"KeepAlive":true}`))), frame(compress([]byte(`{"KeepAlive":true}`)))...))
	f.Add(frame(compress(bigMap(2))))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add(frame([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0xff, 0xff, 0xff, 0xff}))
	f.Fuzz(func(t *testing.T, b []byte) {
		fr := newFrames(bytes.NewReader(b))
		defer fr.close()
		for range 100 {
			if m, err := fr.next(); err != nil {
				return
			} else if m == nil {
				t.Fatal("no frame and no error")
			}
		}
	})
}

func FuzzC2N(f *testing.F) {
	f.Add([]byte("GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add([]byte("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if out := c2n(b); !bytes.HasPrefix(out, []byte("HTTP/1.1 ")) {
			t.Fatalf("%q", out)
		}
	})
}
