package filter

import (
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestVectors reads testdata/vectors/filter.json: rules, and what becomes of
// incoming packets, which are given in hex.
func TestVectors(t *testing.T) {
	b, err := os.ReadFile("../../testdata/vectors/filter.json")
	if err != nil {
		t.Fatal(err)
	}
	var groups []struct {
		Comment string
		Local   []netip.Prefix
		Rules   []tailcfg.FilterRule
		Caps    map[tailcfg.NodeCapability][]netip.Addr // who has which node capability
		Packets []struct{ Comment, Out, In, Verdict string }
	}
	if err := json.Unmarshal(b, &groups); err != nil {
		t.Fatal(err)
	}
	decode := func(s string) *packet.Parsed {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		p := new(packet.Parsed)
		p.Decode(b) // an error leaves a Parsed that is dropped
		return p
	}
	for _, g := range groups {
		t.Run(g.Comment, func(t *testing.T) {
			f, err := Compile(g.Rules, g.Local, func(a netip.Addr, c tailcfg.NodeCapability) bool { return slices.Contains(g.Caps[c], a) })
			if err != nil {
				t.Fatal(err)
			}
			fl := NewFlows(0)
			for _, p := range g.Packets {
				if p.Out != "" {
					f.Out(decode(p.Out), fl, now)
				}
				if got := f.In(decode(p.In), fl, now); got.String() != p.Verdict {
					t.Errorf("%s: %v, want %s", p.Comment, got, p.Verdict)
				}
			}
		})
	}
}
