package packet

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
)

var (
	a4 = netip.MustParseAddr("100.64.0.1")
	b4 = netip.MustParseAddr("100.64.0.2")
	a6 = netip.MustParseAddr("fd7a:115c:a1e0::1")
	b6 = netip.MustParseAddr("fd7a:115c:a1e0::2")
)

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func port(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Map(func(r rune) rune {
		if r == ' ' || r == '|' {
			return -1
		}
		return r
	}, s))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var errorNames = map[string]error{
	"not ip": ErrNotIP, "truncated": ErrTruncated, "malformed": ErrMalformed, "fragment": ErrFragment, "extension": ErrExtension,
}

// TestVectors reads the packets of testdata/vectors/packet.json.
func TestVectors(t *testing.T) {
	b, err := os.ReadFile("../../testdata/vectors/packet.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Comment, Packet, Error, Proto, Src, Dst, Payload string
		TCPFlags                                         uint8
		More                                             bool
	}
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	for _, v := range vectors {
		t.Run(v.Comment, func(t *testing.T) {
			var p Parsed
			err := p.Decode(unhex(t, v.Packet))
			if v.Error != "" {
				if want := errorNames[v.Error]; want == nil || !errors.Is(err, want) {
					t.Fatalf("error %v, want %q", err, v.Error)
				}
				if p.Version != 0 || p.Proto != 0 || p.Bytes() != nil {
					t.Errorf("not empty after an error: %+v", p)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if p.Proto.String() != v.Proto || p.Src.String() != v.Src || p.Dst.String() != v.Dst || p.TCPFlags != v.TCPFlags || p.More != v.More {
				t.Errorf("got %v %v > %v flags %#x more %v", p.Proto, p.Src, p.Dst, p.TCPFlags, p.More)
			}
			if got := hex.EncodeToString(p.Payload()); got != v.Payload {
				t.Errorf("payload %s, want %s", got, v.Payload)
			}
		})
	}
}

func TestRoundTrips(t *testing.T) {
	for _, f := range []struct {
		name     string
		src, dst netip.Addr
	}{{"IPv4", a4, b4}, {"IPv6", a6, b6}} {
		t.Run(f.name, func(t *testing.T) {
			var p Parsed
			decode := func(b []byte) {
				t.Helper()
				padded := append(bytes.Clone(b), make([]byte, 16-len(b)%16)...)
				if err := p.Decode(padded); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(p.Bytes(), b) {
					t.Errorf("padding is not cut off")
				}
				if f.src.Is4() && Checksum(b[:20], 0) != 0 {
					t.Error("IPv4 header checksum is wrong")
				}
			}
			transportSum := func(proto Proto) uint16 {
				return Checksum(p.Transport(), PseudoSum(f.src, f.dst, proto, len(p.Transport())))
			}

			decode(must(AppendUDP(nil, port(f.src, 1), port(f.dst, 53), []byte("odd"))))
			if p.Proto != UDP || p.Src != port(f.src, 1) || p.Dst != port(f.dst, 53) || string(p.Payload()) != "odd" || transportSum(UDP) != 0 {
				t.Errorf("UDP: %+v", p)
			}
			decode(must(AppendTCP(nil, port(f.src, 1), port(f.dst, 80), TCPHeader{Flags: TCPSyn, Options: []byte{2, 4, 5, 0}}, []byte("data"))))
			if p.Proto != TCP || !p.IsSYN() || string(p.Payload()) != "data" || transportSum(TCP) != 0 {
				t.Errorf("TCP: %+v", p)
			}

			for _, reply := range []bool{false, true} {
				want := Echo{reply, 7, 9, []byte("hello")}
				b := must(AppendEcho(nil, f.src, f.dst, want))
				decode(b)
				got, ok := p.Echo()
				if !ok || got.Reply != reply || got.ID != 7 || got.Seq != 9 || string(got.Data) != "hello" || p.IsICMPError() {
					t.Errorf("echo: %+v %v", got, ok)
				}
				b[len(b)-1] ^= 1
				p.Decode(b)
				if _, ok := p.Echo(); ok {
					t.Error("echo with a wrong checksum taken")
				}
			}

			data := [8]byte{1, 2, 3, 4, 5, 6, 7, 8}
			decode(must(AppendTSMPPing(nil, f.src, f.dst, data)))
			if got, ok := p.TSMPPing(); !ok || got != data {
				t.Errorf("ping: %v %v", got, ok)
			}
			if _, _, ok := p.TSMPPong(); ok {
				t.Error("a ping is a pong")
			}
			decode(must(AppendTSMPPong(nil, f.src, f.dst, data, 4242)))
			if got, api, ok := p.TSMPPong(); !ok || got != data || api != 4242 {
				t.Errorf("pong: %v %v %v", got, api, ok)
			}
			for _, maybe := range []bool{false, true} {
				r := Reject{TCP, port(f.dst, 1000), port(f.src, 22), RejectedByACL, maybe}
				decode(must(AppendReject(nil, r)))
				if got, ok := p.Reject(); !ok || got != r {
					t.Errorf("reject: %+v %v", got, ok)
				}
			}
			k := key.NewDisco().Public()
			decode(must(AppendTSMPDisco(nil, f.src, f.dst, k)))
			if got, ok := p.TSMPDisco(); !ok || got != k {
				t.Errorf("disco: %v %v", got, ok)
			}
		})
	}
}

func TestBuildRefuses(t *testing.T) {
	big := make([]byte, 65530)
	for name, f := range map[string]func() ([]byte, error){
		"families":   func() ([]byte, error) { return AppendIP(nil, a4, b6, UDP, 1) },
		"no address": func() ([]byte, error) { return AppendEcho(nil, netip.Addr{}, netip.Addr{}, Echo{}) },
		"4in6":       func() ([]byte, error) { return AppendIP(nil, netip.AddrFrom16(a4.As16()), b6, UDP, 1) },
		"echo":       func() ([]byte, error) { return AppendEcho(nil, a4, b4, Echo{Data: big}) },
		"udp":        func() ([]byte, error) { return AppendUDP(nil, port(a6, 1), port(b6, 1), big) },
		"tcp options": func() ([]byte, error) {
			return AppendTCP(nil, port(a4, 1), port(b4, 1), TCPHeader{Options: big[:3]}, nil)
		},
	} {
		if _, err := f(); !errors.Is(err, ErrBuild) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDecodeHeader reads the header of a packet that is yet to be segmented,
// whose length field does not fit.
func TestDecodeHeader(t *testing.T) {
	b := must(AppendUDP(nil, port(a4, 1), port(b4, 2), make([]byte, 60000)))
	var p Parsed
	if err := p.DecodeHeader(b[:28]); err != nil || p.Dst != port(b4, 2) {
		t.Errorf("%v %+v", err, p)
	}
	if err := p.Decode(b[:28]); !errors.Is(err, ErrTruncated) {
		t.Errorf("Decode: %v", err)
	}
	if err := p.DecodeHeader(b[:27]); !errors.Is(err, ErrTruncated) {
		t.Errorf("half a header: %v", err)
	}
}

// TestTruncation cuts valid packets everywhere: never a panic, always an error.
func TestTruncation(t *testing.T) {
	for _, b := range seeds() {
		var p Parsed
		if err := p.Decode(b); err != nil {
			t.Fatal(err)
		}
		for n := range b {
			if err := p.Decode(b[:n]); err == nil {
				t.Errorf("%x cut to %d is taken", b, n)
			}
		}
	}
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	packets := seeds()
	var p Parsed
	if n := testing.AllocsPerRun(100, func() {
		for _, b := range packets {
			p.Decode(b)
			p.Echo()
			p.Reject()
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func seeds() [][]byte {
	return [][]byte{
		must(AppendUDP(nil, port(a4, 1), port(b4, 53), []byte("x"))),
		must(AppendUDP(nil, port(a6, 1), port(b6, 53), []byte("x"))),
		must(AppendTCP(nil, port(a4, 1), port(b4, 80), TCPHeader{Flags: TCPSyn}, nil)),
		must(AppendTCP(nil, port(a6, 1), port(b6, 80), TCPHeader{Flags: TCPAck, Options: make([]byte, 12)}, []byte("y"))),
		must(AppendEcho(nil, a4, b4, Echo{Data: []byte("z")})),
		must(AppendEcho(nil, a6, b6, Echo{Data: []byte("z")})),
		must(AppendTSMPPong(nil, a4, b4, [8]byte{1}, 80)),
		must(AppendReject(nil, Reject{UDP, port(a6, 1), port(b6, 2), RejectedByShieldsUp, true})),
	}
}

func TestFailed(t *testing.T) {
	for _, tt := range []struct {
		name      string
		src, dst  netip.Addr
		typ, code byte
		mtu       int64 // that it tells
		want      int
	}{
		{"fragmentation needed", a4, b4, icmp4Unreachable, icmp4FragNeeded, 1400, 1400},
		{"port unreachable", a4, b4, icmp4Unreachable, 3, 1400, -1},
		{"time exceeded", a4, b4, icmp4TimeExceeded, icmp4FragNeeded, 1400, -1},
		{"too big", a6, b6, icmp6PacketTooBig, 0, 1400, 1400},
		{"too big, for more than there is", a6, b6, icmp6PacketTooBig, 0, 1<<32 - 1, 1 << 16},
		{"unreachable", a6, b6, icmp6Unreachable, 4, 1400, -1},
	} {
		proto := ICMPv4
		if tt.src.Is6() {
			proto = ICMPv6
		}
		// What it is about went the other way.
		inner := must(AppendTCP(nil, port(tt.dst, 1), port(tt.src, 2), TCPHeader{Flags: TCPAck}, nil))
		body := append([]byte{tt.typ, tt.code, 0, 0}, binary.BigEndian.AppendUint32(nil, uint32(tt.mtu))...)
		body = append(body, inner...)
		var p Parsed
		if err := p.Decode(append(must(AppendIP(nil, tt.src, tt.dst, proto, len(body))), body...)); err != nil {
			t.Fatal(err)
		}
		if dst, mtu, ok := p.Failed(); !ok || dst != tt.src || mtu != tt.want {
			t.Errorf("%s: %v, %d, %v", tt.name, dst, mtu, ok)
		}
		hlen := len(inner) - 20
		for _, n := range []int{8 + hlen - 1, 8 + hlen} {
			if err := p.Decode(append(must(AppendIP(nil, tt.src, tt.dst, proto, n)), body[:n]...)); err != nil {
				t.Fatal(err)
			}
			if _, _, ok := p.Failed(); ok != (n == 8+hlen) {
				t.Errorf("%s, of which %d bytes came: %v", tt.name, n, ok)
			}
		}
	}
	var p Parsed
	if err := p.Decode(must(AppendEcho(nil, a4, b4, Echo{Data: make([]byte, 40)}))); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := p.Failed(); ok {
		t.Error("an echo request is about a packet")
	}
}

func FuzzDecode(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b)
	}
	frag := must(AppendUDP(nil, port(a4, 1), port(b4, 53), make([]byte, 40)))
	binary.BigEndian.PutUint16(frag[6:], 20)
	f.Add(frag)
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Parsed
		before := bytes.Clone(b)
		err := p.Decode(b)
		if !bytes.Equal(b, before) {
			t.Fatal("Decode changed the packet")
		}
		if err != nil {
			if p.Version != 0 || p.Proto != 0 {
				t.Fatalf("not empty after %v", err)
			}
			return
		}
		if !p.Src.IsValid() || !p.Dst.IsValid() || p.Proto == Unknown || p.Src.Addr().Is4() != (p.Version == 4) {
			t.Fatalf("taken without sense: %+v", p)
		}
		if len(p.Payload()) > len(p.Transport()) || len(p.Transport()) > len(p.Bytes()) || len(p.Bytes()) > len(b) {
			t.Fatal("parts longer than the whole")
		}
		p.Echo()
		if dst, _, ok := p.Failed(); ok && (!p.IsICMPError() || dst.Is4() != (p.Version == 4)) {
			t.Fatalf("an error about %v", dst)
		}
		p.TSMPPing()
		p.TSMPPong()
		p.TSMPDisco()
		if r, ok := p.Reject(); ok {
			again, err := AppendReject(nil, r)
			var q Parsed
			if err != nil || q.Decode(again) != nil {
				t.Fatal("a rejection that was read cannot be built")
			}
			if s, ok := q.Reject(); !ok || s != r {
				t.Fatalf("%+v became %+v", r, s)
			}
		}
		var h Parsed
		if err := h.DecodeHeader(p.Bytes()); err != nil {
			t.Fatalf("DecodeHeader refuses what Decode takes: %v", err)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	pkt := must(AppendTCP(nil, port(a4, 1), port(b4, 80), TCPHeader{Flags: TCPAck}, make([]byte, 1200)))
	var p Parsed
	b.ReportAllocs()
	for b.Loop() {
		p.Decode(pkt)
	}
}
