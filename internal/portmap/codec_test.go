package portmap

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestVectors reads testdata/vectors/portmap.json.
func TestVectors(t *testing.T) {
	raw, err := os.ReadFile("../../testdata/vectors/portmap.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Requests []struct{ Comment, Kind, Hex string }
		Replies  []struct {
			Comment, Hex, External  string
			Internal, Port          uint16
			Lifetime, Epoch, Result uint32
			Error                   bool
		}
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	self, external := netip.MustParseAddr("192.168.1.7"), netip.MustParseAddrPort("203.0.113.9:5000")
	nonce := [12]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	requests := map[string][]byte{
		"pmp-address":  appendPMPAddress(nil),
		"pmp-map":      appendPMPMap(nil, 41641, 5000, 7200),
		"pmp-delete":   appendPMPMap(nil, 41641, 0, 0),
		"pcp-announce": appendPCPAnnounce(nil, self),
		"pcp-map":      appendPCPMap(nil, self, nonce, 41641, external, 7200),
		"pcp-delete":   appendPCPMap(nil, self, nonce, 41641, external, 0),
	}
	if len(v.Requests) != len(requests) || len(v.Replies) == 0 {
		t.Errorf("%d requests, %d replies", len(v.Requests), len(v.Replies))
	}
	for _, r := range v.Requests {
		if got := hex.EncodeToString(requests[r.Kind]); got != r.Hex {
			t.Errorf("%s: %s", r.Comment, got)
		}
	}
	for _, r := range v.Replies {
		got, err := parsePXP(unhex(t, r.Hex))
		if (err != nil) != r.Error {
			t.Errorf("%s: %v", r.Comment, err)
		}
		if err != nil {
			continue
		}
		want := netip.AddrPortFrom(netip.Addr{}, r.Port)
		if r.External != "" {
			want = netip.MustParseAddrPort(r.External)
		}
		if got.external != want || got.internal != r.Internal || got.lifetime != r.Lifetime || got.epoch != r.Epoch || uint32(got.result) != r.Result {
			t.Errorf("%s: %+v", r.Comment, got)
		}
	}
	nothing := appendPCPMap(nil, self, nonce, 41641, netip.AddrPort{}, 7200)
	if got := hex.EncodeToString(nothing[40:]); got != "a2a9000000000000000000000000ffff00000000" {
		t.Errorf("nothing suggested: %s", got)
	}
}

func TestParsePXP(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     pxpReply
		err      error
	}{
		{"PMP address", "00 80 0000 00000e10 cb007109", pxpReply{op: 0, epoch: 3600, external: netip.MustParseAddrPort("203.0.113.9:0")}, nil},
		{"PMP mapping", "00 81 0000 00000e10 a2a9 1388 00001c20", pxpReply{op: 1, epoch: 3600, lifetime: 7200, internal: 41641,
			external: netip.AddrPortFrom(netip.Addr{}, 5000)}, nil},
		{"PMP error, short", "00 81 0002", pxpReply{op: 1, result: 2}, nil},
		{"PMP error", "00 80 0001 00000e10", pxpReply{result: 1, epoch: 3600}, nil},
		{"PCP announce", "02 80 00 0c 00000000 00000e10 000000000000000000000000", pxpReply{version: 2, result: 12, epoch: 3600}, nil},
		{"PCP map", "02 81 00 00 00001c20 00000e10 000000000000000000000000 0102030405060708090a0b0c 11 000000 a2a9 1388 00000000000000000000ffffcb007109",
			pxpReply{version: 2, op: 1, epoch: 3600, lifetime: 7200, nonce: [12]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, protocol: 17, internal: 41641,
				external: netip.MustParseAddrPort("203.0.113.9:5000")}, nil},
		{"nothing", "", pxpReply{}, errMalformed},
		{"a request", "00 00 0000", pxpReply{}, errMalformed},
		{"PMP address cut", "00 80 0000 00000e10 cb0071", pxpReply{}, errMalformed},
		{"PMP address long", "00 80 0000 00000e10 cb00710900", pxpReply{}, errMalformed},
		{"PMP mapping cut", "00 81 0000 00000e10 a2a9 1388 00001c", pxpReply{}, errMalformed},
		{"PMP error too long", "00 80 0001" + strings.Repeat("00", 13), pxpReply{}, errMalformed},
		{"PMP another op", "00 82 0000 00000e10 a2a9 1388 00001c20", pxpReply{}, errMalformed},
		{"PCP cut", "02 80 00 00 00000000 00000e10 0000000000000000000000", pxpReply{}, errMalformed},
		{"PCP not of words", "02 80 00 00 00000000 00000e10 00000000000000000000000000", pxpReply{}, errMalformed},
		{"PCP map without a map", "02 81 00 00 00000000 00000e10 000000000000000000000000", pxpReply{}, errMalformed},
		{"PCP too long", "02 80 0000" + strings.Repeat("00", 1100), pxpReply{}, errMalformed},
		{"another version", "03 80 00 00", pxpReply{}, errVersion},
	} {
		got, err := parsePXP(unhex(t, tt.in))
		if !errors.Is(err, tt.err) || err == nil && !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %+v, %v", tt.name, got, err)
		}
	}
	if err := (&pxpReply{version: 2, result: 2}).resultError(); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

func TestPublic(t *testing.T) {
	for _, a := range []string{"203.0.113.9", "8.8.8.8", "100.128.0.1", "172.32.0.1"} {
		if !public(netip.MustParseAddr(a)) {
			t.Errorf("%s is public", a)
		}
	}
	for _, a := range []string{"0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.1.1", "172.16.0.1", "192.0.0.8", "192.168.1.1",
		"224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "2001:db8::1", "::ffff:8.8.8.8"} {
		if public(netip.MustParseAddr(a)) {
			t.Errorf("%s is not public", a)
		}
	}
	if public(netip.Addr{}) {
		t.Error("no address is public")
	}
}

func TestParseDescription(t *testing.T) {
	at := netip.MustParseAddrPort("192.168.1.1:5000")
	svc := func(typ, control string) string {
		return "<service><serviceType>" + typ + "</serviceType>\n<controlURL>" + control + "</controlURL></service>"
	}
	wan2, wan1 := serviceTypes[0], serviceTypes[1]
	for _, tt := range []struct {
		name, in string
		want     []service
	}{
		{"absolute path", svc(wan1, "/ctl/IPConn"), []service{{wan1, "/ctl/IPConn", at}}},
		{"relative path", svc(wan1, "ctl?a=b&amp;c"), []service{{wan1, "/desc/ctl?a=b&c", at}}},
		{"whole URL", svc(wan1, "http://192.168.1.1:81/ctl"), []service{{wan1, "/ctl", netip.MustParseAddrPort("192.168.1.1:81")}}},
		{"a URL of elsewhere", svc(wan1, "HTTP://example.com/ctl"), []service{{wan1, "/ctl", netip.MustParseAddrPort("192.168.1.1:80")}}},
		{"base", "<URLBase> http://192.168.1.1:49000/x/y </URLBase>" + svc(wan1, "ctl"), []service{{wan1, "/x/ctl", netip.MustParseAddrPort("192.168.1.1:49000")}}},
		{"best first", svc(wan1, "/1") + svc("urn:x", "/x") + svc(wan2, "/2"), []service{{wan2, "/2", at}, {wan1, "/1", at}}},
		{"CDATA, comments, attributes", `<?xml version="1.0"?><!DOCTYPE a><!-- <service> --><d:service a="x>y" ><d:serviceType>` + wan1 +
			`</d:serviceType><d:controlURL><![CDATA[/c]]></d:controlURL></d:service>`, []service{{wan1, "/c", at}}},
		{"HTTPS", svc(wan1, "https://192.168.1.1/ctl"), nil},
		{"a line break in the path", svc(wan1, "/ctl\r\nX: y"), nil},
		{"port 0", svc(wan1, "http://192.168.1.1:0/ctl"), nil},
		{"no control URL", "<service><serviceType>" + wan1 + "</serviceType></service>", nil},
		{"outside of a service", "<serviceType>" + wan1 + "</serviceType><controlURL>/c</controlURL></service>", nil},
		{"cut", svc(wan1, "/c")[:60], nil},
		{"cut in a comment", "<!-- " + svc(wan1, "/c"), nil},
		{"cut in CDATA", "<![CDATA[ " + svc(wan1, "/c"), nil},
		{"cut in a declaration", "<?xml ", nil},
		{"too long", svc(wan1, "/"+strings.Repeat("a", maxText)), nil},
		{"nothing", "", nil},
	} {
		if got := parseDescription([]byte(tt.in), at, "/desc/root.xml?x=/"); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
	if got := parseDescription([]byte(strings.Repeat(svc(wan1, "/c"), 100)), at, "/"); len(got) != maxServices {
		t.Errorf("%d services", len(got))
	}
}
