package datapath

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestSTUNServers(t *testing.T) {
	region := func(id int, nodes ...*tailcfg.DERPNode) *tailcfg.DERPRegion {
		return &tailcfg.DERPRegion{RegionID: id, Nodes: nodes}
	}
	at := func(v4, v6 string) *tailcfg.DERPNode { return &tailcfg.DERPNode{IPv4: v4, IPv6: v6} }
	named := &tailcfg.DERPNode{HostName: "relay.example"}
	noSTUN := at("9.9.9.9", "none")
	noSTUN.STUNPort = -1
	for _, tt := range []struct {
		name    string
		regions []*tailcfg.DERPRegion
		home    int
		want    []string
	}{
		{"none", nil, 0, nil},
		{"home first, then by number, three in all", []*tailcfg.DERPRegion{region(1, at("1.1.1.1", "none")), region(2, at("2.2.2.2", "2001:db8::2")), region(3, at("3.3.3.3", "none")), region(4, at("4.4.4.4", "none"))}, 4,
			[]string{"4.4.4.4:3478", "1.1.1.1:3478", "2.2.2.2:3478", "[2001:db8::2]:3478"}},
		{"a relay without STUN", []*tailcfg.DERPRegion{region(1, noSTUN, at("1.1.1.2", "none")), region(2, nil), region(3, noSTUN)}, 0, []string{"1.1.1.2:3478"}},
		{"by name", []*tailcfg.DERPRegion{region(1, named)}, 1, []string{"7.7.7.7:3478", "[2001:db8::7]:3478"}},
		{"a name that is an address, a port, one family", []*tailcfg.DERPRegion{region(1, &tailcfg.DERPNode{HostName: "8.8.8.8", STUNPort: 99})}, 1, []string{"8.8.8.8:99"}},
		{"the address for tests", []*tailcfg.DERPRegion{region(1, &tailcfg.DERPNode{HostName: "x", IPv4: "1.2.3.4", STUNTestIP: "127.0.0.1"})}, 1, []string{"127.0.0.1:3478"}},
		{"addresses of the wrong family and ports that are none", []*tailcfg.DERPRegion{region(1, &tailcfg.DERPNode{IPv4: "::1", IPv6: "1.1.1.1"}), region(2, &tailcfg.DERPNode{IPv4: "1.1.1.1", STUNPort: 1 << 17})}, 1, nil},
	} {
		dm := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{99: nil}}
		for _, r := range tt.regions {
			dm.Regions[r.RegionID] = r
		}
		var got []string
		for _, ap := range stunServers(dm, tt.home, func(name string) []netip.Addr {
			if name != "relay.example" {
				return nil
			}
			return []netip.Addr{netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("7.7.7.7")}
		}) {
			got = append(got, ap.String())
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
