package netmap

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sort"
	"time"

	"github.com/tailnode/tailnode/internal/lpm"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Bounds on what control may make a node keep.
const (
	MaxPeers    = 200_000
	maxProfiles = 200_000
	maxMessages = 1000
	maxFilters  = 10_000 // named ones
)

var (
	// ErrNoSelf reports a first response that does not say who this node is, or
	// a response that says something impossible of it.
	ErrNoSelf = errors.New("netmap: control sent no usable node for us")
	// ErrTooLarge reports a tailnet beyond the bounds of this package.
	ErrTooLarge = errors.New("netmap: more than this node can keep")
)

// Change says what differs between a Map and the one before.
type Change struct {
	Self      bool // anything about this node
	KeyExpiry bool // when this node's key expires, or that it has
	Added     []*Node
	Changed   []*Node // as they are now; the old ones are in the old Map
	Removed   []*Node // as they were
	DERPMap   bool
	DNS       bool
	Filter    bool
	Profiles  bool
	Health    bool // Health or Messages
	Domain    bool
	Ignored   int // parts of the response that made no sense or named nobody, left out
}

// Empty reports whether nothing differs.
func (c *Change) Empty() bool {
	return !(c.Self || c.KeyExpiry || c.DERPMap || c.DNS || c.Filter || c.Profiles || c.Health || c.Domain) &&
		len(c.Added)+len(c.Changed)+len(c.Removed) == 0
}

// Builder makes the Maps of one node. It is not safe for concurrent use: the
// goroutine that reads the map stream owns it.
type Builder struct {
	cur     *Map
	filters map[string][]tailcfg.FilterRule
	intern  interner
	fresh   bool
}

// NewBuilder returns a Builder that expects the first response of a stream.
func NewBuilder() *Builder { return &Builder{fresh: true} }

// Restart tells that the next response is the first of a new stream: what it
// does not mention is gone. The Change it gives is against the last Map, so that a
// reconnect without news changes nothing.
func (b *Builder) Restart() { b.fresh = true }

// Map returns the last Map, or nil.
func (b *Builder) Map() *Map { return b.cur }

// Apply returns the Map after r, and what differs from the one before. It
// takes over nothing of r but strings, filter rules, the DERP map and the DNS
// configuration, which must not be changed afterwards. It does not block.
//
// What makes no sense in r is left out and counted in Change.Ignored. After an error
// the last Map stands.
func (b *Builder) Apply(r *tailcfg.MapResponse, now time.Time) (*Map, Change, error) {
	if r.KeepAlive {
		// Such a response carries nothing but, perhaps, control's clock.
		if r.ControlTime == nil || b.cur == nil {
			return b.cur, Change{}, nil
		}
		m := *b.cur
		m.ControlClock = r.ControlTime.Sub(now)
		b.cur = &m
		return b.cur, Change{}, nil
	}
	if len(r.Peers) > MaxPeers || len(r.PeersChanged) > MaxPeers {
		return b.cur, Change{}, fmt.Errorf("%w: %d peers", ErrTooLarge, max(len(r.Peers), len(r.PeersChanged)))
	}

	a := &apply{b: b, now: now, intern: b.intern, old: b.cur, base: b.cur, filters: b.filters, fresh: b.fresh}
	if a.fresh || a.intern == nil {
		a.intern = interner{}
	}
	if a.old == nil {
		a.old = &Map{seed: maphash.MakeSeed()}
		a.base = a.old
	}
	if a.fresh {
		a.base = &Map{Self: a.old.Self, ControlClock: a.old.ControlClock, seed: a.old.seed}
		a.filters = nil
	}
	next := *a.base
	a.m = &next
	if err := a.self(r.Node); err != nil {
		return b.cur, Change{}, err
	}
	a.rest(r)
	changed, err := a.peerChanges(r)
	if err == nil {
		err = a.commit(changed)
	}
	if err != nil {
		return b.cur, Change{}, err
	}
	b.cur, b.filters, b.intern, b.fresh = a.m, a.filters, a.intern, false
	return a.m, a.c, nil
}

// apply is one response on its way into a Map.
type apply struct {
	b       *Builder
	now     time.Time
	fresh   bool
	old     *Map // the one that Change is against
	base    *Map // the one that a delta is against: old, or empty at the start of a stream
	m       *Map // the new one
	c       Change
	intern  interner
	filters map[string][]tailcfg.FilterRule
	rebuild bool // the indexes cannot be kept
}

func (a *apply) self(n *tailcfg.Node) error {
	if n == nil {
		if a.m.Self == nil || a.fresh {
			return ErrNoSelf
		}
		return nil
	}
	s, ignored, ok := newNode(n, a.intern)
	a.c.Ignored += ignored
	if !ok {
		return ErrNoSelf
	}
	old := a.old.Self
	switch {
	case old == nil:
		a.c.Self, a.c.KeyExpiry = true, true
	case same(old, s):
		return nil
	default:
		a.c.Self = true
		a.c.KeyExpiry = !old.KeyExpiry.Equal(s.KeyExpiry) || old.Expired != s.Expired
		// Peers that claim our addresses, key or ID are judged anew.
		a.rebuild = old.ID != s.ID || old.Key != s.Key || !slices.Equal(old.Addresses, s.Addresses)
	}
	a.m.Self = s
	return nil
}

// rest applies all but the nodes.
func (a *apply) rest(r *tailcfg.MapResponse) {
	m, old := a.m, a.old
	if r.ControlTime != nil {
		m.ControlClock = r.ControlTime.Sub(a.now)
	}
	if r.Domain != "" {
		m.Domain = r.Domain
	}
	a.c.Domain = m.Domain != old.Domain
	if r.DERPMap != nil {
		m.DERPMap = mergeDERP(m.DERPMap, r.DERPMap)
	}
	m.DERPMap, a.c.DERPMap = keep(old.DERPMap, m.DERPMap)
	if r.DNSConfig != nil {
		m.DNS = r.DNSConfig
	}
	m.DNS, a.c.DNS = keep(old.DNS, m.DNS)
	a.applyFilters(r)
	a.applyProfiles(r.UserProfiles)
	a.applyHealth(r)
}

// keep returns old if next says the same, else next, and whether it is another.
// Control repeats itself on every new stream.
func keep[T any](old, next *T) (*T, bool) {
	if old == next || reflect.DeepEqual(old, next) {
		return old, false
	}
	return next, true
}

// mergeDERP returns cur as changed by d: what d leaves zero stays. A set of
// regions replaces the one before; a nil region is one that is gone.
func mergeDERP(cur, d *tailcfg.DERPMap) *tailcfg.DERPMap {
	out := &tailcfg.DERPMap{HomeParams: d.HomeParams, OmitDefaultRegions: d.OmitDefaultRegions}
	if d.Regions != nil {
		out.Regions = make(map[int]*tailcfg.DERPRegion, len(d.Regions))
		for id, r := range d.Regions {
			if r != nil && id > 0 && id == region(id) {
				out.Regions[id] = cleanRegion(id, r)
			}
		}
	}
	if cur == nil {
		return out
	}
	if d.Regions == nil {
		out.Regions, out.OmitDefaultRegions = cur.Regions, cur.OmitDefaultRegions
	}
	switch {
	case d.HomeParams == nil:
		out.HomeParams = cur.HomeParams
	case d.HomeParams.RegionScore == nil && cur.HomeParams != nil:
		out.HomeParams = cur.HomeParams
	}
	return out
}

// cleanRegion returns r, or where r contradicts its place in the map or has nodes that are null,
// a copy that does not.
func cleanRegion(id int, r *tailcfg.DERPRegion) *tailcfg.DERPRegion {
	if r.RegionID == id && !slices.Contains(r.Nodes, nil) {
		return r
	}
	c := *r
	c.RegionID = id
	c.Nodes = slices.DeleteFunc(slices.Clone(r.Nodes), func(n *tailcfg.DERPNode) bool { return n == nil })
	return &c
}

func (a *apply) applyFilters(r *tailcfg.MapResponse) {
	if r.PacketFilter == nil && r.PacketFilters == nil {
		a.c.Filter = a.m.FilterSet != a.old.FilterSet // a new stream without a filter
		return
	}
	fs := maps.Clone(a.filters)
	if fs == nil {
		fs = map[string][]tailcfg.FilterRule{}
	}
	if r.PacketFilter != nil {
		fs["base"] = *r.PacketFilter
	}
	if rules, ok := r.PacketFilters["*"]; ok && rules == nil {
		clear(fs)
	}
	for name, rules := range r.PacketFilters {
		switch {
		case name == "*":
		case rules == nil:
			delete(fs, name)
		case len(fs) >= maxFilters && fs[name] == nil:
			a.c.Ignored++
		default:
			fs[name] = rules
		}
	}
	var all []tailcfg.FilterRule
	for _, name := range slices.Sorted(maps.Keys(fs)) {
		all = append(all, fs[name]...)
	}
	a.filters = fs
	a.m.Filter, a.m.FilterSet = all, true
	if a.old.FilterSet && reflect.DeepEqual(a.old.Filter, all) {
		a.m.Filter = a.old.Filter
	} else {
		a.c.Filter = true
	}
}

func (a *apply) applyProfiles(ps []tailcfg.UserProfile) {
	cloned := false
	if a.fresh {
		// Users are never told to be gone; those we know stay good.
		a.m.profiles = a.old.profiles
	}
	for _, p := range ps {
		if p.ID <= 0 || len(a.m.profiles) >= maxProfiles {
			a.c.Ignored++
			continue
		}
		if a.m.profiles[p.ID] == p {
			continue
		}
		if !cloned {
			cloned = true
			if a.m.profiles = maps.Clone(a.m.profiles); a.m.profiles == nil {
				a.m.profiles = make(map[tailcfg.UserID]tailcfg.UserProfile, len(ps))
			}
		}
		a.m.profiles[p.ID] = p
		a.c.Profiles = true
	}
}

func (a *apply) applyHealth(r *tailcfg.MapResponse) {
	if r.Health != nil {
		a.m.Health = *r.Health
	}
	if r.DisplayMessages != nil {
		ms := maps.Clone(a.m.Messages)
		if msg, ok := r.DisplayMessages["*"]; ok && msg == nil || ms == nil {
			ms = map[string]*tailcfg.DisplayMessage{}
		}
		for id, msg := range r.DisplayMessages {
			switch {
			case id == "*":
			case msg == nil:
				delete(ms, id)
			case len(ms) >= maxMessages:
				a.c.Ignored++
			default:
				ms[id] = msg
			}
		}
		a.m.Messages = ms
	}
	a.c.Health = !slices.Equal(a.m.Health, a.old.Health) ||
		!maps.EqualFunc(a.m.Messages, a.old.Messages, func(x, y *tailcfg.DisplayMessage) bool {
			return x.Title == y.Title && x.Text == y.Text && x.Severity == y.Severity && x.ImpactsConnectivity == y.ImpactsConnectivity &&
				(x.PrimaryAction == y.PrimaryAction || x.PrimaryAction != nil && y.PrimaryAction != nil && *x.PrimaryAction == *y.PrimaryAction)
		})
}

// peerChanges returns what r makes of peers: nil for one that is gone. The
// order of the parts is that in which the protocol wants them applied.
func (a *apply) peerChanges(r *tailcfg.MapResponse) (map[tailcfg.NodeID]*Node, error) {
	out := map[tailcfg.NodeID]*Node{}
	set := func(n *tailcfg.Node) {
		c, ignored, ok := newNode(n, a.intern)
		a.c.Ignored += ignored
		if ok {
			out[c.ID] = c // of two with one ID the later counts
		}
	}
	all := len(r.Peers) > 0 || r.EachPeer != nil
	if a.fresh || all {
		for n := range a.old.All() {
			out[n.ID] = nil
		}
	}
	for _, n := range r.Peers {
		set(n)
	}
	if r.EachPeer != nil {
		count := 0
		if err := r.EachPeer(func(n *tailcfg.Node) error {
			if count++; count > MaxPeers {
				return fmt.Errorf("%w: more than %d peers", ErrTooLarge, MaxPeers)
			}
			set(n)
			return nil
		}); err != nil {
			return nil, err
		}
	}
	if all {
		return out, nil // excludes all that follows
	}

	for _, id := range r.PeersRemoved {
		if a.old.peers.get(id) == nil {
			a.c.Ignored++
			continue
		}
		out[id] = nil
	}
	for _, n := range r.PeersChanged {
		set(n)
	}
	// edit returns a peer of which the caller may change fields.
	edited := map[tailcfg.NodeID]bool{}
	edit := func(id tailcfg.NodeID) *Node {
		n, ok := out[id]
		if !ok {
			n = a.base.peers.get(id)
		}
		if n == nil {
			a.c.Ignored++
			return nil
		}
		if !edited[id] {
			edited[id] = true
			c := *n
			n = &c
			out[id] = n
		}
		return n
	}
	for id, seen := range r.PeerSeenChange {
		if n := edit(id); n != nil {
			n.LastSeen = time.Time{}
			if seen {
				n.LastSeen = a.now
			}
		}
	}
	for id, online := range r.OnlineChange {
		if n := edit(id); n != nil {
			n.Online, n.OnlineKnown = online, true
		}
	}
	for _, p := range r.PeersChangedPatch {
		if p == nil {
			a.c.Ignored++
			continue
		}
		if n := edit(p.NodeID); n != nil {
			a.patch(n, p)
		}
	}
	return out, nil
}

func (a *apply) patch(n *Node, p *tailcfg.PeerChange) {
	if p.DERPRegion != 0 {
		n.HomeDERP = region(p.DERPRegion)
	}
	if p.Cap != 0 {
		n.Cap = p.Cap
	}
	if p.CapMap != nil {
		n.CapMap = capMap(p.CapMap, nil, a.intern)
	}
	if p.Endpoints != nil {
		var bad int
		n.Endpoints, bad = endpoints(p.Endpoints)
		a.c.Ignored += bad
	}
	if p.Key != nil {
		if p.Key.IsZero() {
			a.c.Ignored++
		} else {
			n.Key = *p.Key
		}
	}
	if p.DiscoKey != nil {
		n.DiscoKey = *p.DiscoKey
	}
	if p.Online != nil {
		n.Online, n.OnlineKnown = *p.Online, true
	}
	if p.LastSeen != nil {
		n.LastSeen = *p.LastSeen
	}
	if p.KeyExpiry != nil {
		n.KeyExpiry = *p.KeyExpiry
	}
}

// commit brings the changed peers into the new Map.
func (a *apply) commit(changed map[tailcfg.NodeID]*Node) error {
	old, self := a.old, a.m.Self
	peers := old.peers
	if s := peers.get(self.ID); s != nil {
		if _, ok := changed[self.ID]; !ok {
			changed[self.ID] = nil // we got the ID of a former peer
		}
	}
	ids := slices.Collect(maps.Keys(changed))
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	for _, id := range ids {
		was, is := old.peers.get(id), changed[id]
		if is != nil && (is.ID == self.ID || is.Key == self.Key) {
			a.c.Ignored++
			is = nil
		}
		switch {
		case was == nil && is == nil:
		case was == nil:
			a.c.Added = append(a.c.Added, is)
		case is == nil:
			a.c.Removed = append(a.c.Removed, was)
		case !same(was, is):
			a.c.Changed = append(a.c.Changed, is)
		}
	}
	touched := len(a.c.Added) + len(a.c.Changed) + len(a.c.Removed)
	if total := peers.n + len(a.c.Added) - len(a.c.Removed); total > MaxPeers {
		return fmt.Errorf("%w: %d peers", ErrTooLarge, total)
	}

	m, e := a.m, new(edit)
	m.seed = old.seed
	if a.rebuild || touched > 64+peers.n/8 {
		a.rebuildAll(e)
		return nil
	}
	m.peers, m.keys, m.stable, m.names, m.addrs = old.peers, old.keys, old.stable, old.names, old.addrs
	m.routes, m.owners = old.routes, old.owners
	reroute := false
	for _, n := range a.c.Removed {
		m.unindex(e, n)
		reroute = reroute || hasRoutes(n)
		m.peers = m.peers.without(n.ID)
	}
	for _, n := range a.c.Changed {
		was := old.peers.get(n.ID)
		sameIPs := slices.Equal(was.AllowedIPs, n.AllowedIPs)
		if sameIPs && was.Key == n.Key && was.StableID == n.StableID && was.Name == n.Name && slices.Equal(was.Addresses, n.Addresses) {
			m.eachIndex(n, func(x *index, h uint64) { x.replace(e, h, was, n) })
		} else {
			m.unindex(e, was)
			m.index(e, n)
		}
		reroute = reroute || !sameIPs && (hasRoutes(was) || hasRoutes(n))
		m.peers = m.peers.with(n)
	}
	for _, n := range a.c.Added {
		m.index(e, n)
		reroute = reroute || hasRoutes(n)
		m.peers = m.peers.with(n)
	}
	if reroute {
		m.reroute()
	}
	return nil
}

// rebuildAll makes the indexes anew, which is cheaper than many changes.
func (a *apply) rebuildAll(e *edit) {
	m := a.m
	nodes := make([]*Node, 0, a.old.peers.n+len(a.c.Added))
	replaced := make(map[tailcfg.NodeID]*Node, len(a.c.Changed)+len(a.c.Removed))
	for _, n := range a.c.Changed {
		replaced[n.ID] = n
	}
	for _, n := range a.c.Removed {
		replaced[n.ID] = nil
	}
	for n := range a.old.All() {
		if r, ok := replaced[n.ID]; ok {
			n = r
		}
		if n == nil {
			continue
		}
		if n.Key == m.Self.Key { // ours since now
			a.c.Removed = append(a.c.Removed, n)
			a.c.Ignored++
			continue
		}
		nodes = append(nodes, n)
	}
	nodes = append(nodes, a.c.Added...)
	slices.SortFunc(nodes, func(x, y *Node) int { return cmp.Compare(x.ID, y.ID) })
	m.peers = newList(nodes)
	m.keys, m.stable, m.names, m.addrs = index{}, index{}, index{}, index{}
	for _, n := range nodes {
		m.index(e, n)
	}
	m.reroute()
}

func (m *Map) index(e *edit, n *Node) {
	m.eachIndex(n, func(x *index, h uint64) { x.insert(e, h, n) })
}

func (m *Map) unindex(e *edit, n *Node) {
	m.eachIndex(n, func(x *index, h uint64) { x.remove(e, h, n) })
}

func (m *Map) eachIndex(n *Node, do func(*index, uint64)) {
	do(&m.keys, hashKey(m.seed, n.Key))
	if n.StableID != "" {
		do(&m.stable, maphash.String(m.seed, string(n.StableID)))
	}
	if h, ok := hashName(m.seed, n.Name); ok {
		do(&m.names, h)
	}
	var buf [2 * maxIndexed]netip.Prefix
	done := buf[:0]
	for _, ps := range [][]netip.Prefix{n.indexed(n.Addresses), n.indexed(n.AllowedIPs)} {
		for _, p := range ps {
			if p.IsSingleIP() && !slices.Contains(done, p) {
				done = append(done, p)
				do(&m.addrs, hashAddr(m.seed, p.Addr()))
			}
		}
	}
}

// maxIndexed is how many of a node's prefixes are looked at for single
// addresses, which the index of addresses finds. All else, such as the routes
// of an app connector by the thousand, is in the routing table.
const maxIndexed = 8

func (n *Node) indexed(ps []netip.Prefix) []netip.Prefix { return ps[:min(len(ps), maxIndexed)] }

// tableRoutes yields n's prefixes that belong into the routing table. Default
// routes do not; see Map.Route.
func tableRoutes(n *Node) iter.Seq2[int, netip.Prefix] {
	return func(yield func(int, netip.Prefix) bool) {
		for i, p := range n.AllowedIPs {
			if p.Bits() > 0 && (i >= maxIndexed || !p.IsSingleIP()) && !yield(i, p) {
				return
			}
		}
	}
}

func hasRoutes(n *Node) bool {
	for range tableRoutes(n) {
		return true
	}
	return false
}

// reroute makes the routing table anew. Routes change seldom, and most peers
// have none. The table names its peers by ID, so it stays when anything else
// about them changes.
func (m *Map) reroute() {
	var keys []netip.Prefix
	var owners []tailcfg.NodeID
	seen := map[netip.Prefix]struct{}{}
	for n := range m.All() { // by ascending ID: the first that claims a prefix has it
		for _, p := range tableRoutes(n) {
			if _, ok := seen[p]; !ok {
				seen[p] = struct{}{}
				keys, owners = append(keys, p), append(owners, n.ID)
			}
		}
	}
	m.routes, m.owners = lpm.New(keys), owners
}
