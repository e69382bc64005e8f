// Package lpm finds the longest prefix that covers an address.
package lpm

import (
	"net/netip"
	"sort"
)

// Table numbers prefixes and finds all that cover an address. It is a sorted
// slice: of two prefixes one covers the other or they are disjoint, so the longest
// that covers an address is the last one that does not start behind it, or an
// ancestor of that one. Against a trie it costs a binary search, and saves most
// of the memory and of the code.
//
// What a prefix stands for lies in a slice of the caller's, so that the code
// is there once and not per type of value. A Table is immutable and safe for
// concurrent use. The zero Table is empty.
type Table struct {
	at []entry
}

type entry struct {
	prefix netip.Prefix
	parent int32 // the longest other prefix that covers this one, or -1
	key    int32 // the prefix's index in what New was given
}

// New makes the table of keys, which must be masked, each there once. It does
// not keep keys.
func New(keys []netip.Prefix) Table {
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
	return Table{at}
}

// Len returns the number of prefixes.
func (t *Table) Len() int { return len(t.at) }

// Find returns the place of the longest prefix that covers a, or -1. It does
// not allocate.
func (t *Table) Find(a netip.Addr) int32 {
	lo, hi := 0, len(t.at) // the first entry that starts behind a
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		if t.at[m].prefix.Addr().Compare(a) <= 0 {
			lo = m + 1
		} else {
			hi = m
		}
	}
	i := int32(lo - 1)
	for i >= 0 && !t.at[i].prefix.Contains(a) {
		i = t.at[i].parent
	}
	return i
}

// Parent returns the place of the next shorter prefix that covers all that the
// one at place i does, or -1.
func (t *Table) Parent(i int32) int32 { return t.at[i].parent }

// Prefix returns the prefix at place i.
func (t *Table) Prefix(i int32) netip.Prefix { return t.at[i].prefix }

// Key returns the index, in what New was given, of the prefix at place i.
func (t *Table) Key(i int32) int32 { return t.at[i].key }

// Compare orders prefixes by address, and the shorter first.
func Compare(p, q netip.Prefix) int {
	if c := p.Addr().Compare(q.Addr()); c != 0 {
		return c
	}
	return p.Bits() - q.Bits()
}

type byPrefix []entry

func (s byPrefix) Len() int           { return len(s) }
func (s byPrefix) Less(i, j int) bool { return Compare(s[i].prefix, s[j].prefix) < 0 }
func (s byPrefix) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }
