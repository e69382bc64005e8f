// Package netmap is the node's view of its tailnet. A Map is an immutable
// snapshot that readers take from an atomic pointer and use without locks; a
// Builder, owned by the goroutine of the map session, turns control's responses
// into the next one. Snapshots share what did not change.
package netmap

import (
	"hash/maphash"
	"iter"
	"net/netip"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/lpm"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Map is a snapshot of the tailnet. It is safe for concurrent use, and nothing
// that its methods and fields give out may be changed. The methods also work on a
// nil Map, which is empty.
type Map struct {
	Self   *Node  // never nil in a Map that a Builder made
	Domain string // the tailnet's name for users; MagicDNS names end in Suffix

	DERPMap      *tailcfg.DERPMap // nil until control sends one
	DNS          *tailcfg.DNSConfig
	Filter       []tailcfg.FilterRule // all named filters together, in the order of their names
	FilterSet    bool                 // whether control sent any
	Health       []string
	Messages     map[string]*tailcfg.DisplayMessage
	ControlClock time.Duration // how far control's clock is ahead of ours

	profiles map[tailcfg.UserID]tailcfg.UserProfile

	peers  list
	keys   index
	stable index
	names  index
	addrs  index            // single addresses in Addresses and AllowedIPs
	routes lpm.Table        // all other routes
	owners []tailcfg.NodeID // of routes
	seed   maphash.Seed
}

// Len returns the number of peers.
func (m *Map) Len() int {
	if m == nil {
		return 0
	}
	return m.peers.n
}

// All yields the peers by ascending ID.
func (m *Map) All() iter.Seq[*Node] {
	return func(yield func(*Node) bool) {
		if m == nil {
			return
		}
		for _, c := range m.peers.chunks {
			for _, n := range c {
				if !yield(n) {
					return
				}
			}
		}
	}
}

// PeerByID returns the peer with the ID, or nil.
func (m *Map) PeerByID(id tailcfg.NodeID) *Node {
	if m == nil {
		return nil
	}
	return m.peers.get(id)
}

// PeerByKey returns the peer with the node key, or nil.
func (m *Map) PeerByKey(k key.NodePublic) *Node {
	if m == nil || m.keys.root == nil || k.IsZero() {
		return nil
	}
	return m.keys.find(hashKey(m.seed, k), func(n *Node) bool { return n.Key == k })
}

// PeerByStableID returns the peer with the stable ID, or nil.
func (m *Map) PeerByStableID(id tailcfg.StableNodeID) *Node {
	if m == nil || m.stable.root == nil || id == "" {
		return nil
	}
	return m.stable.find(maphash.String(m.seed, string(id)), func(n *Node) bool { return n.StableID == id })
}

// PeerByAddr returns the peer that has a as one of its own addresses, or nil.
func (m *Map) PeerByAddr(a netip.Addr) *Node {
	if m == nil || m.addrs.root == nil {
		return nil
	}
	return m.addrs.find(hashAddr(m.seed, a), func(n *Node) bool { return containsAddr(n.indexed(n.Addresses), a) })
}

// Route returns the peer that packets to a belong to, and from which alone
// packets with the source a may come: the one with the longest prefix in AllowedIPs
// that covers a; of several with the same prefix the one with the lowest ID. It
// returns nil for this node's own addresses. Default
// routes (0.0.0.0/0, ::/0) do not count: an exit node is used by choice only.
func (m *Map) Route(a netip.Addr) *Node {
	if m == nil || m.Self != nil && m.Self.HasAddr(a) {
		return nil
	}
	if m.addrs.root != nil {
		// No prefix is longer.
		if n := m.addrs.find(hashAddr(m.seed, a), func(n *Node) bool { return containsAddr(n.indexed(n.AllowedIPs), a) }); n != nil {
			return n
		}
	}
	if i := m.routes.Find(a); i >= 0 {
		return m.peers.get(m.owners[m.routes.Key(i)])
	}
	return nil
}

func containsAddr(ps []netip.Prefix, a netip.Addr) bool {
	for _, p := range ps {
		if p.IsSingleIP() && p.Addr() == a {
			return true
		}
	}
	return false
}

// ByName returns the node, this one included, with the MagicDNS name: fully
// qualified, with or without the trailing dot, or the first label alone for a node of this tailnet.
// Case does not matter. It returns nil if there is none.
func (m *Map) ByName(name string) *Node {
	if m == nil || m.Self == nil {
		return nil
	}
	var buf [256]byte
	q, ok := fold(buf[:0], name)
	if !ok {
		return nil
	}
	if strings.IndexByte(strings.TrimSuffix(name, "."), '.') < 0 {
		if strings.HasSuffix(name, ".") {
			return nil // a top-level domain
		}
		suffix := m.Suffix()
		if suffix == "" || len(q)+1+len(suffix) > cap(buf) {
			return nil
		}
		q = append(q, '.')
		for i := range len(suffix) {
			q = append(q, lower(suffix[i]))
		}
	}
	match := func(n *Node) bool { return equalFold(q, n.Name) }
	if match(m.Self) {
		return m.Self
	}
	if m.names.root == nil {
		return nil
	}
	return m.names.find(maphash.Bytes(m.seed, q), match)
}

// Suffix returns the domain of this node's name without the trailing dot, such as
// "tail1234.ts.net"; "" if the node has no name with a domain.
func (m *Map) Suffix() string {
	if m == nil || m.Self == nil {
		return ""
	}
	_, domain, _ := strings.Cut(strings.TrimSuffix(m.Self.Name, "."), ".")
	return domain
}

// UserProfile returns what is known of a user.
func (m *Map) UserProfile(id tailcfg.UserID) (p tailcfg.UserProfile, ok bool) {
	if m == nil {
		return p, false
	}
	p, ok = m.profiles[id]
	return p, ok
}

// Expired reports whether n's key has expired at now, by this host's clock.
func (m *Map) Expired(n *Node, now time.Time) bool {
	return n.Expired || !n.KeyExpiry.IsZero() && !now.Add(m.ControlClock).Before(n.KeyExpiry)
}

// NextExpiry returns when, by this host's clock, the next key expires after
// now, this node's included; the zero time if none does. It looks at every peer.
func (m *Map) NextExpiry(now time.Time) (next time.Time) {
	if m == nil || m.Self == nil {
		return next
	}
	look := func(n *Node) {
		if n.KeyExpiry.IsZero() || m.Expired(n, now) {
			return
		}
		if at := n.KeyExpiry.Add(-m.ControlClock); next.IsZero() || at.Before(next) {
			next = at
		}
	}
	look(m.Self)
	for n := range m.All() {
		look(n)
	}
	return next
}

// HasCap reports whether the node that has src as one of its addresses, this
// node included, has the node capability. It does not allocate: package filter asks it for packets.
func (m *Map) HasCap(src netip.Addr, c tailcfg.NodeCapability) bool {
	if m == nil || m.Self == nil {
		return false
	}
	if m.Self.HasAddr(src) {
		return m.Self.HasCap(c)
	}
	n := m.PeerByAddr(src)
	return n != nil && n.HasCap(c)
}

// The hashes are keyed: names, keys and addresses come from outside.

func hashKey(s maphash.Seed, k key.NodePublic) uint64 {
	raw := k.Raw()
	return maphash.Bytes(s, raw[:])
}

func hashAddr(s maphash.Seed, a netip.Addr) uint64 {
	raw := a.As16()
	return maphash.Bytes(s, raw[:])
}

func hashName(s maphash.Seed, name string) (uint64, bool) {
	var buf [256]byte
	q, ok := fold(buf[:0], name)
	if !ok {
		return 0, false
	}
	return maphash.Bytes(s, q), true
}

// fold appends name in lower case without the trailing dot. ok is false if it
// cannot be a domain name.
func fold(b []byte, name string) (_ []byte, ok bool) {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > 253 {
		return b, false
	}
	for i := range len(name) {
		b = append(b, lower(name[i]))
	}
	return b, true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// equalFold reports whether folded is what fold makes of name.
func equalFold(folded []byte, name string) bool {
	name = strings.TrimSuffix(name, ".")
	if len(name) != len(folded) {
		return false
	}
	for i, c := range folded {
		if lower(name[i]) != c {
			return false
		}
	}
	return true
}
