package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/proxy"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a network of pipes on which relays are functions.
type world struct {
	mu     sync.Mutex
	relays map[string]func(*relay) // by host
	dials  map[string][]time.Time
	wg     sync.WaitGroup
}

func newWorld() *world {
	return &world{relays: map[string]func(*relay){}, dials: map[string][]time.Time{}}
}

// serve sets what answers at host; nil: nothing does.
func (w *world) serve(host string, f func(*relay)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.relays[host] = f
}

func (w *world) dialTimes(host string) []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]time.Time(nil), w.dials[host]...)
}

func (w *world) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if network != "tcp4" {
		return nil, errors.New("no such family")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dials[host] = append(w.dials[host], time.Now())
	f := w.relays[host]
	if f == nil {
		return nil, errors.New("connection refused")
	}
	near, far := net.Pipe()
	w.wg.Go(func() {
		defer far.Close()
		f(&relay{nc: far, rd: derp.NewReader(far, 0, nil), priv: key.PrivateFromRaw[key.Node]([32]byte{7})})
	})
	return near, nil
}

// relay is the far end of one connection. Its methods panic with gone when the client left.
type relay struct {
	nc      net.Conn
	rd      *derp.Reader
	priv    key.NodePrivate
	client  key.NodePublic
	request string
}

type gone struct{}

func (r *relay) write(b []byte) {
	if _, err := r.nc.Write(b); err != nil {
		panic(gone{})
	}
}

func (r *relay) next() (derp.FrameType, []byte) {
	t, p, err := r.rd.Next()
	if err != nil {
		panic(gone{})
	}
	return t, bytes.Clone(p)
}

// upgrade answers the HTTP request and greets.
func (r *relay) upgrade() {
	var head []byte
	for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b...) {
		if _, err := r.nc.Read(b); err != nil {
			panic(gone{})
		}
	}
	r.request = string(head)
	r.write([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\n\r\n"))
	r.write(derp.AppendServerKey(nil, r.priv.Public()))
}

// accept completes the handshake.
func (r *relay) accept(info derp.ServerInfo) {
	r.upgrade()
	t, p := r.next()
	k, _, err := derp.ParseClientInfo(r.priv, p)
	if t != derp.ClientInfoT || err != nil {
		panic(fmt.Sprint("client info: ", t, err))
	}
	r.client = k
	b, err := derp.AppendServerInfo(nil, r.priv, k, info)
	if err != nil {
		panic(err)
	}
	r.write(b)
}

// serveUntilGone runs f, and then answers pings until the client is gone. It passes other frames to each.
func (r *relay) serveUntilGone(each func(derp.FrameType, []byte)) {
	for {
		t, p := r.next()
		if t == derp.Ping {
			r.write(derp.AppendPing(nil, derp.Pong, [8]byte(p)))
		}
		if each != nil {
			each(t, p)
		}
	}
}

// script makes a relay of f: its panics with gone end the connection.
func script(f func(*relay)) func(*relay) {
	return func(r *relay) {
		defer func() {
			if v := recover(); v != nil && v != (gone{}) {
				panic(v)
			}
		}()
		f(r)
	}
}

// good is a relay that does nothing but what it must.
func good(each func(*relay, derp.FrameType, []byte)) func(*relay) {
	return script(func(r *relay) {
		r.accept(derp.ServerInfo{Version: 2})
		r.serveUntilGone(func(t derp.FrameType, p []byte) {
			if each != nil {
				each(r, t, p)
			}
		})
	})
}

type event struct {
	what   string // "up", "down", "packet", "flush", "gone"
	region int
	text   string
	err    error
}

// log is a Handler.
type log chan event

func (l log) Packet(r int, _ key.NodePublic, b []byte) { l <- event{"packet", r, string(b), nil} }
func (l log) Flush(r int)                              { l <- event{"flush", r, "", nil} }
func (l log) PeerGone(r int, _ key.NodePublic, why byte) {
	l <- event{"gone", r, fmt.Sprint(why), nil}
}
func (l log) State(r int, up bool, err error) {
	if up {
		l <- event{"up", r, "", err}
		return
	}
	l <- event{"down", r, "", err}
}

// want takes events until one of the kind comes.
func (l log) want(t *testing.T, what string, region int) event {
	t.Helper()
	for {
		select {
		case e := <-l:
			if e.what == what && e.region == region {
				return e
			}
			if e.what == "up" || e.what == "down" {
				t.Logf("%s %d %v", e.what, e.region, e.err)
			}
		case <-time.After(time.Hour): // virtual
			t.Fatalf("no %s of region %d", what, region)
		}
	}
}

func node(name string) *tailcfg.DERPNode {
	return &tailcfg.DERPNode{Name: name, HostName: name, IPv6: "none"}
}

func reg(id int, names ...string) *tailcfg.DERPRegion {
	r := &tailcfg.DERPRegion{RegionID: id}
	for _, n := range names {
		r.Nodes = append(r.Nodes, node(n))
	}
	return r
}

func mapOf(regions ...*tailcfg.DERPRegion) *tailcfg.DERPMap {
	m := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}}
	for _, r := range regions {
		m.Regions[r.RegionID] = r
	}
	return m
}

// newRegions returns Regions on w that speak plain HTTP.
func (w *world) newRegions() (*Regions, log) {
	l := make(log, 10_000)
	return NewRegions(RegionsConfig{PrivateKey: key.NewNode(), Handler: l, Dial: w.dial, Proxy: proxy.None, PlainHTTP: true}), l
}

func contains(err error, s string) bool { return err != nil && strings.Contains(err.Error(), s) }
