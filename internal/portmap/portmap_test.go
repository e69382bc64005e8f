package portmap

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bubble runs f with a router under virtual time.
func bubble(t *testing.T, f func(t *testing.T, r *router)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRouter(t)
		defer r.close()
		f(t, r)
	})
}

func TestMap(t *testing.T) {
	wan2, wan1, ppp, old := serviceTypes[0], serviceTypes[1], serviceTypes[2], serviceTypes[4]
	for _, tt := range []struct {
		name   string
		set    func(*router)
		cfg    func(*Config)
		proto  Protocol
		port   uint16 // 0: any above 1023
		within time.Duration
		asked  []string
	}{
		{"PCP", func(r *router) { r.pcp, r.port = true, 5000 }, nil, PCP, 5000, 5 * time.Millisecond, []string{"pcp map 41641 suggest 41641"}},
		{"NAT-PMP", func(r *router) { r.pmp, r.port = true, 5000 }, nil, PMP, 5000, 110 * time.Millisecond, []string{"pmp map 41641 suggest 41641"}},
		{"NAT-PMP that knows of PCP", func(r *router) { r.pmp, r.pmpAnswersPCP, r.port = true, true, 5000 }, nil, PMP, 5000, 5 * time.Millisecond, nil},
		{"PCP ahead of the others", func(r *router) { r.pcp, r.pmp, r.upnp = true, true, true }, nil, PCP, 41641, 5 * time.Millisecond, nil},
		{"PCP turned off", func(r *router) { r.pcp, r.pmp, r.upnp = true, true, true }, func(c *Config) { c.DisablePCP = true }, PMP, 41641, 5 * time.Millisecond, nil},
		{"only UPnP turned on", func(r *router) { r.pcp, r.pmp, r.upnp = true, true, true }, func(c *Config) { c.DisablePCP, c.DisablePMP = true, true }, UPnP, 0, 20 * time.Millisecond, nil},
		{"UPnP 2", func(r *router) { r.upnp, r.port = true, 5000 }, nil, UPnP, 5000, 120 * time.Millisecond,
			[]string{"get /desc/root.xml", "AddAnyPortMapping:2 UDP to 192.168.1.7:41641 lease 7200"}},
		{"UPnP 1", func(r *router) { r.upnp, r.services = true, []string{wan1} }, nil, UPnP, 0, time.Second,
			[]string{"get /desc/root.xml", "AddPortMapping:1 UDP to 192.168.1.7:41641 lease 7200"}},
		{"UPnP on PPP", func(r *router) { r.upnp, r.services = true, []string{ppp} }, nil, UPnP, 0, time.Second, nil},
		{"UPnP of old", func(r *router) { r.upnp, r.services = true, []string{old} }, nil, UPnP, 0, time.Second, nil},
		{"UPnP, the best is down", func(r *router) { r.upnp, r.services = true, []string{ppp, wan2}; r.down[wan2] = true }, nil, UPnP, 0, time.Second,
			[]string{"get /desc/root.xml", "AddPortMapping:1 UDP to 192.168.1.7:41641 lease 7200"}},
		{"UPnP with permanent leases alone", func(r *router) { r.upnp, r.upnpErrors = true, []int{upnpOnlyPermanent} }, nil, UPnP, 0, time.Second,
			[]string{"get /desc/root.xml", "AddAnyPortMapping:2 UDP to 192.168.1.7:41641 lease 7200", "AddAnyPortMapping:2 UDP to 192.168.1.7:41641 lease 0"}},
		{"UPnP, port taken", func(r *router) { r.upnp, r.services, r.upnpErrors = true, []string{wan1}, []int{upnpConflict} }, nil, UPnP, 0, time.Second, nil},
		{"UPnP, same port wanted", func(r *router) { r.upnp, r.services, r.upnpErrors = true, []string{wan1}, []int{upnpSamePorts} }, nil, UPnP, 41641, time.Second, nil},
		{"UPnP, the first service refuses", func(r *router) { r.upnp, r.services, r.upnpErrors = true, []string{wan2, wan1}, []int{606} }, nil, UPnP, 0, time.Second, nil},
		{"UPnP, a location that is not the router's", func(r *router) { r.upnp, r.location = true, "http://198.51.100.99:5000/desc/root.xml" }, nil, UPnP, 0, time.Second, nil},
		{"UPnP, a base that is not the router's", func(r *router) { r.upnp, r.urlBase = true, "<URLBase>http://198.51.100.99:5000/</URLBase>" }, nil, UPnP, 0, time.Second, nil},
		{"PCP refuses, NAT-PMP grants", func(r *router) { r.pcp, r.pmp, r.wrongNonce = true, true, true }, nil, PMP, 41641, 3 * time.Second, nil},
		{"PMP refuses, UPnP grants", func(r *router) { r.pmp, r.upnp, r.result = true, true, 2 }, nil, UPnP, 0, time.Second, nil},
		{"PCP refuses, UPnP grants late", func(r *router) { r.pcp, r.upnp, r.result = true, true, 2 }, nil, UPnP, 0, 3 * time.Second, nil},
		{"two requests lost", func(r *router) { r.pcp, r.lose = true, 4 }, nil, PCP, 41641, time.Second, nil},
		{"a private address, allowed", func(r *router) { r.pcp, r.ext = true, netip.MustParseAddr("10.0.0.5") }, func(c *Config) { c.AllowPrivate = true }, PCP, 41641, time.Second, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *router) {
				tt.set(r)
				c, changed := r.client(tt.cfg)
				defer c.Close()
				start := time.Now()
				c.Want(true)
				<-changed
				if d := time.Since(start); d > tt.within {
					t.Errorf("took %v", d)
				}
				ap, ok := c.Mapping()
				if !ok || ap.Port() < 1024 || tt.port != 0 && ap.Port() != tt.port || c.Protocol() != tt.proto {
					t.Errorf("%v, %v by %q", ap, ok, c.Protocol())
				}
				if log := r.took(); tt.asked != nil && !slices.Equal(log, tt.asked) {
					t.Errorf("asked %q", log)
				}
				c.Close()
				if _, ok := c.Mapping(); ok {
					t.Error("a mapping after Close")
				}
				time.Sleep(time.Second)
				if log := r.took(); len(log) == 0 || !strings.Contains(strings.ToLower(log[0]), "delete") {
					t.Errorf("not released: %q", log)
				}
			})
		})
	}
}

// What routers say that is wrong, or not theirs, makes no mapping and no connection to elsewhere.
func TestNoMapping(t *testing.T) {
	a := netip.MustParseAddr
	for _, tt := range []struct {
		name string
		set  func(*router)
	}{
		{"no service", func(r *router) {}},
		{"PCP refuses", func(r *router) { r.pcp, r.result = true, 2 }},
		{"PMP refuses", func(r *router) { r.pmp, r.result = true, 3 }},
		{"PCP from another address", func(r *router) { r.pcp, r.stray = true, true }},
		{"PMP from another address", func(r *router) { r.pmp, r.stray = true, true }},
		{"PCP with another nonce", func(r *router) { r.pcp, r.wrongNonce = true, true }},
		{"PCP for another port", func(r *router) { r.pcp, r.wrongPort = true, true }},
		{"PMP for another port", func(r *router) { r.pmp, r.wrongPort = true, true }},
		{"PCP for no time", func(r *router) { r.pcp, r.lifetime = true, 0 }},
		{"PMP for no time", func(r *router) { r.pmp, r.lifetime = true, 0 }},
		{"PMP for a second", func(r *router) { r.pmp, r.lifetime = true, 1 }},
		{"PCP unspecified", func(r *router) { r.pcp, r.ext = true, a("0.0.0.0") }},
		{"PMP unspecified", func(r *router) { r.pmp, r.ext = true, a("0.0.0.0") }},
		{"UPnP unspecified", func(r *router) { r.upnp, r.ext = true, a("0.0.0.0") }},
		{"PCP private", func(r *router) { r.pcp, r.ext = true, a("192.168.0.4") }},
		{"PMP private", func(r *router) { r.pmp, r.ext = true, a("10.1.2.3") }},
		{"UPnP private", func(r *router) { r.upnp, r.ext = true, a("172.16.3.4") }},
		{"PCP carrier's", func(r *router) { r.pcp, r.ext = true, a("100.64.3.4") }},
		{"PCP loopback", func(r *router) { r.pcp, r.ext = true, a("127.0.0.1") }},
		{"PCP multicast", func(r *router) { r.pcp, r.ext = true, a("224.0.0.1") }},
		{"PCP broadcast", func(r *router) { r.pcp, r.ext = true, a("255.255.255.255") }},
		{"PCP IPv6", func(r *router) { r.pcp, r.ext = true, a("2001:db8::1") }},
		{"UPnP always in conflict", func(r *router) { r.upnp, r.upnpErrors = true, slices.Repeat([]int{upnpConflict}, 1000) }},
		{"UPnP permanent in vain", func(r *router) { r.upnp, r.upnpErrors = true, slices.Repeat([]int{upnpOnlyPermanent}, 1000) }},
		{"UPnP without a service", func(r *router) { r.upnp, r.services = true, nil }},
		{"UPnP without sense", func(r *router) { r.upnp, r.raw = true, "hello\r\n\r\n" }},
		{"UPnP redirects", func(r *router) {
			r.upnp, r.raw = true, "HTTP/1.1 302 x\r\nLocation: http://198.51.100.99/\r\nContent-Length: 0\r\n\r\n"
		}},
		{"UPnP endless", func(r *router) { r.upnp, r.raw = true, "HTTP/1.1 200 x\r\n\r\n"+strings.Repeat("<a>", 1<<17) }},
		{"UPnP endless header", func(r *router) { r.upnp, r.raw = true, "HTTP/1.1 200 x\r\nA: "+strings.Repeat("a", 1<<19) }},
		{"UPnP on no port", func(r *router) { r.upnp, r.location = true, "http://192.168.1.1:0/" }},
		{"UPnP on a closed port", func(r *router) { r.upnp, r.location = true, "http://192.168.1.1:81/" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *router) {
				tt.set(r)
				c, changed := r.client(func(cfg *Config) {
					dial := cfg.DialContext
					cfg.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
						if ap, err := netip.ParseAddrPort(address); err != nil || ap.Addr() != gwAddr {
							t.Errorf("dialled %s", address)
						}
						return dial(ctx, network, address)
					}
				})
				defer c.Close()
				c.Want(true)
				time.Sleep(time.Minute)
				if ap, ok := c.Mapping(); ok || len(changed) > 0 {
					t.Errorf("mapped to %v; %d changes", ap, len(changed))
				}
				// It is not asked again and again.
				n := len(r.took())
				time.Sleep(time.Hour)
				if m := len(r.took()); m > 8*max(n, 1) {
					t.Errorf("%d requests in an hour, %d at first", m, n)
				}
			})
		})
	}
}

func TestRenew(t *testing.T) {
	for _, proto := range []Protocol{PCP, PMP, UPnP} {
		t.Run(string(proto), func(t *testing.T) {
			bubble(t, func(t *testing.T, r *router) {
				r.pcp, r.pmp, r.upnp = proto == PCP, proto == PMP, proto == UPnP
				c, changed := r.client(nil)
				defer c.Close()
				c.Want(true)
				<-changed
				first, _ := c.Mapping()
				r.took()
				time.Sleep(10 * time.Hour)
				if ap, ok := c.Mapping(); !ok || ap != first || len(changed) > 0 {
					t.Errorf("%v, %v, %d changes", ap, ok, len(changed))
				}
				times := 10
				if proto == UPnP {
					times = 30
				}
				if log := r.took(); len(log) < times-1 || len(log) > times {
					t.Errorf("asked %d times in ten hours", len(log))
				}

				// Another address: heard of at the next renewal.
				r.set(func() { r.ext = netip.MustParseAddr("203.0.113.10") })
				<-changed
				if ap, ok := c.Mapping(); !ok || ap.Addr() != r.ext {
					t.Errorf("%v, %v", ap, ok)
				}

				// The router goes: the mapping goes at its time, and not before.
				start := time.Now()
				r.set(func() { r.pcp, r.pmp, r.upnp, r.raw = false, false, false, "x" })
				<-changed
				if _, ok := c.Mapping(); ok || time.Since(start) < 90*time.Minute || time.Since(start) > 2*time.Hour+time.Second {
					t.Errorf("%v after %v", ok, time.Since(start))
				}

				// It comes back.
				r.set(func() { r.pcp, r.pmp, r.upnp, r.raw = proto == PCP, proto == PMP, proto == UPnP, "" })
				<-changed
				if _, ok := c.Mapping(); !ok {
					t.Error("no mapping")
				}
			})
		})
	}
}

func TestIdle(t *testing.T) {
	bubble(t, func(t *testing.T, r *router) {
		r.pcp = true
		c, changed := r.client(nil)
		defer c.Close()
		c.Want(true)
		<-changed
		c.Want(false)
		r.took()
		if _, ok := c.Mapping(); !ok {
			t.Error("gone at once")
		}
		start := time.Now()
		<-changed
		if _, ok := c.Mapping(); ok || time.Since(start) < 110*time.Minute {
			t.Errorf("%v after %v", ok, time.Since(start))
		}
		time.Sleep(24 * time.Hour)
		if log := r.took(); len(log) > 0 {
			t.Errorf("an idle client asked %q", log)
		}
		c.Want(true)
		<-changed
		if _, ok := c.Mapping(); !ok {
			t.Error("no mapping")
		}
	})
}

func TestLostMapping(t *testing.T) {
	for _, tt := range []struct {
		name string
		pcp  bool
		lose func(*router)
		lost bool
	}{
		{"PCP restarts", true, func(r *router) { r.booted, r.port = time.Now(), 6000 }, true},
		{"PMP restarts", false, func(r *router) { r.booted, r.port = time.Now(), 6000 }, true},
		{"PMP, another address", false, func(r *router) { r.ext, r.port = netip.MustParseAddr("203.0.113.10"), 6000 }, true},
		{"nothing happened", true, func(r *router) { r.port = 6000 }, false},
		{"a clock somewhat slow", true, func(r *router) { r.booted = r.booted.Add(30 * time.Second) }, false},
		{"a clock that stood still", true, func(r *router) { r.booted, r.port = r.booted.Add(9*time.Minute), 6000 }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *router) {
				r.pcp, r.pmp = tt.pcp, !tt.pcp
				c, changed := r.client(nil)
				defer c.Close()
				c.Want(true)
				<-changed
				time.Sleep(10 * time.Minute)
				r.set(func() { tt.lose(r) })
				res, err := c.Probe(t.Context())
				if err != nil || res.PCP != tt.pcp || res.PMP == tt.pcp || res.UPnP {
					t.Errorf("%+v, %v", res, err)
				}
				time.Sleep(time.Second)
				if ap, ok := c.Mapping(); !ok || (ap.Port() == 6000) != tt.lost || (len(changed) > 0) != tt.lost {
					t.Errorf("%v, %v, %d changes", ap, ok, len(changed))
				}
			})
		})
	}
}

func TestNetworkChanged(t *testing.T) {
	bubble(t, func(t *testing.T, r *router) {
		r.pmp = true
		port, gw, err := uint16(1111), gwAddr, error(nil)
		c, changed := r.client(func(cfg *Config) {
			cfg.LocalPort = func() uint16 { r.mu.Lock(); defer r.mu.Unlock(); return port }
			cfg.Gateway = func() (netip.Addr, netip.Addr, error) { r.mu.Lock(); defer r.mu.Unlock(); return gw, selfAddr, err }
		})
		defer c.Close()
		c.Want(true)
		<-changed
		c.NetworkChanged()
		synctest.Wait()
		if log := r.took(); len(log) != 1 || len(changed) != 0 {
			t.Errorf("nothing changed, but %q", log)
		}
		time.Sleep(time.Minute)
		r.set(func() { r.booted, r.port = time.Now(), 6000 }) // it restarts, and the link goes and comes back
		c.NetworkChanged()
		c.NetworkChanged()
		<-changed
		if ap, ok := c.Mapping(); !ok || ap.Port() != 6000 {
			t.Errorf("%v, %v", ap, ok)
		}
		c.NetworkChanged()
		synctest.Wait()
		if log := r.took(); len(log) != 1 {
			t.Errorf("%q", log)
		}
		r.set(func() { port, r.port = 2222, 0 })
		c.NetworkChanged()
		<-changed
		if ap, ok := c.Mapping(); !ok || ap.Port() != 2222 {
			t.Errorf("%v, %v", ap, ok)
		}
		if log := r.took(); !slices.Equal(log, []string{"pmp delete 1111", "pmp map 2222 suggest 2222"}) {
			t.Errorf("%q", log)
		}
		r.set(func() { gw = netip.MustParseAddr("192.168.1.254") }) // where nobody answers
		c.NetworkChanged()
		<-changed
		if _, ok := c.Mapping(); ok {
			t.Error("a mapping of another network")
		}
		r.set(func() { gw, err = gwAddr, errors.New("no route") })
		c.NetworkChanged()
		time.Sleep(time.Minute)
		if _, ok := c.Mapping(); ok {
			t.Error("a mapping without a gateway")
		}
		r.set(func() { err = nil })
		c.NetworkChanged()
		<-changed
		if _, ok := c.Mapping(); !ok {
			t.Error("no mapping")
		}
	})
}

// TestNewsDuringAttempt: an attempt that was under way when there was a reason for another does not put that off when it fails.
func TestNewsDuringAttempt(t *testing.T) {
	for name, news := range map[string]func(*Client){
		"network changed": (*Client).NetworkChanged,
		"router heard":    func(c *Client) { c.Probe(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *router) {
				r.pcp = true
				gw := netip.MustParseAddr("192.168.1.99") // nobody answers
				c, changed := r.client(func(cfg *Config) {
					cfg.Gateway = func() (netip.Addr, netip.Addr, error) { r.mu.Lock(); defer r.mu.Unlock(); return gw, selfAddr, nil }
				})
				defer c.Close()
				c.Want(true)
				time.Sleep(quickWindow + minRetry + quickWindow/2) // in the middle of the second attempt
				r.set(func() { gw = gwAddr })
				news(c)
				start := time.Now()
				<-changed
				if d := time.Since(start); d > quickWindow {
					t.Errorf("a mapping after %v", d)
				}
			})
		})
	}
}

func TestProbe(t *testing.T) {
	bubble(t, func(t *testing.T, r *router) {
		c, _ := r.client(nil)
		defer c.Close()
		for range 2 {
			for i := range 8 {
				want := Result{PCP: i&1 != 0, PMP: i&2 != 0, UPnP: i&4 != 0}
				r.set(func() { r.pcp, r.pmp, r.upnp = want.PCP, want.PMP, want.UPnP })
				start := time.Now()
				if res, err := c.Probe(t.Context()); err != nil || res != want || time.Since(start) > probeWindow {
					t.Errorf("%+v, want %+v, %v, after %v", res, want, err, time.Since(start))
				}
			}
		}
		if log := r.took(); len(log) > 0 {
			t.Errorf("a probe asked for %q", log)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		r.set(func() { r.pcp = false })
		start := time.Now()
		if _, err := c.Probe(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 10*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		go c.Close()
		c.Close()
		if _, err := c.Probe(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
		c.Want(true)
		c.NetworkChanged()
	})
}

func TestDisabled(t *testing.T) {
	bubble(t, func(t *testing.T, r *router) {
		r.pcp = true
		for _, cfg := range []Config{{Disabled: true}, {DisablePCP: true, DisablePMP: true, DisableUPnP: true}} {
			c, _ := r.client(func(c *Config) {
				c.Disabled, c.DisablePCP, c.DisablePMP, c.DisableUPnP = cfg.Disabled, cfg.DisablePCP, cfg.DisablePMP, cfg.DisableUPnP
				c.ListenPacket = func(context.Context, string, string) (net.PacketConn, error) {
					t.Error("a socket")
					return nil, errors.New("no")
				}
			})
			c.Want(true)
			c.NetworkChanged()
			if res, err := c.Probe(t.Context()); !errors.Is(err, ErrDisabled) || res != (Result{}) {
				t.Errorf("%+v, %v", res, err)
			}
			time.Sleep(time.Hour)
			c.Close()
		}
	})
}

// Close in the middle of anything is quick and leaves nothing behind.
func TestCloseAnyTime(t *testing.T) {
	for _, proto := range []Protocol{PCP, PMP, UPnP, ""} {
		for d := time.Duration(0); d < 130*time.Millisecond; d += 700 * time.Microsecond {
			bubble(t, func(t *testing.T, r *router) {
				r.pcp, r.pmp, r.upnp = proto == PCP, proto == PMP, proto == UPnP
				c, _ := r.client(nil)
				c.Want(true)
				time.Sleep(d)
				start := time.Now()
				c.Close()
				if took := time.Since(start); took > releaseTimeout {
					t.Errorf("Close after %v took %v", d, took)
				}
			})
		}
	}
}

func TestEpoch(t *testing.T) {
	t0 := time.Now()
	for _, tt := range []struct {
		server  uint32
		elapsed time.Duration
		lost    bool
	}{
		{1000, 0, false}, {1001, time.Second, false}, {999, 0, false}, {998, 0, true},
		{1100, 100 * time.Second, false}, {1095, 100 * time.Second, false}, {1080, 100 * time.Second, true}, {1120, 100 * time.Second, true},
		{0, time.Hour, true}, {1, time.Hour, true}, {1<<32 - 1, time.Second, true},
	} {
		if lost := (epoch{1000, t0}).next(tt.server, t0.Add(tt.elapsed)); lost != tt.lost {
			t.Errorf("%d after %v: %v", tt.server, tt.elapsed, lost)
		}
	}
}

// The system's sockets do as the ones in memory.
func TestRealSockets(t *testing.T) {
	pc, err := net.ListenPacket("udp4", "127.0.0.2:5351")
	if err != nil {
		t.Skipf("no router on loopback: %v", err)
	}
	r := &router{t: t, pmp: true, ext: extAddr, lifetime: 7200, booted: time.Now()}
	r.wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, src, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			r.mu.Lock()
			out := r.pxp(b[:n], netip.AddrPort{})
			r.mu.Unlock()
			for _, o := range out {
				pc.WriteTo(o, src)
			}
		}
	})
	defer r.wg.Wait()
	defer pc.Close()
	changed := make(chan struct{}, 1)
	c := New(Config{
		LocalPort: func() uint16 { return 41641 }, Changed: func() { changed <- struct{}{} }, DisableUPnP: true,
		Gateway: func() (netip.Addr, netip.Addr, error) {
			return netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.1"), nil
		},
	})
	defer c.Close()
	for tries := 1; ; tries++ { // a busy machine may need more time than a probe takes
		res, err := c.Probe(t.Context())
		if err != nil || res.PCP || !res.PMP && tries == 100 {
			t.Fatalf("%+v, %v", res, err)
		}
		if res.PMP {
			break
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Probe(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	c.Want(true)
	<-changed
	if ap, ok := c.Mapping(); !ok || ap != netip.AddrPortFrom(extAddr, 41641) {
		t.Errorf("%v, %v", ap, ok)
	}
}
