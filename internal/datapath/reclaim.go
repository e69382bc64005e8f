package datapath

import (
	"runtime"
	"sync"
)

// After a burst of traffic the buffers that carried it are garbage: in pools, which the collector empties with its second
// cycle, and on a heap that has grown to twice what the burst needed. A process that does nothing more
// allocates nothing, and so does not collect until the runtime does it anyway, every two minutes. So
// once a burst is over the collector is run, as often as it has not run since by itself, and the runtime's own
// scavenger hands the pages to the system within seconds. It costs nothing without traffic: what tells of the end of
// a burst is a timer that traffic arms (wg.Config.Traffic).
//
// A collection costs in proportion to everything that lives in the process. The program around the node may have a large
// heap, of which a burst is a small part: then it is left to the runtime.
type reclaim struct {
	mu     sync.Mutex
	cycles uint32 // of the collector, when there was last a lot of traffic
	closed bool
	wg     sync.WaitGroup
}

const (
	// reclaimCycles is how many cycles it takes: nothing is in a sync.Pool any more after two, and the scavenger spares
	// what was densely used for one more.
	reclaimCycles = 3
	// ReclaimHeap is the size in bytes of the heap above which nothing is done. Marking it takes some 20 ms of one processor.
	ReclaimHeap = 64 << 20
)

// collections returns how many cycles there are to run after a burst, ran since the burst, with so many bytes on the heap.
func collections(ran uint32, heap uint64) int {
	if heap > ReclaimHeap || ran >= reclaimCycles {
		return 0
	}
	return int(reclaimCycles - ran)
}

// traffic is wg.Config.Traffic.
func (r *reclaim) traffic(heavy bool) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	r.mu.Lock()
	defer r.mu.Unlock()
	if heavy {
		r.cycles = m.NumGC
		return
	}
	if n := collections(m.NumGC-r.cycles, m.HeapAlloc); n > 0 && !r.closed {
		r.wg.Go(func() {
			for range n {
				runtime.GC()
			}
		})
	}
}

// close waits until nothing runs.
func (r *reclaim) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.wg.Wait()
}
