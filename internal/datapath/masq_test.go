package datapath

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/tailnode/tailnode/internal/packet"
)

// TestSetAddr holds a packet whose address was changed against one that was built with it.
func TestSetAddr(t *testing.T) {
	payload := []byte("an odd payload!")
	build := map[string]func(src, dst netip.Addr) ([]byte, error){
		"TCP": func(src, dst netip.Addr) ([]byte, error) {
			return packet.AppendTCP(nil, netip.AddrPortFrom(src, 1), netip.AddrPortFrom(dst, 2), packet.TCPHeader{Flags: packet.TCPAck}, payload)
		},
		"UDP": func(src, dst netip.Addr) ([]byte, error) {
			return packet.AppendUDP(nil, netip.AddrPortFrom(src, 1), netip.AddrPortFrom(dst, 2), payload)
		},
		"echo": func(src, dst netip.Addr) ([]byte, error) {
			return packet.AppendEcho(nil, src, dst, packet.Echo{ID: 1, Seq: 2, Data: payload})
		},
		"TSMP": func(src, dst netip.Addr) ([]byte, error) {
			return packet.AppendTSMPPing(nil, src, dst, [8]byte{1, 2, 3})
		},
	}
	for name, build := range build {
		for _, a := range [][3]string{
			{"100.64.0.1", "100.64.0.2", "100.99.255.254"}, {"100.64.0.1", "100.64.0.2", "255.255.255.255"}, {"0.0.0.1", "100.64.0.2", "0.0.0.0"},
			{"fd7a::1", "fd7a::2", "fd7a:115c:a1e0::ffff:ffff"}, {"fd7a::1", "fd7a::2", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
		} {
			src, dst, as := netip.MustParseAddr(a[0]), netip.MustParseAddr(a[1]), netip.MustParseAddr(a[2])
			for _, source := range []bool{true, false} {
				t.Run(fmt.Sprint(name, as, source), func(t *testing.T) {
					b, err := build(src, dst)
					if err != nil {
						t.Fatal(err)
					}
					was, want := src, [2]netip.Addr{as, dst}
					if !source {
						was, want = dst, [2]netip.Addr{src, as}
					}
					w, err := build(want[0], want[1])
					if err != nil {
						t.Fatal(err)
					}
					var h packet.Parsed
					if err := h.Decode(b); err != nil {
						t.Fatal(err)
					}
					setAddr(&h, as, source)
					if !bytes.Equal(b, w) {
						t.Errorf("%v for %v:\n got %x\nwant %x", as, was, b, w)
					}
				})
			}
		}
	}
	t.Run("UDP without a checksum stays so", func(t *testing.T) {
		b, _ := build["UDP"](netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("100.64.0.2"))
		var h packet.Parsed
		h.Decode(b)
		u := h.Transport()
		u[6], u[7] = 0, 0
		setAddr(&h, netip.MustParseAddr("100.99.1.1"), true)
		if u[6]|u[7] != 0 {
			t.Errorf("checksum %x%x", u[6], u[7])
		}
	})
}

// BenchmarkSetAddr is what a masquerade address costs per packet.
func BenchmarkSetAddr(b *testing.B) {
	pkt, err := packet.AppendTCP(nil, netip.MustParseAddrPort("[fd7a::1]:1"), netip.MustParseAddrPort("[fd7a::2]:2"), packet.TCPHeader{Flags: packet.TCPAck}, make([]byte, 1200))
	if err != nil {
		b.Fatal(err)
	}
	to := [2]netip.Addr{netip.MustParseAddr("fd7a::3"), netip.MustParseAddr("fd7a::1")}
	var h packet.Parsed
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if h.Decode(pkt) != nil {
			b.Fatal("decode")
		}
		setAddr(&h, to[i&1], true)
	}
}
