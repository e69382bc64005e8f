package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/derp/server"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"github.com/tailnode/tailnode/internal/wg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// end is an Engine and what a control server would tell it.
type end struct {
	*Engine
	t     testing.TB
	id    int
	key   key.NodePrivate
	disco key.DiscoPrivate
	build *netmap.Builder
	a4    netip.Addr
	a6    netip.Addr
	relay *server.Server
}

func addrs(id int) (a4, a6 netip.Addr) {
	return netip.AddrFrom4([4]byte{100, 64, 0, byte(id)}), netip.AddrFrom16([16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 15: byte(id)})
}

// node is e as control describes it.
func (e *end) node() *tailcfg.Node {
	online := true
	return &tailcfg.Node{
		ID: tailcfg.NodeID(e.id), StableID: tailcfg.StableNodeID(fmt.Sprint("n", e.id)), Name: fmt.Sprintf("n%d.example.ts.net.", e.id),
		Key: e.key.Public(), DiscoKey: e.disco.Public(), HomeDERP: 1, Cap: tailcfg.CurrentCapabilityVersion, Online: &online, MachineAuthorized: true,
		Addresses: []netip.Prefix{netip.PrefixFrom(e.a4, 32), netip.PrefixFrom(e.a6, 128)},
	}
}

// tell gives e a map response.
func (e *end) tell(r *tailcfg.MapResponse) {
	e.t.Helper()
	m, ch, err := e.build.Apply(r, time.Now())
	if err != nil {
		e.t.Fatal(err)
	}
	if err := e.SetNetmap(m, ch); err != nil {
		e.t.Fatal(err)
	}
}

var allowAll = []tailcfg.FilterRule{{SrcIPs: []string{"*"}, DstPorts: []tailcfg.NetPortRange{{IP: "*", Ports: tailcfg.PortRange{First: 0, Last: 65535}}}}}

// newPair returns two engines that know each other, joined by a relay on loopback and by whatever direct path they find.
func newPair(t testing.TB) (a, b *end) {
	t.Helper()
	relay := server.New(server.Config{PrivateKey: key.NewNode()})
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: relay}
	served := make(chan struct{})
	go func() { defer close(served); hs.Serve(ln) }()
	t.Cleanup(func() { relay.Close(); hs.Close(); <-served })
	dm := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, RegionCode: "one", Nodes: []*tailcfg.DERPNode{{
		Name: "1a", RegionID: 1, HostName: "http://relay.test", IPv4: "127.0.0.1", IPv6: "none", DERPPort: ln.Addr().(*net.TCPAddr).Port, STUNPort: -1,
	}}}}}
	up := make(chan struct{}, 16)
	ends := [2]*end{}
	for i := range ends {
		e := &end{t: t, id: i + 1, key: key.NewNode(), disco: key.NewDisco(), build: netmap.NewBuilder(), relay: relay}
		e.a4, e.a6 = addrs(e.id)
		e.Engine, err = New(Config{NodeKey: e.key, DiscoKey: e.disco, RelayState: func(_ int, connected bool, _ error) {
			if connected {
				up <- struct{}{}
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(e.Close)
		ends[i] = e
	}
	a, b = ends[0], ends[1]
	for _, e := range ends {
		other := b
		if e == b {
			other = a
		}
		e.tell(&tailcfg.MapResponse{Node: e.node(), Peers: []*tailcfg.Node{other.node()}, DERPMap: dm, PacketFilter: &allowAll})
		e.SetHome(1)
	}
	<-up
	<-up
	return a, b
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// dial connects to a TCP port as node.Dial does.
func (e *end) dial(d time.Duration, dst netip.AddrPort) error {
	ctx, stop := e.Dialing(within(e.t, d), dst)
	defer stop()
	c, err := e.Stack().DialTCP(ctx, dst)
	if err == nil {
		c.Close()
	} else if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// datagrams returns a UDP socket of e that is connected to one of to. They are closed before the two are.
func (e *end) datagrams(to *end) (from net.Conn, at net.PacketConn) {
	e.t.Helper()
	addr := netip.AddrPortFrom(to.a4, 53)
	at, err := to.Stack().ListenUDP(addr)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { at.Close() })
	from, err = e.Stack().DialUDP(e.t.Context(), addr)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { from.Close() })
	return from, at
}

// untilRead writes a datagram, again and again in case it is lost, until one can be read from at, which is returned.
func untilRead(t testing.TB, c net.Conn, b []byte, at interface {
	SetReadDeadline(time.Time) error
	ReadFrom([]byte) (int, net.Addr, error)
}) []byte {
	t.Helper()
	buf := make([]byte, 1500)
	for end := time.Now().Add(time.Minute); ; {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		at.SetReadDeadline(time.Now().Add(time.Second))
		if n, _, err := at.ReadFrom(buf); err == nil {
			return buf[:n]
		} else if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// listen accepts connections to a port and tells from where they came.
func (e *end) listen(port uint16) <-chan netip.Addr {
	e.t.Helper()
	ln, err := e.Stack().ListenTCP(netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	if err != nil {
		e.t.Fatal(err)
	}
	from := make(chan netip.Addr, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			from <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			io.WriteString(c, "x")
			c.Close()
		}
	}()
	e.t.Cleanup(func() { ln.Close(); <-done })
	return from
}

func TestJailedPeer(t *testing.T) {
	a, b := newPair(t)
	a.listen(80)
	b.listen(80)
	if err := b.dial(time.Minute, netip.AddrPortFrom(a.a4, 80)); err != nil {
		t.Fatal(err)
	}
	n := b.node()
	n.IsJailed = true
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	if err := b.dial(time.Minute, netip.AddrPortFrom(a.a4, 80)); errcode.Of(err) != errcode.Refused {
		t.Errorf("a jailed peer's connection: got %v, want a refusal", err)
	}
	if err := a.dial(time.Minute, netip.AddrPortFrom(b.a4, 80)); err != nil {
		t.Errorf("a connection to a jailed peer: %v", err)
	}
}

func TestExpiredPeer(t *testing.T) {
	for name, expire := range map[string]func(*tailcfg.Node){
		"by control":   func(n *tailcfg.Node) { n.Expired = true },
		"by the clock": func(n *tailcfg.Node) { n.KeyExpiry = time.Now().Add(-time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newPair(t)
			a.listen(80)
			b.listen(80)
			// Both have a session with each other before.
			if err := a.dial(time.Minute, netip.AddrPortFrom(b.a4, 80)); err != nil {
				t.Fatal(err)
			}
			n := b.node()
			expire(n)
			a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
			if _, _, err := a.PingTSMP(within(t, time.Minute), b.a4); !errors.Is(err, ErrNoPeer) {
				t.Errorf("ping of an expired peer: %v, want %v", err, ErrNoPeer)
			}
			// That nothing is sent shows later: bytes counted would be WireGuard's own too, and what was under way, such as the end of
			// the connection.
			c, pc := a.datagrams(b)
			c.Write([]byte("while expired")) // into nothing, whatever it returns
			if err := a.dial(300*time.Millisecond, netip.AddrPortFrom(b.a4, 80)); err == nil {
				t.Error("an expired peer was reached")
			}
			if err := b.dial(300*time.Millisecond, netip.AddrPortFrom(a.a4, 80)); err == nil {
				t.Error("an expired peer came in")
			}
			a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{b.node()}})
			if err := b.dial(time.Minute, netip.AddrPortFrom(a.a4, 80)); err != nil {
				t.Errorf("after the key was extended: %v", err)
			}
			if got := untilRead(t, c, []byte("extended"), pc); string(got) != "extended" {
				t.Errorf("the first datagram that came: %q", got)
			}
		})
	}
}

// carried is a wg.Conduit whose messages somebody else carries over.
type carried chan []byte

func (c carried) Send(b []byte, seg int) error {
	for m := range slices.Chunk(b, seg) {
		select {
		case c <- bytes.Clone(m):
		default: // lost
		}
	}
	return nil
}

// TestPeerIsComplete: a peer that one goroutine makes while another receives from it. The race detector sees it if the latter uses what is
// not set yet.
func TestPeerIsComplete(t *testing.T) {
	at, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	src := at.LocalAddr().(*net.UDPAddr).AddrPort()
	a := &end{t: t, id: 1, key: key.NewNode(), disco: key.NewDisco(), build: netmap.NewBuilder()}
	a.a4, a.a6 = addrs(a.id)
	c := &end{id: 2, key: key.NewNode(), disco: key.NewDisco()}
	c.a4, c.a6 = addrs(c.id)
	a.Engine, err = New(Config{NodeKey: a.key, DiscoKey: a.disco})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	n := c.node()
	n.DiscoKey, n.HomeDERP, n.IsWireGuardOnly, n.Endpoints = key.DiscoPublic{}, 0, true, []netip.AddrPort{src}
	a.tell(&tailcfg.MapResponse{Node: a.node(), Peers: []*tailcfg.Node{n}, PacketFilter: &allowAll})
	dev, err := wg.NewDevice(wg.Config{PrivateKey: c.key, MTU: MTU})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	out := make(carried, 100)
	p, err := dev.AddPeer(a.key.Public(), out, nil)
	if err != nil {
		t.Fatal(err)
	}
	ping, err := packet.AppendTSMPPing(nil, c.a4, a.a4, [8]byte{1})
	if err != nil {
		t.Fatal(err)
	}

	tr := a.trans.Load()
	made := make(chan struct{})
	go func() { defer close(made); tr.peer(c.key.Public()) }()
	defer func() { <-made }()
	for tr.dev.Peer(c.key.Public()) == nil {
		runtime.Gosched()
	}
	s := tr.newSink()
	p.Send((*one)(&ping))
	pong := make(chan struct{}, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		for buf := make([]byte, 1500); ; {
			n, _, err := at.ReadFrom(buf)
			if err != nil {
				return
			}
			if pkt, _, _ := dev.Receive(nil, buf[:n], nil); pkt != nil { // an error is a response that was too late: another follows
				pong <- struct{}{}
				return
			}
		}
	}()
	defer func() { at.Close(); <-read }()
	for ctx := within(t, time.Minute); ; {
		select {
		case m := <-out:
			s.WireGuard(path.Source{Addr: src}, nil, m)
		case <-pong:
			return
		case <-ctx.Done():
			t.Fatal("no pong")
		}
	}
}

// TestMasquerade lets b know a by other addresses than a's own, as across tailnets.
func TestMasquerade(t *testing.T) {
	a, b := newPair(t)
	m4, m6 := netip.MustParseAddr("100.99.1.1"), netip.MustParseAddr("fd7a:115c:a1e0::9999")
	n := b.node()
	n.SelfNodeV4MasqAddrForThisPeer, n.SelfNodeV6MasqAddrForThisPeer = &m4, &m6
	rules := []tailcfg.FilterRule{{SrcIPs: []string{"*"}, DstPorts: []tailcfg.NetPortRange{{IP: "*", Ports: tailcfg.PortRange{First: 0, Last: 99}}}}}
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}, PacketFilter: &rules})
	n = a.node()
	n.Addresses = []netip.Prefix{netip.PrefixFrom(m4, 32), netip.PrefixFrom(m6, 128)}
	b.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	atA, atB := a.listen(80), b.listen(80)
	for _, c := range []struct{ as, b netip.Addr }{{m4, b.a4}, {m6, b.a6}} {
		if err := a.dial(time.Minute, netip.AddrPortFrom(c.b, 80)); err != nil {
			t.Fatalf("out to %v: %v", c.b, err)
		}
		if from := <-atB; from != c.as {
			t.Errorf("b was called by %v, want %v", from, c.as)
		}
		if err := b.dial(time.Minute, netip.AddrPortFrom(c.as, 80)); err != nil {
			t.Fatalf("in to %v: %v", c.as, err)
		}
		if from := <-atA; from != c.b {
			t.Errorf("a was called by %v, want %v", from, c.b)
		}
		if err := b.dial(time.Minute, netip.AddrPortFrom(c.as, 100)); errcode.Of(err) != errcode.Refused {
			t.Errorf("a port that the rules close: got %v, want a refusal", err)
		}
		if _, _, err := b.PingTSMP(within(t, time.Minute), c.as); err != nil {
			t.Errorf("TSMP ping of %v: %v", c.as, err)
		}
		if _, err := b.PingICMP(within(t, time.Minute), c.as); err != nil {
			t.Errorf("echo of %v: %v", c.as, err)
		}
		if _, _, err := a.PingTSMP(within(t, time.Minute), c.b); err != nil {
			t.Errorf("TSMP ping of %v: %v", c.b, err)
		}
		if _, err := a.PingICMP(within(t, time.Minute), c.b); err != nil {
			t.Errorf("echo of %v: %v", c.b, err)
		}
		echo(t, a, b, c.b)
	}
}

// echo sends a datagram from a to b and back.
func echo(t *testing.T, a, b *end, to netip.Addr) {
	t.Helper()
	pc, err := b.Stack().ListenUDP(netip.AddrPortFrom(to, 53))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 100)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(buf[:n], from)
		}
	}()
	defer func() { pc.Close(); <-done }()
	c, err := a.Stack().DialUDP(t.Context(), netip.AddrPortFrom(to, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := untilRead(t, c, []byte("hello"), c.(net.PacketConn)); string(got) != "hello" {
		t.Errorf("UDP to %v: %q", to, got)
	}
}

func TestResolver(t *testing.T) {
	a, b := newPair(t)
	for _, at := range []string{"100.100.100.100:53", "[fd7a:115c:a1e0::53]:53"} {
		r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			if network != "udp" {
				return nil, net.UnknownNetworkError(network)
			}
			return a.Stack().DialUDP(ctx, netip.MustParseAddrPort(at))
		}}
		ips, err := r.LookupNetIP(within(t, time.Minute), "ip", "n2.example.ts.net.")
		if err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		var has4, has6 bool
		for _, ip := range ips {
			has4, has6 = has4 || ip.Unmap() == b.a4, has6 || ip == b.a6
		}
		if !has4 || !has6 || len(ips) != 2 {
			t.Errorf("%s: got %v, want %v and %v", at, ips, b.a4, b.a6)
		}
		_, err = r.LookupNetIP(within(t, time.Minute), "ip", "nobody.example.ts.net.")
		if de, ok := errors.AsType[*net.DNSError](err); !ok || !de.IsNotFound {
			t.Errorf("%s: unknown name: %v, want not found", at, err)
		}
	}
}

// TestResolverUnderLoad closes the engine while queries are on the way.
func TestResolverUnderLoad(t *testing.T) {
	a, _ := newPair(t)
	c, err := a.Stack().DialUDP(t.Context(), netip.MustParseAddrPort("100.100.100.100:53"))
	if err != nil {
		t.Fatal(err)
	}
	query := []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 'n', '2', 0, 0, 1, 0, 1}
	begun, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			if _, err := c.Write(query); err != nil && errors.Is(err, net.ErrClosed) {
				return
			}
			if i == 1000 {
				close(begun)
			}
		}
	}()
	<-begun
	a.Close()
	<-done
}
