// Package filter holds our packet filter against upstream's: the same rules
// and packets must give the same verdict.
package filter

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"go4.org/netipx"
	upacket "tailscale.com/net/packet"
	utailcfg "tailscale.com/tailcfg"
	ufilter "tailscale.com/wgengine/filter"

	"github.com/tailnode/tailnode/internal/filter"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestVerdictsAreUpstreams(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	pick := func(ss ...string) string { return ss[rng.IntN(len(ss))] }
	addr4 := func() netip.Addr { return netip.AddrFrom4([4]byte{100, 64, byte(rng.IntN(2)), byte(rng.IntN(6))}) }
	addr6 := func() netip.Addr {
		a := netip.MustParseAddr("fd7a:115c:a1e0::").As16()
		a[15] = byte(rng.IntN(6))
		return netip.AddrFrom16(a)
	}
	set := func() string {
		switch a := addr4(); rng.IntN(6) {
		case 0:
			return "*"
		case 1:
			return netip.PrefixFrom(a, 8+rng.IntN(25)).Masked().String()
		case 2:
			return fmt.Sprintf("%v-%v", a, netip.AddrFrom4([4]byte{100, 64, 1, byte(6 + rng.IntN(200))}))
		case 3:
			return addr6().String()
		case 4:
			return netip.PrefixFrom(addr6(), 120+rng.IntN(9)).Masked().String()
		default:
			return a.String()
		}
	}
	hasCap := func(a netip.Addr, c string) bool { return c == "x" && a == netip.MustParseAddr("100.64.0.3") }
	local := []netip.Prefix{netip.MustParsePrefix("100.64.0.1/32"), netip.MustParsePrefix("fd7a:115c:a1e0::1/128"), netip.MustParsePrefix("100.64.1.0/30")}
	var lb netipx.IPSetBuilder
	for _, p := range local {
		lb.AddPrefix(p)
	}
	localSet, err := lb.IPSet()
	if err != nil {
		t.Fatal(err)
	}

	accepted := 0
	for range 300 {
		var rules []tailcfg.FilterRule
		for range rng.IntN(5) {
			r := tailcfg.FilterRule{SrcIPs: []string{set(), set()}}
			if rng.IntN(5) == 0 {
				// Beside a destination that holds everything: for ICMP upstream does not look at the destinations of such rules.
				r.SrcIPs = []string{"cap:x"}
			}
			for range 1 + rng.IntN(2) {
				pr := tailcfg.PortRange{First: 0, Last: 65535}
				if rng.IntN(3) > 0 {
					pr.First = uint16(rng.IntN(5))
					pr.Last = pr.First + uint16(rng.IntN(3))
				}
				ip := set()
				if r.SrcIPs[0] == "cap:x" {
					ip = "*"
				}
				r.DstPorts = append(r.DstPorts, tailcfg.NetPortRange{IP: ip, Ports: pr})
			}
			for range rng.IntN(3) {
				r.IPProto = append(r.IPProto, []int{1, 6, 17, 58, 132, 47}[rng.IntN(6)])
			}
			rules = append(rules, r)
		}
		ours, err := filter.Compile(rules, local, func(a netip.Addr, c tailcfg.NodeCapability) bool { return hasCap(a, string(c)) })
		if err != nil {
			t.Fatal(err)
		}
		j, _ := json.Marshal(rules)
		var urules []utailcfg.FilterRule
		if err := json.Unmarshal(j, &urules); err != nil {
			t.Fatal(err)
		}
		matches, err := ufilter.MatchesFromFilterRules(urules)
		if err != nil {
			t.Fatal(err)
		}
		theirs := ufilter.New(matches, func(a netip.Addr, c utailcfg.NodeCapability) bool { return hasCap(a, string(c)) }, localSet, &netipx.IPSet{}, nil, func(string, ...any) {})
		flows := filter.NewFlows(0)

		for range 300 {
			src, dst := addr4(), addr4()
			if rng.IntN(3) == 0 {
				src, dst = addr6(), addr6()
			}
			s, d := netip.AddrPortFrom(src, uint16(rng.IntN(6))), netip.AddrPortFrom(dst, uint16(rng.IntN(6)))
			var b []byte
			kind := pick("tcp", "udp", "echo", "reply", "tsmp", "other")
			switch kind {
			case "tcp":
				b, err = packet.AppendTCP(nil, s, d, packet.TCPHeader{Flags: uint8(rng.IntN(256))}, nil)
			case "udp":
				b, err = packet.AppendUDP(nil, s, d, []byte("x"))
			case "echo", "reply":
				b, err = packet.AppendEcho(nil, src, dst, packet.Echo{Reply: kind == "reply"})
			case "tsmp":
				b, err = packet.AppendTSMPPing(nil, src, dst, [8]byte{})
			case "other":
				b, err = packet.AppendIP(nil, src, dst, 47, 8)
				b = append(b, make([]byte, 8)...)
			}
			if err != nil {
				t.Fatal(err)
			}
			var p packet.Parsed
			if err := p.Decode(b); err != nil {
				t.Fatal(err)
			}
			var up upacket.Parsed
			up.Decode(b)
			if rng.IntN(4) == 0 {
				if got, _ := theirs.RunOut(&up, 0); ours.Out(&p, flows, time.Time{}).Accepted() != (got == ufilter.Accept) {
					t.Fatalf("out %v: theirs %v", up.String(), got)
				}
				continue
			}
			verdict, want := ours.In(&p, flows, time.Time{}), theirs.RunIn(&up, 0) == ufilter.Accept
			if verdict.Accepted() != want {
				t.Fatalf("%s %v flags %#x: ours %v, theirs accept=%v, by %s", kind, up.String(), p.TCPFlags, verdict, want, j)
			}
			if want {
				accepted++
			}
		}
	}
	if accepted == 0 {
		t.Error("nothing was ever accepted: the test shows nothing")
	}
}

// TestTSMP holds our TSMP packets and upstream's reading of them together.
func TestTSMP(t *testing.T) {
	for _, a := range [][2]string{{"100.64.0.1", "100.64.0.2"}, {"fd7a:115c:a1e0::1", "fd7a:115c:a1e0::2"}} {
		src, dst := netip.MustParseAddr(a[0]), netip.MustParseAddr(a[1])
		data := [8]byte{1, 2, 3, 4, 5, 6, 7, 8}
		var up upacket.Parsed

		b, _ := packet.AppendTSMPPing(nil, src, dst, data)
		up.Decode(b)
		if got, ok := up.AsTSMPPing(); !ok || got.Data != data {
			t.Errorf("ping: %v %v", got, ok)
		}
		b, _ = packet.AppendTSMPPong(nil, src, dst, data, 4242)
		up.Decode(b)
		if got, ok := up.AsTSMPPong(); !ok || got.Data != data || got.PeerAPIPort != 4242 {
			t.Errorf("pong: %v %v", got, ok)
		}
		for _, maybe := range []bool{false, true} {
			r := packet.Reject{Proto: packet.TCP, Src: netip.AddrPortFrom(dst, 1000), Dst: netip.AddrPortFrom(src, 22), Reason: packet.RejectedByACL, MaybeBroken: maybe}
			b, _ = packet.AppendReject(nil, r)
			up.Decode(b)
			got, ok := up.AsTailscaleRejectedHeader()
			if !ok || got.Src != r.Src || got.Dst != r.Dst || got.Reason != upacket.RejectedDueToACLs || got.MaybeBroken != maybe {
				t.Errorf("rejection: %+v %v", got, ok)
			}
			buf := make([]byte, got.Len())
			if err := got.Marshal(buf); err != nil {
				t.Fatal(err)
			}
			var p packet.Parsed
			if err := p.Decode(buf); err != nil {
				t.Fatal(err)
			}
			if back, ok := p.Reject(); !ok || back != r {
				t.Errorf("their rejection: %+v %v", back, ok)
			}
		}
	}
}
