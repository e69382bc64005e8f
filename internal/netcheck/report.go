package netcheck

import (
	"encoding/json"
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// wire is a report's JSON. It has the names that upstream's "netcheck --format=json" has; durations are nanoseconds, and what is not
// known is null.
type wire struct {
	UDP, IPv4, IPv6       bool
	GlobalV4, GlobalV6    string
	MappingVariesByDestIP *bool
	HairPinning           *bool
	UPnP, PMP, PCP        *bool
	CaptivePortal         *bool
	PreferredDERP         int
	RegionLatency         map[int]time.Duration
	RegionV4Latency       map[int]time.Duration
	RegionV6Latency       map[int]time.Duration
	RegionHTTPSLatency    map[int]time.Duration
}

// MarshalJSON returns what the report says, and nothing of its history.
func (r *Report) MarshalJSON() ([]byte, error) {
	known := func(b tailcfg.OptBool) *bool {
		v, ok := b.Get()
		if !ok {
			return nil
		}
		return &v
	}
	addr := func(ap netip.AddrPort) string {
		if !ap.IsValid() {
			return ""
		}
		return ap.String()
	}
	return json.Marshal(&wire{
		UDP: r.UDP, IPv4: r.IPv4, IPv6: r.IPv6, GlobalV4: addr(r.GlobalV4), GlobalV6: addr(r.GlobalV6),
		MappingVariesByDestIP: known(r.MappingVaries), HairPinning: known(r.Hairpin),
		UPnP: known(r.UPnP), PMP: known(r.PMP), PCP: known(r.PCP), CaptivePortal: known(r.CaptivePortal),
		PreferredDERP: r.Home, RegionLatency: r.Latency, RegionV4Latency: r.LatencyV4, RegionV6Latency: r.LatencyV6, RegionHTTPSLatency: r.LatencyHTTPS,
	})
}

// UnmarshalJSON sets r to what the JSON of a report says.
func (r *Report) UnmarshalJSON(b []byte) error {
	var w wire
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	opt := func(b *bool) tailcfg.OptBool {
		if b == nil {
			return ""
		}
		return tailcfg.Bool(*b)
	}
	*r = Report{
		UDP: w.UDP, IPv4: w.IPv4, IPv6: w.IPv6,
		MappingVaries: opt(w.MappingVariesByDestIP), Hairpin: opt(w.HairPinning),
		UPnP: opt(w.UPnP), PMP: opt(w.PMP), PCP: opt(w.PCP), CaptivePortal: opt(w.CaptivePortal),
		Home: w.PreferredDERP, Latency: w.RegionLatency, LatencyV4: w.RegionV4Latency, LatencyV6: w.RegionV6Latency, LatencyHTTPS: w.RegionHTTPSLatency,
	}
	for _, a := range []struct {
		text string
		to   *netip.AddrPort
	}{{w.GlobalV4, &r.GlobalV4}, {w.GlobalV6, &r.GlobalV6}} {
		if a.text == "" {
			continue
		}
		ap, err := netip.ParseAddrPort(a.text)
		if err != nil {
			return err
		}
		*a.to = ap
	}
	return nil
}
