package netmap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

var now = time.Unix(1_700_000_000, 0).UTC()

func nodeKey(id, generation int) key.NodePublic {
	var raw [key.Size]byte
	raw[0], raw[1], raw[2], raw[3], raw[31] = byte(id), byte(id>>8), byte(id>>16), byte(generation), 1
	return key.NodePublicFromRaw(raw)
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func ip(s string) netip.Addr    { return netip.MustParseAddr(s) }

func addr4(id int) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 64 + byte(id>>16), byte(id >> 8), byte(id)})
}

// peer makes a node as control sends one.
func peer(id int) *tailcfg.Node {
	a4 := addr4(id)
	b := a4.As4()
	a6 := netip.AddrFrom16([16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 0, 0, 0, 0, 0, 0, b[0], b[1], b[2], b[3]})
	online := id%3 != 0
	seen := now.Add(-time.Duration(id) * time.Second)
	n := &tailcfg.Node{
		ID: tailcfg.NodeID(id), StableID: tailcfg.StableNodeID(fmt.Sprintf("n%dCNTRL", id)), Name: fmt.Sprintf("host-%d.tail1234.ts.net.", id),
		User: tailcfg.UserID(1 + id%50), Key: nodeKey(id, 0), KeyExpiry: now.Add(24 * time.Hour),
		DiscoKey:  key.DiscoPublicFromRaw([32]byte{byte(id), byte(id >> 8), 7}),
		Addresses: []netip.Prefix{netip.PrefixFrom(a4, 32), netip.PrefixFrom(a6, 128)},
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(id)}), 41641), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, b[2], b[3]}), 41641)},
		HomeDERP:  1 + id%20, Created: now.Add(-time.Hour), LastSeen: &seen, Online: &online, Cap: 119, MachineAuthorized: true,
		Hostinfo: &tailcfg.Hostinfo{OS: "linux", Hostname: fmt.Sprintf("host-%d", id), App: "tsnet", Services: []tailcfg.Service{{Proto: "peerapi4", Port: 4000}, {Proto: "peerapi6", Port: 6000}}},
		Tags:     []string{"tag:server"},
	}
	n.AllowedIPs = slices.Clone(n.Addresses)
	return n
}

func self() *tailcfg.Node {
	n := peer(1)
	n.Name = "me.tail1234.ts.net."
	return n
}

func full(ids ...int) *tailcfg.MapResponse {
	r := &tailcfg.MapResponse{Node: self(), Domain: "example.com"}
	for _, id := range ids {
		r.Peers = append(r.Peers, peer(id))
	}
	return r
}

func do(t testing.TB, b *Builder, r *tailcfg.MapResponse) (*Map, Change) {
	t.Helper()
	m, c, err := b.Apply(r, now)
	if err != nil {
		t.Fatal(err)
	}
	return m, c
}

func started(t testing.TB, ids ...int) (*Builder, *Map) {
	t.Helper()
	b := NewBuilder()
	m, _ := do(t, b, full(ids...))
	return b, m
}

func ids(ns []*Node) (out []int) {
	for _, n := range ns {
		out = append(out, int(n.ID))
	}
	return out
}

func wantIDs(t testing.TB, what string, ns []*Node, want ...int) {
	t.Helper()
	if got := ids(ns); !slices.Equal(got, want) {
		t.Errorf("%s %v, want %v", what, got, want)
	}
}

func TestLookups(t *testing.T) {
	r := full(2, 3)
	r.Peers[1].AllowedIPs = append(r.Peers[1].AllowedIPs, pfx("10.0.0.0/8"), pfx("0.0.0.0/0"), pfx("::/0"))
	r.Peers[0].AllowedIPs = append(r.Peers[0].AllowedIPs, pfx("10.1.0.0/16"))
	r.UserProfiles = []tailcfg.UserProfile{{ID: 3, LoginName: "ann@example.com"}}
	m, c := do(t, NewBuilder(), r)
	wantIDs(t, "added", c.Added, 2, 3)
	if !c.Self || !c.KeyExpiry || !c.Profiles || !c.Domain || c.DERPMap || c.Filter || c.Ignored != 0 {
		t.Errorf("%+v", c)
	}
	if m.Len() != 2 || len(slices.Collect(m.All())) != 2 || m.Domain != "example.com" || m.Suffix() != "tail1234.ts.net" {
		t.Errorf("%+v", m)
	}
	two := m.PeerByID(2)
	if two == nil || m.PeerByKey(two.Key) != two || m.PeerByStableID("n2CNTRL") != two || m.PeerByAddr(two.Addr6()) != two || two.PeerAPI4 != 4000 || two.PeerAPI6 != 6000 {
		t.Errorf("%+v", two)
	}
	if p, ok := m.UserProfile(3); !ok || p.LoginName != "ann@example.com" {
		t.Error("profile")
	}
	for name, want := range map[string]int{
		"host-2": 2, "HOST-2": 2, "host-2.tail1234.ts.net": 2, "Host-2.Tail1234.ts.net.": 2, "me": 1, "me.tail1234.ts.net": 1,
		"host-9": 0, "host-2.": 0, "host-2.other.net": 0, "": 0, ".": 0, "..": 0, strings.Repeat("a", 300): 0,
	} {
		if n := m.ByName(name); (n == nil) != (want == 0) || n != nil && int(n.ID) != want {
			t.Errorf("ByName(%q) = %v", name, n)
		}
	}
	for a, want := range map[string]int{
		"100.64.0.2": 2, "fd7a:115c:a1e0::6440:3": 3, "10.1.2.3": 2, "10.2.2.3": 3, "100.64.0.1": 0, "8.8.8.8": 0, "2001:db8::1": 0,
	} {
		if n := m.Route(ip(a)); (n == nil) != (want == 0) || n != nil && int(n.ID) != want {
			t.Errorf("Route(%s) = %v, want %d", a, n, want)
		}
	}
	if m.PeerByAddr(ip("10.1.2.3")) != nil || m.PeerByAddr(ip("100.64.0.1")) != nil || m.PeerByAddr(netip.Addr{}) != nil || m.PeerByKey(key.NodePublic{}) != nil || m.PeerByID(1) != nil {
		t.Error("a peer that is none")
	}
}

func TestNilAndEmptyMap(t *testing.T) {
	for _, m := range []*Map{nil, {}} {
		if m.Len() != 0 || m.Route(ip("100.64.0.1")) != nil || m.ByName("x") != nil || m.PeerByAddr(ip("1.1.1.1")) != nil || m.PeerByID(1) != nil ||
			m.Suffix() != "" || m.HasCap(ip("1.1.1.1"), "x") || !m.NextExpiry(now).IsZero() {
			t.Error("not empty")
		}
		for range m.All() {
			t.Error("a peer")
		}
	}
}

// TestDeltas applies one kind of change after the other.
func TestDeltas(t *testing.T) {
	b, m0 := started(t, 2, 3, 4)

	four := peer(4)
	four.Name = "renamed.tail1234.ts.net."
	m1, c := do(t, b, &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{3, 99}, PeersChanged: []*tailcfg.Node{four, peer(5), peer(2)}})
	wantIDs(t, "added", c.Added, 5)
	wantIDs(t, "changed", c.Changed, 4)
	wantIDs(t, "removed", c.Removed, 3)
	if c.Ignored != 1 || c.Self || c.Domain {
		t.Errorf("%+v", c)
	}
	if m1.PeerByID(2) != m0.PeerByID(2) {
		t.Error("a peer that did not change is another")
	}
	if m1.ByName("renamed").ID != 4 || m1.ByName("host-4") != nil || m1.Route(addr4(3)) != nil || m1.PeerByAddr(addr4(5)).ID != 5 {
		t.Error("indexes of the new map")
	}
	if m0.ByName("host-4").ID != 4 || m0.ByName("renamed") != nil || m0.Route(addr4(3)).ID != 3 || m0.PeerByAddr(addr4(5)) != nil || m0.Len() != 3 {
		t.Error("the old map changed")
	}

	m2, c := do(t, b, &tailcfg.MapResponse{OnlineChange: map[tailcfg.NodeID]bool{2: false, 99: true}, PeerSeenChange: map[tailcfg.NodeID]bool{4: true, 5: false}})
	wantIDs(t, "changed", c.Changed, 2, 4, 5)
	if n := m2.PeerByID(2); n.Online || !n.OnlineKnown || m2.Route(addr4(2)) != n || m2.PeerByKey(n.Key) != n {
		t.Errorf("%+v", n)
	}
	if !m2.PeerByID(4).LastSeen.Equal(now) || !m2.PeerByID(5).LastSeen.IsZero() || c.Ignored != 1 {
		t.Error("last seen")
	}

	// Every field of a patch.
	k, d, online, seen, expiry := nodeKey(2, 1), key.DiscoPublicFromRaw([32]byte{9}), true, now.Add(time.Minute), now.Add(time.Hour)
	m3, c := do(t, b, &tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{
		{NodeID: 2, DERPRegion: 7, Cap: 120, CapMap: tailcfg.NodeCapMap{"x": {"1"}}, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:1")},
			Key: &k, DiscoKey: &d, Online: &online, LastSeen: &seen, KeyExpiry: &expiry},
		{NodeID: 99, DERPRegion: 1}, nil,
	}})
	wantIDs(t, "changed", c.Changed, 2)
	n := m3.PeerByID(2)
	if n.HomeDERP != 7 || n.Cap != 120 || !n.HasCap("x") || len(n.Endpoints) != 1 || n.Key != k || n.DiscoKey != d || !n.Online || !n.LastSeen.Equal(seen) || !n.KeyExpiry.Equal(expiry) || c.Ignored != 2 {
		t.Errorf("%+v %+v", n, c)
	}
	if m3.PeerByKey(k) != n || m3.PeerByKey(nodeKey(2, 0)) != nil || m2.PeerByKey(nodeKey(2, 0)) == nil || !m3.HasCap(addr4(2), "x") || m2.HasCap(addr4(2), "x") {
		t.Error("key index")
	}
	if n.Name != "host-2.tail1234.ts.net." || len(n.Addresses) != 2 {
		t.Error("a patch changed what it does not name")
	}

	// The whole set again: what is not in it is gone.
	_, c = do(t, b, &tailcfg.MapResponse{Peers: []*tailcfg.Node{peer(5), peer(6)}})
	wantIDs(t, "added", c.Added, 6)
	wantIDs(t, "changed", c.Changed, 5)
	wantIDs(t, "removed", c.Removed, 2, 4)

	if _, c = do(t, b, &tailcfg.MapResponse{}); !c.Empty() {
		t.Errorf("nothing changed: %+v", c)
	}
}

func TestRestart(t *testing.T) {
	b := NewBuilder()
	r := func() *tailcfg.MapResponse {
		r := full(2, 3)
		r.DERPMap = &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1}}}
		r.DNSConfig = &tailcfg.DNSConfig{Proxied: true, Domains: []string{"tail1234.ts.net"}}
		r.PacketFilters = tailcfg.PacketFilterDelta{"base": slices.Clone(tailcfg.FilterAllowAll)}
		r.Health = &[]string{"ill"}
		r.UserProfiles = []tailcfg.UserProfile{{ID: 1, LoginName: "x"}}
		return r
	}
	m, _ := do(t, b, r())
	two := m.PeerByID(2)
	b.Restart()
	m, c := do(t, b, r())
	if !c.Empty() || m.PeerByID(2) != two || len(m.Filter) != 1 {
		t.Errorf("a reconnect without news: %+v", c)
	}
	b.Restart()
	m, c = do(t, b, &tailcfg.MapResponse{Node: self()})
	wantIDs(t, "removed", c.Removed, 2, 3)
	if m.Len() != 0 || m.Filter != nil || m.FilterSet || !c.Filter || !c.DERPMap || !c.DNS || !c.Health || c.Self {
		t.Errorf("%+v", c)
	}
	b.Restart()
	if _, _, err := b.Apply(&tailcfg.MapResponse{}, now); !errors.Is(err, ErrNoSelf) || b.Map() != m {
		t.Errorf("no self: %v", err)
	}
}

func TestSelf(t *testing.T) {
	b := NewBuilder()
	for _, n := range []*tailcfg.Node{nil, {}, {ID: 1}, {ID: -1, Key: nodeKey(1, 0)}} {
		if m, _, err := b.Apply(&tailcfg.MapResponse{Node: n}, now); !errors.Is(err, ErrNoSelf) || m != nil {
			t.Errorf("%+v: %v", n, err)
		}
	}
	r := full(2)
	r.ControlTime = &[]time.Time{now.Add(time.Hour)}[0]
	m, _ := do(t, b, r)
	if m.ControlClock != time.Hour {
		t.Errorf("clock %v", m.ControlClock)
	}
	if got := m.NextExpiry(now); !got.Equal(now.Add(23 * time.Hour)) {
		t.Errorf("next expiry %v", got)
	}
	if m.Expired(m.Self, now.Add(23*time.Hour-1)) || !m.Expired(m.Self, now.Add(23*time.Hour)) {
		t.Error("expiry by control's clock")
	}
	me := self()
	me.KeyExpiry = now
	m2, c := do(t, b, &tailcfg.MapResponse{Node: me})
	if !c.Self || !c.KeyExpiry || !m2.Expired(m2.Self, now) || len(c.Changed) != 0 {
		t.Errorf("%+v", c)
	}
	me.CapMap = tailcfg.NodeCapMap{"a": nil}
	me.Capabilities = []tailcfg.NodeCapability{"b"}
	m3, c := do(t, b, &tailcfg.MapResponse{Node: me})
	if !c.Self || c.KeyExpiry || !m3.Self.HasCap("a") || !m3.Self.HasCap("b") || !m3.HasCap(addr4(1), "b") {
		t.Errorf("%+v", c)
	}
	if m4, c := do(t, b, &tailcfg.MapResponse{KeepAlive: true, ControlTime: &now}); !c.Empty() || m4.ControlClock != 0 || m4.Len() != 1 {
		t.Errorf("keep-alive: %+v", c)
	}
}

func TestFilters(t *testing.T) {
	b, m := started(t, 2)
	if m.FilterSet {
		t.Error("a filter from nowhere")
	}
	rule := func(src string) tailcfg.FilterRule { return tailcfg.FilterRule{SrcIPs: []string{src}} }
	got := func(m *Map) (s string) {
		for _, r := range m.Filter {
			s += r.SrcIPs[0]
		}
		return s
	}
	for i, step := range []struct {
		r      tailcfg.MapResponse
		want   string
		change bool
	}{
		{tailcfg.MapResponse{PacketFilter: &[]tailcfg.FilterRule{rule("b")}}, "b", true},
		{tailcfg.MapResponse{}, "b", false},
		{tailcfg.MapResponse{PacketFilters: tailcfg.PacketFilterDelta{"z": {rule("z")}, "a": {rule("a")}}}, "abz", true},
		{tailcfg.MapResponse{PacketFilters: tailcfg.PacketFilterDelta{"z": {rule("z")}}}, "abz", false},
		{tailcfg.MapResponse{PacketFilters: tailcfg.PacketFilterDelta{"z": nil}}, "ab", true},
		{tailcfg.MapResponse{PacketFilters: tailcfg.PacketFilterDelta{"base": {rule("B")}}}, "aB", true},
		{tailcfg.MapResponse{PacketFilters: tailcfg.PacketFilterDelta{"*": nil, "n": {rule("n")}}}, "n", true},
		{tailcfg.MapResponse{PacketFilters: tailcfg.PacketFilterDelta{"n": {}}}, "", true},
		{tailcfg.MapResponse{PacketFilter: &[]tailcfg.FilterRule{}}, "", false},
	} {
		m, c := do(t, b, &step.r)
		if got(m) != step.want || c.Filter != step.change {
			t.Errorf("step %d: %q, changed %v", i, got(m), c.Filter)
		}
	}
}

func TestDERPMap(t *testing.T) {
	b, _ := started(t, 2)
	one, two := &tailcfg.DERPRegion{RegionID: 1}, &tailcfg.DERPRegion{RegionID: 2}
	m, c := do(t, b, &tailcfg.MapResponse{DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: one, 2: two, 3: nil, -1: one}}})
	if !c.DERPMap || len(m.DERPMap.Regions) != 2 {
		t.Errorf("%+v", m.DERPMap)
	}
	m, c = do(t, b, &tailcfg.MapResponse{DERPMap: &tailcfg.DERPMap{HomeParams: &tailcfg.DERPHomeParams{RegionScore: map[int]float64{1: 2}}}})
	if !c.DERPMap || len(m.DERPMap.Regions) != 2 || m.DERPMap.HomeParams.RegionScore[1] != 2 {
		t.Errorf("home parameters alone: %+v", m.DERPMap)
	}
	m, _ = do(t, b, &tailcfg.MapResponse{DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: one, 2: nil}}})
	if len(m.DERPMap.Regions) != 1 || m.DERPMap.HomeParams == nil {
		t.Errorf("regions alone: %+v", m.DERPMap)
	}
	_, c = do(t, b, &tailcfg.MapResponse{DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1}}}})
	if c.DERPMap {
		t.Error("the same again is a change")
	}
}

func TestHealthAndMessages(t *testing.T) {
	b, _ := started(t, 2)
	msg := func(s string) *tailcfg.DisplayMessage { return &tailcfg.DisplayMessage{Title: s} }
	for i, step := range []struct {
		r      tailcfg.MapResponse
		health int
		ids    []string
		change bool
	}{
		{tailcfg.MapResponse{Health: &[]string{"a", "b"}}, 2, nil, true},
		{tailcfg.MapResponse{DisplayMessages: tailcfg.DisplayMessages{"x": msg("1"), "y": msg("1")}}, 2, []string{"x", "y"}, true},
		{tailcfg.MapResponse{DisplayMessages: tailcfg.DisplayMessages{"x": msg("1")}}, 2, []string{"x", "y"}, false},
		{tailcfg.MapResponse{DisplayMessages: tailcfg.DisplayMessages{"x": nil}}, 2, []string{"y"}, true},
		{tailcfg.MapResponse{DisplayMessages: tailcfg.DisplayMessages{"*": nil, "z": msg("2")}}, 2, []string{"z"}, true},
		{tailcfg.MapResponse{Health: &[]string{}}, 0, []string{"z"}, true},
	} {
		m, c := do(t, b, &step.r)
		var got []string
		for id := range m.Messages {
			got = append(got, id)
		}
		slices.Sort(got)
		if len(m.Health) != step.health || !slices.Equal(got, step.ids) || c.Health != step.change {
			t.Errorf("step %d: %v %v %v", i, m.Health, got, c.Health)
		}
	}
}

// TestHostileMaps: nothing of this may panic, and the rest of the map stands.
func TestHostileMaps(t *testing.T) {
	bad := func(change func(n *tailcfg.Node)) *tailcfg.Node {
		n := peer(50)
		change(n)
		return n
	}
	many := make([]netip.Prefix, maxPrefixes+10)
	for i := range many {
		many[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	for name, tt := range map[string]struct {
		n       *tailcfg.Node
		ignored int
		kept    bool
	}{
		"nil":            {nil, 1, false},
		"no ID":          {bad(func(n *tailcfg.Node) { n.ID = 0 }), 1, false},
		"negative ID":    {bad(func(n *tailcfg.Node) { n.ID = -5 }), 1, false},
		"no key":         {bad(func(n *tailcfg.Node) { n.Key = key.NodePublic{} }), 1, false},
		"our ID":         {bad(func(n *tailcfg.Node) { n.ID = 1 }), 1, false},
		"our key":        {bad(func(n *tailcfg.Node) { n.Key = nodeKey(1, 0) }), 1, false},
		"long name":      {bad(func(n *tailcfg.Node) { n.Name = strings.Repeat("x", 256) }), 1, false},
		"bad prefixes":   {bad(func(n *tailcfg.Node) { n.AllowedIPs = []netip.Prefix{{}, pfx("::ffff:1.2.3.4/128")} }), 2, true},
		"many prefixes":  {bad(func(n *tailcfg.Node) { n.AllowedIPs = many }), 10, true},
		"bad endpoints":  {bad(func(n *tailcfg.Node) { n.Endpoints = make([]netip.AddrPort, 3) }), 3, true},
		"many endpoints": {bad(func(n *tailcfg.Node) { n.Endpoints = slices.Repeat(n.Endpoints, 200) }), 400 - maxEndpoints, true},
		"odd region":     {bad(func(n *tailcfg.Node) { n.HomeDERP = 1 << 40 }), 0, true},
		"no hostinfo":    {bad(func(n *tailcfg.Node) { n.Hostinfo = nil }), 0, true},
		"no name":        {bad(func(n *tailcfg.Node) { n.Name, n.StableID = "", "" }), 0, true},
		"no addresses":   {bad(func(n *tailcfg.Node) { n.Addresses, n.AllowedIPs = nil, nil }), 0, true},
		"our address":    {bad(func(n *tailcfg.Node) { n.Addresses = self().Addresses; n.AllowedIPs = nil }), 0, true},
	} {
		for _, asFull := range []bool{false, true} {
			b, _ := started(t, 2)
			r := &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{tt.n}}
			if asFull {
				r = &tailcfg.MapResponse{Peers: []*tailcfg.Node{peer(2), tt.n}}
			}
			m, c := do(t, b, r)
			if c.Ignored != tt.ignored || (m.PeerByID(50) != nil) != tt.kept {
				t.Errorf("%s: ignored %d, kept %v", name, c.Ignored, m.PeerByID(50))
			}
			if m.PeerByID(2) == nil || m.Route(addr4(1)) != nil || m.PeerByID(1) != nil {
				t.Errorf("%s: the rest of the map", name)
			}
			check(t, m)
		}
	}

	b, _ := started(t, 2)
	second := peer(7)
	second.Name = "second.tail1234.ts.net."
	m, c := do(t, b, &tailcfg.MapResponse{Peers: []*tailcfg.Node{peer(7), second, peer(2)}})
	if m.Len() != 2 || m.ByName("second") == nil || m.ByName("host-7") != nil {
		t.Errorf("two with one ID: %+v", c)
	}
	if _, _, err := b.Apply(&tailcfg.MapResponse{Peers: make([]*tailcfg.Node, MaxPeers+1)}, now); !errors.Is(err, ErrTooLarge) || b.Map() != m {
		t.Errorf("too many: %v", err)
	}
}

// TestClaims: of peers that claim one address, route, key or name, that with the
// lowest ID has it, and the next one when it goes.
func TestClaims(t *testing.T) {
	claim := func(id int) *tailcfg.Node {
		n := peer(id)
		n.Addresses, n.AllowedIPs = peer(2).Addresses, append(peer(2).Addresses, pfx("10.0.0.0/8"))
		n.Key, n.Name, n.StableID = nodeKey(2, 0), "same.tail1234.ts.net.", "same"
		return n
	}
	owner := func(m *Map, want int) {
		t.Helper()
		check(t, m)
		for what, n := range map[string]*Node{
			"address": m.PeerByAddr(addr4(2)), "host route": m.Route(addr4(2)), "route": m.Route(ip("10.9.9.9")), "key": m.PeerByKey(nodeKey(2, 0)),
			"name": m.ByName("same"), "stable ID": m.PeerByStableID("same"),
		} {
			if (n == nil) != (want == 0) || n != nil && int(n.ID) != want {
				t.Errorf("%s belongs to %v, want %d", what, n, want)
			}
		}
	}
	b, _ := started(t, 9)
	m, _ := do(t, b, &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{claim(5)}})
	owner(m, 5)
	m, _ = do(t, b, &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{claim(7)}})
	owner(m, 5)
	m, _ = do(t, b, &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{claim(3)}})
	owner(m, 3)
	m, _ = do(t, b, &tailcfg.MapResponse{OnlineChange: map[tailcfg.NodeID]bool{3: true, 5: true, 7: false}})
	owner(m, 3)
	m, _ = do(t, b, &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{3}})
	owner(m, 5)
	m, _ = do(t, b, &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{7}})
	owner(m, 5)
	m, _ = do(t, b, &tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{peer(5)}})
	owner(m, 0)
	m, _ = do(t, b, &tailcfg.MapResponse{Peers: []*tailcfg.Node{claim(8), claim(6), peer(9)}})
	owner(m, 6)
	m, _ = do(t, b, &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{6}})
	owner(m, 8)
}

// TestNewSelf: when this node's identity changes, peers are judged anew.
func TestNewSelf(t *testing.T) {
	b, _ := started(t, 2, 3, 4)
	me := self()
	me.ID, me.Key, me.Addresses = 2, nodeKey(3, 0), peer(4).Addresses
	m, c := do(t, b, &tailcfg.MapResponse{Node: me})
	check(t, m)
	if m.Len() != 1 || m.PeerByID(4) == nil || m.Route(addr4(4)) != nil || len(c.Removed) != 2 {
		t.Errorf("%d peers, %+v", m.Len(), c)
	}
}

// check compares every index with the list of peers.
func check(t testing.TB, m *Map) {
	t.Helper()
	keys, stable, names, addrs, hosts, routes := map[key.NodePublic]*Node{}, map[tailcfg.StableNodeID]*Node{}, map[string]*Node{}, map[netip.Addr]*Node{}, map[netip.Addr]*Node{}, map[netip.Prefix]*Node{}
	n := 0
	last := tailcfg.NodeID(0)
	for p := range m.All() {
		n++
		if p.ID <= last {
			t.Fatalf("peers out of order: %d after %d", p.ID, last)
		}
		last = p.ID
		if m.PeerByID(p.ID) != p {
			t.Fatalf("PeerByID(%d)", p.ID)
		}
		first(keys, p.Key, p)
		first(stable, p.StableID, p)
		first(names, p.Name, p)
		for _, a := range p.Addresses {
			first(addrs, a.Addr(), p)
		}
		for _, r := range p.AllowedIPs {
			if r.Bits() > 0 && r.IsSingleIP() {
				first(hosts, r.Addr(), p)
			}
		}
		for _, r := range tableRoutes(p) {
			first(routes, r, p)
		}
	}
	if n != m.Len() {
		t.Fatalf("%d peers, Len %d", n, m.Len())
	}
	for k, p := range keys {
		if m.PeerByKey(k) != p {
			t.Fatalf("key of %d", p.ID)
		}
	}
	for s, p := range stable {
		if s != "" && m.PeerByStableID(s) != p {
			t.Fatalf("stable ID of %d", p.ID)
		}
	}
	for s, p := range names {
		if s != "" && s != m.Self.Name && m.ByName(s) != p {
			t.Fatalf("name of %d", p.ID)
		}
	}
	for a, p := range addrs {
		if m.PeerByAddr(a) != p {
			t.Fatalf("address of %d", p.ID)
		}
	}
	for a, p := range hosts {
		if got := m.Route(a); got != p && !m.Self.HasAddr(a) {
			t.Fatalf("host route %v is of %v, want %d", a, got, p.ID)
		}
	}
	if m.routes.Len() != len(routes) {
		t.Fatalf("%d routes, want %d", m.routes.Len(), len(routes))
	}
	for r, p := range routes {
		i := m.routes.Find(r.Addr())
		for i >= 0 && m.routes.Prefix(i) != r {
			i = m.routes.Parent(i)
		}
		if i < 0 || m.peers.get(m.owners[m.routes.Key(i)]) != p {
			t.Fatalf("route %v: place %d, want %d", r, i, p.ID)
		}
	}
}

func first[K comparable](m map[K]*Node, k K, n *Node) {
	if m[k] == nil {
		m[k] = n
	}
}

// TestRandomDeltas applies random deltas, with claims on each other's
// things, and compares every snapshot with one that is built from scratch, and
// old snapshots with what they were.
func TestRandomDeltas(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	node := func() *tailcfg.Node {
		n := peer(2 + rng.IntN(400))
		other := 2 + rng.IntN(400)
		switch rng.IntN(6) {
		case 0:
			n.AllowedIPs = append(n.AllowedIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rng.IntN(3)), 0, 0}), 8+8*rng.IntN(2)).Masked())
		case 1:
			n.Key = nodeKey(other, 0)
		case 2:
			n.Addresses = peer(other).Addresses
			n.AllowedIPs = nil
		case 3:
			n.Name = peer(other).Name
		}
		return n
	}
	b := NewBuilder()
	m, _ := do(t, b, full(2, 3, 4))
	type snapshot struct {
		m     *Map
		peers []*Node
	}
	var old []snapshot
	for step := range 600 {
		r := &tailcfg.MapResponse{}
		switch rng.IntN(12) {
		case 0:
			for range rng.IntN(300) {
				r.PeersChanged = append(r.PeersChanged, node())
			}
		case 1:
			if step%40 == 0 {
				r.Peers = append(r.Peers, node(), node())
			}
		case 2:
			for range rng.IntN(20) {
				r.PeersRemoved = append(r.PeersRemoved, tailcfg.NodeID(2+rng.IntN(400)))
			}
		default:
			for range rng.IntN(4) {
				r.PeersChanged = append(r.PeersChanged, node())
				r.PeersRemoved = append(r.PeersRemoved, tailcfg.NodeID(2+rng.IntN(400)))
				k := nodeKey(2+rng.IntN(400), rng.IntN(2))
				r.PeersChangedPatch = append(r.PeersChangedPatch, &tailcfg.PeerChange{NodeID: tailcfg.NodeID(2 + rng.IntN(400)), Key: &k})
			}
		}
		before := slices.Collect(m.All())
		var c Change
		m, c = do(t, b, r)
		check(t, m)
		if want := len(before) + len(c.Added) - len(c.Removed); m.Len() != want {
			t.Fatalf("Change says %d peers, there are %d", want, m.Len())
		}
		if step%50 == 0 {
			old = append(old, snapshot{m, slices.Collect(m.All())})
		}
	}
	for _, s := range old {
		if !slices.Equal(s.peers, slices.Collect(s.m.All())) {
			t.Fatal("an old snapshot changed")
		}
		check(t, s.m)
	}
}

// TestNodeIsCovered fails when a field is added to Node that same does not compare.
func TestNodeIsCovered(t *testing.T) {
	base, _, _ := newNode(peer(2), interner{})
	typ := reflect.TypeFor[Node]()
	for i := range typ.NumField() {
		n := *base
		f := reflect.ValueOf(&n).Elem().Field(i)
		switch v := f.Interface().(type) {
		case bool:
			f.SetBool(!v)
		case string:
			f.SetString(v + "x")
		case time.Time:
			f.Set(reflect.ValueOf(v.Add(1)))
		case netip.Addr:
			f.Set(reflect.ValueOf(ip("9.9.9.9")))
		case key.NodePublic:
			f.Set(reflect.ValueOf(nodeKey(99, 0)))
		case key.DiscoPublic:
			f.Set(reflect.ValueOf(key.DiscoPublicFromRaw([32]byte{99})))
		default:
			switch f.Kind() {
			case reflect.Slice:
				f.Set(reflect.MakeSlice(f.Type(), 9, 9))
			case reflect.Map:
				f.Set(reflect.ValueOf(tailcfg.NodeCapMap{"q": nil}))
			case reflect.String:
				f.SetString("other")
			case reflect.Int, reflect.Int64:
				f.SetInt(f.Int() + 1)
			case reflect.Uint16:
				f.SetUint(f.Uint() + 1)
			default:
				t.Fatalf("%s: kind %v", typ.Field(i).Name, f.Kind())
			}
		}
		if same(base, &n) {
			t.Errorf("%s is not compared", typ.Field(i).Name)
		}
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	_, m := started(t, 2, 3, 4)
	k, a := nodeKey(3, 0), addr4(3)
	if n := testing.AllocsPerRun(100, func() {
		m.PeerByKey(k)
		m.PeerByAddr(a)
		m.Route(a)
		m.HasCap(a, "x")
		m.ByName("Host-3")
		m.PeerByStableID("n3CNTRL")
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
