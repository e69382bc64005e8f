package tailnode_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

func TestMain(m *testing.M) {
	for _, name := range []string{"TS_AUTHKEY", "TS_AUTH_KEY", "TS_CONTROL_URL"} {
		os.Unsetenv(name)
	}
	goleak.VerifyTestMain(m)
}

// tailnet is a coordination server and a relay on loopback.
type tailnet struct {
	t     testing.TB
	coord *coord.Server
	relay *relay.Server
}

func newTailnet(t testing.TB) *tailnet {
	t.Helper()
	tn := &tailnet{t: t, relay: &relay.Server{Addr: "127.0.0.1:0"}}
	if err := tn.relay.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tn.relay.Close() })
	tn.coord = &coord.Server{Relays: []coord.Region{regionOf(tn.relay, 900)}}
	if err := tn.coord.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tn.coord.Close() })
	return tn
}

func regionOf(r *relay.Server, id int) coord.Region {
	n := r.Node()
	return coord.Region{ID: id, Code: "here", Name: "this machine", Nodes: []coord.Relay{{
		Name: n.Name, HostName: n.HostName, IPv4: n.IPv4, IPv6: n.IPv6,
		DERPPort: n.DERPPort, STUNPort: n.STUNPort, CertName: n.CertName,
	}}}
}

// authKey returns a reusable key.
func (tn *tailnet) authKey() string {
	tn.t.Helper()
	k, err := tn.coord.CreateAuthKey(coord.AuthKeyOptions{Reusable: true})
	if err != nil {
		tn.t.Fatal(err)
	}
	return k
}

// server returns a server that can join, not started.
func (tn *tailnet) server(name string) *tailnode.Server {
	s := &tailnode.Server{
		Hostname: name, Store: tailnode.NewMemoryStore(), ControlURL: tn.coord.BaseURL(), AuthKey: tn.authKey(),
		UserLogf: tn.t.Logf,
	}
	if testing.Verbose() {
		s.Logf = func(f string, a ...any) { tn.t.Logf(name+": "+f, a...) }
	}
	tn.t.Cleanup(func() { s.Close() })
	return s
}

// up returns a server that has joined.
func (tn *tailnet) up(name string) *tailnode.Server {
	tn.t.Helper()
	s := tn.server(name)
	if _, err := s.Up(withTimeout(tn.t, patience)); err != nil {
		tn.t.Fatal(err)
	}
	return s
}

// until waits for ok, which it asks again at every change of the node's state or netmap.
func until(t *testing.T, lc *tailnode.LocalClient, what string, ok func() bool) {
	t.Helper()
	ctx := withTimeout(t, patience)
	for {
		changed, err := lc.Changed()
		if err != nil {
			t.Fatal(err)
		}
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("never came: %s", what)
		}
	}
}

// patience is how long a test waits for what must come.
const patience = time.Minute

func withTimeout(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// upFails calls Up until control has been tried, and returns the error of that.
func upFails(t *testing.T, s *tailnode.Server) error {
	t.Helper()
	for ctx := withTimeout(t, patience); ; {
		_, err := s.Up(withTimeout(t, 50*time.Millisecond))
		if err == nil || !strings.Contains(err.Error(), "before control answered") || ctx.Err() != nil {
			return err
		}
	}
}

func TestTCPBothWays(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	for _, way := range []struct {
		name     string
		from, to *tailnode.Server
		host     string
	}{{"short name", a, b, "beta"}, {"full name", b, a, "alpha." + coord.DefaultDomain}, {"itself", a, a, "alpha"}} {
		t.Run(way.name, func(t *testing.T) {
			ln, err := way.to.Listen("tcp", ":7")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				io.Copy(c, c)
			}()
			c, err := way.from.Dial(withTimeout(t, patience), "tcp", net.JoinHostPort(way.host, "7"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			msg := make([]byte, 4<<20)
			rand.Read(msg)
			sum := sha256.New()
			done := make(chan error, 1)
			go func() {
				_, err := io.Copy(sum, c)
				done <- err
			}()
			if _, err := c.Write(msg); err != nil {
				t.Fatal(err)
			}
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			want := sha256.Sum256(msg)
			if !bytes.Equal(sum.Sum(nil), want[:]) {
				t.Error("what came back is not what was sent")
			}
		})
	}
}

func TestPing(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	ip4, ip6 := b.TailscaleIPs()
	lc, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	for _, typ := range []tailnode.PingType{tailnode.PingDisco, tailnode.PingTSMP, tailnode.PingICMP} {
		for _, ip := range []netip.Addr{ip4, ip6} {
			r, err := lc.Ping(withTimeout(t, patience), ip, typ)
			if err != nil {
				t.Errorf("%s %v: %v", typ, ip, err)
				continue
			}
			if r.NodeName != "beta" || r.LatencySeconds <= 0 || r.IP != ip.String() {
				t.Errorf("%s %v: %+v", typ, ip, r)
			}
			if typ == tailnode.PingDisco && (r.DERPRegionCode == "here") == (r.Endpoint != "") {
				t.Errorf("disco ping by region %q and endpoint %q, want one of them", r.DERPRegionCode, r.Endpoint)
			}
		}
	}
}
