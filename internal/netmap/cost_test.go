package netmap

import (
	"runtime"
	"testing"

	"github.com/tailnode/tailnode/internal/budget"
)

func TestLookupCost(t *testing.T) {
	_, m := started(t, 2, 3, 4)
	k, a := nodeKey(3, 0), addr4(3)
	budget.Check(t, "allocs.netmap.lookup", testing.AllocsPerRun(100, func() {
		m.PeerByKey(k)
		m.PeerByAddr(a)
		m.Route(a)
		m.ByName("Host-3")
	}))
}

// TestPeerCost weighs the peers of a large netmap, with all of its indexes and what the builder keeps for the next delta.
func TestPeerCost(t *testing.T) {
	heap := func() float64 {
		var s runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&s)
		return float64(s.HeapAlloc)
	}
	before := heap()
	b := NewBuilder()
	m, _ := do(t, b, bigResponse()) // which is garbage by the time of the next line
	budget.Check(t, "bytes.peer.netmap", (heap()-before)/tailnet)
	runtime.KeepAlive(m)
	runtime.KeepAlive(b)
}
