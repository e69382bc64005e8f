package node

import (
	"runtime"
	"runtime/debug"
	"time"
)

const (
	// settleAfter is how long the work that a large map makes may go on.
	settleAfter = 2 * time.Second
	// settleMax is the heap beyond which a process is left alone, the same as after bursts of traffic (datapath.Limits.KeepMemory).
	settleMax = 64 << 20
)

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
		if runtime.ReadMemStats(&s); s.HeapAlloc <= settleMax {
			debug.FreeOSMemory()
		}
	})
}
