package natlab

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/memnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

var start = time.Unix(1e9, 0)

func home(mapping, filtering Behaviour) Config {
	return Config{Inside: netip.MustParsePrefix("192.168.1.0/24"), Outside: netip.MustParseAddr("203.0.113.1"),
		Mapping: mapping, Filtering: filtering}
}

func TestBehaviours(t *testing.T) {
	const ei, ad, apd = EndpointIndependent, AddressDependent, AddressAndPortDependent
	in := ap("192.168.1.2:1000")
	a1, a2, b1 := ap("198.51.100.1:1"), ap("198.51.100.1:2"), ap("198.51.100.2:1")
	for _, b := range []Behaviour{ei, ad, apd} {
		t.Run("mapping "+b.String(), func(t *testing.T) {
			n := NewNAT(home(b, ei))
			first, _ := n.Out(start, in, a1)
			again, _ := n.Out(start, in, a1)
			port, _ := n.Out(start, in, a2)
			addr, _ := n.Out(start, in, b1)
			if first != again || first.Addr() != n.Config().Outside {
				t.Errorf("%v then %v", first, again)
			}
			if (port == first) != (b != apd) || (addr == first) != (b == ei) {
				t.Errorf("%v, other port %v, other address %v", first, port, addr)
			}
		})
		t.Run("filtering "+b.String(), func(t *testing.T) {
			n := NewNAT(home(ei, b))
			ext, _ := n.Out(start, in, a1)
			for _, tt := range []struct {
				from netip.AddrPort
				want bool
			}{{a1, true}, {a2, b != apd}, {b1, b == ei}} {
				got, ok := n.In(start, tt.from, ext)
				if ok != tt.want || ok && got != in {
					t.Errorf("from %v: %v, %v", tt.from, got, ok)
				}
			}
			if _, ok := n.In(start, a1, netip.AddrPortFrom(ext.Addr(), ext.Port()+1)); ok {
				t.Error("a port without a mapping lets something in")
			}
		})
	}
}

func TestTimeoutRebindPreserveBlock(t *testing.T) {
	cfg := home(EndpointIndependent, AddressAndPortDependent)
	cfg.Timeout, cfg.PreservePort = 30*time.Second, true
	n := NewNAT(cfg)
	in, peer := ap("192.168.1.2:1000"), ap("198.51.100.1:1")
	ext, _ := n.Out(start, in, peer)
	if ext.Port() != 1000 {
		t.Errorf("port %v not preserved", ext)
	}
	if other, _ := n.Out(start, ap("192.168.1.3:1000"), peer); other.Port() == 1000 {
		t.Error("one port for two")
	}
	if _, ok := n.In(start.Add(29*time.Second), peer, ext); !ok {
		t.Error("expired early")
	}
	if _, ok := n.In(start.Add(31*time.Second), peer, ext); ok {
		t.Error("incoming traffic keeps a mapping alive")
	}
	n.Out(start.Add(40*time.Second), in, peer)
	n.Rebind()
	if _, ok := n.In(start.Add(41*time.Second), peer, ext); ok {
		t.Error("mapping survived a restart")
	}
	n.SetBlockUDP(true)
	if _, ok := n.Out(start, in, peer); ok {
		t.Error("blocked UDP got out")
	}
	cfg.PreservePort = false
	n = NewNAT(cfg)
	one, _ := n.Out(start, in, peer)
	n.Rebind()
	if two, _ := n.Out(start, in, peer); one == two {
		t.Error("a restart gave the same port")
	}
}

func TestForward(t *testing.T) {
	cfg := home(AddressAndPortDependent, AddressAndPortDependent)
	server := ap("192.168.1.2:7000")
	cfg.Forward = map[uint16]netip.AddrPort{41641: server}
	cfg.PreservePort = true
	n := NewNAT(cfg)
	remote, other := ap("198.51.100.1:1"), ap("198.51.100.2:1")
	if got, ok := n.In(start, remote, ap("203.0.113.1:41641")); !ok || got != server {
		t.Fatalf("%v, %v", got, ok)
	}
	if ext, ok := n.Out(start, server, remote); !ok || ext.Port() != 41641 {
		t.Errorf("answered from %v", ext)
	}
	if ext, ok := n.Out(start, server, other); !ok || ext.Port() == 41641 {
		t.Errorf("of its own accord from %v", ext)
	}
	if ext, _ := n.Out(start, ap("192.168.1.3:41641"), other); ext.Port() == 41641 {
		t.Error("another has the port")
	}
	if ext, _ := n.Out(start.Add(3*time.Minute), server, remote); ext.Port() == 41641 {
		t.Error("a conversation without end")
	}
	n.SetBlockUDP(true)
	if _, ok := n.In(start, remote, ap("203.0.113.1:41641")); ok {
		t.Error("blocked UDP got in")
	}
}

// TestLab sends datagrams between hosts of a small Internet. Each step is one datagram; want is whether it arrives.
func TestLab(t *testing.T) {
	lab := New(func() time.Time { return start })
	cgnat := lab.Add(Config{Inside: netip.MustParsePrefix("100.64.0.0/10"), Outside: netip.MustParseAddr("203.0.113.9"), Filtering: AddressAndPortDependent})
	for _, c := range []struct {
		inside, outside string
		hairpin         bool
	}{
		{"192.168.1.0/24", "203.0.113.1", false},
		{"192.168.2.0/24", "203.0.113.2", true},
		{"192.168.3.0/24", "100.64.0.3", false},
		{"192.168.4.0/24", "100.64.0.4", false},
	} {
		lab.Add(Config{Inside: netip.MustParsePrefix(c.inside), Outside: netip.MustParseAddr(c.outside), Filtering: AddressAndPortDependent, Hairpin: c.hairpin})
	}
	lab.Add(Config{Inside: netip.MustParsePrefix("2001:db8:1::/48"), Filtering: AddressAndPortDependent}) // a firewall
	world := ap("198.51.100.1:1")
	last := map[string]netip.AddrPort{} // where a host's datagram to the world seemed to come from
	for _, s := range []struct {
		comment, from, to string // a name with "@" is where that host was last seen by the world
		want              bool
	}{
		{"out through a NAT", "192.168.1.2:5", "198.51.100.1:1", true},
		{"and back", "198.51.100.1:1", "@192.168.1.2:5", true},
		{"from another port", "198.51.100.1:9", "@192.168.1.2:5", false},
		{"to an inside address", "198.51.100.1:1", "192.168.1.2:5", false},
		{"within one LAN", "192.168.1.2:5", "192.168.1.3:5", true},
		{"to another's LAN", "192.168.1.2:5", "192.168.2.2:5", false},
		{"no hairpin", "192.168.1.3:7", "@192.168.1.2:5", false},
		{"out, second NAT", "192.168.2.2:5", "198.51.100.1:1", true},
		{"hairpin, but filtered", "192.168.2.3:7", "@192.168.2.2:5", false},
		{"out through two NATs", "192.168.3.2:5", "198.51.100.1:1", true},
		{"and back through both", "198.51.100.1:1", "@192.168.3.2:5", true},
		{"not from a stranger", "198.51.100.2:1", "@192.168.3.2:5", false},
		{"to a carrier-internal address from without", "198.51.100.1:1", "100.64.0.3:40001", false},
		{"punch, first try is filtered", "192.168.1.2:5", "@192.168.2.2:5", false},
		{"punch, the other way opens", "192.168.2.2:5", "@192.168.1.2:5", true},
		{"punched", "192.168.1.2:5", "@192.168.2.2:5", true},
		{"IPv6 firewall, out", "[2001:db8:1::5]:5", "[2001:db8:2::1]:1", true},
		{"IPv6 firewall, answer", "[2001:db8:2::1]:1", "[2001:db8:1::5]:5", true},
		{"IPv6 firewall, unasked", "[2001:db8:2::1]:2", "[2001:db8:1::5]:5", false},
		{"within the carrier", "192.168.4.2:5", "100.64.0.3:9", false},
	} {
		to, seen := s.to, s.to[0] == '@'
		dst := netip.AddrPort{}
		if seen {
			dst = last[to[1:]]
		} else {
			dst = ap(to)
		}
		src, ok := lab.Out(ap(s.from), dst)
		if dst == world {
			last[s.from] = src
		}
		got := dst
		if ok {
			got, ok = lab.In(src, dst)
		}
		if ok != s.want {
			t.Errorf("%s: arrived %v at %v, seen as from %v", s.comment, ok, got, src)
		}
		if ok && seen && got != ap(to[1:]) {
			t.Errorf("%s: arrived at %v", s.comment, got)
		}
	}
	if cgnat.Mappings() == 0 {
		t.Error("the carrier's NAT was not used")
	}
	defer func() {
		if recover() == nil {
			t.Error("overlapping networks were taken")
		}
	}()
	lab.Add(Config{Inside: netip.MustParsePrefix("192.168.0.0/16")})
}

// TestOverMemnet punches a hole between two sockets.
func TestOverMemnet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New(1, memnet.Link{Latency: 10 * time.Millisecond})
		lab := New(nil)
		lab.Add(Config{Inside: netip.MustParsePrefix("10.1.0.0/16"), Outside: netip.MustParseAddr("203.0.113.1"), Filtering: AddressAndPortDependent})
		lab.Add(Config{Inside: netip.MustParsePrefix("10.2.0.0/16"), Outside: netip.MustParseAddr("203.0.113.2"), Filtering: AddressAndPortDependent})
		n.SetRouter(lab)
		open := func(a, port string) *memnet.PacketConn {
			c, err := n.Host(a).ListenPacket("udp4", ":"+port)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c
		}
		a, b, world := open("10.1.0.1", "41641"), open("10.2.0.1", "41641"), open("198.51.100.1", "3478")
		read := func(c *memnet.PacketConn) (netip.AddrPort, bool) {
			c.SetReadDeadline(time.Now().Add(time.Second))
			_, src, err := c.ReadFromUDPAddrPort(make([]byte, 10))
			return src, err == nil
		}
		seen := func(c *memnet.PacketConn) netip.AddrPort {
			c.WriteToUDPAddrPort([]byte("who am I"), world.LocalAddrPort())
			src, ok := read(world)
			if !ok {
				t.Fatal("no way out")
			}
			return src
		}
		extA, extB := seen(a), seen(b)
		if extA.Addr().String() != "203.0.113.1" || extB.Addr().String() != "203.0.113.2" {
			t.Fatal(extA, extB)
		}
		a.WriteToUDPAddrPort([]byte("1"), extB)
		if _, ok := read(b); ok {
			t.Error("in without having asked")
		}
		b.WriteToUDPAddrPort([]byte("2"), extA)
		if src, ok := read(a); !ok || src != extB {
			t.Errorf("%v, %v", src, ok)
		}
		a.WriteToUDPAddrPort([]byte("3"), extB)
		if src, ok := read(b); !ok || src != extA {
			t.Errorf("%v, %v", src, ok)
		}
		time.Sleep(3 * time.Minute)
		b.WriteToUDPAddrPort([]byte("4"), extA)
		if _, ok := read(a); ok {
			t.Error("the hole stays open for ever")
		}
	})
}
