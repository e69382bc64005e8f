package lpm

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// TestFind holds the table against a search through all prefixes.
func TestFind(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	addr := func() netip.Addr {
		if rng.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, byte(rng.IntN(4)), byte(rng.IntN(4) << 6), byte(rng.IntN(256))})
		}
		return netip.AddrFrom16([16]byte{0: 0xfd, 7: byte(rng.IntN(4) << 6), 8: byte(rng.IntN(4)), 15: byte(rng.IntN(256))})
	}
	for range 200 {
		var keys []netip.Prefix
		seen := map[netip.Prefix]bool{}
		for range rng.IntN(60) {
			a := addr()
			p := netip.PrefixFrom(a, rng.IntN(a.BitLen()+1)).Masked()
			if !seen[p] {
				seen[p] = true
				keys = append(keys, p)
			}
		}
		table := New(keys)
		if table.Len() != len(keys) {
			t.Fatalf("%d prefixes, want %d", table.Len(), len(keys))
		}
		for range 100 {
			a := addr()
			var want []netip.Prefix // the longest first
			for bits := a.BitLen(); bits >= 0; bits-- {
				if p := netip.PrefixFrom(a, bits).Masked(); seen[p] {
					want = append(want, p)
				}
			}
			i := table.Find(a)
			for _, p := range want {
				if i < 0 || keys[table.Key(i)] != p || table.Prefix(i) != p {
					t.Fatalf("%v: place %d, want %v, of %v", a, i, p, keys)
				}
				i = table.Parent(i)
			}
			if i >= 0 {
				t.Fatalf("%v: %v covers it, it does not", a, keys[table.Key(i)])
			}
		}
	}
	var zero Table
	if zero.Find(addr()) != -1 {
		t.Error("the zero Table finds something")
	}
}

func BenchmarkFind(b *testing.B) {
	for _, bb := range []struct {
		name string
		n    int
	}{{"10", 10}, {"1000", 1000}} {
		b.Run(bb.name, func(b *testing.B) {
			var keys []netip.Prefix
			for i := range bb.n {
				keys = append(keys, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
			}
			table := New(keys)
			i := 0
			for b.Loop() {
				i++
				if table.Find(netip.AddrFrom4([4]byte{10, byte(i % bb.n >> 8), byte(i % bb.n), 9})) < 0 {
					b.Fatal("not found")
				}
			}
		})
	}
}
