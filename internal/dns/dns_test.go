package dns

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func testMap(t testing.TB, change ...func(*tailcfg.MapResponse)) *netmap.Map {
	t.Helper()
	node := func(id byte, name string, addrs ...string) *tailcfg.Node {
		n := &tailcfg.Node{ID: tailcfg.NodeID(id), Name: name, Key: key.NodePublicFromRaw([32]byte{id})}
		for _, a := range addrs {
			a := netip.MustParseAddr(a)
			n.Addresses = append(n.Addresses, netip.PrefixFrom(a, a.BitLen()))
		}
		return n
	}
	r := &tailcfg.MapResponse{
		Node: node(1, "me.tail.ts.net.", "100.64.0.1", "fd7a:115c:a1e0::1"),
		Peers: []*tailcfg.Node{
			node(2, "Web.tail.ts.net.", "fd7a:115c:a1e0::2", "100.64.0.2"),
			node(3, "four.tail.ts.net.", "100.64.0.3"),
			node(4, "shared.other.ts.net.", "100.64.0.4"),
		},
		DNSConfig: &tailcfg.DNSConfig{
			Proxied: true,
			Domains: []string{"tail.ts.net", "corp.example"},
			Routes:  map[string][]*tailcfg.Resolver{"tail.ts.net.": nil, "corp.example": {{Addr: "10.0.0.53"}}, "sub.tail.ts.net": {{Addr: "10.0.0.53"}}, "64.100.in-addr.arpa.": nil},
			ExtraRecords: []tailcfg.DNSRecord{
				{Name: "svc.tail.ts.net", Value: "100.100.1.1"}, {Name: "svc.tail.ts.net.", Type: "AAAA", Value: "fd7a:115c:a1e0::99"},
				{Name: "db.corp.example", Type: "A", Value: "10.1.1.1"}, {Name: "db.corp.example", Type: "A", Value: "10.1.1.2"},
				{Name: "text.tail.ts.net", Type: "TXT", Value: "x"}, {Name: "bad.tail.ts.net", Type: "A", Value: "fd7a::1"}, {Name: "bad.tail.ts.net", Value: "nonsense"},
				{Name: "a.deep.tail.ts.net", Value: "100.100.1.2"},
			},
		},
	}
	for _, c := range change {
		c(r)
	}
	m, _, err := netmap.NewBuilder().Apply(r, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestLookup(t *testing.T) {
	m := testMap(t)
	for _, tt := range []struct {
		network, host, want string
		tailnet             bool
		err                 error
	}{
		{"tcp", "web", "100.64.0.2 fd7a:115c:a1e0::2", true, nil},
		{"tcp", "WEB.Tail.TS.net.", "100.64.0.2 fd7a:115c:a1e0::2", true, nil},
		{"tcp4", "web.tail.ts.net", "100.64.0.2", true, nil},
		{"udp6", "web", "fd7a:115c:a1e0::2", true, nil},
		{"tcp6", "four", "", true, ErrNoAddress},
		{"tcp", "me", "100.64.0.1 fd7a:115c:a1e0::1", true, nil},
		{"tcp", "shared.other.ts.net", "100.64.0.4", true, nil},
		{"tcp", "shared", "", true, ErrNotFound},
		{"tcp", "svc", "100.100.1.1 fd7a:115c:a1e0::99", true, nil},
		{"tcp", "db", "10.1.1.1 10.1.1.2", true, nil}, // by a search domain
		{"tcp", "db.corp.example", "10.1.1.1 10.1.1.2", true, nil},
		{"tcp", "a.deep", "100.100.1.2", true, nil},
		{"tcp", "a.deep.", "", false, ErrNotFound}, // absolute
		{"tcp", "text", "", true, ErrNoAddress},
		{"tcp", "bad", "", true, ErrNoAddress},
		{"tcp", "later", "", true, ErrNotFound},
		{"tcp", "later.tail.ts.net", "", true, ErrNotFound},
		{"tcp", "x.sub.tail.ts.net", "", false, ErrNotFound}, // routed to somebody
		{"tcp", "other.corp.example", "", false, ErrNotFound},
		{"tcp", "www.example.org", "", false, ErrNotFound},
		{"tcp", "nottail.ts.net", "", false, ErrNotFound},
		{"tcp", "localhost", "", false, ErrNotFound},
		{"tcp", "x.localhost.", "", false, ErrNotFound},
		{"tcp", "", "", false, ErrNotFound},
		{"tcp", "a..b", "", false, ErrNotFound},
		{"tcp", "a b", "", false, ErrNotFound},
		{"tcp", strings.Repeat("a", 64), "", false, ErrNotFound},
		{"tcp", "100.64.0.2", "100.64.0.2", true, nil},
		{"tcp", "::ffff:100.64.0.2", "100.64.0.2", true, nil},
		{"tcp6", "100.64.0.2", "", true, ErrNoAddress},
		{"tcp", "8.8.8.8", "8.8.8.8", false, nil},
	} {
		addrs, tailnet, err := Lookup(m, tt.network, tt.host)
		var got []string
		for _, a := range addrs {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != tt.want || tailnet != tt.tailnet || !errors.Is(err, tt.err) {
			t.Errorf("%s %q: %v %v %v", tt.network, tt.host, got, tailnet, err)
		}
	}
	for host, want := range map[string]bool{"web": true, "www.example.org": true, "localhost": false} {
		if _, tailnet, err := Lookup(nil, "tcp", host); tailnet != want || !errors.Is(err, ErrNotFound) {
			t.Errorf("without a map: %s: %v %v", host, tailnet, err)
		}
	}
}

func TestReverse(t *testing.T) {
	m := testMap(t)
	for a, want := range map[string]string{"100.64.0.1": "me.tail.ts.net.", "fd7a:115c:a1e0::2": "Web.tail.ts.net.", "100.64.0.99": "", "8.8.8.8": ""} {
		if got, ok := Reverse(m, netip.MustParseAddr(a)); got != want || ok != (want != "") {
			t.Errorf("%s: %q %v", a, got, ok)
		}
	}
	if _, ok := Reverse(nil, netip.MustParseAddr("100.64.0.1")); ok {
		t.Error("without a map")
	}
}

func query(name string, typ dnsmessage.Type) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}},
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func answers(m dnsmessage.Message) (out []string) {
	for _, r := range m.Answers {
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			out = append(out, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			out = append(out, netip.AddrFrom16(b.AAAA).String())
		case *dnsmessage.PTRResource:
			out = append(out, b.PTR.String())
		case *dnsmessage.SOAResource:
			out = append(out, "SOA")
		}
	}
	return out
}

func TestAnswer(t *testing.T) {
	m := testMap(t)
	const ok, nx, refused = dnsmessage.RCodeSuccess, dnsmessage.RCodeNameError, dnsmessage.RCodeRefused
	rev6 := "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa."
	for _, tt := range []struct {
		name    string
		typ     dnsmessage.Type
		code    dnsmessage.RCode
		want    string
		soa     string
		forward bool
	}{
		{"web.tail.ts.net.", dnsmessage.TypeA, ok, "100.64.0.2", "", false},
		{"WEB.tail.ts.net.", dnsmessage.TypeAAAA, ok, "fd7a:115c:a1e0::2", "", false},
		{"web.tail.ts.net.", dnsmessage.TypeALL, ok, "100.64.0.2 fd7a:115c:a1e0::2", "", false},
		{"four.tail.ts.net.", dnsmessage.TypeAAAA, ok, "", "tail.ts.net.", false},
		{"web.tail.ts.net.", dnsmessage.TypeMX, ok, "", "tail.ts.net.", false},
		{"none.tail.ts.net.", dnsmessage.TypeA, nx, "", "tail.ts.net.", false},
		{"tail.ts.net.", dnsmessage.TypeA, ok, "", "tail.ts.net.", false},
		{"tail.ts.net.", dnsmessage.TypeSOA, ok, "SOA", "", false},
		{"deep.tail.ts.net.", dnsmessage.TypeA, ok, "", "tail.ts.net.", false},
		{"db.corp.example.", dnsmessage.TypeA, ok, "10.1.1.1 10.1.1.2", "", false},
		{"db.corp.example.", dnsmessage.TypeAAAA, ok, "", "db.corp.example.", false},
		{"x.corp.example.", dnsmessage.TypeA, refused, "", "", true},
		{"x.sub.tail.ts.net.", dnsmessage.TypeA, refused, "", "", true},
		{"www.example.org.", dnsmessage.TypeA, refused, "", "", true},
		{"web.", dnsmessage.TypeA, refused, "", "", true},
		{".", dnsmessage.TypeNS, refused, "", "", true},
		{"2.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, ok, "Web.tail.ts.net.", "", false},
		{"2.0.64.100.in-addr.arpa.", dnsmessage.TypeA, ok, "", "0.64.100.in-addr.arpa.", false},
		{"9.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, nx, "", "64.100.in-addr.arpa.", false},
		{"9.0.65.100.in-addr.arpa.", dnsmessage.TypePTR, nx, "", "0.65.100.in-addr.arpa.", false},
		{"8.8.8.8.in-addr.arpa.", dnsmessage.TypePTR, refused, "", "", true},
		{"300.8.8.8.in-addr.arpa.", dnsmessage.TypePTR, refused, "", "", true},
		{rev6, dnsmessage.TypePTR, ok, "Web.tail.ts.net.", "", false},
		{"x" + rev6[1:], dnsmessage.TypePTR, refused, "", "", true},
	} {
		b, forward := Answer(query(tt.name, tt.typ), m)
		var r dnsmessage.Message
		if err := r.Unpack(b); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		soa := ""
		if len(r.Authorities) > 0 {
			soa = r.Authorities[0].Header.Name.String()
		}
		if r.RCode != tt.code || strings.Join(answers(r), " ") != tt.want || soa != tt.soa || forward != tt.forward {
			t.Errorf("%s %v: %v %v SOA %q forward %v", tt.name, tt.typ, r.RCode, answers(r), soa, forward)
		}
		if r.ID != 77 || !r.Response || !r.RecursionDesired || len(r.Questions) != 1 || r.Questions[0].Name.String() != tt.name || len(b) > 512 || r.Authoritative == (r.RCode == refused && forward) {
			t.Errorf("%s: header %+v", tt.name, r.Header)
		}
	}
}

func TestAnswerOddQueries(t *testing.T) {
	m := testMap(t)
	good := dnsmessage.Message{Header: dnsmessage.Header{ID: 5}, Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("web.tail.ts.net."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	with := func(f func(*dnsmessage.Message)) []byte {
		q := good
		q.Questions = slices.Clone(good.Questions)
		f(&q)
		b, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, tt := range map[string]struct {
		q    []byte
		code int // -1: no response
	}{
		"empty":         {nil, -1},
		"short":         {[]byte{1, 2, 3}, -1},
		"response":      {with(func(q *dnsmessage.Message) { q.Response = true }), -1},
		"opcode":        {with(func(q *dnsmessage.Message) { q.OpCode = 5 }), int(dnsmessage.RCodeNotImplemented)},
		"no question":   {with(func(q *dnsmessage.Message) { q.Questions = nil }), int(dnsmessage.RCodeFormatError)},
		"two questions": {with(func(q *dnsmessage.Message) { q.Questions = append(q.Questions, q.Questions[0]) }), int(dnsmessage.RCodeFormatError)},
		"cut question":  {with(func(q *dnsmessage.Message) {})[:20], int(dnsmessage.RCodeFormatError)},
		"class":         {with(func(q *dnsmessage.Message) { q.Questions[0].Class = dnsmessage.ClassCHAOS }), int(dnsmessage.RCodeRefused)},
		"loop of names": {append(with(func(q *dnsmessage.Message) {})[:12], 0xc0, 12, 0, 1, 0, 1), int(dnsmessage.RCodeFormatError)},
	} {
		b, forward := Answer(tt.q, m)
		var r dnsmessage.Message
		err := r.Unpack(b)
		if forward || (b == nil) != (tt.code < 0) || b != nil && (err != nil || int(r.RCode) != tt.code) {
			t.Errorf("%s: %x %v", name, b, forward)
		}
	}
	if b, forward := Answer(query("web.tail.ts.net.", dnsmessage.TypeA), nil); !forward || b == nil {
		t.Error("without a map")
	}
}

// TestAnswersFit512: however much control sends.
func TestAnswersFit512(t *testing.T) {
	name := strings.Repeat("abcdefghi.", 23) + "tail.ts.net"
	m := testMap(t, func(r *tailcfg.MapResponse) {
		for i := range 100 {
			r.DNSConfig.ExtraRecords = append(r.DNSConfig.ExtraRecords, tailcfg.DNSRecord{Name: name, Value: netip.AddrFrom16([16]byte{0xfd, 15: byte(i)}).String()})
		}
	})
	b, _ := Answer(query(name+".", dnsmessage.TypeAAAA), m)
	var r dnsmessage.Message
	if err := r.Unpack(b); err != nil || len(r.Answers) != maxAnswers || len(b) > 512 {
		t.Errorf("%d answers in %d bytes: %v", len(r.Answers), len(b), err)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add(query("web.tail.ts.net.", dnsmessage.TypeA))
	f.Add(query("2.0.64.100.in-addr.arpa.", dnsmessage.TypePTR))
	f.Add(query("none.tail.ts.net.", dnsmessage.TypeSOA))
	f.Add(query("example.org.", dnsmessage.TypeALL))
	m := testMap(f)
	f.Fuzz(func(t *testing.T, q []byte) {
		b, forward := Answer(q, m)
		if b == nil {
			if forward {
				t.Fatal("nothing to forward")
			}
			return
		}
		var r dnsmessage.Message
		if err := r.Unpack(b); err != nil || !r.Response || len(b) > 1024 || r.ID != uint16(q[0])<<8|uint16(q[1]) {
			t.Fatalf("%v: %x", err, b)
		}
	})
}

func FuzzLookup(f *testing.F) {
	for _, s := range []string{"web", "web.tail.ts.net.", "a..b", "8.8.8.8", "fe80::1%x", strings.Repeat("a.", 200)} {
		f.Add(s)
	}
	m := testMap(f)
	f.Fuzz(func(t *testing.T, host string) {
		if addrs, _, err := Lookup(m, "tcp", host); (len(addrs) == 0) != (err != nil) {
			t.Fatalf("%v %v", addrs, err)
		}
	})
}

func BenchmarkAnswer(b *testing.B) {
	m := testMap(b)
	q := query("web.tail.ts.net.", dnsmessage.TypeA)
	b.ReportAllocs()
	for b.Loop() {
		Answer(q, m)
	}
}
