// Package path holds internal/path against upstream's magicsock.
package path

import (
	"context"
	"net"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	wgconn "github.com/tailscale/wireguard-go/conn"
	"go4.org/mem"
	"tailscale.com/derp/derpserver"
	"tailscale.com/health"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/net/netmon"
	ttailcfg "tailscale.com/tailcfg"
	tkey "tailscale.com/types/key"
	"tailscale.com/types/logger"
	"tailscale.com/util/eventbus"
	"tailscale.com/util/usermetric"
	"tailscale.com/wgengine/magicsock"

	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// handler joins our relay client to our path manager, as a node does.
type handler struct {
	m  *path.Manager
	up chan struct{}
}

func (h *handler) Packet(region int, src key.NodePublic, b []byte) { h.m.FromRelay(region, src, b) }
func (h *handler) Flush(region int)                                { h.m.FlushRelay(region) }
func (h *handler) PeerGone(region int, k key.NodePublic, reason byte) {
	h.m.PeerGone(region, k, reason)
}
func (h *handler) State(region int, connected bool, err error) {
	h.m.RelayState(region, connected, err)
	if connected {
		select {
		case h.up <- struct{}{}:
		default:
		}
	}
}

type sink struct{}

func (sink) WireGuard(path.Source, *path.Peer, []byte) {}
func (sink) Flush()                                    {}

// TestDiscoPingBothWays: our ping is answered by magicsock, and magicsock's by us, over upstream's relay. UDP is there for upstream
// and not for us, so its attempts at a direct path must come to nothing without harm.
func TestDiscoPingBothWays(t *testing.T) {
	d := derpserver.New(tkey.NewNode(), logger.Discard)
	defer d.Close()
	srv := httptest.NewTLSServer(derpserver.Handler(d))
	defer srv.Close()
	defer srv.CloseClientConnections()
	port := srv.Listener.Addr().(*net.TCPAddr).Port

	// Upstream's side.
	theirNode := tkey.NewNode()
	bus := eventbus.New()
	defer bus.Close()
	mon, err := netmon.New(bus, logger.Discard)
	if err != nil {
		t.Fatal(err)
	}
	defer mon.Close()
	conn, err := magicsock.NewConn(magicsock.Options{
		NetMon: mon, EventBus: bus, Metrics: new(usermetric.Registry), Logf: logger.Discard,
		HealthTracker: health.NewTracker(bus), DisablePortMapper: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDERPMap(&ttailcfg.DERPMap{Regions: map[int]*ttailcfg.DERPRegion{1: {RegionID: 1, Nodes: []*ttailcfg.DERPNode{{
		Name: "1a", RegionID: 1, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none", DERPPort: port, STUNPort: -1, InsecureForTests: true,
	}}}}})
	if err := conn.SetPrivateKey(theirNode); err != nil {
		t.Fatal(err)
	}
	receivers, _, err := conn.Bind().Open(0)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range receivers {
		go func() {
			n := conn.Bind().BatchSize()
			bufs, sizes := make([][]byte, n), make([]int, n)
			for i := range bufs {
				bufs[i] = make([]byte, 65536)
			}
			eps := make([]wgconn.Endpoint, n)
			for {
				if _, err := f(bufs, sizes, eps); err != nil {
					return
				}
			}
		}()
	}

	// Ours.
	nodeKey, discoKey := key.NewNode(), key.NewDisco()
	h := &handler{up: make(chan struct{}, 1)}
	regions := client.NewRegions(client.RegionsConfig{PrivateKey: nodeKey, Handler: h})
	defer regions.Close()
	h.m, err = path.New(path.Config{NodeKey: nodeKey.Public(), DiscoKey: discoKey, Relay: regions, NewSink: func() path.Sink { return sink{} }})
	if err != nil {
		t.Fatal(err)
	}
	defer h.m.Close()
	theirs := key.NodePublicFromRaw([32]byte(theirNode.Public().AppendTo(nil)))
	theirDisco := conn.DiscoPublicKey()
	h.m.UpsertPeer(path.PeerInfo{Key: theirs, Disco: key.DiscoPublicFromRaw([32]byte(theirDisco.AppendTo(nil))), HomeRegion: 1})
	regions.SetMap(&tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, Nodes: []*tailcfg.DERPNode{{
		Name: "1a", RegionID: 1, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none", DERPPort: port, STUNPort: -1, InsecureForTests: true,
	}}}}})
	regions.SetHome(1)

	ourPub, ourDisco := nodeKey.Public().Raw(), discoKey.Public().Raw()
	us := (&ttailcfg.Node{
		ID: 2, StableID: "2", Key: tkey.NodePublicFromRaw32(mem.B(ourPub[:])), DiscoKey: tkey.DiscoPublicFromRaw32(mem.B(ourDisco[:])),
		HomeDERP: 1, Name: "us.example.", Hostinfo: (&ttailcfg.Hostinfo{Hostname: "us"}).View(), Addresses: []netip.Prefix{netip.MustParsePrefix("100.64.0.2/32")}, Cap: ttailcfg.CurrentCapabilityVersion,
	}).View()
	self := (&ttailcfg.Node{ID: 1, StableID: "1", Key: theirNode.Public(), DiscoKey: theirDisco, HomeDERP: 1,
		Addresses: []netip.Prefix{netip.MustParsePrefix("100.64.0.1/32")}}).View()
	conn.SetNetworkMap(self, []ttailcfg.NodeView{us})

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	select {
	case <-h.up:
	case <-ctx.Done():
		t.Fatal("our relay client did not connect")
	}
	for _, size := range []int{0, 1200, 4000} {
		r, err := h.m.Ping(ctx, theirs, size)
		if err != nil || r.Region != 1 || r.Latency <= 0 {
			t.Fatalf("our ping of size %d: %+v, %v", size, r, err)
		}
		t.Logf("ours, size %d: %v by region %d", size, r.Latency, r.Region)
	}
	for _, size := range []int{0, 1200, 4000} {
		done := make(chan ipnstate.PingResult, 1)
		conn.Ping(us, &ipnstate.PingResult{}, size, func(r *ipnstate.PingResult) { done <- *r })
		select {
		case r := <-done:
			if r.Err != "" || r.DERPRegionID != 1 || r.LatencySeconds <= 0 {
				t.Fatalf("upstream's ping of size %d: %+v", size, r)
			}
			t.Logf("upstream's, size %d: %.3f ms by region %d", size, 1e3*r.LatencySeconds, r.DERPRegionID)
		case <-ctx.Done():
			t.Fatalf("upstream's ping of size %d: no answer", size)
		}
	}
}
