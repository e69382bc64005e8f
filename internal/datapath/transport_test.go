package datapath

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestPeerLogsInAgain: of a peer that has a new node key nothing stays of the old one, however often, and it is reached by the new one.
func TestPeerLogsInAgain(t *testing.T) {
	a, b := newPair(t)
	b.listen(7)
	if err := a.dial(time.Minute, netip.AddrPortFrom(b.a4, 7)); err != nil {
		t.Fatal(err)
	}
	tr := a.trans.Load()
	was := b.key.Public()
	for range 10 {
		k := key.NewNode().Public()
		a.tell(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: tailcfg.NodeID(b.id), Key: &k}}})
		if tr.known(was) != nil || tr.paths.Peer(was) != nil {
			t.Fatal("the old key is still known")
		}
		if tr.paths.Peer(k) == nil {
			t.Fatal("the new key is not known")
		}
		was = k
	}
	b.key = key.NewNode()
	if err := b.SetNodeKey(b.key); err != nil {
		t.Fatal(err)
	}
	k := b.key.Public()
	a.tell(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: tailcfg.NodeID(b.id), Key: &k}}})
	if err := a.dial(time.Minute, netip.AddrPortFrom(b.a4, 7)); err != nil {
		t.Fatal(err)
	}
}
