package netmap

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

const tailnet = 10_000

func bigResponse() *tailcfg.MapResponse {
	r := &tailcfg.MapResponse{Node: self()}
	for id := range tailnet {
		r.Peers = append(r.Peers, peer(id+2))
	}
	return r
}

func BenchmarkApplyFull10000(b *testing.B) {
	r := bigResponse()
	b.ReportAllocs()
	for b.Loop() {
		do(b, NewBuilder(), r)
	}
}

func BenchmarkReapplyFull10000(b *testing.B) {
	bu := NewBuilder()
	do(b, bu, bigResponse())
	r := bigResponse()
	b.ReportAllocs()
	for b.Loop() {
		bu.Restart()
		do(b, bu, r)
	}
}

func BenchmarkDelta(b *testing.B) {
	bu := NewBuilder()
	do(b, bu, bigResponse())
	i := 0
	for _, bb := range []struct {
		name string
		r    func() *tailcfg.MapResponse
	}{
		{"Online", func() *tailcfg.MapResponse {
			return &tailcfg.MapResponse{OnlineChange: map[tailcfg.NodeID]bool{tailcfg.NodeID(2 + i*7919%tailnet): i/tailnet%2 == 0}}
		}},
		{"Endpoints", func() *tailcfg.MapResponse {
			return &tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: tailcfg.NodeID(2 + i*7919%tailnet), Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr4(i), 1)}}}}
		}},
		{"AddRemove", func() *tailcfg.MapResponse {
			if i%2 == 0 {
				return &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{100}}
			}
			return &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{peer(100)}}
		}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				i++
				do(b, bu, bb.r())
			}
		})
	}
}

func BenchmarkRoute(b *testing.B) {
	m, _ := do(b, NewBuilder(), bigResponse())
	for _, bb := range []struct {
		name  string
		peers int
	}{{"OnePeer", 1}, {"20Peers", 20}, {"AllPeers", tailnet}} {
		b.Run(bb.name, func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				if m.Route(addr4(2+i%bb.peers*7919%tailnet)) == nil {
					b.Fatal("no route")
				}
			}
		})
	}
}

func BenchmarkPeerByKey(b *testing.B) {
	m, _ := do(b, NewBuilder(), bigResponse())
	i := 0
	for b.Loop() {
		i++
		if m.PeerByKey(nodeKey(2+i*7919%tailnet, 0)) == nil {
			b.Fatal("no peer")
		}
	}
}

// BenchmarkHeapPerPeer reports what a tailnet of 10,000 keeps, response freed.
func BenchmarkHeapPerPeer(b *testing.B) {
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var ms runtime.MemStats
		runtime.ReadMemStats(&ms)
		return ms.HeapAlloc
	}
	for b.Loop() {
		before := heap()
		m, _ := do(b, NewBuilder(), bigResponse())
		b.ReportMetric(float64(heap()-before)/tailnet, "B/peer")
		runtime.KeepAlive(m)
	}
}
