package datapath

import (
	"runtime"
	"testing"
)

func TestCollections(t *testing.T) {
	for _, tc := range []struct {
		ran  uint32
		heap uint64
		want int
	}{
		{0, 1 << 20, 3}, {1, 1 << 20, 2}, {3, 1 << 20, 0}, {1000, 1 << 20, 0}, {0, ReclaimHeap + 1, 0},
	} {
		if got := collections(tc.ran, tc.heap); got != tc.want {
			t.Errorf("%d cycles, %d bytes: %d, want %d", tc.ran, tc.heap, got, tc.want)
		}
	}
}

func TestReclaim(t *testing.T) {
	var before, after runtime.MemStats
	var r reclaim
	runtime.ReadMemStats(&before)
	r.traffic(true)
	if before.HeapAlloc > ReclaimHeap {
		t.Skip("other tests have left too much")
	}
	r.traffic(false)
	r.close()
	if runtime.ReadMemStats(&after); after.NumGC < before.NumGC+1 { // a cycle may have run in between
		t.Error("nothing was collected after a burst")
	}
	r.traffic(false) // after close: nothing
}
