package netcheck

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestReportJSON(t *testing.T) {
	want := &Report{
		UDP: true, IPv4: true, GlobalV4: netip.MustParseAddrPort("203.0.113.1:41641"), MappingVaries: tailcfg.True, Hairpin: tailcfg.False,
		PCP: tailcfg.True, Home: 7, Latency: map[int]time.Duration{7: 3 * ms}, LatencyV4: map[int]time.Duration{7: 3 * ms},
	}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{`"PreferredDERP":7`, `"RegionV4Latency":{"7":3000000}`, `"HairPinning":false`, `"UPnP":null`, `"CaptivePortal":null`, `"GlobalV6":""`} {
		if !strings.Contains(string(b), s) {
			t.Errorf("%s lacks %s", b, s)
		}
	}
	var got Report
	if err := json.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(&got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{`{"GlobalV4":"x"}`, `[]`, `{"UDP":1}`} {
		if json.Unmarshal([]byte(bad), &got) == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}
