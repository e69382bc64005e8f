package filter

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"sync"

	"github.com/tailnode/tailnode/internal/packet"
)

// Flows remembers the UDP and SCTP flows that the node opened, so that their
// replies come in without a rule. It holds a fixed number; a new flow takes the
// place of one that was not used for long. A flow has no other lifetime, as
// with the other clients of the network: a server may answer a subscription
// much later.
//
// Flows outlives the filters: a new filter keeps the flows of the one before.
// It is safe for concurrent use and allocates only when a part of it is used
// for the first time.
type Flows struct {
	seed   [2]uint64
	sets   int // per shard, a power of two
	shards [shards]shard
}

const (
	shards = 16 // locks; a power of two
	ways   = 8  // flows that compete for the same place
)

// shard is a set-associative cache. Beside an exact LRU list it needs no
// pointers, no map and no allocation per flow.
type shard struct {
	mu    sync.Mutex
	clock uint32
	slots []slot
}

type slot struct {
	flow flow
	used uint32 // shard.clock at the last use; 0 means empty
}

// flow is how a reply looks: src is the peer.
type flow struct {
	src, dst     [16]byte
	sport, dport uint16
	proto        packet.Proto
}

// NewFlows returns a table for about max flows (rounded up to a power of two, at
// least 128 and at most 1<<20; 0 means 4096).
func NewFlows(max int) *Flows {
	if max <= 0 {
		max = 4096
	}
	max = min(max, 1<<20)
	f := &Flows{seed: [2]uint64{rand.Uint64() | 1, rand.Uint64() | 1}, sets: 1}
	for f.sets*ways*shards < max {
		f.sets *= 2
	}
	return f
}

// note remembers that a packet from src to dst went out.
func (f *Flows) note(proto packet.Proto, src, dst netip.AddrPort) {
	f.use(makeFlow(proto, dst, src), true)
}

// has reports whether a packet from src to dst is a reply, and counts as a use
// of the flow.
func (f *Flows) has(proto packet.Proto, src, dst netip.AddrPort) bool {
	return f.use(makeFlow(proto, src, dst), false)
}

func makeFlow(proto packet.Proto, src, dst netip.AddrPort) flow {
	return flow{src.Addr().As16(), dst.Addr().As16(), src.Port(), dst.Port(), proto}
}

func (f *Flows) use(w flow, add bool) bool {
	h := f.hash(&w)
	s := &f.shards[h%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.slots == nil {
		if !add {
			return false
		}
		s.slots = make([]slot, f.sets*ways)
	}
	if s.clock++; s.clock == 0 { // wrapped: forget the order, not the flows
		for i := range s.slots {
			s.slots[i].used = min(s.slots[i].used, 1)
		}
		s.clock = 2
	}
	set := s.slots[int(h/shards%uint64(f.sets))*ways:][:ways]
	oldest := &set[0]
	for i := range set {
		if set[i].used != 0 && set[i].flow == w {
			set[i].used = s.clock
			return true
		}
		if set[i].used < oldest.used {
			oldest = &set[i]
		}
	}
	if add {
		*oldest = slot{w, s.clock}
	}
	return add
}

// hash is keyed, so that no peer can choose ports that collide.
func (f *Flows) hash(w *flow) uint64 {
	h := f.seed[0]
	mix := func(x uint64) {
		hi, lo := bits.Mul64(h^x, 0x9e3779b97f4a7c15^f.seed[1])
		h = hi ^ lo
	}
	mix(binary.LittleEndian.Uint64(w.src[8:]))
	mix(binary.LittleEndian.Uint64(w.dst[8:]))
	mix(binary.LittleEndian.Uint64(w.src[:8]) ^ bits.RotateLeft64(binary.LittleEndian.Uint64(w.dst[:8]), 32))
	mix(uint64(w.sport)<<32 | uint64(w.dport)<<16 | uint64(w.proto))
	mix(f.seed[0])
	return h
}
