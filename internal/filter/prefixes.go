package filter

import (
	"math/bits"
	"net/netip"
	"sort"
)

// prefixes numbers prefixes and finds all that cover an address. It is
// a sorted slice: of two prefixes one covers the other or they are disjoint, so the
// longest that covers an address is the last one that does not start behind
// it, or an ancestor of that one. Against a trie it costs a binary search, and
// saves most of the memory.
//
// What a prefix stands for lies in a slice beside it, so that the code exists
// once and not per type of value.
type prefixes struct {
	at []entry
}

type entry struct {
	prefix netip.Prefix
	parent int32 // the longest other prefix that covers this one, or -1
	value  int32 // the prefix's index in what newPrefixes was given
}

// newPrefixes makes the set of keys, which must be masked, each there once.
func newPrefixes(keys []netip.Prefix) prefixes {
	at := make([]entry, len(keys))
	for i, p := range keys {
		at[i] = entry{p, -1, int32(i)}
	}
	sort.Sort(byPrefix(at))
	for i := 1; i < len(at); i++ {
		j := int32(i - 1)
		for j >= 0 && !at[j].prefix.Contains(at[i].prefix.Addr()) {
			j = at[j].parent
		}
		at[i].parent = j
	}
	return prefixes{at}
}

// byPrefix sorts by address, and the shorter prefix first.
type byPrefix []entry

func (s byPrefix) Len() int           { return len(s) }
func (s byPrefix) Less(i, j int) bool { return comparePrefix(s[i].prefix, s[j].prefix) < 0 }
func (s byPrefix) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// split takes a map apart: values[i] belongs to keys[i].
func split[V any](m map[netip.Prefix]V) (keys []netip.Prefix, values []V) {
	keys, values = make([]netip.Prefix, 0, len(m)), make([]V, 0, len(m))
	for k, v := range m {
		keys, values = append(keys, k), append(values, v)
	}
	return keys, values
}

// find returns the index of the longest prefix that covers a, or -1. The
// others are its ancestors.
func (p *prefixes) find(a netip.Addr) int32 {
	lo, hi := 0, len(p.at) // the first entry that starts behind a
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		if p.at[m].prefix.Addr().Compare(a) <= 0 {
			lo = m + 1
		} else {
			hi = m
		}
	}
	i := int32(lo - 1)
	for i >= 0 && !p.at[i].prefix.Contains(a) {
		i = p.at[i].parent
	}
	return i
}

// appendRange appends the fewest prefixes that are together the addresses from
// first to last. Both must be of one family and in order.
func appendRange(out []netip.Prefix, first, last netip.Addr) []netip.Prefix {
	for {
		// The longest block that starts at first and ends no later than last.
		n := first.BitLen() - trailingZeros(first)
		p := netip.PrefixFrom(first, n)
		for lastOf(p).Compare(last) > 0 {
			n++
			p = netip.PrefixFrom(first, n)
		}
		out = append(out, p)
		end := lastOf(p)
		if end.Compare(last) >= 0 {
			return out
		}
		first = end.Next()
	}
}

func trailingZeros(a netip.Addr) int {
	s := a.AsSlice()
	n := 0
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] != 0 {
			return n + bits.TrailingZeros8(s[i])
		}
		n += 8
	}
	return n
}

func lastOf(p netip.Prefix) netip.Addr {
	s := p.Addr().AsSlice()
	for i := range s {
		if host := (i+1)*8 - p.Bits(); host > 0 {
			s[i] |= byte(1<<min(host, 8) - 1)
		}
	}
	a, _ := netip.AddrFromSlice(s)
	return a
}
