package portmap

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// FuzzPXP parses replies of NAT-PMP and PCP.
func FuzzPXP(f *testing.F) {
	self := netip.MustParseAddr("192.168.1.7")
	f.Add([]byte{0, 128, 0, 0, 0, 0, 0, 9, 203, 0, 113, 9})
	f.Add([]byte{0, 129, 0, 0, 0, 0, 0, 9, 0xa2, 0xa9, 0xa2, 0xa9, 0, 0, 28, 32})
	f.Add([]byte{0, 129, 0, 1})
	f.Add(append([]byte{2, 0x81}, appendPCPMap(nil, self, [12]byte{1}, 1, netip.AddrPort{}, 7200)[2:]...))
	f.Add(append([]byte{2, 0x80}, appendPCPAnnounce(nil, self)[2:]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parsePXP(b)
		if err != nil {
			return
		}
		if r.version != pmpVersion && r.version != pcpVersion || len(b) > pcpMaxLen {
			t.Errorf("%+v", r)
		}
		var fd found
		fd.pxp(b)
		epoch{1000, time.Unix(0, 0)}.next(r.epoch, time.Unix(1000, 0))
		c := New(Config{})
		defer c.Close()
		m, err := c.granted(PCP, target{}, r.external, r.lifetime, r.epoch)
		if err == nil && (!public(m.external.Addr()) || m.external.Port() == 0 || m.expires.Sub(m.got) < minLifetime || m.expires.Sub(m.got) > maxLifetime) {
			t.Errorf("granted %+v", m)
		}
	})
}

// FuzzSSDP parses answers of a search.
func FuzzSSDP(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nLOCATION: http://192.168.1.1:5000/rootDesc.xml\r\n\r\n"))
	f.Add([]byte("HTTP/1.0 200 OK\nlocation:http://[::1]/\nUSN:uuid:x::urn:schemas-upnp-org:device:InternetGatewayDevice:2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if u, ok := parseSSDP(b); ok && (u.host == "" || u.port == 0 || !validPath(u.path) || strings.ContainsAny(u.path, " \r\n")) {
			t.Errorf("%+v", u)
		}
	})
}

// FuzzXML goes through descriptions and replies.
func FuzzXML(f *testing.F) {
	f.Add([]byte(`<?xml version="1.0"?><!-- <service> --><root><URLBase>http://192.168.1.1:80/x/</URLBase><service><serviceType>` + serviceTypes[1] +
		`</serviceType><controlURL a='>'><![CDATA[/ctl]]></controlURL></service></root>`))
	f.Add([]byte(`<s:Envelope><NewExternalIPAddress>203.0.113.9</NewExternalIPAddress><errorCode>7&lt;18</errorCode></s:Envelope>`))
	f.Add([]byte(`<a b="<![CDATA[<!--<?`))
	at := netip.MustParseAddrPort("192.168.1.1:5000")
	f.Fuzz(func(t *testing.T, b []byte) {
		services := parseDescription(b, at, "/desc/root.xml")
		if len(services) > maxServices {
			t.Errorf("%d services", len(services))
		}
		for _, s := range services {
			if s.at.Addr() != at.Addr() || s.at.Port() == 0 || !validPath(s.control) {
				t.Errorf("%+v", s)
			}
		}
		if v, ok := element(b, "errorCode"); ok && len(v) > maxText {
			t.Errorf("%d bytes of text", len(v))
		}
	})
}
