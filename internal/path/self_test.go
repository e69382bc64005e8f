package path

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/natlab"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestGuessOfAForwardedPort: two servers see different mappings, and somebody has chosen the port.
func TestGuessOfAForwardedPort(t *testing.T) {
	now := time.Unix(1e9, 0)
	ap := netip.MustParseAddrPort
	const typ = tailcfg.EndpointSTUN4LocalPort
	for _, tt := range []struct {
		name  string
		fixed uint16
		seen  []string
		want  string
	}{
		{"varies", 41641, []string{"203.0.113.1:5000", "203.0.113.1:5001"}, "203.0.113.1:41641"},
		{"varies, IPv6 as well", 41641, []string{"[2001:db8::1]:41641", "203.0.113.1:5000", "203.0.113.1:5001"}, "203.0.113.1:41641"},
		{"varies, any port", 0, []string{"203.0.113.1:5000", "203.0.113.1:5001"}, ""},
		{"varies, the port was taken", 4000, []string{"203.0.113.1:5000", "203.0.113.1:5001"}, ""},
		{"does not vary", 41641, []string{"203.0.113.1:5000", "203.0.113.1:5000"}, ""},
		{"not known", 41641, []string{"203.0.113.1:5000"}, ""},
		{"the port is seen besides", 41641, []string{"203.0.113.1:41641", "203.0.113.1:5001"}, ""}, // it is in the list as what it is
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := self{v4: 41641, v6: 41641, fixed: tt.fixed}
			for i := range tt.seen {
				s.servers = append(s.servers, netip.AddrPortFrom(netip.AddrFrom4([4]byte{9, 9, 9, byte(i)}), 3478))
			}
			s.begin(now)
			for i, p := range slices.Clone(s.probes) {
				s.answer(now, p.dst, stun.AppendResponse(nil, p.tx, ap(tt.seen[i])))
			}
			got := ""
			for _, e := range s.endpoints() {
				if e.Type == typ {
					got += e.Addr.String()
				}
			}
			if got != tt.want {
				t.Errorf("guess %q, want %q: %v", got, tt.want, s.endpoints())
			}
		})
	}
}

// TestForwardedPort: a node behind a symmetric NAT with a static mapping is reached by a peer behind another hard one, for the guess.
func TestForwardedPort(t *testing.T) {
	for _, forwarded := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newInternet(t)
			w.server(netip.MustParseAddrPort("9.9.9.10:3478"))
			const apd = natlab.AddressAndPortDependent
			cfg := natlab.Config{Inside: netip.MustParsePrefix("10.0.0.0/24"), Outside: netip.MustParseAddr("1.1.1.1"), Mapping: apd, Filtering: apd}
			if forwarded {
				cfg.Forward = map[uint16]netip.AddrPort{41641: netip.MustParseAddrPort("10.0.0.2:41641")}
			}
			w.lab.Add(cfg)
			w.nat("10.0.1.0/24", "2.2.2.2", apd, apd)
			a, b := w.node(nodeOpts{port: 41641}, "10.0.0.2"), w.node(nodeOpts{}, "10.0.1.2")
			w.pair(a, b)
			w.talk(10*time.Second, 50*time.Millisecond, a, b)
			if a.direct() != forwarded || b.direct() != forwarded {
				t.Errorf("forwarded %v: direct %v and %v", forwarded, a.direct(), b.direct())
			}
		})
	}
}
