package coord

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/tailnode/tailnode/coord/internal/mapframe"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// maxFrames bounds the deltas kept for other streams. Streams are woken together, so few cursors matter.
const maxFrames = 16

// frameKey names what makes two streams' deltas the same.
type frameKey struct {
	from  uint64
	named bool // packet filters by name
}

// setRules puts the packet filter into m in the form that n's version knows. A blind node has no
// business with it: its filter is empty.
func (t *tailnet) setRules(m *tailcfg.MapResponse, n *node, named, blind bool) {
	rules := t.rules
	if blind {
		rules = []tailcfg.FilterRule{}
	} else if n != nil && n.rec.Filter != nil {
		if r, err := n.rec.Filter.rules(); err == nil { // checked when it was set
			rules = r
		}
	}
	if named {
		m.PacketFilters = tailcfg.PacketFilterDelta{"base": rules}
	} else {
		m.PacketFilter = &rules
	}
}

// setUsers puts the profiles of all users into m; a blind node gets its own user's.
func (t *tailnet) setUsers(m *tailcfg.MapResponse, n *node, blind bool) {
	m.UserProfiles = nil
	for _, u := range t.users {
		if !blind || u.ID == n.rec.User {
			m.UserProfiles = append(m.UserProfiles, t.profile(u))
		}
	}
	slices.SortFunc(m.UserProfiles, func(a, b tailcfg.UserProfile) int { return cmp.Compare(a.ID, b.ID) })
}

// setMessages puts n's messages into m.
func (n *node) setMessages(m *tailcfg.MapResponse) {
	if n.live.Cap < 117 {
		texts := []string{}
		for _, x := range n.messages {
			texts = append(texts, x.Title+": "+x.Text)
		}
		m.Health = &texts
		return
	}
	m.DisplayMessages = tailcfg.DisplayMessages{"*": nil}
	for _, x := range n.messages {
		m.DisplayMessages[x.ID] = &tailcfg.DisplayMessage{Title: x.Title, Text: x.Text, Severity: cmp.Or(x.Severity, "medium")}
	}
}

// full makes the first message of a map stream, or the answer to a request for one map.
func (s *Server) full(n *node, ver tailcfg.CapabilityVersion, omitPeers bool, now time.Time) *mapframe.Frame {
	t := s.net
	f := &mapframe.Frame{To: t.seq, List: "Peers"}
	m := &f.Base
	m.Node = t.wire(n, s.domain, true, now)
	m.DERPMap = t.derp
	m.DNSConfig = &tailcfg.DNSConfig{Proxied: true, Domains: []string{s.domain}}
	m.Domain = s.domain
	m.CollectServices = tailcfg.False
	m.Debug = &tailcfg.Debug{DisableLogTail: true}
	m.ControlTime = &now
	blind := n.blind(now)
	t.setRules(m, n, ver >= capNamedFilters, blind)
	t.setUsers(m, n, blind)
	if len(n.messages) > 0 {
		n.setMessages(m)
	}
	if !omitPeers && !blind {
		t.allPeers(f, n, s.domain, now)
	}
	return f
}

// allPeers puts every node that n sees into f, sorted by ID.
func (t *tailnet) allPeers(f *mapframe.Frame, n *node, domain string, now time.Time) {
	ids := make([]*node, 0, len(t.nodes))
	for _, p := range t.nodes {
		if p != n && p.visible() {
			ids = append(ids, p)
		}
	}
	slices.SortFunc(ids, func(a, b *node) int { return cmp.Compare(a.rec.ID, b.rec.ID) })
	f.Peers = make([][]byte, len(ids))
	for i, p := range ids {
		f.Peers[i] = t.peerJSON(p, domain, now)
	}
}

// delta makes the message that brings st from its cursor to now, or nil if there is nothing to say to
// its node; the cursor moves on either way.
func (s *Server) delta(st *stream, now time.Time) *mapframe.Frame {
	t, n := s.net, st.node
	from := st.cursor
	if from == t.seq && len(n.pings) == 0 {
		return nil
	}
	self := max(n.selfSeq, n.top) > from || len(n.pings) > 0
	blind := n.blind(now)
	turned := blind != st.blind
	resync := from < t.forgot || turned
	if !self && !blind && !resync && !(n.rec.Filter != nil && t.ruleSeq > from) && !st.omitPeers {
		k := frameKey{from, st.named}
		if f := t.frames[k]; f != nil {
			st.cursor = f.To
			// An older frame leaves the stream short of seq. If a wake-up is due, the stream waits for it already;
			// else the one for what came after the frame is past, and the stream must look again by itself.
			if f.To < t.seq && s.waking == nil {
				st.poke()
			}
			return f.OrNil()
		}
		if len(t.frames) >= maxFrames {
			clear(t.frames)
		}
		f := &mapframe.Frame{From: from, To: t.seq, List: "PeersChanged"}
		t.changes(f, nil, st.named, s.domain, now)
		t.frames[k] = f
		st.cursor = f.To
		return f.OrNil()
	}

	f := &mapframe.Frame{From: from, To: t.seq, List: "PeersChanged"}
	m := &f.Base
	st.cursor, st.blind = t.seq, blind
	switch {
	case st.omitPeers || blind && !turned:
	case blind:
		for _, p := range t.nodes {
			if p != n {
				m.PeersRemoved = append(m.PeersRemoved, p.rec.ID)
			}
		}
		slices.Sort(m.PeersRemoved)
	case resync:
		f.List = "Peers"
		t.allPeers(f, n, s.domain, now)
	default:
		t.changes(f, n, st.named, s.domain, now)
	}
	t.globals(m, n, from, st.named, blind)
	if turned {
		t.setRules(m, n, st.named, blind)
		t.setUsers(m, n, blind)
	}
	if max(n.selfSeq, n.seq[whole], n.seq[nodeKey], n.seq[keyExpiry], n.seq[homeDERP]) > from {
		m.Node = t.wire(n, s.domain, true, now)
		if blind {
			t.setUsers(m, n, blind) // it may belong to another user now
		}
		if n.selfSeq > from {
			t.setRules(m, n, st.named, blind)
			n.setMessages(m)
		}
	}
	if len(n.pings) > 0 { // one per message
		m.PingRequest = n.pings[0].req
		n.pings = slices.Delete(n.pings, 0, 1)
		if len(n.pings) > 0 {
			st.poke()
		}
	}
	return f.OrNil()
}

// globals puts into m what changed since from and concerns all nodes.
func (t *tailnet) globals(m *tailcfg.MapResponse, n *node, from uint64, named, blind bool) {
	if t.derpSeq > from {
		dm := *t.derp
		dm.Regions = maps.Clone(t.derp.Regions)
		for id := range t.derpGone {
			if dm.Regions[id] == nil {
				dm.Regions[id] = nil // in a delta: take it out
			}
		}
		m.DERPMap = &dm
	}
	m.UserProfiles = nil
	if blind {
		return
	}
	if t.ruleSeq > from {
		t.setRules(m, n, named, blind)
	}
	for id, seq := range t.userSeq {
		if seq > from {
			m.UserProfiles = append(m.UserProfiles, t.profile(t.users[id]))
		}
	}
}

// changes fills f with what changed since f.From, leaving out the node self (nil: none).
func (t *tailnet) changes(f *mapframe.Frame, self *node, named bool, domain string, now time.Time) {
	m := &f.Base
	if self == nil {
		t.globals(m, nil, f.From, named, false)
	}
	var whole_ []*node
	for n := t.newest; n != nil && n.top > f.From; n = n.older {
		switch {
		case n == self || !n.visible():
		case n.seq[whole] > f.From:
			whole_ = append(whole_, n)
		default:
			t.patch(m, n, f.From)
		}
	}
	slices.SortFunc(whole_, func(a, b *node) int { return cmp.Compare(a.rec.ID, b.rec.ID) })
	for _, n := range whole_ {
		f.Peers = append(f.Peers, t.peerJSON(n, domain, now))
	}
	for i := len(t.removed) - 1; i >= 0 && t.removed[i].seq > f.From; i-- {
		if r := t.removed[i]; self == nil || r.id != self.rec.ID {
			if n := t.nodes[r.id]; n == nil || !n.visible() { // it may be back
				m.PeersRemoved = append(m.PeersRemoved, r.id)
			}
		}
	}
	slices.Sort(m.PeersRemoved)
	m.PeersRemoved = slices.Compact(m.PeersRemoved)
	slices.SortFunc(m.PeersChangedPatch, func(a, b *tailcfg.PeerChange) int { return cmp.Compare(a.NodeID, b.NodeID) })
}

// patch adds to m the aspects of n that changed since from.
func (t *tailnet) patch(m *tailcfg.MapResponse, n *node, from uint64) {
	c := &tailcfg.PeerChange{NodeID: n.rec.ID}
	other := false
	changed := func(a aspect) bool {
		if n.seq[a] <= from {
			return false
		}
		other = true
		return true
	}
	if changed(endpoints) {
		c.Endpoints = n.live.Endpoints
	}
	if changed(homeDERP) {
		c.DERPRegion = n.live.HomeDERP
	}
	if changed(disco) {
		d := n.live.Disco
		c.DiscoKey = &d
	}
	if changed(nodeKey) {
		k := n.rec.Key
		c.Key = &k
	}
	if changed(keyExpiry) {
		e := n.rec.KeyExpiry
		c.KeyExpiry = &e
	}
	if changed(capVer) {
		c.Cap = n.live.Cap
	}
	if n.seq[online] > from {
		is := n.stream != nil
		if is && !other { // nothing to say but this
			if m.OnlineChange == nil {
				m.OnlineChange = map[tailcfg.NodeID]bool{}
			}
			m.OnlineChange[n.rec.ID] = true
			return
		}
		c.Online = &is
		if !is && !n.live.LastSeen.IsZero() {
			seen := n.live.LastSeen
			c.LastSeen = &seen
		}
	}
	m.PeersChangedPatch = append(m.PeersChangedPatch, c)
}
