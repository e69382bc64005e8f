//go:build linux

package core

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

// Crossings counts calls from C into Go; libtailnode-core sets it.
var Crossings func() int64

var tuning struct {
	mu      sync.Mutex
	limit   int64 // what the host asked for; 0: nothing
	pressed bool
}

func setMemoryLimit(n int64) {
	if n <= 0 {
		return
	}
	tuning.mu.Lock()
	defer tuning.mu.Unlock()
	tuning.limit = n
	if !tuning.pressed {
		debug.SetMemoryLimit(n)
	}
}

func setGCPercent(n int) { debug.SetGCPercent(n) }

func setMaxProcs(n int) {
	if n > 0 {
		runtime.GOMAXPROCS(min(n, runtime.NumCPU()*4))
	}
}

func trim() { debug.FreeOSMemory() }

func pressure(level int) {
	tuning.mu.Lock()
	defer tuning.mu.Unlock()
	switch level {
	case 0:
		if tuning.pressed {
			tuning.pressed = false
			limit := tuning.limit
			if limit == 0 {
				limit = math.MaxInt64
			}
			debug.SetMemoryLimit(limit)
		}
	case 1:
		runtime.GC()
	case 2:
		debug.FreeOSMemory()
		s := read("/memory/classes/total:bytes", "/memory/classes/heap/released:bytes")
		limit := s[0] - s[1]
		limit += limit / 8
		if tuning.limit != 0 {
			limit = min(limit, uint64(tuning.limit))
		}
		tuning.pressed = true
		debug.SetMemoryLimit(int64(limit))
	}
}

func read(names ...string) []uint64 {
	s := make([]metrics.Sample, len(names))
	for i, n := range names {
		s[i].Name = n
	}
	metrics.Read(s)
	out := make([]uint64, len(names))
	for i := range s {
		switch s[i].Value.Kind() {
		case metrics.KindUint64:
			out[i] = s[i].Value.Uint64()
		case metrics.KindFloat64:
			out[i] = uint64(s[i].Value.Float64() * 1e9)
		case metrics.KindFloat64Histogram:
			h := s[i].Value.Float64Histogram()
			for j, c := range h.Counts {
				if up := h.Buckets[j+1]; c > 0 && !math.IsInf(up, 1) {
					out[i] = uint64(up * 1e9)
				}
			}
		}
	}
	return out
}

// runtimeStats is tailnode_stats behind its size field: 20 numbers of 64 bits.
func runtimeStats() []byte {
	const (
		live, free, unused, released, stacks, osStacks, total, cpu, pauseMax, threads, gors, procs = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
	)
	m := read("/memory/classes/heap/objects:bytes", "/memory/classes/heap/free:bytes", "/memory/classes/heap/unused:bytes",
		"/memory/classes/heap/released:bytes", "/memory/classes/heap/stacks:bytes", "/memory/classes/os-stacks:bytes",
		"/memory/classes/total:bytes", "/cpu/classes/gc/total:cpu-seconds", "/sched/pauses/total/gc:seconds",
		"/sched/threads/total:threads", "/sched/goroutines:goroutines", "/sched/gomaxprocs:threads")
	var gc debug.GCStats
	debug.ReadGCStats(&gc)
	var crossings int64
	if Crossings != nil {
		crossings = Crossings()
	}
	inUse := m[live] + m[free] + m[unused] + m[released] + m[stacks] + m[osStacks]
	var b []byte
	for _, v := range []uint64{
		m[live], m[free] + m[unused], m[released], m[stacks] + m[osStacks], m[total] - inUse, m[total] - m[released],
		uint64(debug.SetMemoryLimit(-1)), uint64(gc.NumGC), uint64(gc.PauseTotal), m[pauseMax], m[cpu],
		m[threads], m[gors], m[procs],
		uint64(openNodes.Load()), uint64(calls.Load()), uint64(inFlight.Load()), uint64(connections.Load()), uint64(crossings), uint64(os.Getpid()),
	} {
		b = native.AppendUint64(b, v)
	}
	return b
}
