package netmap

import (
	"encoding/json"
	"testing"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// FuzzApply applies responses as they come out of the stream: whatever control
// sends, the maps stay whole.
func FuzzApply(f *testing.F) {
	for _, r := range []*tailcfg.MapResponse{
		full(2, 3),
		{PeersChanged: []*tailcfg.Node{peer(3), nil, {}}, PeersRemoved: []tailcfg.NodeID{2, -1}},
		{PeersChangedPatch: []*tailcfg.PeerChange{nil, {NodeID: 3, DERPRegion: -4}}, OnlineChange: map[tailcfg.NodeID]bool{3: true}},
		{PacketFilters: tailcfg.PacketFilterDelta{"*": nil}, DisplayMessages: tailcfg.DisplayMessages{"*": nil, "x": nil}, DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{0: nil}}},
	} {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, one, two []byte) {
		b, _ := started(t, 2, 3, 4)
		for _, raw := range [][]byte{one, two, one} {
			var r tailcfg.MapResponse
			if json.Unmarshal(raw, &r) != nil {
				return
			}
			m, _, err := b.Apply(&r, now)
			if err != nil {
				continue
			}
			check(t, m)
			m.NextExpiry(now)
			for p := range m.All() {
				m.Route(p.Addr4())
			}
		}
	})
}
