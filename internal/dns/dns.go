// Package dns resolves MagicDNS names: the names that control gives the nodes
// of a tailnet, and the records it adds to them. It does so for the node itself
// (Lookup) and for DNS queries that arrive at 100.100.100.100 (Answer). It does no
// I/O and keeps nothing; docs/protocol/magicdns.md says what the names mean.
package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

var (
	// ErrNotFound reports a name that this package knows no address for.
	ErrNotFound = errors.New("dns: no such name")
	// ErrNoAddress reports a name that exists, but without an address of the
	// family that was asked for.
	ErrNoAddress = errors.New("dns: no address of this family")
)

// ServiceIP and ServiceIP6 are where the nodes of a tailnet find their DNS.
var (
	ServiceIP  = netip.AddrFrom4([4]byte{100, 100, 100, 100})
	ServiceIP6 = netip.MustParseAddr("fd7a:115c:a1e0::53")
)

var (
	range4 = netip.MustParsePrefix("100.64.0.0/10")
	range6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")
)

// Lookup returns the addresses of host, IPv4 first, of the family that network
// asks for ("tcp4", "udp6"; no digit: both). host is an address, a full name, with or
// without the trailing dot, or a name to be completed by the tailnet's search
// domains.
//
// tailnet says whose business the name is, found or not. An ErrNotFound
// with tailnet set is a name that belongs to the tailnet and has no node yet: the
// caller may wait for a later Map, and must not ask anybody else. Without a Map every
// name is of that kind but for "localhost". ErrNotFound without tailnet is a
// name for the host's own resolver.
func Lookup(m *netmap.Map, network, host string) (addrs []netip.Addr, tailnet bool, err error) {
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap()
		if !wants(network, a) {
			return nil, IsTailnetAddr(m, a), fmt.Errorf("%w: %s for %s", ErrNoAddress, host, network)
		}
		return []netip.Addr{a}, IsTailnetAddr(m, a), nil
	}
	name, ok := canonical(host)
	if !ok {
		return nil, false, fmt.Errorf("%w: %q is no domain name", ErrNotFound, clip(host))
	}
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return nil, false, fmt.Errorf("%w: %q is this host", ErrNotFound, name)
	}
	if m == nil {
		return nil, true, fmt.Errorf("%w: %q (there is no netmap yet)", ErrNotFound, name)
	}

	all, found := resolve(m, name)
	if !found && !strings.HasSuffix(host, ".") {
		for _, domain := range searchDomains(m) {
			if all, found = resolve(m, name+"."+domain); found {
				break
			}
		}
	}
	if !found {
		_, ours := zone(m, name)
		if ours = ours || !strings.Contains(name, "."); ours {
			return nil, true, fmt.Errorf("%w: %q in this tailnet", ErrNotFound, name)
		}
		return nil, false, fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	for _, a := range all {
		if wants(network, a) {
			addrs = append(addrs, a)
		}
	}
	if len(addrs) == 0 {
		return nil, true, fmt.Errorf("%w: %s for %s", ErrNoAddress, name, network)
	}
	return addrs, true, nil
}

// Reverse returns the name of the node that has the address, with the trailing dot.
func Reverse(m *netmap.Map, a netip.Addr) (name string, ok bool) {
	if m == nil {
		return "", false
	}
	n := m.Self
	if n == nil || !n.HasAddr(a) {
		n = m.PeerByAddr(a)
	}
	if n == nil || n.Name == "" {
		return "", false
	}
	return strings.TrimSuffix(n.Name, ".") + ".", true
}

// IsTailnetAddr reports whether a is an address of the tailnet: in the ranges
// that nodes get theirs from, or routed to a peer. m may be nil.
func IsTailnetAddr(m *netmap.Map, a netip.Addr) bool {
	a = a.Unmap()
	return range4.Contains(a) || range6.Contains(a) ||
		m != nil && (m.Self != nil && m.Self.HasAddr(a) || m.Route(a) != nil)
}

// resolve returns the addresses of a full name in canonical form.
func resolve(m *netmap.Map, name string) (addrs []netip.Addr, found bool) {
	var n *netmap.Node
	if strings.Contains(name, ".") {
		n = m.ByName(name)
	}
	if n != nil {
		found = true
		for _, is := range []func(netip.Addr) bool{netip.Addr.Is4, netip.Addr.Is6} {
			for _, p := range n.Addresses {
				if p.IsSingleIP() && is(p.Addr()) {
					addrs = append(addrs, p.Addr())
				}
			}
		}
		return addrs, true
	}
	if m.DNS == nil {
		return nil, false
	}
	var v6 []netip.Addr
	for i := range m.DNS.ExtraRecords {
		r := &m.DNS.ExtraRecords[i]
		if !sameName(r.Name, name) {
			continue
		}
		found = true // whatever its type: the name exists
		a, ok := recordAddr(r)
		switch {
		case !ok:
		case a.Is4():
			addrs = append(addrs, a)
		default:
			v6 = append(v6, a)
		}
	}
	return append(addrs, v6...), found
}

func recordAddr(r *tailcfg.DNSRecord) (a netip.Addr, ok bool) {
	if r.Type != "" && r.Type != "A" && r.Type != "AAAA" {
		return a, false
	}
	a, err := netip.ParseAddr(r.Value)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return a, false
	}
	return a, r.Type == "" || (r.Type == "A") == a.Is4()
}

// zone returns the longest domain for which this tailnet answers that name
// lies in: the domain of its nodes, or one that control routes to nobody.
func zone(m *netmap.Map, name string) (zone string, ok bool) {
	longest := func(domain string) {
		if d, valid := canonical(domain); valid && inDomain(name, d) && len(d) > len(zone) {
			zone, ok = d, true
		}
	}
	longest(m.Suffix())
	if m.DNS != nil {
		var forwarded string // a longer route to somebody takes its part out
		for domain, to := range m.DNS.Routes {
			if len(to) == 0 {
				longest(domain)
			} else if d, valid := canonical(domain); valid && inDomain(name, d) && len(d) > len(forwarded) {
				forwarded = d
			}
		}
		if len(forwarded) > len(zone) {
			return "", false
		}
	}
	return zone, ok
}

func searchDomains(m *netmap.Map) []string {
	var out []string
	if s, ok := canonical(m.Suffix()); ok {
		out = append(out, s)
	}
	if m.DNS != nil {
		for _, d := range m.DNS.Domains {
			if d, ok := canonical(d); ok {
				out = append(out, d)
			}
			if len(out) == 32 {
				break
			}
		}
	}
	return out
}

// canonical returns name in lower case without the trailing dot, if it can be
// a domain name (RFC 1035 §2.3.4; the labels may hold any bytes but dots and
// what cannot be printed).
func canonical(name string) (string, bool) {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > 253 {
		return "", false
	}
	label := 0
	for i := range len(name) {
		switch c := name[i]; {
		case c == '.':
			if label == 0 {
				return "", false
			}
			label = 0
			continue
		case c <= ' ' || c == 0x7f:
			return "", false
		}
		if label++; label > 63 {
			return "", false
		}
	}
	return strings.ToLower(name), label > 0
}

// sameName reports whether name is the canonical form of other.
func sameName(other, name string) bool {
	return strings.EqualFold(strings.TrimSuffix(other, "."), name)
}

func inDomain(name, domain string) bool {
	rest, ok := strings.CutSuffix(name, domain)
	return ok && (rest == "" || strings.HasSuffix(rest, "."))
}

func wants(network string, a netip.Addr) bool {
	switch {
	case strings.HasSuffix(network, "4"):
		return a.Is4()
	case strings.HasSuffix(network, "6"):
		return a.Is6()
	}
	return true
}

func clip(s string) string { return s[:min(len(s), 64)] }
