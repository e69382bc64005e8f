package node

import (
	"runtime"
	"runtime/debug"
	"time"

	"github.com/tailnode/tailnode/internal/datapath"
)

// settleAfter is how long the work that a large map makes may go on.
const settleAfter = 2 * time.Second

// settle gives back what a large map took to decode, once. The runtime would do it with its next collection, but a node that idles
// allocates next to nothing: the collection is minutes away, and until then the process is as large as it was for that moment.
// Where the program around the node has a large heap, collecting it would cost more than this gives, so it is left to the runtime.
func (n *Node) settle() {
	if n.settling.Swap(true) {
		return
	}
	n.wg.Go(func() {
		defer n.settling.Store(false)
		t := time.NewTimer(settleAfter)
		defer t.Stop()
		select {
		case <-t.C:
		case <-n.ctx.Done():
			return
		}
		var s runtime.MemStats
		if runtime.ReadMemStats(&s); s.HeapAlloc <= datapath.ReclaimHeap {
			debug.FreeOSMemory()
		}
	})
}
