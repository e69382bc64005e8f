package datapath

import (
	"net/netip"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// granting returns a packet filter with a capability from one to others.
func granting(c tailcfg.PeerCapability, src string, dst ...netip.Addr) *[]tailcfg.FilterRule {
	g := tailcfg.CapGrant{CapMap: tailcfg.PeerCapMap{c: nil}}
	for _, d := range dst {
		g.Dsts = append(g.Dsts, netip.PrefixFrom(d, d.BitLen()))
	}
	return &[]tailcfg.FilterRule{allowAll[0], {SrcIPs: []string{src}, CapGrant: []tailcfg.CapGrant{g}}}
}

// TestPeerRelayFollowsNetmap: whether the node is a peer relay, for whom, and which others it uses, is as control says at the moment.
func TestPeerRelayFollowsNetmap(t *testing.T) {
	e := &end{t: t, id: 1, key: key.NewNode(), disco: key.NewDisco(), build: netmap.NewBuilder()}
	e.a4, e.a6 = addrs(e.id)
	var err error
	e.Engine, err = New(Config{NodeKey: e.key, DiscoKey: e.disco, PeerRelay: &PeerRelay{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	var peers []*tailcfg.Node
	for id := 2; id <= 4; id++ {
		p := &end{id: id, key: key.NewNode(), disco: key.NewDisco()}
		p.a4, p.a6 = addrs(id)
		peers = append(peers, p.node())
	}
	if v4, v6 := e.PeerRelayPorts(); v4 != 0 || v6 != 0 {
		t.Error("a relay before control has said anything")
	}
	r := &e.peerRelays
	check := func(what string, running, use, self bool, targets int, allowed ...int) {
		t.Helper()
		v4, v6 := e.PeerRelayPorts()
		if (v4 != 0 || v6 != 0) != running || r.use != use || r.self != self || len(r.targets) != targets {
			t.Errorf("%s: ports %d and %d, use %v, itself %v, others %d", what, v4, v6, r.use, r.self, len(r.targets))
		}
		for i, p := range peers {
			want := false
			for _, id := range allowed {
				want = want || id == i+2
			}
			if r.Allows(p.Key) != want {
				t.Errorf("%s: node %d may ask: %v", what, i+2, !want)
			}
		}
	}
	e.tell(&tailcfg.MapResponse{Node: e.node(), Peers: peers, PacketFilter: &allowAll})
	check("no grants", true, true, false, 0)
	a2, _ := addrs(2)
	e.tell(&tailcfg.MapResponse{PacketFilter: granting(tailcfg.PeerCapabilityRelay, a2.String(), e.a4)})
	check("a client", true, true, false, 0, 2)
	e.tell(&tailcfg.MapResponse{PacketFilter: granting(tailcfg.PeerCapabilityRelay, "*", a2)})
	check("a client of somebody else", true, true, false, 0)
	e.tell(&tailcfg.MapResponse{PacketFilter: granting(tailcfg.PeerCapabilityRelayTarget, "*", e.a4, e.a6)})
	check("everybody is a relay", true, true, true, 3)
	e.tell(&tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{3}})
	check("one is gone", true, true, true, 2)
	unsigned := *peers[2]
	unsigned.UnsignedPeerAPIOnly = true
	e.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{&unsigned}})
	check("one is not signed", true, true, true, 1)
	e.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{peers[1], peers[2]}})
	check("all are back", true, true, true, 3)

	self := e.node()
	self.CapMap = tailcfg.NodeCapMap{tailcfg.NodeAttrDisableRelayServer: nil}
	e.tell(&tailcfg.MapResponse{Node: self})
	check("no server", false, true, true, 3)
	self = e.node()
	self.CapMap = tailcfg.NodeCapMap{tailcfg.NodeAttrDisableRelayClient: nil}
	e.tell(&tailcfg.MapResponse{Node: self})
	check("no client", true, false, false, 0)
	e.tell(&tailcfg.MapResponse{Node: e.node()})
	check("both again", true, true, true, 3)
	if err := e.SetNodeKey(key.NewNode()); err != nil {
		t.Fatal(err)
	}
	e.Rebind()
	check("another key", true, true, true, 3)
	e.Close()
	if v4, v6 := e.PeerRelayPorts(); v4 != 0 || v6 != 0 {
		t.Error("a relay after Close")
	}
}
