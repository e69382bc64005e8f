package filter

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

var (
	self4 = netip.MustParseAddr("100.64.0.1")
	self6 = netip.MustParseAddr("fd7a:115c:a1e0::1")
	local = []netip.Prefix{netip.PrefixFrom(self4, 32), netip.PrefixFrom(self6, 128), netip.MustParsePrefix("10.1.0.0/16")}
	now   = time.Unix(1000, 0)
)

func portRange(first, last uint16) tailcfg.PortRange {
	return tailcfg.PortRange{First: first, Last: last}
}

var anyPort = portRange(0, 65535)

func to(ip string, r tailcfg.PortRange) []tailcfg.NetPortRange {
	return []tailcfg.NetPortRange{{IP: ip, Ports: r}}
}

// pkt makes what Decode would of a packet; "ip:port" without a port is port 0.
func pkt(proto packet.Proto, src, dst string) *packet.Parsed {
	parse := func(s string) netip.AddrPort {
		if a, err := netip.ParseAddr(s); err == nil {
			return netip.AddrPortFrom(a, 0)
		}
		return netip.MustParseAddrPort(s)
	}
	p := &packet.Parsed{Version: 4, Proto: proto, Src: parse(src), Dst: parse(dst)}
	if p.Src.Addr().Is6() {
		p.Version = 6
	}
	if proto == packet.TCP {
		p.TCPFlags = packet.TCPSyn
	}
	return p
}

func decode(t testing.TB, b []byte, err error) *packet.Parsed {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	p := new(packet.Parsed)
	if err := p.Decode(b); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestIn(t *testing.T) {
	eight := 8
	rules := []tailcfg.FilterRule{
		{SrcIPs: []string{"100.64.0.2"}, DstPorts: to("100.64.0.1", portRange(22, 22))},
		{SrcIPs: []string{"100.64.1.0/24"}, DstPorts: to("*", portRange(80, 90))},
		{SrcIPs: []string{"100.64.2.5-100.64.2.9"}, DstPorts: to("100.64.0.1", anyPort), IPProto: []int{6}},
		{SrcIPs: []string{"*"}, DstPorts: to("10.1.2.0/24", portRange(443, 443))},
		{SrcIPs: []string{"cap:backup"}, DstPorts: to("100.64.0.1", portRange(873, 873))},
		{SrcIPs: []string{"172.16.0.1"}, SrcBits: []int{12}, DstPorts: []tailcfg.NetPortRange{{IP: "10.1.2.3", Bits: &eight, Ports: portRange(5, 5)}}},
		{SrcIPs: []string{"100.64.3.1"}, DstPorts: to("100.64.0.1", portRange(1, 1)), IPProto: []int{1}},
		{SrcIPs: []string{"100.64.3.2"}, DstPorts: to("100.64.0.1", anyPort), IPProto: []int{47, 999, -1}},
		{SrcIPs: []string{"100.64.3.3"}, DstPorts: to("100.64.0.1", portRange(1, 65535)), IPProto: []int{47}},
		{SrcIPs: []string{"fd7a:115c:a1e0::2"}, DstPorts: to("fd7a:115c:a1e0::1", portRange(22, 22))},
		{SrcIPs: []string{"100.64.4.0/24"}, DstPorts: to("10.0.0.0/8", portRange(1, 1))},
		{SrcIPs: []string{"100.64.4.7"}, DstPorts: to("10.1.0.0/16", portRange(2, 2))},
	}
	hasCap := func(a netip.Addr, c tailcfg.NodeCapability) bool {
		return c == "backup" && a == netip.MustParseAddr("100.64.9.9")
	}
	f, err := Compile(rules, local, hasCap)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		proto    packet.Proto
		src, dst string
		want     Verdict
	}{
		{packet.TCP, "100.64.0.2:1", "100.64.0.1:22", Accept},
		{packet.UDP, "100.64.0.2:1", "100.64.0.1:22", Accept}, // the default protocols
		{packet.SCTP, "100.64.0.2:1", "100.64.0.1:22", DropNoRule},
		{packet.TCP, "100.64.0.2:1", "100.64.0.1:23", DropNoRule},
		{packet.TCP, "100.64.0.3:1", "100.64.0.1:22", DropNoRule},
		{packet.TCP, "100.64.0.2:1", "10.1.0.1:22", DropNoRule},
		{packet.TCP, "100.64.0.2:1", "100.64.0.9:22", DropNotLocal},
		{packet.TCP, "100.64.1.0:1", "100.64.0.1:80", Accept},
		{packet.TCP, "100.64.1.255:1", "10.1.255.255:90", Accept},
		{packet.TCP, "100.64.1.255:1", "100.64.0.1:91", DropNoRule},
		{packet.TCP, "100.64.1.255:1", "100.64.0.1:79", DropNoRule},
		{packet.TCP, "100.64.2.4:1", "100.64.0.1:7", DropNoRule},
		{packet.TCP, "100.64.2.5:1", "100.64.0.1:7", Accept},
		{packet.TCP, "100.64.2.9:1", "100.64.0.1:7", Accept},
		{packet.TCP, "100.64.2.10:1", "100.64.0.1:7", DropNoRule},
		{packet.UDP, "100.64.2.5:1", "100.64.0.1:7", DropNoRule}, // TCP only
		{packet.TCP, "9.9.9.9:1", "10.1.2.77:443", Accept},
		{packet.TCP, "9.9.9.9:1", "10.1.3.77:443", DropNoRule},
		{packet.TCP, "100.64.9.9:1", "100.64.0.1:873", Accept},
		{packet.TCP, "100.64.9.8:1", "100.64.0.1:873", DropNoRule},
		{packet.TCP, "100.64.9.9:1", "100.64.0.1:874", DropNoRule},
		{packet.TCP, "172.31.1.1:1", "10.1.9.9:5", Accept},
		{packet.TCP, "172.32.1.1:1", "10.1.9.9:5", DropNoRule},
		{packet.Proto(47), "100.64.3.2", "100.64.0.1", Accept},
		{packet.Proto(47), "100.64.3.3", "100.64.0.1", DropNoRule}, // not all ports
		{packet.Proto(47), "100.64.0.2", "100.64.0.1", DropNoRule},
		{packet.TCP, "[fd7a:115c:a1e0::2]:1", "[fd7a:115c:a1e0::1]:22", Accept},
		{packet.TCP, "[fd7a:115c:a1e0::3]:1", "[fd7a:115c:a1e0::1]:22", DropNoRule},
		{packet.TCP, "100.64.4.7:1", "10.1.0.1:1", Accept}, // by the shorter prefix of both
		{packet.TCP, "100.64.4.7:1", "10.1.0.1:2", Accept},
		{packet.TCP, "100.64.4.8:1", "10.1.0.1:2", DropNoRule},
		{packet.TSMP, "100.64.77.7", "100.64.0.1", AcceptTSMP},
		{packet.Fragment, "100.64.77.7", "100.64.0.1", AcceptFragment},
		{packet.Fragment, "100.64.77.7", "100.64.0.2", DropNotLocal},
		{packet.UDP, "100.64.0.2:1", "224.0.0.1:22", DropMulticast},
		{packet.UDP, "[fd7a:115c:a1e0::2]:1", "[ff02::1]:22", DropMulticast},
		{packet.UDP, "100.64.0.2:1", "169.254.1.1:22", DropLinkLocal},
		{packet.UDP, "[fd7a:115c:a1e0::2]:1", "[fe80::1]:22", DropLinkLocal},
		{packet.UDP, "127.0.0.1:1", "10.1.2.3:443", DropBadSource},
		{packet.UDP, "0.0.0.0:1", "10.1.2.3:443", DropBadSource},
		{packet.Unknown, "100.64.0.2", "100.64.0.1", DropNotIP},
	}
	for _, tt := range tests {
		if got := f.In(pkt(tt.proto, tt.src, tt.dst), nil, now); got != tt.want {
			t.Errorf("%v %v > %v: %v, want %v", tt.proto, tt.src, tt.dst, got, tt.want)
		}
	}
	if f.In(&packet.Parsed{}, nil, now) != DropNotIP {
		t.Error("an empty Parsed is taken")
	}
	if !f.AllowsTCP(netip.MustParseAddr("100.64.0.2"), netip.MustParseAddrPort("100.64.0.1:22")) {
		t.Error("AllowsTCP")
	}
}

func TestICMP(t *testing.T) {
	f, _ := Compile([]tailcfg.FilterRule{{SrcIPs: []string{"100.64.0.2", "fd7a:115c:a1e0::2"}, DstPorts: to("*", portRange(22, 22)), IPProto: []int{6}}}, local, nil)
	friend, stranger := netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("100.64.0.3")
	friend6, stranger6 := netip.MustParseAddr("fd7a:115c:a1e0::2"), netip.MustParseAddr("fd7a:115c:a1e0::3")
	echo := func(src, dst netip.Addr, reply bool) Verdict {
		b, err := packet.AppendEcho(nil, src, dst, packet.Echo{Reply: reply})
		return f.In(decode(t, b, err), nil, now)
	}
	for _, tt := range []struct {
		name      string
		got, want Verdict
	}{
		{"request of a source with an open port", echo(friend, self4, false), Accept},
		{"request of a stranger", echo(stranger, self4, false), DropNoRule},
		{"reply of a stranger", echo(stranger, self4, true), AcceptICMP},
		{"request, IPv6", echo(friend6, self6, false), Accept},
		{"request of a stranger, IPv6", echo(stranger6, self6, false), DropNoRule},
		{"reply, IPv6", echo(stranger6, self6, true), AcceptICMP},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	unreachable, _ := packet.AppendIP(nil, stranger, self4, packet.ICMPv4, 8)
	unreachable = append(unreachable, 3, 1, 0, 0, 0, 0, 0, 0)
	if v := f.In(decode(t, unreachable, nil), nil, now); v != AcceptICMP {
		t.Errorf("unreachable: %v", v)
	}
}

func TestNothingComesInWithoutRules(t *testing.T) {
	empty, err := Compile(nil, local, nil)
	if err != nil {
		t.Fatal(err)
	}
	all, _ := Compile(tailcfg.FilterAllowAll, local, nil)
	noAddress, _ := Compile(tailcfg.FilterAllowAll, nil, nil)
	for name, f := range map[string]*Filter{"nil": nil, "empty": empty, "shielded": all.Shielded(), "no address": noAddress} {
		for _, proto := range []packet.Proto{packet.TCP, packet.UDP, packet.SCTP, 47} {
			if v := f.In(pkt(proto, "100.64.0.2", "100.64.0.1"), NewFlows(0), now); v.Accepted() {
				t.Errorf("%s: %v: %v", name, proto, v)
			}
		}
	}
	if v := all.Shielded().In(pkt(packet.TCP, "100.64.0.2:1", "100.64.0.1:1"), nil, now); v != DropShieldsUp {
		t.Errorf("shielded: %v", v)
	}
	if v := all.In(pkt(packet.TCP, "100.64.0.2:1", "100.64.0.1:1"), nil, now); v != Accept {
		t.Errorf("allow all: %v", v)
	}
}

func TestTCPContinues(t *testing.T) {
	f, _ := Compile(nil, local, nil)
	for flags, want := range map[uint8]Verdict{
		packet.TCPSyn:                 DropNoRule,
		packet.TCPSyn | packet.TCPFin: DropNoRule,
		packet.TCPSyn | packet.TCPEce: DropNoRule,
		packet.TCPSyn | packet.TCPAck: AcceptTCP,
		packet.TCPAck:                 AcceptTCP,
		packet.TCPRst:                 AcceptTCP,
	} {
		p := pkt(packet.TCP, "100.64.0.2:80", "100.64.0.1:4000")
		p.TCPFlags = flags
		if got := f.In(p, nil, now); got != want {
			t.Errorf("flags %#x: %v, want %v", flags, got, want)
		}
	}
}

func TestReplies(t *testing.T) {
	f, _ := Compile(nil, local, nil)
	fl := NewFlows(0)
	for _, proto := range []packet.Proto{packet.UDP, packet.SCTP} {
		out, in := pkt(proto, "100.64.0.1:4000", "100.64.0.2:53"), pkt(proto, "100.64.0.2:53", "100.64.0.1:4000")
		if v := f.In(in, fl, now); v != DropNoRule {
			t.Fatalf("before: %v", v)
		}
		if v := f.Out(out, fl, now); v != AcceptOut {
			t.Fatalf("out: %v", v)
		}
		if v := f.In(in, fl, now); v != AcceptReply {
			t.Errorf("reply: %v", v)
		}
		if v := f.Shielded().In(in, fl, now); v != AcceptReply {
			t.Errorf("reply with shields up: %v", v)
		}
		for _, other := range []string{"100.64.0.2:54", "100.64.0.3:53"} {
			if v := f.In(pkt(proto, other, "100.64.0.1:4000"), fl, now); v != DropNoRule {
				t.Errorf("from %s: %v", other, v)
			}
		}
		if v := f.In(pkt(proto, "100.64.0.2:53", "100.64.0.1:4001"), fl, now); v != DropNoRule {
			t.Errorf("another port: %v", v)
		}
	}
	if v := f.In(pkt(packet.TCP, "100.64.0.2:53", "100.64.0.1:4000"), fl, now); v != DropNoRule {
		t.Errorf("another protocol: %v", v)
	}
	if v := f.Out(pkt(packet.UDP, "100.64.0.1:1", "239.1.1.1:1"), fl, now); v != DropMulticast {
		t.Errorf("multicast out: %v", v)
	}
	if v := f.Out(pkt(packet.UDP, "100.64.0.1:1", "169.254.169.254:53"), fl, now); v != AcceptOut {
		t.Errorf("cloud DNS out: %v", v)
	}
}

// TestFlowsAreBounded opens far more flows than fit: the table stays its size,
// and the flow that is used all the time stays in it.
func TestFlowsAreBounded(t *testing.T) {
	fl := NewFlows(1024)
	kept, peer := netip.MustParseAddrPort("100.64.0.1:9"), netip.MustParseAddrPort("100.64.0.2:53")
	fl.note(packet.UDP, kept, peer)
	for i := range 100_000 {
		fl.note(packet.UDP, netip.AddrPortFrom(self4, uint16(i)), netip.AddrPortFrom(netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)}), 53))
		if !fl.has(packet.UDP, peer, kept) {
			t.Fatalf("lost after %d others", i)
		}
	}
	n := 0
	for i := range fl.shards {
		n += len(fl.shards[i].slots)
	}
	if n != 1024 {
		t.Errorf("%d slots", n)
	}
	last := netip.AddrPortFrom(netip.AddrFrom4([4]byte{100, 64, 99_999 >> 8 & 0xff, 99_999 & 0xff}), 53)
	if !fl.has(packet.UDP, last, netip.AddrPortFrom(self4, 99_999&0xffff)) {
		t.Error("the newest flow is not there")
	}
}

func TestFlowsClockWraps(t *testing.T) {
	fl := NewFlows(128)
	peer := netip.MustParseAddrPort("100.64.0.2:53")
	for i := range uint16(20) {
		fl.note(packet.UDP, netip.AddrPortFrom(self4, i), peer)
	}
	for i := range fl.shards {
		fl.shards[i].clock = ^uint32(0)
	}
	for i := range uint16(20) {
		if !fl.has(packet.UDP, peer, netip.AddrPortFrom(self4, i)) {
			t.Errorf("flow %d is gone", i)
		}
	}
}

func TestFlowsConcurrently(t *testing.T) {
	f, _ := Compile(nil, local, nil)
	fl := NewFlows(256)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 5000 {
				p := pkt(packet.UDP, "100.64.0.1:1", "100.64.0.2:53")
				p.Src = netip.AddrPortFrom(self4, uint16(g*5000+i))
				f.Out(p, fl, now)
				p.Src, p.Dst = p.Dst, p.Src
				f.In(p, fl, now)
			}
		})
	}
	wg.Wait()
}

func TestBadRules(t *testing.T) {
	long := 129
	for name, r := range map[string]tailcfg.FilterRule{
		"source":            {SrcIPs: []string{"nonsense"}},
		"prefix":            {SrcIPs: []string{"10.0.0.1/8"}},
		"prefix length":     {SrcIPs: []string{"10.0.0.0/33"}},
		"range":             {SrcIPs: []string{"10.0.0.9-10.0.0.1"}},
		"range of families": {SrcIPs: []string{"10.0.0.9-fd7a::1"}},
		"zone":              {SrcIPs: []string{"fe80::1%eth0"}},
		"empty":             {SrcIPs: []string{""}},
		"empty cap":         {SrcIPs: []string{"cap:"}},
		"bits":              {SrcIPs: []string{"10.0.0.0"}, SrcBits: []int{33}},
		"destination bits":  {SrcIPs: []string{"*"}, DstPorts: []tailcfg.NetPortRange{{IP: "fd7a::1", Bits: &long}}},
		"destination":       {SrcIPs: []string{"*"}, DstPorts: to("nonsense", anyPort)},
		"destination cap":   {SrcIPs: []string{"*"}, DstPorts: to("cap:x", anyPort)},
		"ports":             {SrcIPs: []string{"*"}, DstPorts: to("*", portRange(2, 1))},
		"grant":             {SrcIPs: []string{"*"}, CapGrant: []tailcfg.CapGrant{{Dsts: []netip.Prefix{{}}}}},
	} {
		if r.DstPorts == nil {
			r.DstPorts = to("*", anyPort)
		}
		good := tailcfg.FilterRule{SrcIPs: []string{"100.64.0.2"}, DstPorts: to("*", portRange(1, 1))}
		f, err := Compile([]tailcfg.FilterRule{r, good}, local, func(netip.Addr, tailcfg.NodeCapability) bool { return true })
		if !errors.Is(err, ErrRule) {
			t.Errorf("%s: %v", name, err)
		}
		if v := f.In(pkt(packet.TCP, "100.64.0.2:1", "100.64.0.1:1"), nil, now); v != Accept {
			t.Errorf("%s: the good rule is lost: %v", name, v)
		}
		if v := f.In(pkt(packet.TCP, "10.0.0.5:1", "100.64.0.1:2"), nil, now); name != "grant" && v != DropNoRule {
			t.Errorf("%s: the bad rule allows: %v", name, v)
		}
	}
}

func TestCaps(t *testing.T) {
	grant := func(dst string, m tailcfg.PeerCapMap, caps ...tailcfg.PeerCapability) []tailcfg.CapGrant {
		return []tailcfg.CapGrant{{Dsts: []netip.Prefix{netip.MustParsePrefix(dst)}, CapMap: m, Caps: caps}}
	}
	f, err := Compile([]tailcfg.FilterRule{
		{SrcIPs: []string{"*"}, CapGrant: grant("100.64.0.1/32", tailcfg.PeerCapMap{"a": {"1"}})},
		{SrcIPs: []string{"100.64.0.0/16"}, CapGrant: grant("100.64.0.1/32", nil, "old")},
		{SrcIPs: []string{"100.64.0.2"}, CapGrant: grant("100.64.0.1/32", tailcfg.PeerCapMap{"a": {"2", "3"}, "b": nil})},
		{SrcIPs: []string{"100.64.0.2"}, CapGrant: grant("100.64.0.9/32", tailcfg.PeerCapMap{"elsewhere": nil})},
		{SrcIPs: []string{"cap:x"}, CapGrant: grant("0.0.0.0/0", tailcfg.PeerCapMap{"by-cap": nil})},
	}, local, func(netip.Addr, tailcfg.NodeCapability) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	for src, want := range map[string]tailcfg.PeerCapMap{
		"100.64.0.2":        {"a": {"1", "2", "3"}, "b": nil, "old": nil},
		"100.64.0.3":        {"a": {"1"}, "old": nil},
		"9.9.9.9":           {"a": {"1"}},
		"fd7a:115c:a1e0::2": {"a": {"1"}},
	} {
		if got := f.Caps(netip.MustParseAddr(src), self4); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", src, got, want)
		}
	}
	if got := f.Caps(netip.MustParseAddr("100.64.0.2"), self6); got != nil {
		t.Errorf("at another address: %v", got)
	}
	if got := f.Shielded().Caps(netip.MustParseAddr("9.9.9.9"), self4); len(got) != 1 {
		t.Errorf("shielded: %v", got)
	}
	if got := (*Filter)(nil).Caps(self4, self4); got != nil {
		t.Error("nil filter grants")
	}
	if f.AllowsTCP(netip.MustParseAddr("100.64.0.2"), netip.AddrPortFrom(self4, 1)) {
		t.Error("a capability grant let a packet in")
	}
}

// TestAgainstTheObvious compares with rules applied one by one.
func TestAgainstTheObvious(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	addr := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(rng.IntN(4)), byte(rng.IntN(8))}) }
	set := func() (string, func(netip.Addr) bool) {
		switch rng.IntN(4) {
		case 0:
			return "*", func(netip.Addr) bool { return true }
		case 1:
			a := addr()
			return a.String(), func(b netip.Addr) bool { return a == b }
		case 2:
			p := netip.PrefixFrom(addr(), 16+rng.IntN(17)).Masked()
			return p.String(), p.Contains
		}
		a, b := addr(), addr()
		if b.Less(a) {
			a, b = b, a
		}
		return a.String() + "-" + b.String(), func(c netip.Addr) bool { return !c.Less(a) && !b.Less(c) }
	}
	for range 200 {
		var rules []tailcfg.FilterRule
		var obvious []func(p *packet.Parsed) bool
		for range 1 + rng.IntN(6) {
			src, inSrc := set()
			dst, inDst := set()
			first := uint16(rng.IntN(10))
			r := portRange(first, first+uint16(rng.IntN(5)))
			proto := packet.TCP
			if rng.IntN(2) == 0 {
				proto = packet.UDP
			}
			rules = append(rules, tailcfg.FilterRule{SrcIPs: []string{src}, DstPorts: to(dst, r), IPProto: []int{int(proto)}})
			obvious = append(obvious, func(p *packet.Parsed) bool {
				return p.Proto == proto && inSrc(p.Src.Addr()) && inDst(p.Dst.Addr()) && r.Contains(p.Dst.Port())
			})
		}
		f, err := Compile(rules, local, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 500 {
			proto := packet.TCP
			if rng.IntN(2) == 0 {
				proto = packet.UDP
			}
			p := pkt(proto, addr().String(), addr().String())
			p.Dst = netip.AddrPortFrom(p.Dst.Addr(), uint16(rng.IntN(16)))
			want := DropNoRule
			for _, o := range obvious {
				if o(p) {
					want = Accept
				}
			}
			if got := f.In(p, nil, now); got != want {
				t.Fatalf("%v %v > %v: %v, want %v by %+v", p.Proto, p.Src, p.Dst, got, want, rules)
			}
		}
	}
}

func TestNoAllocations(t *testing.T) {
	f := manyRules(t, 1000)
	fl := NewFlows(0)
	out, in := pkt(packet.UDP, "100.64.0.1:4000", "100.64.0.2:53"), pkt(packet.UDP, "100.64.0.2:53", "100.64.0.1:4000")
	syn, drop := pkt(packet.TCP, "100.65.0.7:1", "100.64.0.1:7"), pkt(packet.TCP, "100.65.0.7:1", "100.64.0.1:60000")
	f.Out(out, fl, now)
	if n := testing.AllocsPerRun(1000, func() {
		f.Out(out, fl, now)
		_ = f.In(in, fl, now).String()
		f.In(syn, fl, now)
		_ = f.In(drop, fl, now).String()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestVerdictNames(t *testing.T) {
	seen := map[string]bool{}
	for v := range verdicts {
		if s := v.String(); s == "" || seen[s] {
			t.Errorf("verdict %d: %q", v, s)
		} else {
			seen[s] = true
		}
	}
	if Verdict(200).String() != "invalid verdict" || DropNoRule.Accepted() || DropShieldsUp.Accepted() {
		t.Error("verdicts")
	}
}

func FuzzCompile(f *testing.F) {
	f.Add("100.64.0.2", "100.64.0.0/10", uint16(1), uint16(2), 6, 32)
	f.Add("10.0.0.1-10.0.0.77", "*", uint16(0), uint16(65535), 0, -1)
	f.Add("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "fd7a::/16", uint16(5), uint16(1), 999, 129)
	f.Add("cap:x", "cap:y", uint16(0), uint16(0), 1, 0)
	f.Fuzz(func(t *testing.T, src, dst string, first, last uint16, proto, bits int) {
		rule := tailcfg.FilterRule{SrcIPs: []string{src, dst}, SrcBits: []int{bits}, IPProto: []int{proto},
			DstPorts: []tailcfg.NetPortRange{{IP: dst, Ports: portRange(first, last)}, {IP: dst, Bits: &bits, Ports: portRange(first, last)}}}
		c, err := Compile([]tailcfg.FilterRule{rule}, local, func(netip.Addr, tailcfg.NodeCapability) bool { return false })
		if c == nil {
			t.Fatal(err)
		}
		for _, p := range []*packet.Parsed{pkt(packet.TCP, "100.64.0.2:1", "100.64.0.1:1"), pkt(packet.UDP, "[fd7a::5]:1", "[fd7a:115c:a1e0::1]:1")} {
			if c.In(p, nil, now) == Accept && (p.Dst.Port() < first || p.Dst.Port() > last || proto != int(p.Proto)) {
				t.Fatalf("%+v let in by %+v", p, rule)
			}
		}
	})
}

// manyRules has n rules for n sources each on a port of its own, as a policy of
// many small grants becomes, beside as many that are about other nodes.
func manyRules(t testing.TB, n int) *Filter {
	rules := make([]tailcfg.FilterRule, 0, n)
	for i := range n {
		dst := "100.64.0.1"
		if i%2 == 1 {
			dst = "100.99.0.1"
		}
		rules = append(rules, tailcfg.FilterRule{
			SrcIPs:   []string{fmt.Sprintf("100.65.%d.%d", i>>8, i&0xff), "100.64.0.0/10"},
			DstPorts: to(dst, portRange(uint16(2*i), uint16(2*i))),
		})
	}
	f, err := Compile(rules, local, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func BenchmarkIn(b *testing.B) {
	f := manyRules(b, 10_000)
	fl := NewFlows(0)
	f.Out(pkt(packet.UDP, "100.64.0.1:4000", "100.64.0.2:53"), fl, now)
	data := pkt(packet.TCP, "100.65.0.7:1", "100.64.0.1:8")
	data.TCPFlags = packet.TCPAck
	for _, bb := range []struct {
		name string
		p    *packet.Parsed
		want Verdict
	}{
		{"TCPData", data, AcceptTCP},
		{"UDPReply", pkt(packet.UDP, "100.64.0.2:53", "100.64.0.1:4000"), AcceptReply},
		{"Rule", pkt(packet.TCP, "100.65.0.8:1", "100.64.0.1:16"), Accept},
		{"NoRule", pkt(packet.TCP, "100.65.0.8:1", "100.64.0.1:17"), DropNoRule},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if v := f.In(bb.p, fl, now); v != bb.want {
					b.Fatal(v)
				}
			}
		})
	}
	b.Run("Out", func(b *testing.B) {
		p := pkt(packet.UDP, "100.64.0.1:4000", "100.64.0.2:53")
		b.ReportAllocs()
		for b.Loop() {
			f.Out(p, fl, now)
		}
	})
}

func BenchmarkCompile10000Rules(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		manyRules(b, 10_000)
	}
}
