package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/derp/server"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/proxy"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type packet struct {
	src  key.NodePublic
	data string
}

// sink is a client.Handler that passes on what it gets.
type sink struct {
	packets chan packet
	gone    chan key.NodePublic
	state   chan bool
	errs    chan error
}

func newSink() *sink {
	return &sink{make(chan packet, 100), make(chan key.NodePublic, 100), make(chan bool, 100), make(chan error, 100)}
}
func (s *sink) Packet(_ int, src key.NodePublic, b []byte) {
	select {
	case s.packets <- packet{src, string(b)}:
	default: // the test has seen enough
	}
}

func (s *sink) Flush(int)                                   {}
func (s *sink) PeerGone(_ int, peer key.NodePublic, _ byte) { s.gone <- peer }
func (s *sink) State(_ int, connected bool, err error) {
	s.state <- connected
	s.errs <- err
}

func derpMap(s *Server, id int) *tailcfg.DERPMap {
	r := s.Region(id)
	out := &tailcfg.DERPRegion{RegionID: id, RegionCode: r.RegionCode}
	for _, n := range r.Nodes {
		out.Nodes = append(out.Nodes, &tailcfg.DERPNode{Name: n.Name, RegionID: id, HostName: n.HostName, CertName: n.CertName,
			IPv4: n.IPv4, IPv6: n.IPv6, STUNPort: n.STUNPort, DERPPort: n.DERPPort})
	}
	return &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{id: out}}
}

func within[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(2 * time.Minute):
		t.Fatalf("no %s", what)
	}
	return v
}

func TestRelayBetweenTwoNodes(t *testing.T) {
	s := &Server{Addr: "127.0.0.1:0"}
	if err := s.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	join := func() (key.NodePublic, *client.Regions, *sink) {
		k, h := key.NewNode(), newSink()
		rs := client.NewRegions(client.RegionsConfig{PrivateKey: k, Handler: h})
		t.Cleanup(rs.Close)
		rs.SetMap(derpMap(s, 1))
		rs.SetHome(1)
		if !within(t, "connection", h.state) {
			t.Fatal("not connected:", rs.Stats()[0].Err)
		}
		return k.Public(), rs, h
	}
	ka, a, ha := join()
	kb, b, hb := join()
	if err := a.Send(1, kb, []byte("onetwothree!"), 3); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one", "two", "thr", "ee!"} {
		if got := within(t, "packet", hb.packets); got != (packet{ka, want}) {
			t.Errorf("got %q, want %q", got.data, want)
		}
	}
	if err := b.Send(1, ka, []byte("back"), 0); err != nil {
		t.Fatal(err)
	}
	if got := within(t, "packet", ha.packets); got != (packet{kb, "back"}) {
		t.Errorf("got %q", got.data)
	}
	if _, err := a.Ping(t.Context(), 1); err != nil {
		t.Error(err)
	}
	b.Close()
	if got := within(t, "peer gone", ha.gone); got != kb {
		t.Errorf("gone: %v", got)
	}
	if _, gone := a.Gone(1, kb); !gone {
		t.Error("that the peer is gone was not learned")
	}
}

func start(t *testing.T, s *Server) *Server {
	t.Helper()
	if s.Addr == "" {
		s.Addr = "127.0.0.1:0"
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func join(t *testing.T, m *tailcfg.DERPMap) (key.NodePublic, *client.Regions, *sink) {
	t.Helper()
	k, h := key.NewNode(), newSink()
	rs := client.NewRegions(client.RegionsConfig{PrivateKey: k, Handler: h})
	t.Cleanup(rs.Close)
	rs.SetMap(m)
	rs.SetHome(1)
	return k.Public(), rs, h
}

// waitState waits for a connection to come up or go down, and returns the error said with it.
func (s *sink) waitState(t *testing.T, up bool) error {
	t.Helper()
	for {
		got, err := within(t, "state", s.state), within(t, "error", s.errs)
		if got == up {
			return err
		}
	}
}

func TestRestartMidTransfer(t *testing.T) {
	dir := t.TempDir()
	s := start(t, &Server{Dir: dir})
	m := derpMap(s, 1)
	tcp, udp := s.Addrs()
	_, a, ha := join(t, m)
	kb, _, hb := join(t, m)
	ha.waitState(t, true)
	hb.waitState(t, true)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { // a transfer that goes on through the restart
		defer close(done)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				a.Send(1, kb, bytes.Repeat([]byte("x"), 1400), 0)
			}
		}
	}()
	within(t, "packet", hb.packets)
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := &Server{Dir: dir, Addr: tcp.String(), STUNAddr: udp.String()}
	t.Cleanup(func() { again.Close() })
	for err := again.Start(t.Context()); err != nil; err = again.Start(t.Context()) {
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
		runtime.Gosched() // another process has one of the ports for the moment
	}
	if again.PublicKey() != s.PublicKey() || again.Node() != s.Node() {
		t.Error("the relay is another one after its restart")
	}
	for len(hb.packets) > 0 {
		<-hb.packets
	}
	hb.waitState(t, true)
	for range cap(hb.packets) + 1 { // more than what was in flight
		within(t, "packet after the restart", hb.packets)
	}
	close(stop)
	<-done
}

func TestWrongPin(t *testing.T) {
	s := start(t, &Server{})
	good := derpMap(s, 1)
	for name, change := range map[string]func(*tailcfg.DERPNode){
		"another certificate": func(n *tailcfg.DERPNode) { n.CertName = "sha256-raw:" + strings.Repeat("ab", 32) },
		"another host":        func(n *tailcfg.DERPNode) { n.HostName = "relay.example" },
		"no pin":              func(n *tailcfg.DERPNode) { n.CertName = "" },
		"another name":        func(n *tailcfg.DERPNode) { n.CertName = "relay.example" },
	} {
		t.Run(name, func(t *testing.T) {
			n := *good.Regions[1].Nodes[0]
			change(&n)
			_, _, h := join(t, &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, Nodes: []*tailcfg.DERPNode{&n}}}})
			err := h.waitState(t, false)
			pinned := strings.HasPrefix(n.CertName, "sha256-raw:")
			var bad *tls.CertificateVerificationError
			if pinned && !errors.Is(err, client.ErrPin) || !pinned && !strings.Contains(err.Error(), "x509") && !errors.As(err, &bad) {
				t.Errorf("got %v", err)
			}
		})
	}
	n := *good.Regions[1].Nodes[0]
	n.CertName, n.InsecureForTests = "", true
	_, _, h := join(t, &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, Nodes: []*tailcfg.DERPNode{&n}}}})
	h.waitState(t, true)
}

func TestPlainHTTP(t *testing.T) {
	s := start(t, &Server{PlainHTTP: true})
	if n := s.Node(); n.HostName != "http://127.0.0.1" || n.CertName != "" {
		t.Errorf("%+v", n)
	}
	k, rs, h := join(t, derpMap(s, 1))
	h.waitState(t, true)
	rs.Send(1, k, []byte("to myself"), 0)
	if p := within(t, "packet", h.packets); p.data != "to myself" {
		t.Error(p.data)
	}
}

func TestAdmitHook(t *testing.T) {
	asked := make(chan NodeKey, 10)
	s := start(t, &Server{Admit: func(_ context.Context, k NodeKey, from netip.Addr) error {
		if !from.IsLoopback() {
			t.Errorf("from %v", from)
		}
		asked <- k
		return errors.New("no")
	}})
	k, _, h := join(t, derpMap(s, 1))
	if err := h.waitState(t, false); !errors.Is(err, client.ErrNotAdmitted) {
		t.Errorf("got %v", err)
	}
	if got := within(t, "question", asked); got != NodeKey(k.Raw()) || got.String() != k.String() {
		t.Error("asked about another key")
	}
}

// TestCloseWhileAdmitAsks: Close waits for an Admit that asks the server itself.
func TestCloseWhileAdmitAsks(t *testing.T) {
	for name, end := range map[string]func(*Server){
		"Close":    func(s *Server) { s.Close() },
		"Shutdown": func(s *Server) { s.Shutdown(canceled) },
	} {
		asked, done := make(chan struct{}, 100), make(chan struct{})
		s := &Server{Addr: "127.0.0.1:0"}
		s.Admit = func(ctx context.Context, k NodeKey, _ netip.Addr) error {
			asked <- struct{}{}
			<-ctx.Done() // by then the server is being closed
			s.Disconnect(k)
			s.Addrs()
			s.PublicKey()
			s.Region(1)
			if s.Stats().Clients > 0 {
				t.Error("clients")
			}
			return ctx.Err()
		}
		if err := s.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		join(t, derpMap(s, 1))
		within(t, "question", asked)
		go func() { end(s); close(done) }()
		within(t, name, done)
	}
}

// canceled is a context that is done.
var canceled = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

func TestSTUN(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		s := &Server{Addr: addr}
		if err := s.Start(t.Context()); err != nil {
			t.Logf("%s: %v", addr, err) // a machine without IPv6
			continue
		}
		t.Cleanup(func() { s.Close() })
		_, udp := s.Addrs()
		c, err := net.Dial("udp", udp.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Minute))
		tx := stun.NewTxID()
		// What is not a request of a tailnet client gets no answer: the first answer is to the last.
		bad := stun.AppendRequest(nil, tx)
		bad[len(bad)-1] ^= 1
		c.Write([]byte("hello"))
		c.Write(bad)
		c.Write(stun.AppendResponse(nil, tx, netip.MustParseAddrPort("192.0.2.1:1")))
		tx = stun.NewTxID()
		c.Write(stun.AppendRequest(nil, tx))
		buf := make([]byte, 1500)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got, self, err := stun.ParseResponse(buf[:n])
		if err != nil || got != tx || self.String() != c.LocalAddr().String() {
			t.Errorf("%v %v %v", got == tx, self, err)
		}
		_, _, h := join(t, derpMap(s, 1))
		h.waitState(t, true)
		if s.Node().STUNPort == 0 || s.Stats().STUNRequests > 1 {
			t.Errorf("%+v %+v", s.Node(), s.Stats())
		}
	}
}

func TestWebPages(t *testing.T) {
	s := start(t, &Server{STUNAddr: "none"})
	if s.Node().STUNPort != -1 {
		t.Error("STUN is off and announced")
	}
	tcp, _ := s.Addrs()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	for path, status := range map[string]int{"/": 200, "/derp": 426, "/derp/probe": 200, "/generate_204": 204, "/x": 404} {
		resp, err := (&http.Client{Transport: tr}).Get("https://" + tcp.String() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != status || resp.ProtoMajor != 1 {
			t.Errorf("%s: %s %s", path, resp.Proto, resp.Status)
		}
	}
}

// TestHTTPTimeLimits: a client that reads or writes too slowly is cut off, but for one that has upgraded.
func TestHTTPTimeLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := memnet.New(1, memnet.Link{})
		ln, err := network.Host("192.0.2.1").Listen("tcp", "192.0.2.1:80")
		if err != nil {
			t.Fatal(err)
		}
		d := server.New(server.Config{})
		defer d.Close()
		hs := httpServer(d)
		go hs.Serve(bufListener{ln})
		defer hs.Close()
		dial := network.Host("192.0.2.2").DialContext

		h := newSink()
		rs := client.NewRegions(client.RegionsConfig{PrivateKey: key.NewNode(), Handler: h, Dial: dial, Proxy: proxy.None})
		defer rs.Close()
		rs.SetMap(&tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1,
			Nodes: []*tailcfg.DERPNode{{Name: "1a", RegionID: 1, HostName: "http://192.0.2.1", IPv6: "none"}}}}})
		rs.SetHome(1)
		h.waitState(t, true)
		upgraded := time.Now()

		for name, use := range map[string]func(net.Conn){
			"a body that does not come": func(nc net.Conn) {
				fmt.Fprint(nc, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\nx")
				io.Copy(io.Discard, nc)
			},
			"answers that are not read": func(nc net.Conn) {
				for err := error(nil); err == nil; {
					_, err = fmt.Fprint(nc, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				}
			},
		} {
			nc, err := dial(t.Context(), "tcp", "192.0.2.1:80")
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			nc.SetDeadline(begin.Add(time.Hour))
			use(nc)
			if d := time.Since(begin); d > time.Minute {
				t.Errorf("%s: held the connection for %v", name, d)
			}
			nc.Close()
		}
		time.Sleep(10 * time.Minute)
		if s := rs.Stats()[0]; !s.Connected || !s.Since.Equal(upgraded) {
			t.Errorf("%v after the upgrade: %+v", time.Since(upgraded), s)
		}
	})
}

func TestStartErrors(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	torn := t.TempDir()
	os.WriteFile(filepath.Join(torn, keyFile), []byte("privkey:12"), 0o600)
	foreign := t.TempDir()
	os.WriteFile(filepath.Join(foreign, certFile), []byte("something else"), 0o600)
	for name, s := range map[string]*Server{
		"bad address":         {Addr: "nonsense"},
		"port taken":          {Addr: taken.Addr().String()},
		"bad STUN address":    {Addr: "127.0.0.1:0", STUNAddr: "nonsense"},
		"no such certificate": {Addr: "127.0.0.1:0", CertFile: "/nonexistent"},
		"torn key":            {Addr: "127.0.0.1:0", Dir: torn},
		"foreign certificate": {Addr: "127.0.0.1:0", Dir: foreign},
	} {
		if err := s.Start(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "relay: ") || strings.Contains(err.Error(), "privkey") {
			t.Errorf("%s: %v", name, err)
		}
		s.Close()
	}
	if b, _ := os.ReadFile(filepath.Join(foreign, certFile)); string(b) != "something else" {
		t.Error("a foreign file was overwritten")
	}
	s := start(t, &Server{})
	if err := s.Start(t.Context()); !errors.Is(err, ErrStarted) {
		t.Error(err)
	}
	s.Close()
	s.Close()
	if err := s.Start(t.Context()); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	unused := &Server{}
	unused.Close()
	if err := unused.Start(t.Context()); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

func TestListenAndServeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := &Server{Addr: "127.0.0.1:0"}
	done := make(chan error, 1)
	go func() { done <- s.ListenAndServe(ctx) }()
	cancel()
	if err := within(t, "end", done); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestShutdownDuringListenAndServe(t *testing.T) {
	done := make(chan error, 1)
	started := make(chan struct{}, 100) // a client that is too slow comes again
	s := &Server{Addr: "127.0.0.1:0", Admit: func(context.Context, NodeKey, netip.Addr) error { started <- struct{}{}; return nil }}
	go func() { done <- s.ListenAndServe(t.Context()) }()
	for tcp, _ := s.Addrs(); tcp == nil; tcp, _ = s.Addrs() {
		if len(done) > 0 {
			t.Fatal(<-done)
		}
		runtime.Gosched()
	}
	m := derpMap(s, 1)
	_, _, h := join(t, m)
	within(t, "client", started)
	h.waitState(t, true)
	if err := s.Shutdown(t.Context()); err != nil { // not cut short by ListenAndServe's end
		t.Error(err)
	}
	if err := within(t, "end", done); err != nil {
		t.Error(err)
	}
}

func TestTheUsersTLSConfigIsNotChanged(t *testing.T) {
	conf, _, err := new(Server).tlsConfig("127.0.0.1", "")
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, &Server{TLS: conf})
	if len(conf.Certificates[0].Certificate) != 1 || conf.NextProtos != nil {
		t.Error("the meta certificate went into the user's own configuration")
	}
	m := derpMap(s, 1)
	m.Regions[1].Nodes[0].InsecureForTests = true
	_, _, h := join(t, m)
	h.waitState(t, true)
}

func TestStateIsPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "relay")
	start(t, &Server{Dir: dir})
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v", path, fi.Mode())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// What goes into DERP maps has the map's own names.
func TestRegionJSON(t *testing.T) {
	s := start(t, &Server{})
	b, err := json.Marshal(s.Region(900))
	if err != nil {
		t.Fatal(err)
	}
	var r tailcfg.DERPRegion
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	n, want := r.Nodes[0], s.Node()
	if r.RegionID != 900 || n.RegionID != 900 || n.Name != "900a" || n.HostName != want.HostName || n.CertName != want.CertName ||
		n.DERPPort != want.DERPPort || n.STUNPort != want.STUNPort || n.IPv4 != "127.0.0.1" || n.IPv6 != "none" {
		t.Errorf("%s", b)
	}
	var k NodeKey
	if err := k.UnmarshalText([]byte(s.PublicKey().String())); err != nil || k != s.PublicKey() {
		t.Error(err)
	}
	if err := k.UnmarshalText([]byte("nodekey:12")); err == nil {
		t.Error("a short key was taken")
	}
}
