// Package filter decides which packets of peers reach the node: those that the
// rules of the netmap allow, and the replies to what the node itself sent.
// Without rules nothing else comes in. docs/protocol/filter.md says what the
// rules mean.
//
// A Filter is immutable; a new netmap brings a new one, and the Flows stay.
// That a packet's source belongs to the peer that sent it (its AllowedIPs) is
// checked before, by the caller.
package filter

import (
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/tailnode/tailnode/internal/lpm"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Verdict is what becomes of a packet, and why. The zero value is a drop.
type Verdict uint8

// The verdicts. Those from Accept on let the packet pass.
const (
	DropNoRule     Verdict = iota // no rule allows it
	DropNotIP                     // not understood: see package packet
	DropNotLocal                  // the destination is not an address of the node
	DropMulticast                 // tailnets carry no multicast
	DropLinkLocal                 // nor link-local unicast
	DropBadSource                 // a source that cannot be replied to
	DropShieldsUp                 // the node takes nothing but replies
	Accept                        // a rule allows it
	AcceptReply                   // belongs to a flow that the node opened
	AcceptTCP                     // not the start of a TCP connection
	AcceptICMP                    // an ICMP answer or error
	AcceptTSMP                    // signalling between nodes
	AcceptFragment                // a later fragment; without its first one it comes to nothing
	AcceptOut                     // outgoing
	verdicts
)

var verdictNames = [verdicts]string{
	"no matching rule", "not understood", "destination not local", "multicast", "link-local", "bad source", "shields up",
	"rule", "reply", "tcp established", "icmp answer", "tsmp", "fragment", "out",
}

// Accepted reports whether the packet passes.
func (v Verdict) Accepted() bool { return v >= Accept }

// String returns the reason, fit for a log or the label of a counter. It does
// not allocate.
func (v Verdict) String() string {
	if v < verdicts {
		return verdictNames[v]
	}
	return "invalid verdict"
}

// Filter holds compiled rules. It is immutable and safe for concurrent use. A
// nil Filter lets nothing in and everything out.
type Filter struct {
	local    lpm.Table
	src      lpm.Table
	accesses []*access // of src
	capSrc   []capAccess
	hasCap   func(netip.Addr, tailcfg.NodeCapability) bool
	grants   []grantRule
	grantSrc lpm.Table
	grantIDs [][]int32 // of grantSrc: indexes of grants
	shields  bool
}

// access is what a source may reach.
type access struct {
	dst   lpm.Table
	ports []ports // of dst
}

type capAccess struct {
	name tailcfg.NodeCapability
	*access
}

type grantRule []grant

type grant struct {
	dst    netip.Prefix
	cap    tailcfg.PeerCapability
	values []tailcfg.RawMessage
}

// gcpDNS is the one link-local address that may be a destination: cloud hosts
// have their DNS there, and subnet routers advertise it.
var gcpDNS = netip.AddrFrom4([4]byte{169, 254, 169, 254})

// Shielded returns a filter that takes nothing but replies and signalling, as for
// a node with its shields up, or for packets of a jailed peer. Caps is unchanged.
func (f *Filter) Shielded() *Filter {
	if f == nil {
		return nil
	}
	g := *f
	g.shields = true
	return &g
}

// In decides on a packet from a peer. fl may be nil: no flows. It does not
// block but for a short lock, and does not allocate.
func (f *Filter) In(p *packet.Parsed, fl *Flows, now time.Time) Verdict {
	if f == nil {
		return DropNoRule
	}
	if v := pre(p); v != Accept {
		return v
	}
	src, dst := p.Src.Addr(), p.Dst.Addr()
	if f.local.Find(dst) < 0 {
		return DropNotLocal
	}
	if src.IsUnspecified() || src.IsMulticast() || src.IsLoopback() {
		return DropBadSource
	}

	match := matchPort
	switch p.Proto {
	case packet.TCP:
		// Only the packet that opens a connection is held against the rules.
		// Any other means something only to a connection that the stack has,
		// and that one began with a SYN: in, past the rules, or out, from us.
		// The stack answers a stray one with RST.
		if !p.IsSYN() {
			return AcceptTCP
		}
	case packet.UDP, packet.SCTP:
		if fl != nil && fl.has(p.Proto, p.Src, p.Dst) {
			return AcceptReply
		}
	case packet.ICMPv4, packet.ICMPv6:
		if p.IsEchoReply() || p.IsICMPError() {
			return AcceptICMP
		}
		match = matchAny
	case packet.TSMP:
		return AcceptTSMP
	case packet.Fragment:
		return AcceptFragment
	default:
		match = matchAllPorts
	}
	if f.shields {
		return DropShieldsUp
	}
	if f.match(p, match) {
		return Accept
	}
	return DropNoRule
}

// Out decides on a packet to a peer, and notes its flow in fl so that the replies
// come in. fl may be nil. It does not block but for a short lock, and does not
// allocate. p may come from DecodeHeader.
func (f *Filter) Out(p *packet.Parsed, fl *Flows, now time.Time) Verdict {
	if v := pre(p); v != Accept {
		return v
	}
	if fl != nil && (p.Proto == packet.UDP || p.Proto == packet.SCTP) {
		fl.note(p.Proto, p.Src, p.Dst)
	}
	return AcceptOut
}

// pre holds what both directions have in common.
func pre(p *packet.Parsed) Verdict {
	dst := p.Dst.Addr()
	switch {
	case p.Version == 0 || p.Proto == packet.Unknown:
		return DropNotIP
	case dst.IsMulticast():
		return DropMulticast
	case dst.IsLinkLocalUnicast() && dst != gcpDNS:
		return DropLinkLocal
	}
	return Accept
}

// AllowsTCP reports whether a TCP connection from src to dst would be let in.
func (f *Filter) AllowsTCP(src netip.Addr, dst netip.AddrPort) bool {
	p := packet.Parsed{Version: 4, Proto: packet.TCP, TCPFlags: packet.TCPSyn, Src: netip.AddrPortFrom(src, 0), Dst: dst}
	return f.In(&p, nil, time.Time{}).Accepted()
}

// How much of a rule a packet must meet.
type matchKind uint8

const (
	matchPort     matchKind = iota // protocol, addresses and port
	matchAny                       // addresses alone: a source that may reach any port may use ICMP
	matchAllPorts                  // protocol and addresses, by a rule for all ports: the protocol has none
)

func (f *Filter) match(p *packet.Parsed, k matchKind) bool {
	src := p.Src.Addr()
	for i := f.src.Find(src); i >= 0; i = f.src.Parent(i) {
		if f.accesses[f.src.Key(i)].allows(p, k) {
			return true
		}
	}
	if f.hasCap == nil || k == matchAllPorts {
		return false
	}
	for i := range f.capSrc {
		// The rule first: it is cheaper than the question.
		if f.capSrc[i].allows(p, k) && f.hasCap(src, f.capSrc[i].name) {
			return true
		}
	}
	return false
}

func (a *access) allows(p *packet.Parsed, k matchKind) bool {
	for i := a.dst.Find(p.Dst.Addr()); i >= 0; i = a.dst.Parent(i) {
		if k == matchAny {
			return true
		}
		ps := a.ports[a.dst.Key(i)]
		for j := range ps {
			if ps[j].proto != p.Proto {
				continue
			}
			if k == matchAllPorts && ps[j].all || k == matchPort && contains(ps[j].ranges, p.Dst.Port()) {
				return true
			}
			break
		}
	}
	return false
}

// contains searches merged ranges.
func contains(rs []tailcfg.PortRange, port uint16) bool {
	lo, hi := 0, len(rs)
	for lo < hi {
		m := int(uint(lo+hi) / 2)
		if rs[m].Last < port {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo < len(rs) && rs[lo].First <= port
}

// Caps returns the capabilities that the node at src is granted at the address
// dst, with their values in the order of the rules; nil if there are none. The
// map is the caller's; the values are shared and must not be changed. Sources of the form "cap:NAME" grant nothing.
func (f *Filter) Caps(src, dst netip.Addr) tailcfg.PeerCapMap {
	if f == nil {
		return nil
	}
	var ids []int32
	for i := f.grantSrc.Find(src); i >= 0; i = f.grantSrc.Parent(i) {
		ids = append(ids, f.grantIDs[f.grantSrc.Key(i)]...)
	}
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	var out tailcfg.PeerCapMap
	for _, id := range slices.Compact(ids) {
		for _, g := range f.grants[id] {
			if g.cap == "" || !g.dst.Contains(dst) {
				continue
			}
			if out == nil {
				out = tailcfg.PeerCapMap{}
			}
			old := out[g.cap]
			out[g.cap] = append(old[:len(old):len(old)], g.values...)
		}
	}
	return out
}
