package portmap

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// pinhole changes a client's configuration to keep a pinhole.
func pinhole(cfg *Config) {
	cfg.IPv6 = true
	cfg.Gateway = func() (netip.Addr, netip.Addr, error) { return gw6Addr, self6, nil }
}

func TestPinhole(t *testing.T) {
	bubble(t, func(t *testing.T, r *router) {
		r.pcp, r.pmp, r.upnp, r.ext = true, true, true, self6
		c, changed := r.client(pinhole)
		defer c.Close()
		c.Want(true)
		<-changed
		want := netip.AddrPortFrom(self6, 41641)
		if ap, ok := c.Mapping(); !ok || ap != want || c.Protocol() != PCP {
			t.Errorf("%v, %v by %q", ap, ok, c.Protocol())
		}
		if log := r.took(); !slices.Equal(log, []string{"pcp map 41641 suggest 41641"}) {
			t.Errorf("asked %q", log)
		}
		time.Sleep(10 * time.Hour)
		if log := r.took(); len(log) < 9 || len(log) > 10 {
			t.Errorf("asked %d times in ten hours", len(log))
		}
		// It restarts: the pinhole is made again.
		r.set(func() { r.booted = time.Now() })
		if res, err := c.Probe(t.Context()); err != nil || res != (Result{PCP: true}) {
			t.Errorf("%+v, %v", res, err)
		}
		time.Sleep(time.Second)
		if log := r.took(); !slices.Equal(log, []string{"pcp map 41641 suggest 41641"}) {
			t.Errorf("after a restart %q", log)
		}
		c.Close()
		time.Sleep(time.Second)
		if log := r.took(); !slices.Equal(log, []string{"pcp delete 41641"}) {
			t.Errorf("not released: %q", log)
		}
	})
}

// TestNoPinhole: what makes none, and is not asked again and again.
func TestNoPinhole(t *testing.T) {
	a := netip.MustParseAddr
	for _, tt := range []struct {
		name string
		set  func(*router)
		gw   netip.Addr
		self netip.Addr
		port uint16
	}{
		{"no PCP", func(r *router) { r.pmp, r.upnp = true, true }, gw6Addr, self6, 1},
		{"an IPv4 gateway", func(r *router) {}, gwAddr, self6, 1},
		{"no global address", func(r *router) {}, gw6Addr, a("fd00::7"), 1},
		{"a link-local address", func(r *router) {}, gw6Addr, a("fe80::7"), 1},
		{"no socket", func(r *router) {}, gw6Addr, self6, 0},
		{"refused", func(r *router) { r.result = 2 }, gw6Addr, self6, 1},
		{"lies: an IPv4 address", func(r *router) { r.ext = extAddr }, gw6Addr, self6, 1},
		{"lies: unspecified", func(r *router) { r.ext = netip.IPv6Unspecified() }, gw6Addr, self6, 1},
		{"lies: loopback", func(r *router) { r.ext = netip.IPv6Loopback() }, gw6Addr, self6, 1},
		{"lies: link-local", func(r *router) { r.ext = a("fe80::1") }, gw6Addr, self6, 1},
		{"lies: multicast", func(r *router) { r.ext = a("ff02::1") }, gw6Addr, self6, 1},
		{"lies: inside the tailnet", func(r *router) { r.ext = a("fd7a:115c:a1e0::1") }, gw6Addr, self6, 1},
		{"lies: another nonce", func(r *router) { r.wrongNonce = true }, gw6Addr, self6, 1},
		{"lies: another port", func(r *router) { r.wrongPort = true }, gw6Addr, self6, 1},
		{"lies: for no time", func(r *router) { r.lifetime = 0 }, gw6Addr, self6, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *router) {
				r.pcp, r.ext = true, self6
				if tt.name == "no PCP" {
					r.pcp = false
				}
				tt.set(r)
				c, changed := r.client(func(cfg *Config) {
					pinhole(cfg)
					cfg.LocalPort = func() uint16 { return tt.port }
					cfg.Gateway = func() (netip.Addr, netip.Addr, error) { return tt.gw, tt.self, nil }
				})
				defer c.Close()
				c.Want(true)
				time.Sleep(time.Minute)
				if ap, ok := c.Mapping(); ok || len(changed) > 0 {
					t.Errorf("mapped to %v; %d changes", ap, len(changed))
				}
				n := len(r.took())
				time.Sleep(time.Hour)
				if m := len(r.took()); m > 8*max(n, 1) {
					t.Errorf("%d requests in an hour, %d at first", m, n)
				}
			})
		})
	}
}

// TestPinholeElsewhere: prefix translation (RFC 6296) gives another address, which is then the one to be reached at.
func TestPinholeElsewhere(t *testing.T) {
	bubble(t, func(t *testing.T, r *router) {
		r.pcp, r.ext, r.port = true, netip.MustParseAddr("2001:db8:9::7"), 5000
		c, changed := r.client(pinhole)
		defer c.Close()
		c.Want(true)
		<-changed
		if ap, ok := c.Mapping(); !ok || ap != netip.AddrPortFrom(r.ext, 5000) {
			t.Errorf("%v, %v", ap, ok)
		}
	})
}
