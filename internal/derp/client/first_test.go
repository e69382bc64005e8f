package client

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestBackToTheFirstRelay: a node whose region's first relay was away returns to it, once it is back, without losing what is sent meanwhile.
func TestBackToTheFirstRelay(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		packets := make(chan string, 100)
		at := func(name string) func(*relay) {
			return good(func(_ *relay, ft derp.FrameType, p []byte) {
				if ft == derp.SendPacket {
					packets <- name + " " + string(p[32:])
				}
			})
		}
		w.serve("b", at("b"))
		rs.SetMap(mapOf(reg(1, "a", "b")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		if s := rs.Stats()[0]; s.Relay != "b" {
			t.Fatalf("relay %q", s.Relay)
		}
		time.Sleep(24 * time.Hour)
		if n := len(w.dialTimes("a")); n < 20 || n > 120 {
			t.Errorf("%d tries of the first relay in a day", n)
		}
		if s := rs.Stats()[0]; s.Relay != "b" || !s.Connected || time.Since(s.Since) < 23*time.Hour {
			t.Errorf("while it is away: %+v", s)
		}
		w.serve("a", at("a"))
		if e := l.want(t, "down", 1); e.err != nil {
			t.Errorf("left for %v", e.err)
		}
		peer := key.NewNode().Public()
		if err := rs.Send(1, peer, []byte("x"), 0); err != nil {
			t.Error(err)
		}
		l.want(t, "up", 1)
		if s := rs.Stats()[0]; s.Relay != "a" {
			t.Errorf("relay %q", s.Relay)
		}
		if p := <-packets; p != "a x" {
			t.Errorf("got %q", p)
		}
		n := len(w.dialTimes("b"))
		time.Sleep(24 * time.Hour)
		if len(w.dialTimes("a")) > 130 || len(w.dialTimes("b")) != n {
			t.Error("relays are dialled without need")
		}
	})
}

// TestOthersStayWhereTheyAre: only the home is moved, and a map without the first relay ends the tries.
func TestOthersStayWhereTheyAre(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		w.serve("b", good(nil))
		w.serve("home", good(nil))
		rs.SetMap(mapOf(reg(1, "home"), reg(2, "a", "b")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		rs.Send(2, key.NewNode().Public(), []byte("x"), 0)
		l.want(t, "up", 2)
		w.serve("a", good(nil))
		l.want(t, "down", 2) // idle
		if n := len(w.dialTimes("a")); n != 1 {
			t.Errorf("%d tries", n)
		}
		w.serve("a", nil)
		rs.SetHome(2)
		l.want(t, "up", 2)
		rs.SetMap(mapOf(reg(2, "b")))
		n := len(w.dialTimes("a"))
		time.Sleep(24 * time.Hour)
		if m := len(w.dialTimes("a")); m != n {
			t.Errorf("%d tries of a relay that is not in the map", m-n)
		}
	})
}

// TestCloseWhileReturning closes at the moments at which two connections are there.
func TestCloseWhileReturning(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		w.serve("b", good(nil))
		rs.SetMap(mapOf(reg(1, "a", "b")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		// It accepts and says nothing: the try takes until its time-out, or Close.
		hung := make(chan struct{})
		w.serve("a", script(func(r *relay) {
			close(hung)
			r.next()
		}))
		<-hung
		rs.Close()
	})
}

// TestProxy: a relay behind an HTTP proxy, by its name.
func TestProxy(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, _ *Regions, _ log) {
		seen := make(chan string, 10)
		w.serve("10.0.0.1", script(func(r *relay) {
			req, err := http.ReadRequest(bufio.NewReaderSize(r.nc, 16)) // no more than the head comes before the answer
			if err != nil {
				panic(gone{})
			}
			seen <- req.Method + " " + req.Host
			r.write([]byte("HTTP/1.1 200 OK\r\n\r\n"))
			good(nil)(r)
		}))
		l := make(log, 100)
		rs := NewRegions(RegionsConfig{PrivateKey: key.NewNode(), Handler: l, PlainHTTP: true,
			Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if network != "tcp" || addr != "10.0.0.1:3128" {
					return nil, errors.New("no way but by the proxy")
				}
				return w.dial(ctx, "tcp4", addr)
			},
			Proxy: func(u *url.URL) (*url.URL, error) {
				if u.Hostname() == "inside.example" {
					return nil, nil
				}
				return &url.URL{Scheme: "http", Host: "10.0.0.1:3128"}, nil
			},
		})
		defer rs.Close()
		def := &tailcfg.DERPRegion{RegionID: 1, Nodes: []*tailcfg.DERPNode{
			{Name: "0", HostName: "inside.example", IPv4: "198.51.100.1"},
			{Name: "1", HostName: "relay.example", IPv4: "198.51.100.2", DERPPort: 444},
		}}
		rs.SetMap(mapOf(def))
		rs.SetHome(1)
		l.want(t, "up", 1)
		if s := <-seen; s != "CONNECT relay.example:444" {
			t.Errorf("the proxy saw %q", s)
		}
	})
}
