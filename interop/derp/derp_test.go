// Package derp proves that our relay and relay client speak with upstream's.
package derp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go4.org/mem"
	upderp "tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/netmon"
	upstun "tailscale.com/net/stun"
	"tailscale.com/net/stun/stuntest"
	upcfg "tailscale.com/tailcfg"
	upkey "tailscale.com/types/key"
	"tailscale.com/types/nettype"

	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"github.com/tailnode/tailnode/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func within[T any](tb testing.TB, what string, c <-chan T) (v T) {
	tb.Helper()
	select {
	case v = <-c:
	case <-time.After(2 * time.Minute):
		tb.Fatalf("no %s", what)
	}
	return v
}

// ourRelay starts our relay; the map entries describe it to both clients.
func ourRelay(tb testing.TB, s *relay.Server) (*relay.Server, *tailcfg.DERPRegion) {
	tb.Helper()
	s.Addr = "127.0.0.1:0"
	if err := s.Start(context.Background()); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	n := s.Region(1).Nodes[0]
	return s, &tailcfg.DERPRegion{RegionID: 1, RegionCode: "t", Nodes: []*tailcfg.DERPNode{{Name: n.Name, RegionID: 1,
		HostName: n.HostName, CertName: n.CertName, IPv4: n.IPv4, IPv6: n.IPv6, STUNPort: n.STUNPort, DERPPort: n.DERPPort}}}
}

// upstreamRelay starts upstream's derpserver behind TLS with a pinned certificate.
func upstreamRelay(tb testing.TB, meta bool) (*derpserver.Server, *tailcfg.DERPRegion) {
	tb.Helper()
	s := derpserver.New(upkey.NewNode(), func(string, ...any) {})
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "r"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &priv.PublicKey, priv)
	if err != nil {
		tb.Fatal(err)
	}
	cert := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: priv}
	conf := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }, NextProtos: []string{"http/1.1"}}
	if meta {
		s.ModifyTLSConfigToAddMetaCert(conf)
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		tb.Fatal(err)
	}
	hs := &http.Server{Handler: derpserver.Handler(s)}
	done := make(chan struct{})
	go func() { defer close(done); hs.Serve(ln) }()
	tb.Cleanup(func() { hs.Close(); s.Close(); <-done })
	sum := sha256.Sum256(der)
	return s, &tailcfg.DERPRegion{RegionID: 1, RegionCode: "u", Nodes: []*tailcfg.DERPNode{{Name: "1a", RegionID: 1, HostName: "127.0.0.1",
		CertName: "sha256-raw:" + hex.EncodeToString(sum[:]), IPv4: "127.0.0.1", IPv6: "none", STUNPort: -1,
		DERPPort: ln.Addr().(*net.TCPAddr).Port}}}
}

func upstreamRegion(r *tailcfg.DERPRegion) *upcfg.DERPRegion {
	out := &upcfg.DERPRegion{RegionID: r.RegionID, RegionCode: r.RegionCode}
	for _, n := range r.Nodes {
		out.Nodes = append(out.Nodes, &upcfg.DERPNode{Name: n.Name, RegionID: n.RegionID, HostName: n.HostName, CertName: n.CertName,
			IPv4: n.IPv4, IPv6: n.IPv6, STUNPort: n.STUNPort, DERPPort: n.DERPPort})
	}
	return out
}

type packet struct {
	src  string
	data string
}

// peer is a client of either make.
type peer struct {
	key     string // raw public key
	send    func(dst string, b []byte) error
	packets chan packet
	gone    chan string
	count   atomic.Int64  // if packets is nil, they are counted here
	arrived chan struct{} // if packets is nil: a token now and then
	health  chan string
	close   func()
}

func (p *peer) tally() {
	if p.count.Add(1)%8 == 0 {
		select {
		case p.arrived <- struct{}{}:
		default:
		}
	}
}

type handler struct{ p *peer }

func (h handler) Packet(_ int, src key.NodePublic, b []byte) {
	if h.p.packets == nil {
		h.p.tally()
		return
	}
	raw := src.Raw()
	h.p.packets <- packet{string(raw[:]), string(b)}
}
func (handler) Flush(int) {}
func (h handler) PeerGone(_ int, k key.NodePublic, _ byte) {
	raw := k.Raw()
	h.p.gone <- string(raw[:])
}
func (handler) State(int, bool, error) {}

func ourPeer(tb testing.TB, region *tailcfg.DERPRegion, keep bool) *peer {
	tb.Helper()
	k := key.NewNode()
	raw := k.Public().Raw()
	p := &peer{key: string(raw[:]), gone: make(chan string, 100), arrived: make(chan struct{}, 1)}
	if keep {
		p.packets = make(chan packet, 1000)
	}
	c, err := client.Dial(tb.Context(), client.Options{PrivateKey: k}, region)
	if err != nil {
		tb.Fatal(err)
	}
	go c.Serve(handler{p})
	p.close = func() { c.Close() }
	tb.Cleanup(p.close)
	if _, err := c.Ping(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	p.send = func(dst string, b []byte) error {
		return c.Send(key.NodePublicFromRaw([32]byte([]byte(dst))), b, 1400)
	}
	return p
}

func upstreamPeer(tb testing.TB, region *tailcfg.DERPRegion, keep bool) *peer {
	tb.Helper()
	k := upkey.NewNode()
	raw := k.Public().AppendTo(nil)
	p := &peer{key: string(raw), gone: make(chan string, 100), arrived: make(chan struct{}, 1), health: make(chan string, 100)}
	if keep {
		p.packets = make(chan packet, 1000)
	}
	up := upstreamRegion(region)
	c := derphttp.NewRegionClient(k, func(string, ...any) {}, netmon.NewStatic(), func() *upcfg.DERPRegion { return up })
	ctx, cancel := context.WithTimeout(tb.Context(), 2*time.Minute)
	defer cancel()
	if err := c.Connect(ctx); err != nil {
		tb.Fatal(err)
	}
	ready, done := make(chan struct{}, 1), make(chan struct{})
	p.close = func() { c.Close(); <-done }
	tb.Cleanup(p.close)
	go func() {
		defer close(done)
		for {
			m, err := c.Recv()
			if err != nil {
				return
			}
			switch m := m.(type) {
			case upderp.ServerInfoMessage:
				ready <- struct{}{}
			case upderp.ReceivedPacket:
				if p.packets == nil {
					p.tally()
					continue
				}
				raw := m.Source.AppendTo(nil)
				p.packets <- packet{string(raw), string(m.Data)}
			case upderp.PeerGoneMessage:
				raw := m.Peer.AppendTo(nil)
				p.gone <- string(raw)
			case upderp.HealthMessage:
				p.health <- m.Problem
			}
		}
	}()
	within(tb, "server info", ready)
	p.send = func(dst string, b []byte) error {
		to := upkey.NodePublicFromRaw32(mem.S(dst))
		for len(b) > 0 { // upstream has no batches
			n := min(len(b), 1400)
			if err := c.Send(to, b[:n]); err != nil {
				return err
			}
			b = b[n:]
		}
		return nil
	}
	return p
}

var (
	relays = map[string]func(testing.TB) *tailcfg.DERPRegion{
		"our relay":      func(tb testing.TB) *tailcfg.DERPRegion { _, r := ourRelay(tb, &relay.Server{}); return r },
		"upstream relay": func(tb testing.TB) *tailcfg.DERPRegion { _, r := upstreamRelay(tb, true); return r },
		"upstream relay without fast start": func(tb testing.TB) *tailcfg.DERPRegion {
			_, r := upstreamRelay(tb, false)
			return r
		},
	}
	peers = map[string]func(testing.TB, *tailcfg.DERPRegion, bool) *peer{"our client": ourPeer, "upstream client": upstreamPeer}
)

func TestMatrix(t *testing.T) {
	for rn, newRelay := range relays {
		for an, newA := range peers {
			for bn, newB := range peers {
				t.Run(fmt.Sprintf("%s, %s, %s", rn, an, bn), func(t *testing.T) {
					region := newRelay(t)
					a, b := newA(t, region, true), newB(t, region, true)
					big := make([]byte, 20*1400) // upstream queues no more than 32 packets
					rand.Read(big)
					for _, msg := range [][]byte{[]byte("hello"), {}, big[:1400], big} {
						if len(msg) == 0 {
							continue
						}
						if err := a.send(b.key, msg); err != nil {
							t.Fatal(err)
						}
						var got []byte
						for len(got) < len(msg) {
							p := within(t, "packet", b.packets)
							if p.src != a.key {
								t.Fatal("packet from someone else")
							}
							got = append(got, p.data...)
						}
						if !bytes.Equal(got, msg) {
							t.Fatalf("%d bytes arrived changed", len(msg))
						}
					}
					if err := b.send(a.key, []byte("back")); err != nil {
						t.Fatal(err)
					}
					if p := within(t, "packet", a.packets); p.src != b.key || p.data != "back" {
						t.Errorf("got %q", p.data)
					}
					b.close()
					if got := within(t, "peer gone", a.gone); got != b.key {
						t.Error("another peer is gone")
					}
				})
			}
		}
	}
}

func TestUpstreamClientRefusedAndDuplicate(t *testing.T) {
	var refuse atomic.Bool
	s, region := ourRelay(t, &relay.Server{Admit: func(context.Context, relay.NodeKey, netip.Addr) error {
		if refuse.Load() {
			return fmt.Errorf("not on the list")
		}
		return nil
	}})
	upstreamPeer(t, region, true)
	refuse.Store(true)
	k := upkey.NewNode()
	up := upstreamRegion(region)
	c := derphttp.NewRegionClient(k, func(string, ...any) {}, netmon.NewStatic(), func() *upcfg.DERPRegion { return up })
	defer c.Close()
	if _, err := c.Recv(); err == nil { // fast start: the connection is made, then closed
		if _, err = c.Recv(); err == nil {
			t.Error("a refused client is served")
		}
	}
	if got := s.Stats().Refused; got == 0 {
		t.Error("the refusal was not counted")
	}
}

func TestSTUNBothWays(t *testing.T) {
	s, _ := ourRelay(t, &relay.Server{})
	_, ours := s.Addrs()
	theirs, stop := stuntest.ServeWithPacketListener(t, nettype.Std{})
	defer stop()
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	pc.SetDeadline(time.Now().Add(2 * time.Minute))
	self := pc.LocalAddr().(*net.UDPAddr).AddrPort()
	buf := make([]byte, 1500)
	ask := func(req []byte, to net.Addr) []byte {
		t.Helper()
		if _, err := pc.WriteTo(req, to); err != nil {
			t.Fatal(err)
		}
		n, _, err := pc.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		return buf[:n]
	}
	tx := upstun.NewTxID()
	if got, addr, err := upstun.ParseResponse(ask(upstun.Request(tx), ours)); err != nil || got != tx || addr != self {
		t.Errorf("upstream asks us: %v %v %v", got == tx, addr, err)
	}
	mine := stun.NewTxID()
	theirAddr := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: theirs.Port}
	if got, addr, err := stun.ParseResponse(ask(stun.AppendRequest(nil, mine), theirAddr)); err != nil || got != mine || addr != self {
		t.Errorf("we ask upstream: %v %v %v", got == mine, addr, err)
	}
}
