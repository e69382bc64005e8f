package coord

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Conversions between the public types and the protocol's.

func derpMap(regions []Region) (*tailcfg.DERPMap, error) {
	m := &tailcfg.DERPMap{Regions: make(map[int]*tailcfg.DERPRegion, len(regions)), OmitDefaultRegions: true}
	for _, r := range regions {
		if r.ID < 1 || r.ID > 65535 {
			return nil, fmt.Errorf("coord: %w: relay region ID %d", ErrInvalid, r.ID)
		}
		if m.Regions[r.ID] != nil {
			return nil, fmt.Errorf("coord: %w: relay region %d twice", ErrInvalid, r.ID)
		}
		w := &tailcfg.DERPRegion{RegionID: r.ID, RegionCode: r.Code, RegionName: r.Name, NoMeasureNoHome: r.NoHome}
		if w.RegionCode == "" {
			w.RegionCode = strconv.Itoa(r.ID)
		}
		if w.RegionName == "" {
			w.RegionName = w.RegionCode
		}
		for i, n := range r.Nodes {
			if n.HostName == "" {
				return nil, fmt.Errorf("coord: %w: a relay of region %d has no host name", ErrInvalid, r.ID)
			}
			if n.Name == "" {
				n.Name = strconv.Itoa(r.ID) + string(rune('a'+i%26))
			}
			w.Nodes = append(w.Nodes, &tailcfg.DERPNode{
				Name: n.Name, RegionID: r.ID, HostName: n.HostName, CertName: n.CertName, IPv4: n.IPv4, IPv6: n.IPv6,
				STUNPort: n.STUNPort, STUNOnly: n.STUNOnly, DERPPort: n.DERPPort, InsecureForTests: n.InsecureForTests,
				STUNTestIP: n.STUNTestIP, CanPort80: n.CanPort80,
			})
		}
		m.Regions[r.ID] = w
	}
	return m, nil
}

// ParseDERPMap reads relays from the JSON of a DERP map, in which form relays and their operators give them.
func ParseDERPMap(b []byte) ([]Region, error) {
	var m tailcfg.DERPMap
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("coord: DERP map: %w", err)
	}
	var out []Region
	for _, id := range slices.Sorted(maps.Keys(m.Regions)) {
		r := m.Regions[id]
		if r == nil {
			continue
		}
		w := Region{ID: id, Code: r.RegionCode, Name: r.RegionName, NoHome: r.NoMeasureNoHome}
		for _, n := range r.Nodes {
			if n == nil {
				continue
			}
			w.Nodes = append(w.Nodes, Relay{Name: n.Name, HostName: n.HostName, CertName: n.CertName, IPv4: n.IPv4, IPv6: n.IPv6,
				DERPPort: n.DERPPort, STUNPort: n.STUNPort, STUNOnly: n.STUNOnly, InsecureForTests: n.InsecureForTests,
				CanPort80: n.CanPort80, STUNTestIP: n.STUNTestIP})
		}
		out = append(out, w)
	}
	if _, err := derpMap(out); err != nil {
		return nil, err
	}
	return out, nil
}

var protoNumbers = map[string]int{"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132}

// rules compiles f for the map. It is what checks a filter.
func (f *Filter) rules() ([]tailcfg.FilterRule, error) {
	if f == nil {
		return tailcfg.FilterAllowAll, nil
	}
	out := []tailcfg.FilterRule{} // not nil: an empty filter blocks all
	for _, r := range f.Rules {
		w := tailcfg.FilterRule{SrcIPs: r.Src}
		if len(r.Src) == 0 || len(r.Dst) == 0 {
			return nil, fmt.Errorf("coord: %w: a filter rule needs Src and Dst", ErrInvalid)
		}
		for _, s := range append(append([]string(nil), r.Src...), r.Dst...) {
			if !validIPs(s) {
				return nil, fmt.Errorf("coord: %w: %q is no address, prefix, range or *", ErrInvalid, s)
			}
		}
		ports := r.Ports
		if len(ports) == 0 {
			ports = []string{"*"}
		}
		for _, p := range ports {
			pr, err := portRange(p)
			if err != nil {
				return nil, err
			}
			for _, d := range r.Dst {
				w.DstPorts = append(w.DstPorts, tailcfg.NetPortRange{IP: d, Ports: pr})
			}
		}
		for _, p := range r.Proto {
			n, ok := protoNumbers[strings.ToLower(p)]
			if !ok {
				u, err := strconv.ParseUint(p, 10, 8)
				if err != nil || u == 0 {
					return nil, fmt.Errorf("coord: %w: %q is no IP protocol", ErrInvalid, p)
				}
				n = int(u)
			}
			w.IPProto = append(w.IPProto, n)
		}
		out = append(out, w)
	}
	for _, g := range f.Grants {
		w := tailcfg.FilterRule{SrcIPs: g.Src}
		for _, s := range g.Src {
			if !validIPs(s) {
				return nil, fmt.Errorf("coord: %w: %q is no address, prefix, range or *", ErrInvalid, s)
			}
		}
		cg := tailcfg.CapGrant{CapMap: tailcfg.PeerCapMap{}}
		for _, d := range g.Dst {
			if d == "*" {
				cg.Dsts = append(cg.Dsts, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
				continue
			}
			p, err := prefix(d)
			if err != nil {
				return nil, fmt.Errorf("coord: %w: %q is no address or prefix", ErrInvalid, d)
			}
			cg.Dsts = append(cg.Dsts, p)
		}
		if len(g.Src) == 0 || len(cg.Dsts) == 0 || len(g.Caps) == 0 {
			return nil, fmt.Errorf("coord: %w: a grant needs Src, Dst and Caps", ErrInvalid)
		}
		for c, args := range g.Caps {
			vals := []tailcfg.RawMessage{}
			for _, a := range args {
				vals = append(vals, tailcfg.RawMessage(a))
			}
			cg.CapMap[tailcfg.PeerCapability(c)] = vals
		}
		w.CapGrant = []tailcfg.CapGrant{cg}
		out = append(out, w)
		if _, ok := g.Caps[CapRelay]; ok {
			back, err := relayTargets(g)
			if err != nil {
				return nil, err
			}
			out = append(out, back)
		}
	}
	return out, nil
}

// relayTargets is the other side of a grant of CapRelay: it tells the sources which nodes are their relays.
func relayTargets(g Grant) (tailcfg.FilterRule, error) {
	cg := tailcfg.CapGrant{CapMap: tailcfg.PeerCapMap{tailcfg.PeerCapabilityRelayTarget: []tailcfg.RawMessage{}}}
	for _, s := range g.Src {
		if s == "*" {
			cg.Dsts = append(cg.Dsts, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
			continue
		}
		p, err := prefix(s)
		if err != nil {
			return tailcfg.FilterRule{}, fmt.Errorf("coord: %w: %q is no address or prefix, which a grant of %s needs", ErrInvalid, s, CapRelay)
		}
		cg.Dsts = append(cg.Dsts, p)
	}
	return tailcfg.FilterRule{SrcIPs: g.Dst, CapGrant: []tailcfg.CapGrant{cg}}, nil
}

func prefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("coord: bad prefix %q", s)
	}
	return p, nil
}

func validIPs(s string) bool {
	if s == "*" {
		return true
	}
	if a, b, ok := strings.Cut(s, "-"); ok {
		x, err1 := netip.ParseAddr(a)
		y, err2 := netip.ParseAddr(b)
		return err1 == nil && err2 == nil && x.BitLen() == y.BitLen() && x.Compare(y) <= 0
	}
	_, err := prefix(s)
	return err == nil
}

func portRange(s string) (tailcfg.PortRange, error) {
	if s == "*" {
		return tailcfg.PortRange{First: 0, Last: 65535}, nil
	}
	a, b, ok := strings.Cut(s, "-")
	if !ok {
		b = a
	}
	x, err1 := strconv.ParseUint(a, 10, 16)
	y, err2 := strconv.ParseUint(b, 10, 16)
	if err1 != nil || err2 != nil || x > y {
		return tailcfg.PortRange{}, fmt.Errorf("coord: %w: %q is no port or range of ports", ErrInvalid, s)
	}
	return tailcfg.PortRange{First: uint16(x), Last: uint16(y)}, nil
}
