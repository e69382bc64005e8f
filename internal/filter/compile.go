package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"

	"github.com/tailnode/tailnode/internal/lpm"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// ErrRule reports that part of a rule set makes no sense. What is wrong was
// left out, so the filter allows less and not more.
var ErrRule = errors.New("filter: invalid rule")

var defaultProtos = []packet.Proto{packet.TCP, packet.UDP, packet.ICMPv4, packet.ICMPv6}

// Compile makes a filter for a node whose addresses and advertised routes are
// local. Without rules nothing comes in but replies. hasCap tells whether the
// node at src has a node capability, for rules with "cap:NAME" as a source; it
// is called for packets, so it must be quick, not allocate, and be safe for
// concurrent use. nil means that no node has any.
//
// Parts of rules that make no sense are left out and reported by an error that wraps
// ErrRule; the filter is valid all the same, and never nil. rules are not kept but for
// the values of their capability grants.
//
// Compile takes time and memory about linear in the size of the rules.
func Compile(rules []tailcfg.FilterRule, local []netip.Prefix, hasCap func(src netip.Addr, cap tailcfg.NodeCapability) bool) (*Filter, error) {
	c := compiler{accesses: map[string]*access{}}
	for _, p := range local {
		if p.IsValid() {
			c.local = append(c.local, p.Masked())
		}
	}
	sort.Slice(c.local, func(i, j int) bool { return lpm.Compare(c.local[i], c.local[j]) < 0 })
	c.local = slices.Compact(c.local)

	bySrc := map[netip.Prefix][]int32{}
	byCap := map[tailcfg.NodeCapability][]int32{}
	grantsBySrc := map[netip.Prefix][]int32{}
	for i := range rules {
		c.rule(&rules[i], bySrc, byCap, grantsBySrc)
	}

	f := &Filter{hasCap: hasCap, grants: c.grants}
	f.local = lpm.New(c.local)
	srcs, srcIDs := split(bySrc)
	f.src = lpm.New(srcs)
	for _, ids := range srcIDs {
		f.accesses = append(f.accesses, c.access(ids))
	}
	for name, ids := range byCap {
		f.capSrc = append(f.capSrc, capAccess{name, c.access(ids)})
	}
	sort.Slice(f.capSrc, func(i, j int) bool { return f.capSrc[i].name < f.capSrc[j].name })
	grantSrcs, grantIDs := split(grantsBySrc)
	f.grantSrc, f.grantIDs = lpm.New(grantSrcs), grantIDs

	if c.bad > 0 {
		return f, fmt.Errorf("%w (%d left out): %w", ErrRule, c.bad, c.err)
	}
	return f, nil
}

type compiler struct {
	local    []netip.Prefix
	rules    []compiledRule // those that allow packets
	grants   []grantRule
	accesses map[string]*access // by the rules they are made of
	bad      int
	err      error // the first
}

type compiledRule struct {
	protos []packet.Proto
	dsts   []dstPorts
}

type dstPorts struct {
	prefix netip.Prefix
	ports  tailcfg.PortRange
}

func (c *compiler) fail(format string, args ...any) {
	if c.bad++; c.err == nil {
		c.err = fmt.Errorf(format, args...)
	}
}

func (c *compiler) rule(r *tailcfg.FilterRule, bySrc map[netip.Prefix][]int32, byCap map[tailcfg.NodeCapability][]int32, grantsBySrc map[netip.Prefix][]int32) {
	var srcs []netip.Prefix
	var caps []tailcfg.NodeCapability
	for i, s := range r.SrcIPs {
		if name, ok := strings.CutPrefix(s, "cap:"); ok {
			if name == "" {
				c.fail("source %q names no capability", s)
				continue
			}
			caps = append(caps, tailcfg.NodeCapability(name))
			continue
		}
		var bits *int
		if i < len(r.SrcBits) {
			bits = &r.SrcBits[i]
		}
		var err error
		if srcs, err = appendSet(srcs, s, bits); err != nil {
			c.fail("source: %w", err)
		}
	}

	cr := compiledRule{protos: defaultProtos}
	if len(r.IPProto) > 0 {
		cr.protos = make([]packet.Proto, 0, len(r.IPProto))
		for _, n := range r.IPProto {
			if n > 0 && n < int(packet.Fragment) {
				cr.protos = append(cr.protos, packet.Proto(n))
			}
		}
	}
	var dsts []netip.Prefix
	for _, d := range r.DstPorts {
		var err error
		if d.Ports.First > d.Ports.Last {
			c.fail("ports %d-%d", d.Ports.First, d.Ports.Last)
			continue
		}
		if dsts, err = appendSet(dsts[:0], d.IP, d.Bits); err != nil {
			c.fail("destination: %w", err)
			continue
		}
		for _, p := range dsts {
			// Only what is ours can be a destination: most of a big policy
			// falls away here.
			for _, l := range c.local {
				if p.Overlaps(l) {
					if l.Bits() > p.Bits() {
						cr.dsts = append(cr.dsts, dstPorts{l, d.Ports})
					} else {
						cr.dsts = append(cr.dsts, dstPorts{p, d.Ports})
					}
				}
			}
		}
	}
	if len(cr.dsts) > 0 && len(cr.protos) > 0 {
		id := int32(len(c.rules))
		c.rules = append(c.rules, cr)
		add(bySrc, srcs, id)
		add(byCap, caps, id)
	}

	var g grantRule
	for _, cg := range r.CapGrant {
		for _, dst := range cg.Dsts {
			if !dst.IsValid() {
				c.fail("capability grant: invalid destination")
				continue
			}
			for _, name := range cg.Caps {
				g = append(g, grant{dst.Masked(), name, nil})
			}
			for name, values := range cg.CapMap {
				g = append(g, grant{dst.Masked(), name, values})
			}
		}
	}
	if len(g) > 0 && len(srcs) > 0 {
		id := int32(len(c.grants))
		c.grants = append(c.grants, g)
		add(grantsBySrc, srcs, id)
	}
}

// add notes the rule id, once, at all of keys.
func add[K comparable](m map[K][]int32, keys []K, id int32) {
	for _, k := range keys {
		if ids := m[k]; len(ids) == 0 || ids[len(ids)-1] != id {
			m[k] = append(ids, id)
		}
	}
}

// access returns what the rules allow together. Sources with the same rules
// share one: control likes to name every peer in every rule.
func (c *compiler) access(ids []int32) *access {
	k := make([]byte, 0, 4*len(ids))
	for _, id := range ids {
		k = binary.LittleEndian.AppendUint32(k, uint32(id))
	}
	if a := c.accesses[string(k)]; a != nil {
		return a
	}
	dsts := map[netip.Prefix]ports{}
	for _, id := range ids {
		r := &c.rules[id]
		for _, d := range r.dsts {
			dsts[d.prefix] = dsts[d.prefix].with(r.protos, d.ports)
		}
	}
	keys, values := split(dsts)
	for i, ps := range values {
		values[i] = ps.merged()
	}
	a := &access{lpm.New(keys), values}
	c.accesses[string(k)] = a
	return a
}

// ports holds what is open per protocol.
type ports []protoPorts

type protoPorts struct {
	proto  packet.Proto
	all    bool                // some rule allows all ports, which a protocol without ports needs
	ranges []tailcfg.PortRange // merged: ascending, apart
}

func (ps ports) with(protos []packet.Proto, r tailcfg.PortRange) ports {
next:
	for _, proto := range protos {
		all := r == tailcfg.PortRange{First: 0, Last: 65535}
		for i := range ps {
			if ps[i].proto == proto {
				ps[i].all = ps[i].all || all
				ps[i].ranges = append(ps[i].ranges, r)
				continue next
			}
		}
		ps = append(ps, protoPorts{proto, all, []tailcfg.PortRange{r}})
	}
	return ps
}

func (ps ports) merged() ports {
	for i := range ps {
		rs := ps[i].ranges
		sort.Slice(rs, func(i, j int) bool { return rs[i].First < rs[j].First })
		out := rs[:1]
		for _, r := range rs[1:] {
			last := &out[len(out)-1]
			if int(r.First) <= int(last.Last)+1 {
				last.Last = max(last.Last, r.Last)
			} else {
				out = append(out, r)
			}
		}
		ps[i].ranges = slices.Clip(slices.Clone(out))
	}
	return slices.Clip(ps)
}

// appendSet appends the prefixes that s stands for: "*", an address (with the
// deprecated bits beside it: a prefix), a prefix, or a range of addresses.
func appendSet(out []netip.Prefix, s string, bits *int) ([]netip.Prefix, error) {
	if s == "*" {
		return append(out, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)), nil
	}
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return out, fmt.Errorf("%q is not a prefix", clip(s))
		}
		if p != p.Masked() {
			return out, fmt.Errorf("prefix %v has bits behind its length", p)
		}
		return append(out, p), nil
	}
	if from, to, ok := strings.Cut(s, "-"); ok {
		a, errA := netip.ParseAddr(from)
		b, errB := netip.ParseAddr(to)
		if errA != nil || errB != nil || a.Zone() != "" || b.Zone() != "" || a.BitLen() != b.BitLen() || b.Less(a) {
			return out, fmt.Errorf("%q is not a range of addresses", clip(s))
		}
		return appendRange(out, a, b), nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return out, fmt.Errorf("%q is not an address", clip(s))
	}
	n := a.BitLen()
	if bits != nil {
		if n = *bits; n < 0 || n > a.BitLen() {
			return out, fmt.Errorf("prefix length %d of %v", n, a)
		}
	}
	return append(out, netip.PrefixFrom(a, n).Masked()), nil
}

// clip keeps a foreign text from filling a log.
func clip(s string) string { return s[:min(len(s), 64)] }
