package wg

import (
	"math/rand/v2"
	"testing"
)

// TestTable compares the table with a map over random insertions, removals and look-ups, with
// indices that collide.
func TestTable(t *testing.T) {
	for seed := range uint64(5) {
		r := rand.New(rand.NewPCG(seed, 5))
		var tab table
		tab.init()
		model := map[uint32]*session{}
		for i := range 20_000 {
			index := r.Uint32N(64) | r.Uint32N(40)<<16 // few slots, many indices
			if i%4000 < 2000 == (r.IntN(4) > 0) {
				if model[index] == nil {
					s := &session{index: index}
					tab.insert(s)
					model[index] = s
				}
			} else if s := model[index]; s != nil {
				tab.remove(s)
				delete(model, index)
			}
			probe := r.Uint32N(64) | r.Uint32N(40)<<16
			if got := tab.lookup(probe); got != model[probe] {
				t.Fatalf("seed %d step %d: lookup(%x) = %v, want %v", seed, i, probe, got, model[probe])
			}
			if tab.live != len(model) {
				t.Fatalf("%d live, want %d", tab.live, len(model))
			}
		}
		for _, s := range model {
			tab.remove(s)
			tab.remove(s) // twice does nothing
		}
		if n := len(*tab.slots.Load()); tab.live != 0 || n > minSlots*2 {
			t.Errorf("empty table of %d slots", n)
		}
	}
	var tab table
	tab.init()
	if tab.lookup(0) != nil {
		t.Error("index 0 is there without a session")
	}
	s := &session{index: 0}
	tab.insert(s)
	tab.remove(s)
	if tab.lookup(0) != nil {
		t.Error("a tombstone was taken for a session")
	}
	i, p := tab.reserve(&Peer{}), tab.reserve(&Peer{})
	if i == p || tab.handshake(i) == nil {
		t.Error("reserve")
	}
	tab.cancel(i)
	if tab.handshake(i) != nil {
		t.Error("cancel")
	}
}
