package netstack

import (
	"net"
	"net/netip"
	"testing"
)

func TestTaker(t *testing.T) {
	p := newPair(t, nil)
	ln, err := p.b.ListenTCP(netip.AddrPortFrom(netip.IPv6Unspecified(), 80))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	to := netip.AddrPortFrom(b4, 80)
	c, err := p.a.DialTCP(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	from := netip.MustParseAddrPort(c.LocalAddr().String())
	for _, tt := range []struct {
		name          string
		local, remote netip.AddrPort
		want          Taker
	}{
		{"the connection", to, from, Connection},
		{"another port of its peer", to, netip.AddrPortFrom(from.Addr(), from.Port()+1), Listener},
		{"another peer", to, netip.MustParseAddrPort("100.64.9.9:1"), Listener},
		{"a port without listener", netip.AddrPortFrom(b4, 81), from, Nobody},
		{"an address of another node", netip.AddrPortFrom(a4, 80), from, Foreign},
		{"the other family", netip.AddrPortFrom(b6, 80), netip.AddrPortFrom(a6, 1), Listener},
	} {
		if got := p.b.Taker(tt.local, tt.remote); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { p.b.Taker(to, from) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestOneFamilyEach puts two listeners on one port, one for each family.
func TestOneFamilyEach(t *testing.T) {
	p := newPair(t, nil)
	l6, err := p.b.ListenTCP6(80)
	if err != nil {
		t.Fatal(err)
	}
	defer l6.Close()
	if c, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(b4, 80)); err == nil {
		c.Close()
		t.Error("a listener for IPv6 took an IPv4 connection")
	}
	l4, err := p.b.ListenTCP(netip.AddrPortFrom(netip.IPv4Unspecified(), 80))
	if err != nil {
		t.Fatal(err)
	}
	defer l4.Close()
	for ln, dst := range map[net.Listener]netip.Addr{l4: b4, l6: b6} {
		c, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(dst, 80))
		if err != nil {
			t.Fatal(err)
		}
		in, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		in.Close()
		c.Close()
	}
	u6, err := p.b.ListenUDP6(53)
	if err != nil {
		t.Fatal(err)
	}
	defer u6.Close()
	u4, err := p.b.ListenUDP(netip.AddrPortFrom(netip.IPv4Unspecified(), 53))
	if err != nil {
		t.Fatal(err)
	}
	u4.Close()
}
