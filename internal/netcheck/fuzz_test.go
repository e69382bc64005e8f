package netcheck

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// FuzzPlan makes plans and choices of whatever map control may send.
func FuzzPlan(f *testing.F) {
	f.Add([]byte(`{"Regions":{"1":{"RegionID":1,"Nodes":[{"HostName":"a.example","IPv4":"192.0.2.1","IPv6":"none"}]}}}`), 1)
	f.Add([]byte(`{"HomeParams":{"RegionScore":{"1":1e300,"2":-1}},"Regions":{"1":null,"2":{"RegionID":2,"Nodes":[null]},"3":{"RegionID":3,"Nodes":[{"STUNPort":99999,"DERPPort":-4}]}}}`), 3)
	f.Add([]byte(`{"Regions":{"7":{"RegionID":7,"NoMeasureNoHome":true,"Nodes":[{}]},"8":{"RegionID":8,"Avoid":true,"Nodes":[{"STUNOnly":true},{"STUNPort":-1,"HostName":"x"}]}}}`), 8)
	f.Add([]byte(`{"Regions":{"1":{"RegionID":1,"Nodes":[null,{"IPv4":"192.0.2.1","CanPort80":true},{"IPv4":"x","CanPort80":true}]}}}`), 1)
	f.Fuzz(func(t *testing.T, b []byte, home int) {
		var dm tailcfg.DERPMap
		if json.Unmarshal(b, &dm) != nil {
			return
		}
		plan := Plan(&dm, home, nil, time.Now(), true, true)
		if len(plan) > maxRegions*(2*tries+2) {
			t.Fatalf("%d probes", len(plan))
		}
		if n := len(captivePlan(&dm, home)); n > captiveNodes {
			t.Fatalf("%d captive portal probes", n)
		}
		latency := map[int]time.Duration{}
		for _, p := range plan {
			latency[p.Region] = time.Duration(p.Region)
		}
		if d := enough(&dm, home, latency); d < 0 {
			t.Fatalf("enough after %v", d)
		}
		for _, lat := range []map[int]time.Duration{nil, latency} {
			h := ChooseHome(&dm, home, false, lat, nil)
			r := dm.Regions[h]
			if h != 0 && r == nil {
				for _, r = range dm.Regions { // the key need not be the region's ID
					if r != nil && r.RegionID == h {
						break
					}
				}
			}
			if h != 0 && (r == nil || r.NoMeasureNoHome) {
				t.Fatalf("home %d", h)
			}
		}
	})
}
