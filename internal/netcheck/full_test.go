package netcheck

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/natlab"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

var certificate = sync.OnceValue(func() tls.Certificate {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, k.Public(), k)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
})

func pin() string {
	sum := sha256.Sum256(certificate().Certificate[0])
	return "sha256-raw:" + hex.EncodeToString(sum[:])
}

// relay serves HTTPS and HTTP as a relay does at an address where the bed has none yet, or as a captive portal does.
func (b *bed) relay(t *testing.T, id int, rtt time.Duration, portal bool) {
	a := netip.MustParseAddr(addr(id))
	b.dist[a] = rtt
	h := b.net.Host(a.String())
	serve := func(port string, f func(net.Conn)) {
		l, err := h.Listen("tcp4", port)
		if err != nil {
			t.Fatal(err)
		}
		b.stop = append(b.stop, l.Close)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { f(c); c.Close() }()
			}
		}()
	}
	serve(":443", func(c net.Conn) {
		if portal {
			return
		}
		tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificate()}})
		req, err := http.ReadRequest(bufio.NewReader(tc))
		if err != nil || req.URL.Path != "/derp/latency-check" {
			return
		}
		fmt.Fprint(tc, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		tc.Close()
	})
	serve(":80", func(c net.Conn) {
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		if portal {
			fmt.Fprint(c, "HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\nContent-Length: 0\r\n\r\n")
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 204 No Content\r\nX-Tailscale-Response: response %s\r\n\r\n", req.Header.Get("X-Tailscale-Challenge"))
	})
	pc, err := h.ListenPacket("udp4", ":3478")
	if err != nil {
		t.Fatal(err)
	}
	b.stop = append(b.stop, pc.Close)
	go serveSTUN(pc)
}

func fullMap(cert string) *tailcfg.DERPMap {
	node := func(id int) *tailcfg.DERPNode {
		return &tailcfg.DERPNode{Name: "n", HostName: "relay.example", IPv4: addr(id), IPv6: "none", CertName: cert, CanPort80: true}
	}
	return derpMap(region(1, node(1)), region(2, node(2)))
}

func TestFull(t *testing.T) {
	outside := netip.MustParseAddr("203.0.113.9")
	for _, tt := range []struct {
		name                               string
		udp, portal                        bool
		cert                               string
		nat                                *natlab.Config
		hairpin, captive, varies, portmaps tailcfg.OptBool
		https                              bool
		home                               int
	}{
		{"open", true, false, pin(), nil, tailcfg.True, "", tailcfg.False, tailcfg.True, false, 2},
		{"UDP blocked", false, false, pin(), nil, "", tailcfg.False, "", tailcfg.True, true, 2},
		{"UDP blocked, wrong certificate", false, false, "sha256-raw:00", nil, "", tailcfg.False, "", tailcfg.True, false, 1},
		{"UDP blocked, unknown authority", false, false, "", nil, "", tailcfg.False, "", tailcfg.True, false, 1},
		{"captive portal", false, true, pin(), nil, "", tailcfg.True, "", tailcfg.True, false, 1},
		{"NAT that hairpins", true, false, pin(), &natlab.Config{Mapping: natlab.EndpointIndependent, Filtering: natlab.AddressAndPortDependent, Hairpin: true},
			tailcfg.True, "", tailcfg.False, tailcfg.True, false, 2},
		{"NAT that does not", true, false, pin(), &natlab.Config{Mapping: natlab.EndpointIndependent}, tailcfg.False, "", tailcfg.False, tailcfg.True, false, 2},
		{"NAT that varies", true, false, pin(), &natlab.Config{Mapping: natlab.AddressAndPortDependent}, tailcfg.False, "", tailcfg.True, tailcfg.True, false, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dm := fullMap(tt.cert)
				b := newBed(t, dm, nil)
				defer b.close()
				b.udp = tt.udp
				b.relay(t, 1, 60*ms, tt.portal)
				b.relay(t, 2, 20*ms, tt.portal)
				b.dist[outside] = 2 * ms
				if tt.udp {
					b.dist[netip.MustParseAddr("198.51.100.7")] = 2 * ms
				}
				if tt.nat != nil {
					tt.nat.Inside, tt.nat.Outside = netip.MustParsePrefix("198.51.100.0/24"), outside
					lab := natlab.New(nil)
					lab.Add(*tt.nat)
					b.net.SetRouter(lab)
				}
				cfg := b.config(dm)
				cfg.Full = true
				cfg.PortMap = func(context.Context) (PortMapping, error) { return PortMapping{PCP: true}, nil }
				start := time.Now()
				r, err := Run(t.Context(), cfg)
				if err != nil {
					t.Fatal(err)
				}
				if r.UDP != tt.udp || r.Hairpin != tt.hairpin || r.CaptivePortal != tt.captive || r.MappingVaries != tt.varies || r.PCP != tt.portmaps || r.Home != tt.home {
					t.Errorf("%+v", r)
				}
				if (len(r.LatencyHTTPS) == 2) != tt.https || tt.https && r.LatencyHTTPS[2] != 20*ms {
					t.Errorf("HTTPS %v", r.LatencyHTTPS)
				}
				if d := time.Since(start); tt.udp && d > time.Second || d > DefaultFullTimeout {
					t.Errorf("took %v", d)
				}
				if ni := r.NetInfo(); ni.PCP != tailcfg.True || ni.UPnP != tailcfg.False || ni.WorkingUDP != tailcfg.Bool(tt.udp) {
					t.Errorf("%+v", ni)
				}
			})
		})
	}
}

// TestProxied: where only an HTTP proxy leads out, relays are measured through it, by their names.
func TestProxied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dm := derpMap(
			region(1, &tailcfg.DERPNode{HostName: "far.example", IPv4: addr(1), IPv6: "none", CertName: pin()}),
			region(2, &tailcfg.DERPNode{HostName: "near.example", IPv4: addr(2), IPv6: "none", CertName: pin()}))
		b := newBed(t, dm, nil)
		defer b.close()
		b.udp = false
		b.relay(t, 1, 60*ms, false)
		b.relay(t, 2, 20*ms, false)
		out := b.net.Host("192.0.2.200") // the proxy's leg to the Internet
		cfg := b.config(dm)
		cfg.Full = true
		cfg.Proxy = func(u *url.URL) (*url.URL, error) { return &url.URL{Scheme: "http", Host: "proxy.example:3128"}, nil }
		cfg.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			if address != "proxy.example:3128" {
				return nil, errors.New("no way but by the proxy")
			}
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				br := bufio.NewReader(far)
				req, err := http.ReadRequest(br)
				if err != nil {
					return
				}
				to := map[string]string{"far.example:443": addr(1), "near.example:443": addr(2)}[req.Host]
				c, err := out.DialContext(ctx, "tcp", to+":443")
				if err != nil {
					return
				}
				defer c.Close()
				io.WriteString(far, "HTTP/1.1 200 OK\r\n\r\n")
				go io.Copy(c, br)
				io.Copy(far, c)
			}()
			return near, nil
		}
		r, err := Run(t.Context(), cfg)
		if err != nil || r.Home != 2 || len(r.LatencyHTTPS) != 2 || r.LatencyHTTPS[2] >= r.LatencyHTTPS[1] {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// shared is a socket that its owner reads and lends out.
type shared struct {
	pc *memnet.PacketConn
	mu sync.Mutex
	f  func(b []byte, src netip.AddrPort)
}

func (s *shared) Families() (v4, v6 bool) { return true, false }

func (s *shared) WriteSTUN(b []byte, dst netip.AddrPort) error {
	_, err := s.pc.WriteToUDPAddrPort(b, dst)
	return err
}

func (s *shared) OnSTUN(f func(b []byte, src netip.AddrPort)) func() {
	set := func(f func(b []byte, src netip.AddrPort)) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.f = f
	}
	set(f)
	return func() { set(nil) }
}

func (s *shared) read() {
	b := make([]byte, 1500)
	for {
		n, src, err := s.pc.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.f != nil && stun.Is(b[:n]) {
			s.f(b[:n], src)
		}
		s.mu.Unlock()
	}
}

func TestTransport(t *testing.T) {
	for _, full := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			dm := derpMap(region(1), region(2))
			b := newBed(t, dm, map[int]time.Duration{1: 60 * ms, 2: 20 * ms})
			defer b.close()
			b.dist[netip.MustParseAddr("198.51.100.7")] = ms
			pc, err := b.host.ListenPacket("udp4", ":41641")
			if err != nil {
				t.Fatal(err)
			}
			s := &shared{pc: pc}
			go s.read()
			defer pc.Close()
			cfg := b.config(dm)
			cfg.Transport, cfg.Full = s, full
			if !full {
				cfg.ListenPacket = func(context.Context, string, string) (net.PacketConn, error) {
					t.Error("a socket")
					return nil, errors.New("no")
				}
			}
			r, err := Run(t.Context(), cfg)
			if err != nil || r.Home != 2 || r.GlobalV4 != netip.MustParseAddrPort("198.51.100.7:41641") || (r.Hairpin == tailcfg.True) != full {
				t.Errorf("%+v, %v", r, err)
			}
			if s.f != nil {
				t.Error("not given back")
			}
		})
	}
}

func TestCaptivePlan(t *testing.T) {
	node := func(ip string, port80 bool) *tailcfg.DERPNode { return &tailcfg.DERPNode{IPv4: ip, CanPort80: port80} }
	dm := derpMap(
		region(1, node("192.0.2.1", true), node("192.0.2.2", false), nil),
		region(2, node("", true), node("none", true), node("2001:db8::1", true)),
		region(3, node("192.0.2.3", true)))
	var got []string
	for _, p := range captivePlan(dm, 3) {
		got = append(got, p.Node.IPv4)
	}
	if fmt.Sprint(got) != "[192.0.2.3 192.0.2.1]" {
		t.Errorf("%v", got)
	}
	for id := range 50 {
		dm.Regions[id+10] = region(id+10, node("192.0.2.9", true), node("192.0.2.9", true))
	}
	if n := len(captivePlan(dm, 0)); n != captiveNodes {
		t.Errorf("%d probes", n)
	}
}
