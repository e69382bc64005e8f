//go:build linux

package core

import (
	"bytes"
	"net/netip"
	"testing"
)

func FuzzParseRequest(f *testing.F) {
	b := make([]byte, requestHead+3)
	native.PutUint32(b, requestMagic)
	native.PutUint32(b[4:], uint32(kDial))
	native.PutUint32(b[88:], 2)
	native.PutUint32(b[96:], 1)
	native.PutUint32(b[100:], 2)
	f.Add(b)
	f.Add(b[:requestHead])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRequest(b)
		n := 0
		for _, s := range r.str {
			n += len(s)
		}
		if err == nil && n > len(b)-requestHead {
			t.Fatalf("%d bytes of strings in a message of %d", n, len(b))
		}
	})
}

func TestAddr(t *testing.T) {
	for _, s := range []string{"192.0.2.1:80", "[2001:db8::1]:65535"} {
		ap := netip.MustParseAddrPort(s)
		b := appendAddr(nil, ap)
		if len(b) != addrSize || parseAddr(b) != ap {
			t.Errorf("%v became %v", ap, parseAddr(b))
		}
	}
	if b := appendAddr(nil, netip.AddrPort{}); !bytes.Equal(b, make([]byte, addrSize)) || parseAddr(b).IsValid() {
		t.Error("no address is not all zero")
	}
	if parseAddr(nil).IsValid() || parseAddr(bytes.Repeat([]byte{9}, addrSize)).IsValid() {
		t.Error("garbage became an address")
	}
}
