package netstack

import (
	"io"
	"net/netip"
	"testing"
)

// TestListenAgain listens on a port whose former listener is closed while connections of its live
// on, or are just ending.
func TestListenAgain(t *testing.T) {
	p := newPair(t, nil)
	any80 := netip.AddrPortFrom(netip.IPv6Unspecified(), 80)
	for round := range 20 {
		ln, err := p.b.ListenTCP(any80)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if second, err := p.b.ListenTCP(any80); err == nil {
			second.Close()
			t.Fatal("two listeners on one port")
		}
		for _, to := range []netip.Addr{b4, b6} {
			c, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(to, 80))
			if err != nil {
				t.Fatal(err)
			}
			in, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			switch round % 3 {
			case 0: // our end closes first, and waits
				in.Close()
				io.Copy(io.Discard, c)
				c.Close()
			case 1: // stays open
				t.Cleanup(func() { c.Close(); in.Close() })
			case 2: // closed by the other end
				c.Close()
				io.Copy(io.Discard, in)
				in.Close()
			}
		}
		ln.Close()
	}
}
