package node

import (
	"net/netip"
	"testing"

	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestWantPortMap(t *testing.T) {
	ep := func(typ tailcfg.EndpointType, a string) path.Endpoint {
		return path.Endpoint{Addr: netip.AddrPortFrom(netip.MustParseAddr(a), 41641), Type: typ}
	}
	for _, c := range []struct {
		name string
		eps  []path.Endpoint
		want bool
	}{
		{"nothing known", nil, false},
		{"no STUN", []path.Endpoint{ep(tailcfg.EndpointLocal, "192.168.1.2")}, false},
		{"all on this machine", []path.Endpoint{ep(tailcfg.EndpointLocal, "192.168.1.2"), ep(tailcfg.EndpointSTUN, "127.0.0.1")}, false},
		{"relay in the local network", []path.Endpoint{ep(tailcfg.EndpointLocal, "192.168.1.2"), ep(tailcfg.EndpointSTUN, "192.168.1.2")}, false},
		{"no NAT", []path.Endpoint{ep(tailcfg.EndpointLocal, "198.51.100.7"), ep(tailcfg.EndpointSTUN, "198.51.100.7")}, false},
		{"a NAT", []path.Endpoint{ep(tailcfg.EndpointLocal, "192.168.1.2"), ep(tailcfg.EndpointSTUN, "198.51.100.7")}, true},
		{"seen from within a carrier's network", []path.Endpoint{ep(tailcfg.EndpointLocal, "192.168.1.2"), ep(tailcfg.EndpointSTUN, "100.64.1.1")}, false},
		{"IPv6 has no NAT", []path.Endpoint{ep(tailcfg.EndpointLocal, "fd00::1"), ep(tailcfg.EndpointSTUN, "2001:db8::1")}, false},
	} {
		if got := wantPortMap(c.eps); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestWantPinhole(t *testing.T) {
	ep := func(typ tailcfg.EndpointType, a string) path.Endpoint {
		return path.Endpoint{Addr: netip.AddrPortFrom(netip.MustParseAddr(a), 41641), Type: typ}
	}
	for _, c := range []struct {
		name string
		eps  []path.Endpoint
		want bool
	}{
		{"nothing known", nil, false},
		{"IPv4 alone", []path.Endpoint{ep(tailcfg.EndpointSTUN, "198.51.100.7")}, false},
		{"IPv6 that nobody has seen", []path.Endpoint{ep(tailcfg.EndpointLocal, "2001:db8::1")}, false},
		{"IPv6 that is seen", []path.Endpoint{ep(tailcfg.EndpointSTUN, "2001:db8::1")}, true},
		{"all on this machine", []path.Endpoint{ep(tailcfg.EndpointSTUN, "::1")}, false},
		{"a relay in the local network", []path.Endpoint{ep(tailcfg.EndpointSTUN, "fd00::1")}, false},
	} {
		if got := wantPinhole(c.eps); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
