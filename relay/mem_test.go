package relay

import (
	"runtime"
	"testing"

	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/key"
)

// TestIdleConnectionsAreSmall bounds what an idle connection holds, at both ends and with TLS, after traffic.
func TestIdleConnectionsAreSmall(t *testing.T) {
	if testing.Short() {
		t.Skip("opens a hundred connections")
	}
	s := start(t, &Server{})
	m := derpMap(s, 1)
	heap := func() (bytes, stack uint64) {
		var ms runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&ms)
		return ms.HeapAlloc, ms.StackInuse
	}
	h0, s0 := heap()
	g0 := runtime.NumGoroutine()
	const n = 100
	h := newSink()
	for range n {
		k := key.NewNode()
		rs := client.NewRegions(client.RegionsConfig{PrivateKey: k, Handler: h})
		t.Cleanup(rs.Close)
		rs.SetMap(m)
		rs.SetHome(1)
		h.waitState(t, true)
		for range 5 { // a burst to itself
			rs.Send(1, k.Public(), make([]byte, 50_000), 1400)
			within(t, "packet", h.packets)
		}
	}
	h1, s1 := heap()
	perConn := (int64(h1) - int64(h0)) / n
	goroutines := (runtime.NumGoroutine() - g0) / n
	t.Logf("an idle connection, both ends: %d KB of heap, %d KB of stack, %d goroutines", perConn>>10, (int64(s1)-int64(s0))/n>>10, goroutines)
	if perConn > 150<<10 || goroutines > 5 {
		t.Errorf("an idle connection holds %d KB in %d goroutines", perConn>>10, goroutines)
	}
}
