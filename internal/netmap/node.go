package netmap

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Node is what this node keeps of a node of the tailnet, itself included. A
// Node in a Map is shared by everybody and must not be changed, nor may
// anything it refers to. Two snapshots hold the same *Node if nothing in it
// changed between them.
type Node struct {
	ID       tailcfg.NodeID
	StableID tailcfg.StableNodeID
	Name     string // fully qualified, with the trailing dot
	User     tailcfg.UserID
	Sharer   tailcfg.UserID
	Key      key.NodePublic
	DiscoKey key.DiscoPublic

	KeyExpiry time.Time // zero: never
	Created   time.Time
	LastSeen  time.Time // zero: unknown

	Addresses     []netip.Prefix // its own, most often one /32 and one /128
	AllowedIPs    []netip.Prefix // what may come from it; the same slice as Addresses if there is no more
	PrimaryRoutes []netip.Prefix
	Endpoints     []netip.AddrPort
	HomeDERP      int // region; 0: unknown

	Hostname string
	OS       string
	App      string
	PeerAPI4 uint16 // ports of its peer API; 0: none
	PeerAPI6 uint16

	Tags   []string
	Cap    tailcfg.CapabilityVersion
	CapMap tailcfg.NodeCapMap // with the older Capabilities as keys without values

	// By these addresses this node is known to the peer, if not by its own.
	Masq4, Masq6 netip.Addr

	Online            bool
	OnlineKnown       bool // false: control does not say
	Expired           bool // control says so; see Map.Expired
	MachineAuthorized bool
	IsWireGuardOnly   bool
	IsJailed          bool
	// PeerRelay nodes say of themselves that they relay for others.
	PeerRelay bool
	// UnsignedPeerAPIOnly nodes are not covered by tailnet lock; they never hold peer capabilities that concern paths.
	UnsignedPeerAPIOnly bool
}

// ShortName returns the first label of the name.
func (n *Node) ShortName() string {
	label, _, _ := strings.Cut(n.Name, ".")
	return label
}

// HasCap reports whether the node has the capability.
func (n *Node) HasCap(c tailcfg.NodeCapability) bool {
	_, ok := n.CapMap[c]
	return ok
}

// Addr4 returns the node's first IPv4 address, or the zero address.
func (n *Node) Addr4() netip.Addr { return n.first(netip.Addr.Is4) }

// Addr6 returns the node's first IPv6 address, or the zero address.
func (n *Node) Addr6() netip.Addr { return n.first(netip.Addr.Is6) }

func (n *Node) first(is func(netip.Addr) bool) netip.Addr {
	for _, p := range n.Addresses {
		if p.IsSingleIP() && is(p.Addr()) {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// HasAddr reports whether a is one of the node's own addresses.
func (n *Node) HasAddr(a netip.Addr) bool { return containsAddr(n.Addresses, a) }

// Bounds on what is kept of one node, far beyond what a control server sends.
const (
	maxPrefixes  = 16384
	maxEndpoints = 256
	maxTags      = 1024
	maxNodeCaps  = 4096
	maxText      = 1024
)

// interner makes equal strings share their bytes. A tailnet repeats few tags,
// systems and programs thousands of times.
type interner map[string]string

func (in interner) text(s string) string {
	if s == "" {
		return ""
	}
	s = s[:min(len(s), maxText)]
	if t, ok := in[s]; ok {
		return t
	}
	if len(in) < 4096 {
		s = strings.Clone(s)
		in[s] = s
	}
	return s
}

// newNode makes the compact form of n. ok is false if n is nothing a node can
// be kept by. ignored counts parts that made no sense.
func newNode(n *tailcfg.Node, in interner) (c *Node, ignored int, ok bool) {
	if n == nil || n.ID <= 0 || n.Key.IsZero() || len(n.Name) > 255 {
		return nil, 1, false
	}
	c = &Node{
		ID: n.ID, StableID: n.StableID, Name: n.Name, User: n.User, Sharer: n.Sharer, Key: n.Key, DiscoKey: n.DiscoKey,
		KeyExpiry: n.KeyExpiry, Created: n.Created,
		HomeDERP: region(n.HomeRegion()), Cap: n.Cap,
		Expired: n.Expired, MachineAuthorized: n.MachineAuthorized, IsWireGuardOnly: n.IsWireGuardOnly, IsJailed: n.IsJailed, UnsignedPeerAPIOnly: n.UnsignedPeerAPIOnly,
	}
	if n.LastSeen != nil {
		c.LastSeen = *n.LastSeen
	}
	if n.Online != nil {
		c.Online, c.OnlineKnown = *n.Online, true
	}
	var bad int
	c.Addresses, bad = prefixes(n.Addresses)
	ignored += bad
	if n.AllowedIPs == nil || slices.Equal(n.AllowedIPs, n.Addresses) {
		c.AllowedIPs = c.Addresses
	} else {
		c.AllowedIPs, bad = prefixes(n.AllowedIPs)
		ignored += bad
	}
	c.PrimaryRoutes, bad = prefixes(n.PrimaryRoutes)
	ignored += bad
	c.Endpoints, bad = endpoints(n.Endpoints)
	ignored += bad
	if a := n.SelfNodeV4MasqAddrForThisPeer; a != nil && a.Is4() {
		c.Masq4 = *a
	}
	if a := n.SelfNodeV6MasqAddrForThisPeer; a != nil && a.Is6() {
		c.Masq6 = *a
	}
	if h := n.Hostinfo; h != nil {
		c.PeerRelay = h.PeerRelay
		if short := c.ShortName(); h.Hostname == short {
			c.Hostname = short
		} else {
			c.Hostname = h.Hostname[:min(len(h.Hostname), maxText)]
		}
		c.OS, c.App = in.text(h.OS), in.text(h.App)
		for _, s := range h.Services {
			switch s.Proto {
			case "peerapi4":
				c.PeerAPI4 = s.Port
			case "peerapi6":
				c.PeerAPI6 = s.Port
			}
		}
	}
	if len(n.Tags) > 0 {
		tags := n.Tags[:min(len(n.Tags), maxTags)]
		ignored += len(n.Tags) - len(tags)
		c.Tags = make([]string, len(tags))
		for i, t := range tags {
			c.Tags[i] = in.text(t)
		}
	}
	c.CapMap = capMap(n.CapMap, n.Capabilities, in)
	return c, ignored, true
}

// region keeps a hostile number from being more than a number.
func region(r int) int {
	if r < 0 || r > 1<<16-1 {
		return 0
	}
	return r
}

func capMap(m tailcfg.NodeCapMap, old []tailcfg.NodeCapability, in interner) tailcfg.NodeCapMap {
	if len(m)+len(old) == 0 {
		return nil
	}
	out := make(tailcfg.NodeCapMap, min(len(m)+len(old), maxNodeCaps))
	for k, v := range m {
		if len(out) == maxNodeCaps {
			break
		}
		if len(v) == 0 {
			v = nil
		}
		out[tailcfg.NodeCapability(in.text(string(k)))] = v
	}
	for _, k := range old {
		if _, ok := out[k]; !ok && len(out) < maxNodeCaps {
			out[tailcfg.NodeCapability(in.text(string(k)))] = nil
		}
	}
	return out
}

// prefixes copies the valid ones of ps, masked.
func prefixes(ps []netip.Prefix) (out []netip.Prefix, ignored int) {
	if len(ps) == 0 {
		return nil, 0
	}
	out = make([]netip.Prefix, 0, min(len(ps), maxPrefixes))
	for i, p := range ps {
		if len(out) == maxPrefixes {
			return out, ignored + len(ps) - i
		}
		if !p.IsValid() || p.Addr().Is4In6() {
			ignored++
			continue
		}
		out = append(out, p.Masked())
	}
	return out, ignored
}

func endpoints(eps []netip.AddrPort) (out []netip.AddrPort, ignored int) {
	if len(eps) == 0 {
		return nil, 0
	}
	out = make([]netip.AddrPort, 0, min(len(eps), maxEndpoints))
	for i, ep := range eps {
		if len(out) == maxEndpoints {
			return out, ignored + len(eps) - i
		}
		if !ep.IsValid() || ep.Port() == 0 || ep.Addr().IsUnspecified() || ep.Addr().IsMulticast() {
			ignored++
			continue
		}
		out = append(out, netip.AddrPortFrom(ep.Addr().Unmap(), ep.Port()))
	}
	return out, ignored
}

// same reports whether a and b say the same.
func same(a, b *Node) bool {
	return a.ID == b.ID && a.StableID == b.StableID && a.Name == b.Name && a.User == b.User && a.Sharer == b.Sharer &&
		a.Key == b.Key && a.DiscoKey == b.DiscoKey &&
		a.KeyExpiry.Equal(b.KeyExpiry) && a.Created.Equal(b.Created) && a.LastSeen.Equal(b.LastSeen) &&
		slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.AllowedIPs, b.AllowedIPs) &&
		slices.Equal(a.PrimaryRoutes, b.PrimaryRoutes) && slices.Equal(a.Endpoints, b.Endpoints) &&
		a.HomeDERP == b.HomeDERP && a.Hostname == b.Hostname && a.OS == b.OS && a.App == b.App &&
		a.PeerAPI4 == b.PeerAPI4 && a.PeerAPI6 == b.PeerAPI6 && slices.Equal(a.Tags, b.Tags) && a.Cap == b.Cap &&
		maps.EqualFunc(a.CapMap, b.CapMap, slices.Equal) &&
		a.Masq4 == b.Masq4 && a.Masq6 == b.Masq6 && a.Online == b.Online && a.OnlineKnown == b.OnlineKnown &&
		a.Expired == b.Expired && a.MachineAuthorized == b.MachineAuthorized &&
		a.IsWireGuardOnly == b.IsWireGuardOnly && a.IsJailed == b.IsJailed && a.PeerRelay == b.PeerRelay && a.UnsignedPeerAPIOnly == b.UnsignedPeerAPIOnly
}
