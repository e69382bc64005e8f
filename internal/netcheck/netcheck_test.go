package netcheck

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/proxy"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ms = time.Millisecond

func region(id int, nodes ...*tailcfg.DERPNode) *tailcfg.DERPRegion {
	if nodes == nil {
		nodes = []*tailcfg.DERPNode{{Name: "n", HostName: "relay.example", IPv4: addr(id), IPv6: "none"}}
	}
	return &tailcfg.DERPRegion{RegionID: id, Nodes: nodes}
}

func addr(id int) string { return netip.AddrFrom4([4]byte{192, 0, 2, byte(id)}).String() }

func derpMap(regions ...*tailcfg.DERPRegion) *tailcfg.DERPMap {
	dm := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}}
	for _, r := range regions {
		dm.Regions[r.RegionID] = r
	}
	return dm
}

func TestChooseHome(t *testing.T) {
	hidden := region(9)
	hidden.NoMeasureNoHome = true
	avoid := region(3)
	avoid.Avoid = true
	stunOnly := region(8, &tailcfg.DERPNode{STUNOnly: true})
	all := derpMap(region(1), region(2), region(3), hidden, stunOnly)
	scored := derpMap(region(1), region(2))
	scored.HomeParams = &tailcfg.DERPHomeParams{RegionScore: map[int]float64{2: 0.5, 1: -1}}
	type lat = map[int]time.Duration
	for _, tt := range []struct {
		name        string
		dm          *tailcfg.DERPMap
		home        int
		alive       bool
		now, recent lat
		want        int
	}{
		{"no map", nil, 0, false, nil, nil, 0},
		{"no home allowed", derpMap(hidden, stunOnly), 9, true, lat{9: ms}, nil, 0},
		{"fastest", all, 0, false, lat{1: 30 * ms, 2: 10 * ms, 3: 20 * ms}, nil, 2},
		{"equal: lowest ID", all, 0, false, lat{2: 10 * ms, 3: 10 * ms}, nil, 2},
		{"never the hidden one", all, 0, false, lat{1: 30 * ms, 8: ms, 9: ms}, nil, 1},
		{"nothing measured: the first", all, 0, false, nil, nil, 1},
		{"nothing measured: not the avoided", derpMap(avoid, region(4)), 0, false, nil, nil, 4},
		{"nothing measured, all avoided", derpMap(avoid), 0, false, nil, nil, 3},
		{"nothing measured: the home stays", all, 3, false, nil, nil, 3},
		{"nothing measured, home has left the map", all, 7, true, nil, nil, 1},
		{"home has left the map", all, 7, true, lat{2: ms, 3: 2 * ms}, nil, 2},
		{"home stays within 10 ms", all, 1, false, lat{1: 12 * ms, 2: 3 * ms}, nil, 1},
		{"home stays within a third", all, 1, false, lat{1: 100 * ms, 2: 70 * ms}, nil, 1},
		{"home moves beyond both", all, 1, false, lat{1: 100 * ms, 2: 60 * ms}, nil, 2},
		{"silent home that is alive stays", all, 1, true, lat{2: ms}, nil, 1},
		{"silent home that is not goes", all, 1, false, lat{2: ms}, nil, 2},
		{"one slow answer of the home's changes nothing", all, 1, false, lat{1: 200 * ms, 2: 30 * ms}, lat{1: 10 * ms, 2: 30 * ms}, 1},
		{"a region must answer now", all, 0, false, lat{2: 30 * ms}, lat{1: ms, 2: 30 * ms}, 2},
		{"score favours", scored, 0, false, lat{1: 30 * ms, 2: 50 * ms}, nil, 2},
		{"score does not favour enough", scored, 0, false, lat{1: 20 * ms, 2: 50 * ms}, nil, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := ChooseHome(tt.dm, tt.home, tt.alive, tt.now, tt.recent); got != tt.want {
				t.Errorf("home %d, want %d", got, tt.want)
			}
		})
	}
}

func TestPlan(t *testing.T) {
	two := region(1,
		&tailcfg.DERPNode{Name: "a", IPv4: "192.0.2.1", IPv6: "2001:db8::1"},
		&tailcfg.DERPNode{Name: "b", HostName: "b.example", IPv6: "none"},
		&tailcfg.DERPNode{Name: "s", IPv4: "192.0.2.3", IPv6: "none", STUNOnly: true})
	noSTUN := region(2, &tailcfg.DERPNode{Name: "t", HostName: "t.example", STUNPort: -1})
	hidden := region(3)
	hidden.NoMeasureNoHome = true
	type p struct {
		node string
		kind Kind
		at   time.Duration
	}
	for _, tt := range []struct {
		name   string
		v4, v6 bool
		want   []p
	}{
		{"dual stack", true, true, []p{
			{"a", STUN4, 0}, {"a", STUN6, 0}, {"t", TCP, 0},
			{"b", STUN4, 100 * ms}, {"a", TCP, 150 * ms}, {"s", STUN4, 200 * ms}, {"b", TCP, 250 * ms}}},
		{"IPv6 only", false, true, []p{{"a", STUN6, 0}, {"t", TCP, 0}, {"a", TCP, 150 * ms}, {"b", TCP, 250 * ms}}},
		{"no UDP at all", false, false, []p{{"a", TCP, 0}, {"t", TCP, 0}, {"b", TCP, 100 * ms}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []p
			for _, x := range Plan(derpMap(two, noSTUN, hidden), 0, nil, time.Now(), tt.v4, tt.v6) {
				got = append(got, p{x.Node.Name, x.Kind, x.After})
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}

func TestPlanIncremental(t *testing.T) {
	dm := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}}
	last := &Report{Time: time.Now(), Latency: map[int]time.Duration{}, tried: map[int]struct{}{}}
	for id := 1; id <= 10; id++ {
		dm.Regions[id] = region(id)
		if id != 10 { // new since
			last.tried[id] = struct{}{}
		}
		if id <= 8 {
			last.Latency[id] = time.Duration(id) * ms
		}
	}
	probed := func(now time.Time, home int) map[int]bool {
		m := map[int]bool{}
		for _, p := range Plan(dm, home, last, now, true, false) {
			m[p.Region] = true
		}
		return m
	}
	want := map[int]bool{1: true, 2: true, 3: true, 4: true, 7: true, 10: true}
	if got := probed(last.Time.Add(time.Minute), 7); !reflect.DeepEqual(got, want) {
		t.Errorf("young report: %v, want %v", got, want)
	}
	if got := probed(last.Time.Add(time.Hour), 7); len(got) != 10 {
		t.Errorf("old report: %v, want all", got)
	}
}

func TestPlanIsBounded(t *testing.T) {
	dm := derpMap()
	for id := 1; id <= 5000; id++ {
		dm.Regions[id] = region(id)
	}
	regions := map[int]bool{}
	for _, p := range Plan(dm, 4000, nil, time.Now(), true, true) {
		regions[p.Region] = true
	}
	if len(regions) != maxRegions || !regions[4000] {
		t.Errorf("%d regions, with home %v", len(regions), regions[4000])
	}
}

// bed is a network with relays for the regions, each at its own distance.
type bed struct {
	net  *memnet.Network
	host *memnet.Host
	udp  bool
	dist map[netip.Addr]time.Duration // round trip
	stop []func() error
}

func newBed(t *testing.T, dm *tailcfg.DERPMap, rtt map[int]time.Duration) *bed {
	b := &bed{udp: true, dist: map[netip.Addr]time.Duration{}}
	b.net = memnet.New(1, memnet.Link{})
	b.net.SetLink(func(src, dst netip.AddrPort, udp bool) memnet.Link {
		d, ok := b.dist[dst.Addr()]
		if !ok {
			d, ok = b.dist[src.Addr()]
		}
		return memnet.Link{Latency: d / 2, Down: !ok || udp && !b.udp}
	})
	b.host = b.net.Host("198.51.100.7")
	for id, d := range rtt {
		b.dist[netip.MustParseAddr(addr(id))] = d
		h := b.net.Host(addr(id))
		pc, err := h.ListenPacket("udp4", ":3478")
		if err != nil {
			t.Fatal(err)
		}
		l, err := h.Listen("tcp4", ":443")
		if err != nil {
			t.Fatal(err)
		}
		go serveSTUN(pc)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		b.stop = append(b.stop, pc.Close, l.Close)
	}
	t.Cleanup(b.close)
	return b
}

func (b *bed) close() {
	for _, f := range b.stop {
		f()
	}
	b.stop = nil
}

func serveSTUN(pc *memnet.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, src, err := pc.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		tx, err := stun.ParseRequest(buf[:n])
		if err != nil {
			continue
		}
		out := stun.AppendResponse(nil, tx, src)
		pc.WriteToUDPAddrPort(out, src)
	}
}

func (b *bed) config(dm *tailcfg.DERPMap) Config {
	return Config{
		Map: dm,
		ListenPacket: func(_ context.Context, network, address string) (net.PacketConn, error) {
			pc, err := b.host.ListenPacket(network, address)
			if err != nil {
				return nil, err
			}
			return pc, nil
		},
		DialContext: b.host.DialContext,
		Proxy:       proxy.None,
		LookupNetIP: func(ctx context.Context, network, host string) ([]netip.Addr, error) {
			return nil, errors.New("no such host")
		},
	}
}

func TestRun(t *testing.T) {
	hidden := region(4)
	hidden.NoMeasureNoHome = true
	dm := derpMap(region(1), region(2), region(3), hidden)
	named := derpMap(region(1, &tailcfg.DERPNode{HostName: "one.example"}), region(2, &tailcfg.DERPNode{HostName: "two.example"}))
	for _, tt := range []struct {
		name   string
		dm     *tailcfg.DERPMap
		rtt    map[int]time.Duration
		change func(*bed, *Config)
		home   int
		udp    bool
		within time.Duration
	}{
		{"one region: at once", derpMap(region(5)), nil, nil, 5, false, 0},
		{"fastest", dm, map[int]time.Duration{1: 80 * ms, 2: 20 * ms, 3: 200 * ms, 4: ms}, nil, 2, true, 40 * ms},
		{"only a far one answers", dm, map[int]time.Duration{3: 300 * ms}, nil, 3, true, 400 * ms},
		{"UDP blocked", dm, map[int]time.Duration{1: 80 * ms, 2: 20 * ms}, func(b *bed, _ *Config) { b.udp = false }, 2, false, 200 * ms},
		{"nothing answers", dm, nil, nil, 1, false, DefaultTimeout},
		{"nothing answers, home stays", dm, nil, func(_ *bed, c *Config) { c.Home = 3 }, 3, false, DefaultTimeout},
		{"home waits for its answer", dm, map[int]time.Duration{1: 20 * ms, 2: 28 * ms}, func(_ *bed, c *Config) { c.Home = 2 }, 2, true, 60 * ms},
		{"no sockets", dm, map[int]time.Duration{1: 80 * ms, 2: 20 * ms}, func(_ *bed, c *Config) {
			c.ListenPacket = func(context.Context, string, string) (net.PacketConn, error) { return nil, errors.New("no") }
		}, 2, false, 40 * ms},
		{"names", named, map[int]time.Duration{1: 60 * ms, 2: 20 * ms}, func(_ *bed, c *Config) {
			c.LookupNetIP = func(_ context.Context, _, host string) ([]netip.Addr, error) {
				return []netip.Addr{netip.MustParseAddr(addr(map[string]int{"one.example": 1, "two.example": 2}[host]))}, nil
			}
		}, 2, true, 40 * ms},
		{"names that do not resolve", named, nil, nil, 1, false, 300 * ms},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, tt.dm, tt.rtt)
				defer b.close()
				cfg := b.config(tt.dm)
				if tt.change != nil {
					tt.change(b, &cfg)
				}
				start := time.Now()
				r, err := Run(t.Context(), cfg)
				if err != nil {
					t.Fatal(err)
				}
				if d := time.Since(start); d > tt.within {
					t.Errorf("took %v, want at most %v", d, tt.within)
				}
				if r.Home != tt.home || r.UDP != tt.udp {
					t.Errorf("home %d, UDP %v; want %d, %v", r.Home, r.UDP, tt.home, tt.udp)
				}
				if d, ok := r.Latency[tt.home]; ok && d != tt.rtt[tt.home] {
					t.Errorf("latency %v", d)
				}
				if ni := r.NetInfo(); ni.PreferredDERP != tt.home || r.UDP && len(ni.DERPLatency) == 0 {
					t.Errorf("%+v", ni)
				}
				if r.UDP && r.GlobalV4.Addr().String() != "198.51.100.7" {
					t.Errorf("address %v", r.GlobalV4)
				}
			})
		})
	}
}

func TestRunHistoryAndFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dm := derpMap(region(1), region(2))
		b := newBed(t, dm, map[int]time.Duration{1: 20 * ms, 2: 40 * ms})
		defer b.close()
		cfg := b.config(dm)
		cfg.Full = true
		r, err := Run(t.Context(), cfg)
		if err != nil || len(r.Latency) != 2 || r.Home != 1 || r.MappingVaries != tailcfg.False {
			t.Fatalf("%+v, %v", r, err)
		}
		synctest.Wait()                                 // connections that are still being closed look it up
		b.dist[netip.MustParseAddr(addr(1))] = 300 * ms // for a moment
		cfg.Home, cfg.Last = 1, r
		if r, err = Run(t.Context(), cfg); err != nil || r.Home != 1 {
			t.Fatalf("home moved to %d, %v", r.Home, err)
		}
		time.Sleep(2 * historyAge)
		cfg.Last = r
		if r, err = Run(t.Context(), cfg); err != nil || r.Home != 2 {
			t.Fatalf("home stayed at %d, %v", r.Home, err)
		}
	})
}

func TestRunErrors(t *testing.T) {
	for _, dm := range []*tailcfg.DERPMap{nil, {}, derpMap(), {Regions: map[int]*tailcfg.DERPRegion{1: nil, 2: {Nodes: []*tailcfg.DERPNode{nil}}}}} {
		if _, err := Run(t.Context(), Config{Map: dm}); !errors.Is(err, ErrNoRegion) {
			t.Errorf("%v", err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		dm := derpMap(region(1), region(2))
		b := newBed(t, dm, nil)
		ctx, cancel := context.WithTimeout(t.Context(), 100*ms)
		defer cancel()
		start := time.Now()
		if _, err := Run(ctx, b.config(dm)); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 100*ms {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}
