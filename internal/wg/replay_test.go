package wg

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestWindow(t *testing.T) {
	const w = windowSize
	type step struct {
		c    uint64
		want bool
	}
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"in order", []step{{0, true}, {1, true}, {2, true}, {1, false}, {2, false}, {0, false}, {3, true}}},
		{"first is not 0", []step{{5, true}, {0, true}, {5, false}, {4, true}, {0, false}}},
		{"gap filled", []step{{0, true}, {9, true}, {5, true}, {5, false}, {9, false}, {0, false}, {8, true}}},
		{"far jump", []step{{0, true}, {1 << 40, true}, {0, false}, {1<<40 - w, false}, {1<<40 - w + 1, true}, {1<<40 - w + 1, false}}},
		{"jump by the ring", []step{{0, true}, {1, true}, {ringBits, true}, {1, false}, {ringBits - 1, true}, {ringBits + 1, true}, {ringBits, false}}},
		{"jump by a word", []step{{0, true}, {2, true}, {64, true}, {63, true}, {1, true}, {65, true}, {66, true}, {65, false}, {64, false}}},
		{"edge of the window", []step{{w, true}, {0, false}, {1, true}, {w + 1, true}, {1, false}, {2, true}}},
		{"end of counters", []step{{math.MaxUint64 - 1, true}, {math.MaxUint64 - 2, true}, {math.MaxUint64 - 1, false}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var win window
			for i, s := range tc.steps {
				if seen := win.seen(s.c); seen == s.want {
					t.Errorf("step %d: seen(%d) = %v", i, s.c, seen)
				}
				if got := win.accept(s.c); got != s.want {
					t.Errorf("step %d: accept(%d) = %v", i, s.c, got)
				}
			}
		})
	}
}

func TestWindowInOrderNeedsNoRing(t *testing.T) {
	var w window
	for c := range uint64(100_000) {
		if !w.accept(c) {
			t.Fatalf("%d refused", c)
		}
	}
	if w.ring != nil {
		t.Error("a ring for traffic in order")
	}
	for _, c := range []uint64{0, 99_999, 50_000, 99_000} {
		if w.accept(c) {
			t.Errorf("%d accepted twice", c)
		}
	}
}

// TestWindowAgainstModel compares the window with a plain set, over random walks with jumps,
// stragglers and collapses.
func TestWindowAgainstModel(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 9))
		var w window
		seen := map[uint64]bool{}
		var next, floor uint64
		for i := range 30_000 {
			var c uint64
			switch r.IntN(10) {
			case 0:
				c = next + r.Uint64N(20)
			case 1:
				c = next - min(next, r.Uint64N(windowSize+100))
			case 2:
				c = next - min(next, r.Uint64N(100))
			case 3:
				if r.IntN(200) == 0 {
					c = next + r.Uint64N(3*ringBits)
				} else {
					c = next
				}
			default:
				c = next
			}
			if r.IntN(5000) == 0 {
				w.collapse()
				floor = next
			}
			want := !seen[c] && c >= floor && (next <= windowSize || c >= next-windowSize)
			if got := w.accept(c); got != want {
				t.Fatalf("seed %d step %d: accept(%d) = %v with next %d, floor %d", seed, i, c, got, next, floor)
			}
			if want {
				seen[c] = true
				next = max(next, c+1)
			}
		}
	}
}
