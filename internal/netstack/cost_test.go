package netstack

import (
	"io"
	"runtime"
	"testing"

	costs "github.com/tailnode/tailnode/internal/budget"
)

// TestPacketCost counts allocations of a transfer, in both stacks, for each packet of the MTU. Most of gVisor's are for segments, of which
// one is many packets; how many depends a little on how the goroutines meet.
func TestPacketCost(t *testing.T) {
	p := newPair(t, nil)
	c, d := connect(t, p.a, listen(t, p.b, "[::]:80"), b4)
	buf := make([]byte, 256<<10)
	const warm, total = 4 << 20, 32 << 20
	transfer := func(n int) {
		done := make(chan error, 1)
		go func() {
			_, err := io.CopyN(io.Discard, d, int64(n))
			done <- err
		}()
		for range n / len(buf) {
			if _, err := c.Write(buf); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	transfer(warm) // buffers and pools grow
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	transfer(total)
	runtime.ReadMemStats(&after)
	packets := float64(total) / float64(p.a.MTU()-40)
	costs.Check(t, "allocs.netstack.packet", float64(after.Mallocs-before.Mallocs)/packets)
}
