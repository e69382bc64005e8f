package peerrelay

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/natlab"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/udp"
)

var stunAt = netip.MustParseAddrPort("9.9.9.9:3478")

// stunServer answers on the network until the test ends, and counts.
func stunServer(t *testing.T, net *memnet.Network) *atomic.Int64 {
	c, err := net.Host("9.9.9.9").ListenPacket("udp4", ":3478")
	if err != nil {
		t.Fatal(err)
	}
	asked, done := new(atomic.Int64), make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			n, src, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if tx, err := stun.ParseRequest(b[:n]); err == nil {
				asked.Add(1)
				c.WriteToUDPAddrPort(stun.AppendResponse(nil, tx, src), src)
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return asked
}

func open(t *testing.T, net *memnet.Network, addr string, cfg Config) *Server {
	h := net.Host(addr)
	cfg.Listen = func(network, address string) (udp.PacketConn, error) {
		c, err := h.ListenPacket(network, address)
		if err != nil {
			return nil, err // not a nil *PacketConn in an interface
		}
		return c, nil
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.SetLocal([]netip.Addr{netip.MustParseAddr(addr)})
	return s
}

// ask waits for an endpoint of a new pair.
func ask(s *Server) (ep disco.RelayEndpoint, ok bool) {
	ch := make(chan disco.RelayEndpoint, 1)
	s.Allocate(key.NewDisco().Public(), key.NewDisco().Public(), func(ep disco.RelayEndpoint) { ch <- ep })
	select {
	case ep = <-ch:
		return ep, true
	case <-time.After(time.Minute):
		return ep, false
	}
}

// TestServerAddresses: where a relay behind a NAT says that it can be reached, and that it asks for it only while it has something to relay.
func TestServerAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := memnet.New(1, memnet.Link{Latency: 5 * time.Millisecond})
		lab := natlab.New(nil)
		router := lab.Add(natlab.Config{Inside: netip.MustParsePrefix("10.0.0.0/24"), Outside: netip.MustParseAddr("1.1.1.1"), Timeout: 30 * time.Second})
		net.SetRouter(lab)
		asked := stunServer(t, net)
		fixed := netip.MustParseAddrPort("7.7.7.7:7")
		s := open(t, net, "10.0.0.2", Config{Port: 4000, Static: []netip.AddrPort{fixed, netip.MustParseAddrPort("7.7.7.8:0")}})
		s.SetSTUN([]netip.AddrPort{stunAt})
		time.Sleep(time.Second)
		ep, ok := ask(s)
		if !ok || len(ep.Addrs) != 3 || ep.Addrs[0] != fixed || ep.Addrs[1].Addr().String() != "1.1.1.1" || ep.Addrs[2] != netip.MustParseAddrPort("10.0.0.2:4000") {
			t.Fatalf("%+v", ep)
		}
		first := ep.Addrs[1]
		// As long as there is an endpoint the NAT's mapping is kept.
		time.Sleep(BindLifetime)
		ep, _ = ask(s)
		if !slices.Contains(ep.Addrs, first) {
			t.Errorf("another mapping: %v", ep.Addrs)
		}
		time.Sleep(2 * time.Minute)
		n := asked.Load()
		time.Sleep(24 * time.Hour)
		if asked.Load() != n || s.Stats().Endpoints != 0 {
			t.Errorf("asked %d times in a day without anything to relay", asked.Load()-n)
		}
		// The first answer after that says what is true now.
		router.Rebind()
		ep, ok = ask(s)
		if !ok || slices.Contains(ep.Addrs, first) || len(ep.Addrs) != 3 || asked.Load() != n+1 {
			t.Errorf("%v, asked %d times", ep.Addrs, asked.Load()-n)
		}
		// Another network.
		if err := s.Rebind(); err != nil {
			t.Fatal(err)
		}
		s.SetLocal([]netip.Addr{netip.MustParseAddr("10.0.0.3")})
		time.Sleep(time.Second)
		ep, ok = ask(s)
		if !ok || !slices.Contains(ep.Addrs, netip.MustParseAddrPort("10.0.0.3:4000")) {
			t.Errorf("%v", ep.Addrs)
		}
		s.Close()
		s.Close()
		if err := s.Rebind(); err == nil {
			t.Error("rebound after Close")
		}
		if _, ok := ask(s); ok {
			t.Error("an endpoint after Close")
		}
	})
}

// TestServerWithoutSTUN: servers that do not answer cost half a second, and only that.
func TestServerWithoutSTUN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := memnet.New(1, memnet.Link{Latency: 5 * time.Millisecond})
		s := open(t, net, "1.2.3.4", Config{})
		s.SetSTUN([]netip.AddrPort{stunAt})
		start := time.Now()
		ep, ok := ask(s)
		v4, _ := s.Ports()
		if d := time.Since(start); !ok || d > roundEnd || len(ep.Addrs) != 1 || ep.Addrs[0] != netip.AddrPortFrom(netip.MustParseAddr("1.2.3.4"), v4) {
			t.Errorf("%+v after %v", ep, d)
		}
		s.SetLocal(nil)
		synctest.Wait()
		if ep, _ = ask(s); len(ep.Addrs) == 0 || !ep.Addrs[0].Addr().IsLoopback() {
			t.Errorf("without a network: %v", ep.Addrs)
		}
	})
}

// TestServerNobodyToAsk: servers of an address family without a socket are neither asked nor waited for.
func TestServerNobodyToAsk(t *testing.T) {
	f := finder{v4: 1, stun: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::1]:3478")}}
	start := time.Now()
	for now := start; now.Before(start.Add(time.Hour)); {
		if f.begin(now) || !f.isFresh(now) {
			t.Fatal("a round without a server")
		}
		next := f.refreshAt()
		if next.Before(now.Add(refreshMin)) {
			t.Fatalf("after %v: to be looked at again in %v", now.Sub(start), next.Sub(now))
		}
		now = next
	}
	synctest.Test(t, func(t *testing.T) {
		s := open(t, memnet.New(1, memnet.Link{}), "1.2.3.4", Config{})
		s.SetSTUN(f.stun)
		synctest.Wait()
		start := time.Now()
		if ep, ok := ask(s); !ok || len(ep.Addrs) != 1 || time.Since(start) != 0 {
			t.Errorf("%+v after %v", ep, time.Since(start))
		}
		time.Sleep(time.Minute) // a loop without a pause would never let it pass
	})
}

// TestServerRelays: two clients over real sockets of the network, through the server.
func TestServerRelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := memnet.New(1, memnet.Link{Latency: 5 * time.Millisecond})
		s := open(t, net, "5.5.5.5", Config{Port: 5555})
		r := &rig{t: t, a: key.NewDisco(), b: key.NewDisco()}
		ch := make(chan disco.RelayEndpoint, 1)
		s.Allocate(r.a.Public(), r.b.Public(), func(ep disco.RelayEndpoint) { ch <- ep })
		r.ep = <-ch
		at := r.ep.Addrs[0]
		var conns [2]*memnet.PacketConn
		for i, me := range []key.DiscoPrivate{r.a, r.b} {
			other := []key.DiscoPrivate{r.b, r.a}[i]
			c, err := net.Host([]string{"1.1.1.1", "2.2.2.2"}[i]).ListenPacket("udp4", ":1000")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			conns[i] = c
			m := r.common(other, 1)
			c.WriteToUDPAddrPort(r.message(me, disco.TypeBindEndpoint, m), at)
			b := make([]byte, 1500)
			n, _, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				t.Fatal(err)
			}
			got, ok := r.open(me, b[:n])
			if !ok {
				t.Fatal("no challenge")
			}
			m.Challenge = got.Challenge
			c.WriteToUDPAddrPort(r.message(me, disco.TypeBindEndpointAnswer, m), at)
		}
		time.Sleep(time.Second)
		conns[0].WriteToUDPAddrPort(r.data("hello"), at)
		b := make([]byte, 1500)
		n, src, err := conns[1].ReadFromUDPAddrPort(b)
		if err != nil || src != at || string(b[disco.GeneveLen:n]) != "hello" {
			t.Errorf("%q from %v, %v", b[:n], src, err)
		}
		if st := s.Stats(); st.Endpoints != 1 || st.ForwardedBytes != uint64(n) {
			t.Errorf("%+v", st)
		}
	})
}
