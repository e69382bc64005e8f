package tailnode_test

import (
	"encoding/json"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/tailnode/tailnode"
)

// TestNetcheck: the address that a check finds is one at which peers are told to reach the node: it is that of the node's own socket.
func TestNetcheck(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	lc, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	ctx := withTimeout(t, patience)
	raw, err := lc.Netcheck(ctx, tailnode.NetcheckOptions{Timeout: patience / 2, NoPortMap: true})
	if err != nil {
		t.Fatal(err)
	}
	var r struct {
		UDP           bool
		GlobalV4      string
		HairPinning   *bool
		PCP           *bool
		PreferredDERP int
		RegionLatency map[int]time.Duration
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		t.Fatal(err)
	}
	if !r.UDP || r.GlobalV4 == "" || r.HairPinning == nil || !*r.HairPinning || r.PCP != nil || r.PreferredDERP != 900 || r.RegionLatency[900] <= 0 {
		t.Errorf("%s", raw)
	}
	other, err := b.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	until(t, other, "beta knows alpha's address "+r.GlobalV4, func() bool {
		st, err := other.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(slices.Collect(maps.Values(st.Peer)), func(p *tailnode.PeerStatus) bool {
			return slices.Contains(p.Addrs, r.GlobalV4)
		})
	})
	a.Close()
	if _, err := lc.Netcheck(ctx, tailnode.NetcheckOptions{}); err == nil {
		t.Error("a check of a closed server")
	}
}
