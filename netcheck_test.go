package tailnode_test

import (
	"encoding/json"
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
	ctx := withTimeout(t, 60*time.Second)
	raw, err := lc.Netcheck(ctx, tailnode.NetcheckOptions{NoPortMap: true})
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
	for {
		st, err := other.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var addrs []string
		for _, p := range st.Peer {
			addrs = append(addrs, p.Addrs...)
		}
		if slices.Contains(addrs, r.GlobalV4) {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s is none of %q", r.GlobalV4, addrs)
		}
	}
	a.Close()
	if _, err := lc.Netcheck(ctx, tailnode.NetcheckOptions{}); err == nil {
		t.Error("a check of a closed server")
	}
}
