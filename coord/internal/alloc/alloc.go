// Package alloc chooses what a new node of a tailnet gets: addresses, a DNS label, and random IDs.
package alloc

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

// ErrPoolEmpty reports that every address of the prefix is taken.
var ErrPoolEmpty = errors.New("coord: the tailnet's address range is used up")

// reservedIPv4 are parts of the default range that mean something else to clients: MagicDNS's
// own address and a range that ChromeOS uses for itself.
var reservedIPv4 = []netip.Prefix{
	netip.MustParsePrefix("100.100.0.0/24"),
	netip.MustParsePrefix("100.100.100.0/24"),
	netip.MustParsePrefix("100.115.92.0/23"),
}

// NextIPv4 returns the next free address of p after last. Addresses go round: one that was
// given back is used again only after all others.
func NextIPv4(p netip.Prefix, last netip.Addr, taken func(netip.Addr) bool) (netip.Addr, error) {
	p = p.Masked()
	base := p.Addr().As4()
	first := binary.BigEndian.Uint32(base[:])
	size := uint64(1) << (32 - p.Bits())
	var off uint64
	if last.Is4() && p.Contains(last) {
		b := last.As4()
		off = uint64(binary.BigEndian.Uint32(b[:]) - first)
	}
	for range size {
		off = (off + 1) % size
		if size > 2 && (off == 0 || off == size-1) { // network and broadcast addresses confuse people
			continue
		}
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], first+uint32(off))
		a := netip.AddrFrom4(b)
		if reserved(a) || taken(a) {
			continue
		}
		return a, nil
	}
	return netip.Addr{}, ErrPoolEmpty
}

func reserved(a netip.Addr) bool {
	for _, p := range reservedIPv4 {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// PairIPv6 returns the IPv6 address that goes with v4: its 32 bits at the end of p.
func PairIPv6(p netip.Prefix, v4 netip.Addr) netip.Addr {
	b, low := p.Masked().Addr().As16(), v4.As4()
	copy(b[12:], low[:])
	return netip.AddrFrom16(b)
}

// Label makes a DNS label (RFC 1035 §2.3.1) of a host name as people and systems spell them.
func Label(host string) string {
	host, _, _ = strings.Cut(host, ".") // "laptop.lan"
	var b strings.Builder
	dash := true                                     // no dash at the start, none twice
	for i := 0; i < len(host) && b.Len() < 58; i++ { // room for a suffix
		c := host[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
			fallthrough
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
			b.WriteByte(c)
			dash = false
		case c == '\'' || c == '"': // "Ann's laptop"
		default:
			if !dash {
				b.WriteByte('-')
				dash = true
			}
		}
	}
	if s := strings.TrimRight(b.String(), "-"); s != "" {
		return s
	}
	return "node"
}

// FreeName returns base, or base with the first free number behind it.
func FreeName(base string, taken func(string) bool) string {
	if !taken(base) {
		return base
	}
	for i := 1; ; i++ {
		if n := base + "-" + strconv.Itoa(i); !taken(n) {
			return n
		}
	}
}

var lowerBase32 = base32.NewEncoding("abcdefghijkmnpqrstuvwxyz23456789").WithPadding(base32.NoPadding)

// ID returns n random bytes as text without letters that look alike.
func ID(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return lowerBase32.EncodeToString(b)
}

// IsNumbered reports whether name is base with a number that FreeName put behind it.
func IsNumbered(name, base string) bool {
	rest, ok := strings.CutPrefix(name, base+"-")
	_, err := strconv.Atoi(rest)
	return ok && err == nil
}
