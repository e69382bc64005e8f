package filter

import (
	"math/bits"
	"net/netip"
)

// split takes a map apart: values[i] belongs to keys[i].
func split[V any](m map[netip.Prefix]V) (keys []netip.Prefix, values []V) {
	keys, values = make([]netip.Prefix, 0, len(m)), make([]V, 0, len(m))
	for k, v := range m {
		keys, values = append(keys, k), append(values, v)
	}
	return keys, values
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
