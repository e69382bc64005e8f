package coord_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailnode/tailnode/coord"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tsnet"
)

// TestUpstreamJoins is the point of the whole server: two upstream nodes join with an auth key, without special
// settings, and reach each other by address and by name.
func TestUpstreamJoins(t *testing.T) {
	s := start(t, &coord.Server{Dir: t.TempDir()})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	a, b := upstream(t, s, "alpha", key), upstream(t, s, "beta", key)
	st, err := a.Up(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Self.DNSName; got != "alpha.tailnode.internal." {
		t.Errorf("DNSName = %q", got)
	}
	if _, err := b.Up(ctx(t)); err != nil {
		t.Fatal(err)
	}
	serveEcho(t, a, ":7")
	serveEcho(t, b, ":7")
	echo(t, b, hostPort(ip4(t, a), "7"))
	echo(t, a, hostPort(ip4(t, b), "7"))
	echo(t, a, "beta:7")
	echo(t, b, "alpha.tailnode.internal:7")
}

// TestInteractiveLogin lets an upstream node in by its URL.
func TestInteractiveLogin(t *testing.T) {
	s := start(t, &coord.Server{})
	n := upstream(t, s, "laptop", "")
	up := make(chan error, 1)
	go func() {
		_, err := n.Up(ctx(t))
		up <- err
	}()
	lc, err := n.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	var url string
	waitFor(t, "AuthURL", func() bool {
		st, err := lc.Status(ctx(t))
		if err != nil {
			return false
		}
		url = st.AuthURL
		return url != ""
	})
	if err := s.ApproveLogin(url, coord.ApproveOptions{Tags: []string{"tag:laptop"}}); err != nil {
		t.Fatal(err)
	}
	if err := <-up; err != nil {
		t.Fatal(err)
	}
	st, err := lc.Status(ctx(t))
	if err != nil || st.Self.Tags == nil || st.Self.Tags.At(0) != "tag:laptop" {
		t.Errorf("self: %+v, %v", st.Self, err)
	}
}

// TestEphemeralRemoval closes an ephemeral node: it logs out and is gone at once, for its peers too.
func TestEphemeralRemoval(t *testing.T) {
	s := start(t, &coord.Server{})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	a := upstream(t, s, "stays", key)
	if _, err := a.Up(ctx(t)); err != nil {
		t.Fatal(err)
	}
	e := upstream(t, s, "goes", key)
	e.Ephemeral = true
	if _, err := e.Up(ctx(t)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the peer", func() bool { return peerOf(t, a, "goes") != nil })
	e.Close()
	waitFor(t, "the removal", func() bool { return peerOf(t, a, "goes") == nil })
	if _, err := s.Node("goes"); !errors.Is(err, coord.ErrNotFound) {
		t.Errorf("still known: %v", err)
	}
}

// TestExpiryAndLogin makes a node's key expire while it runs. It has to log in again, and is itself again then.
func TestExpiryAndLogin(t *testing.T) {
	s := start(t, &coord.Server{})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	a, b := upstream(t, s, "alpha", key), upstream(t, s, "beta", key)
	for _, n := range []*tsnet.Server{a, b} {
		if _, err := n.Up(ctx(t)); err != nil {
			t.Fatal(err)
		}
	}
	serveEcho(t, a, ":7")
	echo(t, b, hostPort(ip4(t, a), "7"))
	before, err := s.Node("alpha")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ExpireNode("alpha"); err != nil {
		t.Fatal(err)
	}
	lc, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "NeedsLogin", func() bool {
		st, err := lc.Status(ctx(t))
		return err == nil && st.BackendState == "NeedsLogin"
	})
	// Each node hears of it on a stream of its own.
	waitFor(t, "beta sees alpha expired", func() bool { p := peerOf(t, b, "alpha"); return p != nil && p.Expired })
	if err := lc.StartLoginInteractive(ctx(t)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "alpha is back", func() bool {
		if ls, _ := s.PendingLogins(); len(ls) > 0 {
			s.ApproveLogin(ls[0].ID, coord.ApproveOptions{})
		}
		st, err := lc.Status(ctx(t))
		return err == nil && st.BackendState == "Running"
	})
	after, err := s.Node("alpha")
	if err != nil || after.ID != before.ID || after.Addrs[0] != before.Addrs[0] || after.Key == before.Key {
		t.Errorf("after %+v, before %+v, %v", after, before, err)
	}
	waitFor(t, "beta has the new key", func() bool {
		p := peerOf(t, b, "alpha")
		return p != nil && p.PublicKey.String() == after.Key && !p.Expired
	})
	echo(t, b, hostPort(ip4(t, a), "7"))
}

func TestLogout(t *testing.T) {
	s := start(t, &coord.Server{})
	n := upstream(t, s, "alpha", authKey(t, s, coord.AuthKeyOptions{}))
	if _, err := n.Up(ctx(t)); err != nil {
		t.Fatal(err)
	}
	lc, err := n.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	if err := lc.Logout(ctx(t)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "expired", func() bool { n, err := s.Node("alpha"); return err == nil && n.Expired })
}

// TestFilteredPort allows one port and checks that it is open and another is not, and that a grant
// reaches WhoIs.
func TestFilteredPort(t *testing.T) {
	s := start(t, &coord.Server{})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	f := &coord.Filter{
		Rules:  []coord.FilterRule{{Src: []string{"*"}, Dst: []string{"*"}, Ports: []string{"7"}}},
		Grants: []coord.Grant{{Src: []string{"*"}, Dst: []string{"*"}, Caps: map[string][]json.RawMessage{"example.com/cap/echo": {json.RawMessage(`{"role":"admin"}`)}}}},
	}
	if err := s.SetFilter(f); err != nil {
		t.Fatal(err)
	}
	a, b := upstream(t, s, "alpha", key), upstream(t, s, "beta", key)
	for _, n := range []*tsnet.Server{a, b} {
		if _, err := n.Up(ctx(t)); err != nil {
			t.Fatal(err)
		}
	}
	serveEcho(t, a, ":7")
	serveEcho(t, a, ":8")
	echo(t, b, hostPort(ip4(t, a), "7"))
	refused := func() bool {
		c, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		conn, err := b.Dial(c, "tcp", hostPort(ip4(t, a), "8"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	}
	if !refused() {
		t.Error("port 8 is open")
	}
	lc, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	who, err := lc.WhoIs(ctx(t), hostPort(ip4(t, b), "1"))
	if err != nil || len(who.CapMap["example.com/cap/echo"]) != 1 || who.UserProfile.LoginName != coord.DefaultUser {
		t.Errorf("WhoIs: %+v, %v", who, err)
	}
	// A filter that changes while they run.
	if err := s.SetFilter(nil); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "port 8 opens", func() bool { return !refused() })
}

// TestWrongAuthKey shows the server's words to the user.
func TestWrongAuthKey(t *testing.T) {
	s := start(t, &coord.Server{})
	n := upstream(t, s, "alpha", "tnkey-auth-no-such")
	c, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := n.Up(c); err == nil {
		t.Fatal("joined with a wrong key")
	}
	if l, _ := s.Nodes(); len(l) != 0 {
		t.Errorf("%d nodes", len(l))
	}
}

// TestServerRestart stops the server and starts it again on the same folder and at the same URL: upstream's nodes come
// back by themselves and stay who they were. The port is not let go of meanwhile: another program could take it.
func TestServerRestart(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + ln.Addr().String()
	s := start(t, &coord.Server{Dir: dir, Addr: "none", URL: url})
	var h atomic.Value
	h.Store(s.Handler())
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.Load().(http.Handler).ServeHTTP(w, r) })}
	go hs.Serve(ln)
	t.Cleanup(func() { hs.Close() })
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	a, b := upstream(t, s, "alpha", key), upstream(t, s, "beta", key)
	for _, n := range []*tsnet.Server{a, b} {
		if _, err := n.Up(ctx(t)); err != nil {
			t.Fatal(err)
		}
	}
	serveEcho(t, a, ":7")
	echo(t, b, hostPort(ip4(t, a), "7"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	echo(t, b, hostPort(ip4(t, a), "7")) // the nodes do without it
	s2 := start(t, &coord.Server{Dir: dir, Addr: "none", URL: url, Relays: s.Relays})
	h.Store(s2.Handler())
	waitFor(t, "both are back", func() bool {
		x, err1 := s2.Node("alpha")
		y, err2 := s2.Node("beta")
		return err1 == nil && err2 == nil && x.Online && y.Online
	})
	echo(t, b, hostPort(ip4(t, a), "7"))
}

// TestPing asks an upstream node to answer the server, and to ping another node.
func TestPing(t *testing.T) {
	s := start(t, &coord.Server{})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	a, b := upstream(t, s, "alpha", key), upstream(t, s, "beta", key)
	for _, n := range []*tsnet.Server{a, b} {
		if _, err := n.Up(ctx(t)); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := s.Ping(ctx(t), "alpha", "", netip.Addr{}); err != nil {
		t.Errorf("%+v, %v", r, err)
	}
	v4, _ := b.TailscaleIPs()
	if r, err := s.Ping(ctx(t), "alpha", "TSMP", v4); err != nil || r.Err != "" {
		t.Errorf("%+v, %v", r, err)
	}
}

// waitFor polls: upstream offers no event for most of what is waited for here.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(45 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never came: %s", what)
		}
	}
}

// peerOf returns what n knows of the peer with this name.
func peerOf(t *testing.T, n *tsnet.Server, name string) *ipnstate.PeerStatus {
	t.Helper()
	lc, err := n.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	st, err := lc.Status(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range st.Peer {
		if strings.HasPrefix(p.DNSName, name+".") {
			return p
		}
	}
	return nil
}

// TestFanOut joins several upstream nodes at once and checks that each learns of all others, of a rename, and of
// one that goes.
func TestFanOut(t *testing.T) {
	s := start(t, &coord.Server{})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	const n = 6
	var nodes []*tsnet.Server
	var wg sync.WaitGroup
	for range n {
		x := upstream(t, s, "crowd", key)
		nodes = append(nodes, x)
		wg.Go(func() {
			if _, err := x.Up(ctx(t)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	peers := func(x *tsnet.Server) int {
		lc, err := x.LocalClient()
		if err != nil {
			t.Fatal(err)
		}
		st, err := lc.Status(ctx(t))
		if err != nil {
			t.Fatal(err)
		}
		return len(st.Peer)
	}
	for _, x := range nodes {
		waitFor(t, "all peers", func() bool { return peers(x) == n-1 })
	}
	if err := s.RenameNode("crowd-3", "renamed"); err != nil {
		t.Fatal(err)
	}
	for _, x := range nodes {
		waitFor(t, "the new name", func() bool {
			lc, err := x.LocalClient()
			if err != nil {
				t.Fatal(err)
			}
			st, err := lc.Status(ctx(t))
			return err == nil && (strings.HasPrefix(st.Self.DNSName, "renamed.") || peerOf(t, x, "renamed") != nil)
		})
	}
	if err := s.DeleteNode("renamed"); err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, x := range nodes {
		waitFor(t, "one less, or its own end", func() bool {
			lc, err := x.LocalClient()
			if err != nil {
				t.Fatal(err)
			}
			st, err := lc.Status(ctx(t))
			if err == nil && st.BackendState == "NeedsLogin" {
				return true
			}
			if err == nil && len(st.Peer) == n-2 {
				left++
				return true
			}
			return false
		})
	}
	if left != n-1 {
		t.Errorf("%d nodes see the others", left)
	}
}
