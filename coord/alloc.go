package coord

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

// errPoolEmpty reports that every address of the prefix is taken.
var errPoolEmpty = errors.New("coord: the tailnet's address range is used up")

// reservedIPv4 are parts of the default range that mean something else to clients: MagicDNS's
// own address and a range that ChromeOS uses for itself.
var reservedIPv4 = []netip.Prefix{
	netip.MustParsePrefix("100.100.0.0/24"),
	netip.MustParsePrefix("100.100.100.0/24"),
	netip.MustParsePrefix("100.115.92.0/23"),
}

// nextIPv4 returns the next free address of p after last. Addresses go round: one that was
// given back is used again only after all others.
func nextIPv4(p netip.Prefix, last netip.Addr, taken func(netip.Addr) bool) (netip.Addr, error) {
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
	return netip.Addr{}, errPoolEmpty
}

func reserved(a netip.Addr) bool {
	for _, p := range reservedIPv4 {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// pairIPv6 returns the IPv6 address that goes with v4: its 32 bits at the end of p.
func pairIPv6(p netip.Prefix, v4 netip.Addr) netip.Addr {
	b, low := p.Masked().Addr().As16(), v4.As4()
	copy(b[12:], low[:])
	return netip.AddrFrom16(b)
}

// label makes a DNS label (RFC 1035 §2.3.1) of a host name as people and systems spell them.
func label(host string) string {
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

// freeName returns base, or base with the first free number behind it.
func freeName(base string, taken func(string) bool) string {
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

// random returns n random bytes as text without letters that look alike.
func random(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return lowerBase32.EncodeToString(b)
}

func validTag(t string) bool {
	name, ok := strings.CutPrefix(t, "tag:")
	if !ok || name == "" || len(name) > 63 || name[0] < 'a' || name[0] > 'z' {
		return false
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
