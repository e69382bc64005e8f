// Package control_test holds our control protocol against upstream's: its channel, its test server
// and its client.
package control_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/control"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"tailscale.com/control/controlbase"
	uptailcfg "tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	upkey "tailscale.com/types/key"
)

// machines returns the same machine key in both implementations' types.
func machine(t testing.TB, raw [32]byte) (key.MachinePrivate, upkey.MachinePrivate) {
	t.Helper()
	var up upkey.MachinePrivate
	if err := up.UnmarshalText([]byte("privkey:" + hex.EncodeToString(raw[:]))); err != nil {
		t.Fatal(err)
	}
	return key.PrivateFromRaw[key.Machine](raw), up
}

func upPublic(t testing.TB, k key.MachinePublic) (up upkey.MachinePublic) {
	t.Helper()
	if err := up.UnmarshalText([]byte(k.String())); err != nil {
		t.Fatal(err)
	}
	return up
}

// conn is what both implementations' channels have.
type conn interface {
	net.Conn
	ProtocolVersion() int
	HandshakeHash() [32]byte
}

// talk sends data both ways and checks it.
func talk(t *testing.T, a, b conn) {
	t.Helper()
	if a.HandshakeHash() != b.HandshakeHash() || a.ProtocolVersion() != b.ProtocolVersion() {
		t.Fatal("the ends disagree about the handshake")
	}
	for _, n := range []int{1, 4077, 4078, 100_000} {
		msg := strings.Repeat("x", n)
		for _, d := range [][2]conn{{a, b}, {b, a}} {
			go io.WriteString(d[0], msg)
			got := make([]byte, n)
			if _, err := io.ReadFull(d[1], got); err != nil || string(got) != msg {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
	}
}

func TestChannel(t *testing.T) {
	ourMachine, upMachine := machine(t, [32]byte{1, 2, 3})
	ourControl, upControl := machine(t, [32]byte{4, 5, 6})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	t.Run("our client", func(t *testing.T) {
		a, b := net.Pipe()
		ch := make(chan *controlbase.Conn, 1)
		go func() {
			c, err := controlbase.Server(ctx, b, upControl, nil)
			if err != nil {
				t.Error(err)
				b.Close()
			}
			ch <- c
		}()
		c, err := noise.Client(ctx, a, ourMachine, ourControl.Public(), 119)
		if err != nil {
			t.Fatal(err)
		}
		s := <-ch
		defer c.Close()
		defer s.Close()
		if s.Peer().String() != ourMachine.Public().String() {
			t.Error("wrong peer")
		}
		talk(t, c, s)
	})
	t.Run("our server", func(t *testing.T) {
		a, b := net.Pipe()
		ch := make(chan *noise.Conn, 1)
		go func() {
			c, err := noise.Server(ctx, b, ourControl, nil)
			if err != nil {
				t.Error(err)
				b.Close()
			}
			ch <- c
		}()
		c, err := controlbase.Client(ctx, a, upMachine, upPublic(t, ourControl.Public()), 142)
		if err != nil {
			t.Fatal(err)
		}
		s := <-ch
		defer c.Close()
		defer s.Close()
		if s.Peer() != ourMachine.Public() {
			t.Error("wrong peer")
		}
		talk(t, s, c)
	})
}

// Upstream's server accepts the golden initiations, and knows who sent them.
func TestVectors(t *testing.T) {
	raw, err := os.ReadFile("../../testdata/vectors/noise.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Channels []struct {
			Version    int    `json:"version"`
			Machine    string `json:"machine_private"`
			Control    string `json:"control_private"`
			Initiation string `json:"initiation"`
		} `json:"channels"`
	}
	if err := json.Unmarshal(raw, &v); err != nil || len(v.Channels) == 0 {
		t.Fatal(err, "no vectors")
	}
	unhex := func(s string) []byte { b, _ := hex.DecodeString(s); return b }
	for _, c := range v.Channels {
		m, _ := machine(t, [32]byte(unhex(c.Machine)))
		_, up := machine(t, [32]byte(unhex(c.Control)))
		a, b := net.Pipe()
		go io.Copy(io.Discard, a)
		s, err := controlbase.Server(t.Context(), b, up, unhex(c.Initiation))
		if err != nil {
			t.Fatal(err)
		}
		if s.ProtocolVersion() != c.Version || s.Peer().String() != m.Public().String() {
			t.Errorf("version %d: upstream sees %d and another machine", c.Version, s.ProtocolVersion())
		}
		a.Close()
		s.Close()
	}
}

// testControl starts upstream's test server.
func testControl(t *testing.T, edit ...func(*testcontrol.Server)) *testcontrol.Server {
	t.Helper()
	s := &testcontrol.Server{Logf: t.Logf, MagicDNSDomain: "interop.test", DERPMap: &uptailcfg.DERPMap{}}
	for _, e := range edit {
		e(s)
	}
	s.HTTPTestServer = httptest.NewServer(s)
	t.Cleanup(s.HTTPTestServer.Close)
	return s
}

// node is a session with what it was told.
type node struct {
	*control.Session
	key    key.NodePrivate
	states chan string
	maps   chan *tailcfg.MapResponse
	urls   chan string
}

func (n *node) NewNodeKey(k key.NodePrivate) error   { n.key = k; return nil }
func (n *node) AuthURL(u string)                     { n.urls <- u }
func (n *node) Registered(*tailcfg.RegisterResponse) {}
func (n *node) MapStart()                            {}
func (n *node) Map(m *tailcfg.MapResponse) error     { n.maps <- m; return nil }
func (n *node) State(s control.State, err error)     { n.states <- fmt.Sprint(s, " ", err) }
func (n *node) Ping(context.Context, *tailcfg.PingRequest) (*tailcfg.PingResponse, error) {
	return nil, errors.New("no pings here")
}

func start(t *testing.T, url string, edit ...func(*control.SessionConfig)) *node {
	t.Helper()
	n := &node{key: key.NewNode(), states: make(chan string, 100), maps: make(chan *tailcfg.MapResponse, 100), urls: make(chan string, 100)}
	cfg := control.SessionConfig{
		ServerURL: url, MachineKey: key.NewMachine(), NodeKey: n.key, DiscoKey: key.NewDisco().Public(),
		Hostinfo: &tailcfg.Hostinfo{Hostname: "ours", BackendLogID: "x"}, Handler: n,
	}
	for _, e := range edit {
		e(&cfg)
	}
	s, err := control.NewSession(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Session = s
	t.Cleanup(s.Close)
	s.Start()
	return n
}

// next waits for the next value.
func next[T any](t *testing.T, c chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(2 * time.Minute):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

func (n *node) until(t *testing.T, state string) {
	t.Helper()
	for !strings.HasPrefix(next(t, n.states), state) {
	}
}

func TestAuthKey(t *testing.T) {
	s := testControl(t, func(s *testcontrol.Server) { s.RequireAuthKey = "good" })
	n := start(t, s.BaseURL(), func(c *control.SessionConfig) { c.AuthKey = "good" })
	n.until(t, "Connected")
	m := next(t, n.maps)
	if m.Node.Key != n.key.Public() || m.Node.Name != "ours.interop.test." || len(m.Node.Addresses) != 2 || m.PacketFilter == nil {
		t.Errorf("map %+v", m)
	}
	bad := start(t, s.BaseURL(), func(c *control.SessionConfig) { c.AuthKey = "bad" })
	bad.until(t, "Failed")
	var e *control.RegisterError
	<-bad.Done()
	if !errors.As(bad.Err(), &e) || e.Message != "invalid authkey" {
		t.Errorf("got %v", bad.Err())
	}

	// A peer that comes shows in the stream, with its disco key and endpoints.
	peer := start(t, s.BaseURL(), func(c *control.SessionConfig) { c.AuthKey = "good" })
	peer.until(t, "Connected")
	for {
		if m := next(t, n.maps); len(m.Peers) == 1 && m.Peers[0].Key == peer.key.Public() && !m.Peers[0].DiscoKey.IsZero() {
			break
		}
	}

	// And back with the same key after a restart, without registering.
	n.Close()
	again := start(t, s.BaseURL(), func(c *control.SessionConfig) {
		c.Registered, c.NodeKey, c.ControlKey = true, n.key, n.ControlKey()
	})
	// testcontrol ties a node to its machine, and this is another: refused, then registered.
	again.until(t, "Disconnected control: /machine/map: HTTP status 400: node doesn't match machine key")
}

func TestInteractive(t *testing.T) {
	s := testControl(t, func(s *testcontrol.Server) { s.RequireAuth = true })
	n := start(t, s.BaseURL())
	url := next(t, n.urls)
	n.until(t, "NeedsLogin")
	if !s.CompleteAuth(url) {
		t.Fatalf("testcontrol does not know %q", url)
	}
	n.until(t, "Connected")

	// The key expires by the server's word: a new one needs a new login.
	old := n.key.Public()
	s.SetExpireAllNodes(true)
	if u := next(t, n.urls); u != "" {
		t.Fatalf("got URL %q", u)
	}
	n.until(t, "Disconnected")
	s.SetExpireAllNodes(false)
	url = next(t, n.urls)
	if !s.CompleteAuth(url) {
		t.Fatalf("testcontrol does not know %q", url)
	}
	n.until(t, "Connected")
	if n.NodeKey().Public() == old {
		t.Error("the key was not rotated")
	}
}

func TestC2NEcho(t *testing.T) {
	s := testControl(t)
	n := start(t, s.BaseURL())
	n.until(t, "Connected")
	var up upkey.NodePublic
	if err := up.UnmarshalText([]byte(n.key.Public().String())); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := s.AwaitNodeInMapRequest(ctx, up); err != nil {
		t.Fatal(err)
	}
	req, _ := http.NewRequestWithContext(ctx, "POST", "http://node/echo", strings.NewReader("hello"))
	resp, err := s.NodeRoundTripper(up).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(b) != "hello" {
		t.Errorf("%s: %q", resp.Status, b)
	}
}

func TestRateLimit(t *testing.T) {
	first := true
	s := testControl(t, func(s *testcontrol.Server) {
		s.MaybeRateLimitRegister = func() (bool, string, string) { was := first; first = false; return was, "1", "slow down" }
	})
	n := start(t, s.BaseURL())
	n.until(t, "Disconnected control: /machine/register: the server asks to wait 1s: HTTP status 429: slow down")
	n.until(t, "Connected")
}
