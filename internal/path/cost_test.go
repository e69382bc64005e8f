package path

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/tailnode/tailnode/internal/budget"
	"github.com/tailnode/tailnode/internal/key"
)

func TestPacketCost(t *testing.T) {
	m, _, _ := newManager(t)
	k := key.NewNode().Public()
	p := m.UpsertPeer(PeerInfo{Key: k, Disco: key.NewDisco().Public(), HomeRegion: 2})
	m.RelayState(1, true, nil)
	b := wgPacket(1452)
	budget.Check(t, "allocs.path.send", testing.AllocsPerRun(1000, func() {
		p.Send(b, len(b))
		m.FromRelay(1, k, b)
		m.FlushRelay(1)
	}))
}

// TestPeerCost weighs peers that nobody has talked to, and counts their goroutines.
func TestPeerCost(t *testing.T) {
	const n = 10_000
	m, _, _ := newManager(t)
	infos := make([]PeerInfo, n)
	for i := range infos {
		infos[i] = PeerInfo{
			Key: key.NodePublicFromRaw(raw(i)), Disco: key.DiscoPublicFromRaw(raw(i)), HomeRegion: 2,
			Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 41641)},
		}
	}
	before, goroutines := heapBytes(), runtime.NumGoroutine()
	for i := range infos {
		m.UpsertPeer(infos[i])
	}
	if g := runtime.NumGoroutine(); g > goroutines+n/1000 { // a few may come and go that have nothing to do with peers
		t.Errorf("%d goroutines more", g-goroutines)
	}
	budget.Check(t, "bytes.peer.path", (heapBytes()-before)/n)
	runtime.KeepAlive(infos)
}

// raw is a key as cheap as possible; nothing is sealed for it.
func raw(i int) [32]byte { return [32]byte{byte(i), byte(i >> 8), 31: 1} }

func heapBytes() float64 {
	var s runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&s)
	return float64(s.HeapAlloc)
}
