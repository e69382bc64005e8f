package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// peer is a client of few words, on one end of a net.Pipe. A pipe holds nothing: what the peer
// does not read, the server cannot write.
type peer struct {
	t    testing.TB
	nc   net.Conn
	rd   *derp.Reader
	priv key.NodePrivate
	pub  key.NodePublic
	info derp.ServerInfo
	err  chan error // what Serve returned
}

// dial connects a peer up to the greeting.
func dial(t testing.TB, s *Server, priv key.NodePrivate) *peer {
	near, far := net.Pipe()
	return dialOver(t, s, priv, near, far)
}

func dialOver(t testing.TB, s *Server, priv key.NodePrivate, near, far net.Conn) *peer {
	p := &peer{t: t, nc: near, rd: derp.NewReader(near, 0, nil), priv: priv, pub: priv.Public(), err: make(chan error, 1)}
	go func() { p.err <- s.Serve(far, nil) }()
	return p
}

// join connects a peer and completes the handshake.
func join(t testing.TB, s *Server, priv key.NodePrivate) *peer {
	t.Helper()
	p := dial(t, s, priv)
	p.enter(s)
	return p
}

// enter completes the handshake.
func (p *peer) enter(s *Server) {
	p.t.Helper()
	ft, b := p.next()
	k, err := derp.ParseServerKey(b)
	if ft != derp.ServerKey || err != nil || k != s.PublicKey() {
		p.t.Fatalf("greeting: %v %v", ft, err)
	}
	hello, err := derp.AppendClientInfo(nil, p.priv, k, derp.ClientInfo{Version: 2})
	if err != nil {
		p.t.Fatal(err)
	}
	p.write(hello)
	ft, b = p.next()
	if p.info, err = derp.ParseServerInfo(p.priv, k, b); ft != derp.ServerInfoT || err != nil {
		p.t.Fatalf("server info: %v %v", ft, err)
	}
}

func (p *peer) next() (derp.FrameType, []byte) {
	p.t.Helper()
	ft, b, err := p.rd.Next()
	if err != nil {
		p.t.Fatalf("read: %v", err)
	}
	return ft, bytes.Clone(b)
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatalf("write: %v", err)
	}
}

func (p *peer) send(to key.NodePublic, packet string) {
	p.t.Helper()
	p.write(derp.AppendPacket(nil, derp.SendPacket, to, []byte(packet)))
}

// settle waits until the server has handled everything that p wrote. p must have nothing else to read.
func (p *peer) settle() {
	p.t.Helper()
	p.write(derp.AppendPing(nil, derp.Ping, [8]byte{9}))
	p.want(derp.Pong, string([]byte{9, 0, 0, 0, 0, 0, 0, 0}))
}

func (p *peer) want(ft derp.FrameType, payload string) {
	p.t.Helper()
	got, b := p.next()
	if got != ft || string(b) != payload {
		p.t.Fatalf("got %v %q, want %v %q", got, b, ft, payload)
	}
}

func (p *peer) wantPacket(from key.NodePublic, packet string) {
	p.t.Helper()
	p.want(derp.RecvPacket, string(from.AppendTo(nil))+packet)
}

func (p *peer) wantGone(k key.NodePublic, reason byte) {
	p.t.Helper()
	p.want(derp.PeerGone, string(append(k.AppendTo(nil), reason)))
}

// wantEnd reads until the server hangs up; it returns what Serve returned.
func (p *peer) wantEnd() error {
	p.t.Helper()
	for {
		if _, _, err := p.rd.Next(); err != nil {
			break
		}
	}
	return <-p.err
}

// run runs a test in a bubble of virtual time with a server.
func run(t *testing.T, cfg Config, f func(t *testing.T, s *Server)) {
	synctest.Test(t, func(t *testing.T) {
		s := New(cfg)
		defer s.Close()
		f(t, s)
	})
}

func TestForward(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		a, b := join(t, s, key.NewNode()), join(t, s, key.NewNode())
		for i := range 10 {
			a.send(b.pub, fmt.Sprint(i))
			b.wantPacket(a.pub, fmt.Sprint(i))
		}
		big := strings.Repeat("x", derp.MaxPacket)
		b.send(a.pub, big)
		a.wantPacket(b.pub, big)
		a.send(a.pub, "to myself")
		a.wantPacket(a.pub, "to myself")
		if !s.Connected(a.pub) || s.Connected(key.NewNode().Public()) {
			t.Error("Connected")
		}
		synctest.Wait() // what is counted after it is sent
		if got := s.Stats(); got.PacketsIn != 12 || got.PacketsOut != 12 || got.BytesIn != got.BytesOut || got.Clients != 2 {
			t.Errorf("%+v", got)
		}
	})
}

func TestPeerGone(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		a, b, c := join(t, s, key.NewNode()), join(t, s, key.NewNode()), join(t, s, key.NewNode())
		a.send(b.pub, "hi")
		b.wantPacket(a.pub, "hi")
		c.send(a.pub, "hi")
		a.wantPacket(c.pub, "hi")
		a.nc.Close()
		if err := <-a.err; err != nil {
			t.Errorf("a client that leaves is no error: %v", err)
		}
		b.wantGone(a.pub, derp.GoneDisconnected) // it heard of a
		c.wantGone(a.pub, derp.GoneDisconnected) // it sent to a

		// Strangers get an answer, but no flood of them.
		for range 10 {
			b.send(a.pub, "still there?")
		}
		for range notHereBurst {
			b.wantGone(a.pub, derp.GoneNotHere)
		}
		b.settle()
		time.Sleep(time.Second)
		b.send(a.pub, "still there?")
		b.wantGone(a.pub, derp.GoneNotHere)
		if got := s.Stats(); got.DroppedUnknown != 11 || got.PeerGone != 2 || got.NotHere != notHereBurst+1 {
			t.Errorf("%+v", got)
		}
		// Its memory of the others is gone with it.
		b.nc.Close()
		<-b.err
		synctest.Wait()
		s.mu.RLock()
		last := s.byKey[c.pub].active.Load()
		s.mu.RUnlock()
		last.mu.Lock()
		defer last.mu.Unlock()
		if n := len(last.peers); n != 0 {
			t.Errorf("%d departed peers remembered", n)
		}
	})
}

func TestDuplicateKey(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		x := join(t, s, key.NewNode())
		priv := key.NewNode()
		old := join(t, s, priv)
		x.send(old.pub, "1")
		old.wantPacket(x.pub, "1")
		newer := join(t, s, priv)
		old.want(derp.Health, dupText)
		x.send(old.pub, "2")
		newer.wantPacket(x.pub, "2") // the newest is active
		old.settle()                 // until the older speaks
		newer.want(derp.Health, dupText)
		x.send(old.pub, "3")
		old.wantPacket(x.pub, "3")

		old.nc.Close()
		<-old.err
		newer.want(derp.Health, "") // alone again
		x.send(old.pub, "4")
		newer.wantPacket(x.pub, "4") // and nobody said it was gone
		x.settle()
		newer.nc.Close()
		<-newer.err
		x.wantGone(newer.pub, derp.GoneDisconnected)
	})
}

// TestSelfIsForgotten: a connection that sent to its own key is not handed on to the key's other one when it ends.
func TestSelfIsForgotten(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		priv := key.NewNode()
		stays := join(t, s, priv)
		go io.Copy(io.Discard, stays.nc) // what it is told of the other
		leaves := join(t, s, priv)
		leaves.send(leaves.pub, "to myself")
		leaves.wantPacket(leaves.pub, "to myself")
		leaves.nc.Close()
		<-leaves.err
		c := s.lookup(priv.Public()).active.Load()
		c.mu.Lock()
		defer c.mu.Unlock()
		if n := len(c.peers); n != 0 {
			t.Errorf("%d connections that have ended are remembered", n)
		}
	})
}

// TestLeavingAtOnce: of two connections that end at once neither stays with a third.
func TestLeavingAtOnce(t *testing.T) {
	s := New(Config{})
	defer s.Close()
	a, b, third := newClient(s, nil, nil, key.NodePublic{}, netip.AddrPort{}, derp.ClientInfo{}),
		newClient(s, nil, nil, key.NodePublic{}, netip.AddrPort{}, derp.ClientInfo{}),
		newClient(s, nil, nil, key.NodePublic{}, netip.AddrPort{}, derp.ClientInfo{})
	a.meet(b)
	b.leave(nil) // does not know a yet: it is deliver that says so to both
	a.leave(third)
	if n := len(third.peers); n != 0 {
		t.Errorf("%d connections that have ended are remembered", n)
	}
}

func TestQueueBoundsAndFairness(t *testing.T) {
	run(t, Config{QueueBytes: 100 << 10, QueuePackets: 1000}, func(t *testing.T, s *Server) {
		slow, busy, calm := join(t, s, key.NewNode()), join(t, s, key.NewNode()), join(t, s, key.NewNode())
		const burst = 2000
		packet := strings.Repeat("b", 1000)
		for i := range burst { // slow reads nothing meanwhile
			busy.send(slow.pub, packet)
			if i%400 == 0 {
				calm.send(slow.pub, fmt.Sprint(i/400))
				calm.settle()
			}
		}
		busy.settle()
		slow.write(derp.AppendPing(nil, derp.Ping, [8]byte{1}))
		dropped := int(s.Stats().DroppedFull)
		var fromCalm string
		fromBusy, bytes := 0, 0
		for n := 0; n < burst+5-dropped; {
			ft, b := slow.next()
			if ft != derp.RecvPacket {
				continue
			}
			n++
			if src, body, _ := derp.CutKey(b); src == calm.pub {
				fromCalm += string(body)
			} else {
				fromBusy++
				bytes += len(b)
			}
		}
		if fromCalm != "01234" {
			t.Errorf("of the calm sender only %q arrived", fromCalm)
		}
		// The queue, and one batch that was being written.
		if bytes > 100<<10+64<<10 || fromBusy < 90 {
			t.Errorf("%d packets, %d bytes of the busy sender arrived", fromBusy, bytes)
		}
	})
}

func TestDiscoOvertakes(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		slow, a := join(t, s, key.NewNode()), join(t, s, key.NewNode())
		for range 200 {
			a.send(slow.pub, strings.Repeat("d", 1400))
		}
		disco := "TS💬" + strings.Repeat("x", 100)
		a.send(slow.pub, disco)
		a.settle()
		for n := 0; ; n++ {
			if _, b := slow.next(); string(b[32:]) == disco {
				if n > 50 { // the batch in flight, 64 KiB at most
					t.Errorf("the disco message came after %d others", n)
				}
				return
			}
		}
	})
}

func TestAdmit(t *testing.T) {
	good := key.NewNode()
	refusal := errors.New("not on the list")
	admit := func(ctx context.Context, k key.NodePublic, _ netip.Addr) error {
		if _, ok := ctx.Deadline(); !ok {
			t.Error("admission has no deadline")
		}
		if k == good.Public() {
			return nil
		}
		return refusal
	}
	run(t, Config{Admit: admit}, func(t *testing.T, s *Server) {
		join(t, s, good)
		bad := dial(t, s, key.NewNode())
		bad.next()
		hello, _ := derp.AppendClientInfo(nil, bad.priv, s.PublicKey(), derp.ClientInfo{})
		bad.write(hello)
		if err := bad.wantEnd(); !errors.Is(err, ErrRefused) || !errors.Is(err, refusal) {
			t.Errorf("got %v", err)
		}
		if got := s.Stats(); got.Refused != 1 || got.Clients != 1 {
			t.Errorf("%+v", got)
		}
	})
}

func TestSlowClientIsCutOff(t *testing.T) {
	run(t, Config{WriteTimeout: 3 * time.Second}, func(t *testing.T, s *Server) {
		slow, a := join(t, s, key.NewNode()), join(t, s, key.NewNode())
		start := time.Now()
		a.send(slow.pub, "nobody reads this")
		a.wantGone(slow.pub, derp.GoneDisconnected)
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("cut off after %v", d)
		}
		if err := <-slow.err; err == nil || s.Stats().SlowClients != 1 {
			t.Errorf("%v, %+v", err, s.Stats())
		}
	})
}

func TestSilence(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		mute := dial(t, s, key.NewNode())
		start := time.Now()
		mute.next()
		if err := mute.wantEnd(); err == nil || time.Since(start) != 10*time.Second {
			t.Errorf("a handshake lasted %v: %v", time.Since(start), err)
		}
		p := join(t, s, key.NewNode())
		for range 3 {
			start := time.Now()
			p.want(derp.KeepAliveT, "")
			if d := time.Since(start); d < derp.KeepAlive || d > derp.KeepAlive+derp.KeepAliveJitter {
				t.Errorf("keepalive after %v", d)
			}
		}
	})
}

func TestShutdownIsGraceful(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		a, b := join(t, s, key.NewNode()), join(t, s, key.NewNode())
		a.send(b.pub, "queued")
		a.settle()
		done := make(chan error)
		go func() { done <- s.Shutdown(t.Context()) }()
		seen := map[derp.FrameType]int{}
		for _, p := range []*peer{a, b} {
			for {
				ft, payload, err := p.rd.Next()
				if err != nil {
					break
				}
				seen[ft]++
				if ft == derp.Restarting {
					in, tryFor, err := derp.ParseRestarting(payload)
					if err != nil || in > restartSpread || tryFor != restartTryFor {
						t.Errorf("%v %v %v", in, tryFor, err)
					}
				}
			}
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if seen[derp.Restarting] != 2 || seen[derp.RecvPacket] != 1 {
			t.Errorf("clients saw %v", seen)
		}
		if err := <-dial(t, s, key.NewNode()).err; !errors.Is(err, ErrClosed) {
			t.Errorf("a connection to a closed server: %v", err)
		}
	})
}

func TestShutdownGivesUpOnTheStuck(t *testing.T) {
	run(t, Config{WriteTimeout: time.Hour}, func(t *testing.T, s *Server) {
		join(t, s, key.NewNode()) // never reads the notice
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		s.Close()
	})
}

func TestViolations(t *testing.T) {
	k := key.NewNode().Public()
	for name, frame := range map[string][]byte{
		"short send":         derp.AppendFrame(nil, derp.SendPacket, make([]byte, 31)),
		"long send":          derp.AppendFrame(nil, derp.SendPacket, make([]byte, 32+derp.MaxPacket+1)),
		"endless send":       derp.AppendHeader(nil, derp.SendPacket, 1<<31-1),
		"short ping":         derp.AppendFrame(nil, derp.Ping, make([]byte, 7)),
		"long ping":          derp.AppendFrame(nil, derp.Ping, make([]byte, 1001)),
		"long note":          derp.AppendFrame(nil, derp.NotePreferred, make([]byte, 2)),
		"watch without mesh": derp.AppendHeader(nil, derp.WatchConns, 0),
		"close without mesh": derp.AppendFrame(nil, derp.ClosePeer, k.AppendTo(nil)),
		"forward":            derp.AppendFrame(nil, derp.ForwardPacket, make([]byte, 70)),
		"endless unknown":    derp.AppendHeader(nil, 0x77, 1<<30),
	} {
		t.Run(name, func(t *testing.T) {
			run(t, Config{}, func(t *testing.T, s *Server) {
				p := join(t, s, key.NewNode())
				go p.nc.Write(frame)
				if err := p.wantEnd(); !errors.Is(err, ErrProtocol) && !errors.Is(err, derp.ErrTooLarge) {
					t.Errorf("got %v", err)
				}
			})
		})
	}
	for name, hello := range map[string][]byte{
		"another frame first": derp.AppendPing(nil, derp.Ping, [8]byte{}),
		"box for nobody":      derp.AppendFrame(nil, derp.ClientInfoT, make([]byte, 100)),
		"long info":           derp.AppendFrame(nil, derp.ClientInfoT, make([]byte, 17<<10)),
	} {
		t.Run(name, func(t *testing.T) {
			run(t, Config{}, func(t *testing.T, s *Server) {
				p := dial(t, s, key.NewNode())
				p.next()
				go p.nc.Write(hello)
				if err := p.wantEnd(); !errors.Is(err, ErrProtocol) {
					t.Errorf("got %v", err)
				}
				if s.Stats().Failed != 1 {
					t.Error("not counted")
				}
			})
		})
	}
}

func TestHarmlessFrames(t *testing.T) {
	run(t, Config{}, func(t *testing.T, s *Server) {
		p := join(t, s, key.NewNode())
		p.write(derp.AppendNotePreferred(nil, true))
		p.write(derp.AppendFrame(nil, 0x77, make([]byte, 300_000))) // of a later version
		p.write(derp.AppendPing(nil, derp.Pong, [8]byte{}))
		p.settle()
	})
}

func TestRateLimit(t *testing.T) {
	run(t, Config{RateBytes: 100_000, RateBurst: 200_000}, func(t *testing.T, s *Server) {
		a, b := join(t, s, key.NewNode()), join(t, s, key.NewNode())
		if a.info.TokenBucketBytesPerSecond != 100_000 || a.info.TokenBucketBytesBurst != 200_000 {
			t.Errorf("announced %+v", a.info)
		}
		start := time.Now()
		go func() {
			for range 70 {
				a.nc.Write(derp.AppendPacket(nil, derp.SendPacket, b.pub, make([]byte, 10_000)))
			}
		}()
		for range 70 {
			b.next()
		}
		// 700 KB less the burst of 200 KB at 100 KB/s.
		if d := time.Since(start); d < 4500*time.Millisecond || d > 5500*time.Millisecond {
			t.Errorf("took %v", d)
		}
	})
}

func TestMaxConnsAndDisconnect(t *testing.T) {
	run(t, Config{MaxConns: 1}, func(t *testing.T, s *Server) {
		a := join(t, s, key.NewNode())
		if err := <-dial(t, s, key.NewNode()).err; !errors.Is(err, ErrBusy) {
			t.Errorf("got %v", err)
		}
		if n := s.Disconnect(a.pub); n != 1 {
			t.Errorf("disconnected %d", n)
		}
		a.wantEnd()
		synctest.Wait()
		join(t, s, key.NewNode())
	})
}

// TestCutDoesNotWait: TLS's farewell to a client that reads nothing must hold nobody up.
func TestCutDoesNotWait(t *testing.T) {
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(nil, tmpl, tmpl, pub, priv)
	if err != nil {
		t.Fatal(err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: priv}}}
	for name, cut := range map[string]func(*Server, key.NodePublic){
		"Disconnect": func(s *Server, k key.NodePublic) {
			if n := s.Disconnect(k); n != 2 {
				t.Errorf("disconnected %d", n)
			}
		},
		"Close": func(s *Server, _ key.NodePublic) { s.Close() },
	} {
		run(t, Config{}, func(t *testing.T, s *Server) {
			k := key.NewNode()
			var all []*peer
			for range 2 {
				near, far := net.Pipe()
				p := dialOver(t, s, k, tls.Client(near, &tls.Config{InsecureSkipVerify: true}), tls.Server(derp.NewBufConn(far), conf))
				p.enter(s)
				all = append(all, p)
			}
			start := time.Now()
			cut(s, k.Public())
			for _, p := range all {
				<-p.err
			}
			if d := time.Since(start); d != 0 {
				t.Errorf("%s takes %v", name, d)
			}
		})
	}
}

func TestPeersAreBounded(t *testing.T) {
	s := New(Config{})
	defer s.Close()
	c := newClient(s, nil, nil, key.NewNode().Public(), netip.AddrPort{}, derp.ClientInfo{})
	c.asleep = false
	for range maxPeers + 100 {
		src := newClient(s, nil, nil, key.NodePublic{}, netip.AddrPort{}, derp.ClientInfo{})
		c.deliver(src, []byte("x"))
	}
	if len(c.peers) != maxPeers {
		t.Errorf("%d peers remembered", len(c.peers))
	}
	if _, n := c.data.Len(); n != s.cfg.QueuePackets {
		t.Errorf("%d packets queued", n)
	}
}

func TestHTTP(t *testing.T) {
	s := New(Config{})
	defer s.Close()
	do := func(method, path string, header ...string) *http.Response {
		r := httptest.NewRequest(method, path, nil)
		for i := 0; i+1 < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w.Result()
	}
	for _, tt := range []struct {
		method, path string
		header       []string
		status       int
		respHeader   string
		value        string
	}{
		{"GET", "/", nil, 200, "Content-Type", "text/plain; charset=utf-8"},
		{"GET", "/nothing", nil, 404, "", ""},
		{"GET", "/derp", nil, 426, "Upgrade", "DERP"},
		{"GET", "/derp", []string{"Upgrade", "websocket"}, 426, "", ""},
		{"GET", "/derp", []string{"Upgrade", "DERP"}, 500, "", ""}, // this writer cannot
		{"GET", "/derp/probe", nil, 200, "Access-Control-Allow-Origin", "*"},
		{"HEAD", "/derp/latency-check", nil, 200, "Access-Control-Allow-Origin", "*"},
		{"POST", "/derp/probe", nil, 405, "", ""},
		{"GET", "/generate_204", nil, 204, responseHeader, ""},
		{"GET", "/generate_204", []string{challengeHeader, "ts_host.1"}, 204, responseHeader, "response ts_host.1"},
		{"GET", "/generate_204", []string{challengeHeader, "a b"}, 204, responseHeader, ""},
		{"GET", "/generate_204", []string{challengeHeader, strings.Repeat("x", 65)}, 204, responseHeader, ""},
	} {
		resp := do(tt.method, tt.path, tt.header...)
		if resp.StatusCode != tt.status || tt.respHeader != "" && resp.Header.Get(tt.respHeader) != tt.value {
			t.Errorf("%s %s %v: %d %q", tt.method, tt.path, tt.header, resp.StatusCode, resp.Header.Get(tt.respHeader))
		}
	}
}

func TestUpgradeWithAndWithoutFastStart(t *testing.T) {
	s := New(Config{})
	ts := httptest.NewServer(s)
	defer ts.Close()
	defer s.Close()
	for _, fast := range []bool{false, true} {
		nc, err := net.Dial("tcp", ts.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		priv := key.NewNode()
		req := "GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n"
		if fast {
			req += "Derp-Fast-Start: 1\r\n"
		}
		hello, _ := derp.AppendClientInfo(nil, priv, s.PublicKey(), derp.ClientInfo{Version: 2})
		nc.Write(append([]byte(req+"\r\n"), hello...)) // the hello comes along with the request
		br := bufio.NewReader(nc)
		if !fast {
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != 101 || resp.Header.Get("Derp-Version") != "2" {
				t.Fatalf("%v %+v", err, resp)
			}
		}
		rd := derp.NewReader(br, 0, nil)
		for _, want := range []derp.FrameType{derp.ServerKey, derp.ServerInfoT} {
			if ft, _, err := rd.Next(); err != nil || ft != want {
				t.Fatalf("fast start %v: %v %v, want %v", fast, ft, err, want)
			}
		}
	}
}

// FuzzServerConn writes hostile bytes after a good handshake, or in place of one.
func FuzzServerConn(f *testing.F) {
	priv := key.PrivateFromRaw[key.Node]([32]byte{1})
	f.Add(true, derp.AppendPacket(nil, derp.SendPacket, priv.Public(), []byte("self")))
	f.Add(true, derp.AppendPing(nil, derp.Ping, [8]byte{}))
	f.Add(true, derp.AppendHeader(nil, derp.SendPacket, 1<<31-1))
	f.Add(true, append(derp.AppendNotePreferred(nil, true), derp.AppendFrame(nil, 0x50, make([]byte, 1000))...))
	f.Add(false, derp.AppendFrame(nil, derp.ClientInfoT, make([]byte, 80)))
	f.Add(false, []byte("GET / HTTP/1.1\r\n\r\n"))
	s := New(Config{})
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, greet bool, data []byte) {
		near, far := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- s.Serve(far, nil) }()
		drained := make(chan struct{})
		go func() { defer close(drained); io.Copy(io.Discard, near) }()
		if greet {
			hello, _ := derp.AppendClientInfo(nil, priv, s.PublicKey(), derp.ClientInfo{Version: 2})
			near.Write(hello)
		}
		near.Write(data)
		near.Close()
		<-done
		<-drained
	})
}
