package main

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"go4.org/mem"
	upderp "tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	uptailcfg "tailscale.com/tailcfg"
	upkey "tailscale.com/types/key"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"github.com/tailnode/tailnode/interop/harness"
)

// The servers alone, without nodes: what a relay forwards, and what a coordination server does with many.

// relayClient is a connection to a relay. send takes packets of relaySize back to back.
type relayClient struct {
	send    func(to string, b []byte) error
	key     string // raw
	count   atomic.Int64
	arrived chan struct{} // one token: count has grown
	close   func()
}

const relaySize = 1312 // a WireGuard packet with 1,280 bytes in it

func (c *relayClient) tally() {
	c.count.Add(1)
	select {
	case c.arrived <- struct{}{}:
	default:
	}
}

// clientHandler counts what comes to our client.
type clientHandler struct{ c *relayClient }

func (h clientHandler) Packet(int, key.NodePublic, []byte)      { h.c.tally() }
func (clientHandler) Flush(int)                                 {}
func (clientHandler) PeerGone(int, key.NodePublic, byte)        {}
func (clientHandler) State(region int, connected bool, e error) {}

func ourRelayClient(ctx context.Context, r harness.RelayInfo) (*relayClient, error) {
	host := r.DERP.Addr().String()
	k := key.NewNode()
	conn, err := client.Dial(ctx, client.Options{PrivateKey: k}, &tailcfg.DERPRegion{RegionID: 1, RegionCode: "lo", Nodes: []*tailcfg.DERPNode{{
		Name: "1a", RegionID: 1, HostName: host, IPv4: host, IPv6: "none", DERPPort: int(r.DERP.Port()), STUNPort: r.STUNPort, CertName: r.CertName,
	}}})
	if err != nil {
		return nil, err
	}
	raw := k.Public().Raw()
	c := &relayClient{key: string(raw[:]), arrived: make(chan struct{}, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn.Serve(clientHandler{c})
	}()
	c.send = func(to string, b []byte) error {
		return conn.Send(key.NodePublicFromRaw([32]byte([]byte(to))), b, relaySize)
	}
	c.close = func() { conn.Close(); <-done }
	return c, nil
}

func upstreamRelayClient(ctx context.Context, r harness.RelayInfo) (*relayClient, error) {
	region := harness.UpstreamDERPMap(r).Regions[1]
	k := upkey.NewNode()
	conn := derphttp.NewRegionClient(k, func(string, ...any) {}, netmon.NewStatic(), func() *uptailcfg.DERPRegion { return region })
	if err := conn.Connect(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	c := &relayClient{key: string(k.Public().AppendTo(nil)), arrived: make(chan struct{}, 1)}
	ready, done := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := conn.Recv()
			if err != nil {
				return
			}
			switch m.(type) {
			case upderp.ServerInfoMessage:
				ready <- struct{}{}
			case upderp.ReceivedPacket:
				c.tally()
			}
		}
	}()
	c.send = func(to string, b []byte) error {
		dst := upkey.NodePublicFromRaw32(mem.S(to))
		for ; len(b) > 0; b = b[relaySize:] { // it has no batches
			if err := conn.Send(dst, b[:relaySize]); err != nil {
				return err
			}
		}
		return nil
	}
	c.close = func() { conn.Close(); <-done }
	select {
	case <-ready:
		return c, nil
	case <-ctx.Done():
		c.close()
		return nil, ctx.Err()
	}
}

// measureRelay has two clients and a relay in this process; the sides are the relays'.
func measureRelay(r *round) error {
	ctx, cancel := context.WithTimeout(context.Background(), r.m.limit[r.p.index()])
	defer cancel()
	for _, cl := range []struct {
		name string
		dial func(context.Context, harness.RelayInfo) (*relayClient, error)
	}{{"our clients", ourRelayClient}, {"upstream's clients", upstreamRelayClient}} {
		for _, rl := range []struct {
			side  string
			maker harness.RelayMaker
		}{{ours, harness.OurRelay}, {upstream, harness.UpstreamRelay}} {
			rate, cpu, err := forward(ctx, rl.maker, cl.dial, r.p.stream/2)
			if err != nil {
				r.fail(rl.side, fmt.Errorf("between %s: %w", cl.name, err))
				continue
			}
			name := "relay alone, " + cl.name + ": "
			r.addAs(rl.side, more(name+"packets forwarded (1,312 bytes)", "1/s", 0).charted(), rate)
			r.addAs(rl.side, less(name+"processor time, relay and clients", "s/GB", 0), cpu)
		}
	}
	return nil
}

// forward sends for d with a window of packets under way that upstream's relay can hold, and with a larger one, and returns the
// better rate with its processor time for a gigabyte.
func forward(ctx context.Context, maker harness.RelayMaker, dial func(context.Context, harness.RelayInfo) (*relayClient, error), d time.Duration) (rate, cpu float64, err error) {
	rl, err := maker(nil)
	if err != nil {
		return 0, 0, err
	}
	defer rl.Close()
	src, err := dial(ctx, rl.Info())
	if err != nil {
		return 0, 0, err
	}
	defer src.close()
	dst, err := dial(ctx, rl.Info())
	if err != nil {
		return 0, 0, err
	}
	defer dst.close()
	buf := make([]byte, 8*relaySize)
	var sent, lost int64
	late := time.NewTimer(time.Hour)
	defer late.Stop()
	settle := func(room int64) {
		for sent-lost-dst.count.Load() > room {
			late.Reset(20 * time.Millisecond)
			select {
			case <-dst.arrived:
			case <-late.C:
				lost = sent - dst.count.Load()
			}
		}
	}
	for _, window := range []int64{32, 256} {
		from, used, began := dst.count.Load(), child.CPU(), time.Now()
		for time.Since(began) < d && ctx.Err() == nil {
			if err := src.send(dst.key, buf); err != nil {
				return 0, 0, err
			}
			sent += 8
			settle(window - 8)
		}
		settle(0)
		n := float64(dst.count.Load() - from)
		if v := n / time.Since(began).Seconds(); v > rate {
			rate, cpu = v, (child.CPU()-used)/(n*relaySize/1e9)
		}
	}
	return rate, cpu, ctx.Err()
}

// measureCoord has light nodes join our coordination server and, fewer of them, upstream's test server, which sends everybody the whole
// netmap at every change and is not made for many. Upstream's own server is not public.
func measureCoord(r *round) error {
	few := r.p.crowd / 10
	for _, c := range []struct {
		side  string
		n     int
		share time.Duration // a part of the time, so that one that hangs leaves the others theirs
	}{{ours, few, 4}, {upstream, few, 4}, {ours, r.p.crowd, 2}} {
		ctx, cancel := context.WithTimeout(context.Background(), (r.m.limit[r.p.index()]-5*time.Second)/c.share)
		err := r.crowd(ctx, c.side, c.n)
		cancel()
		if err != nil {
			r.fail(c.side, fmt.Errorf("%d nodes: %w", c.n, err))
		}
	}
	return nil
}

func (r *round) crowd(ctx context.Context, side string, n int) error {
	url, key, stop, err := startCoord(side)
	if err != nil {
		return err
	}
	defer stop()
	used := child.CPU()
	x := newCrowd(ctx, url, key, n)
	defer x.close()
	name := "coordination, " + thousands(n) + " light nodes: "
	if err := x.wait(ctx, func() bool { return x.knowAll == n }); err != nil {
		return fmt.Errorf("joining: %w", err)
	}
	r.addAs(side, less(name+"all join and know all", "ms", 0).charted(), time.Since(x.began).Seconds()*1e3)
	r.addAs(side, less(name+"processor time of joining, server and nodes", "s", 0), child.CPU()-used)
	for range 5 {
		began := time.Now()
		if err := x.change(ctx); err != nil {
			return err
		}
		if err := x.wait(ctx, func() bool { return x.heard == n-1 }); err != nil {
			return fmt.Errorf("a change: %w", err)
		}
		r.addAs(side, less(name+"a change is with all others", "ms", 0).charted(), time.Since(began).Seconds()*1e3)
	}
	return nil
}

func startCoord(side string) (url, key string, stop func(), err error) {
	if side == upstream {
		c, err := harness.UpstreamControl(harness.RelayInfo{DERP: netip.MustParseAddrPort("127.0.0.1:1")}, nil)
		if err != nil {
			return "", "", nil, err
		}
		return c.URL(), "tskey-any", func() { c.Close() }, nil
	}
	srv := &coord.Server{Addr: "127.0.0.1:0"}
	if err := srv.Start(context.Background()); err != nil {
		return "", "", nil, err
	}
	key, err = srv.CreateAuthKey(coord.AuthKeyOptions{Reusable: true})
	return srv.BaseURL(), key, func() { srv.Close() }, err
}

// wholeNodes calls f with the ID of each whole node in a map response. Decoding JSON would cost more than all else that is measured.
func wholeNodes(b []byte, f func(id int64)) {
	mark := []byte(`,"StableID":`)
	for {
		i := bytes.Index(b, mark)
		if i < 0 {
			return
		}
		j := bytes.LastIndexByte(b[:i], ':')
		if id, err := strconv.ParseInt(string(b[j+1:i]), 10, 64); err == nil {
			f(id)
		}
		b = b[i+len(mark):]
	}
}
