package alloc

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestLabel(t *testing.T) {
	for in, want := range map[string]string{
		"web": "web", "Web-1": "web-1", "Ann's Laptop": "anns-laptop", "laptop.lan": "laptop", "": "node", "---": "node",
		"日本": "node", "a__b": "a-b", "-a-": "a", "ip 10.0": "ip-10", "x\x00y": "x-y", "müsli": "m-sli",
		strings.Repeat("a", 100): strings.Repeat("a", 58),
	} {
		if got := Label(in); got != want {
			t.Errorf("Label(%q) = %q, want %q", in, got, want)
		}
	}
	taken := map[string]bool{"a": true, "a-1": true}
	if n := FreeName("a", func(s string) bool { return taken[s] }); n != "a-2" {
		t.Errorf("FreeName = %q", n)
	}
}

func TestAddresses(t *testing.T) {
	p := netip.MustParsePrefix("10.0.0.0/29") // .1 to .6
	taken := map[netip.Addr]bool{}
	isTaken := func(a netip.Addr) bool { return taken[a] }
	var last netip.Addr
	var got []string
	for range 6 {
		a, err := NextIPv4(p, last, isTaken)
		if err != nil {
			t.Fatal(err)
		}
		taken[a], last = true, a
		got = append(got, a.String())
	}
	if want := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"}; !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	if _, err := NextIPv4(p, last, isTaken); !errors.Is(err, ErrPoolEmpty) {
		t.Errorf("err = %v", err)
	}
	delete(taken, netip.MustParseAddr("10.0.0.2"))
	delete(taken, netip.MustParseAddr("10.0.0.5"))
	if a, _ := NextIPv4(p, netip.MustParseAddr("10.0.0.3"), isTaken); a.String() != "10.0.0.5" {
		t.Errorf("after .3 comes %v: an address that was just given back is used at once", a)
	}
	if a, _ := NextIPv4(netip.MustParsePrefix("100.64.0.0/10"), netip.MustParseAddr("100.100.99.255"), isTaken); a.String() != "100.100.101.0" {
		t.Errorf("MagicDNS's own range is not left out: %v", a)
	}
	if a := PairIPv6(netip.MustParsePrefix("fd7a:115c:a1e0::/48"), netip.MustParseAddr("100.64.0.1")); a.String() != "fd7a:115c:a1e0::6440:1" {
		t.Errorf("IPv6 %v", a)
	}
}
