package udp

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type got struct {
	socket int
	src    netip.AddrPort
	b      []byte
}

// start opens sockets whose datagrams arrive one by one on the channel.
func start(t testing.TB, cfg Config) (*Sockets, chan got) {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	ch := make(chan got, 4096)
	s.Start(func(i int, src netip.AddrPort, b []byte, seg int) {
		for len(b) > 0 {
			n := min(seg, len(b))
			select {
			case ch <- got{i, src, bytes.Clone(b[:n])}:
			default:
			}
			b = b[n:]
		}
	})
	return s, ch
}

func loop(s *Sockets, v6 bool) netip.AddrPort {
	p4, p6 := s.Ports()
	if v6 {
		return netip.AddrPortFrom(netip.IPv6Loopback(), p6)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p4)
}

func TestBatches(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  Config
		fail bool
	}{
		{"offload", Config{}, false},
		{"plain", Config{Plain: true}, false},
		{"many at a time", Config{NoOffload: true}, false},
		{"offload fails at run time", Config{}, true},
	} {
		for _, v6 := range []bool{false, true} {
			name := tt.name + " IPv4"
			if v6 {
				name = tt.name + " IPv6"
			}
			t.Run(name, func(t *testing.T) {
				a, _ := start(t, tt.cfg)
				b, in := start(t, tt.cfg)
				dst := loop(b, v6)
				if dst.Port() == 0 {
					t.Skip("this host has no such address family")
				}
				if tt.fail {
					for i := range a.socks {
						if c := a.socks[i].conn.Load(); c != nil {
							c.gsoFailed(errIO, dst.Addr())
						}
					}
				}
				for _, sizes := range []struct{ total, seg int }{
					{1, 1}, {1312, 1312}, {1312 * 2, 1312}, {1312*40 + 1, 1312}, {1312*49 + 700, 1312}, {100 * 130, 100}, {3000, 0}, {3000, 9000}, {60000, 40000},
				} {
					if sizes.seg > plainSize && (tt.cfg.Plain || tt.cfg.NoOffload) {
						continue
					}
					want := make([]byte, sizes.total)
					for i := range want {
						want[i] = byte(i * 7 >> 3)
					}
					if err := a.Send(dst, want, sizes.seg); err != nil {
						t.Fatalf("%+v: %v", sizes, err)
					}
					seg := sizes.seg
					if seg <= 0 || seg > sizes.total {
						seg = sizes.total
					}
					for len(want) > 0 {
						n := min(seg, len(want))
						g := <-in
						if !bytes.Equal(g.b, want[:n]) {
							t.Fatalf("%+v: a datagram of %d bytes, want %d, or not its content", sizes, len(g.b), n)
						}
						if g.src != loop(a, v6) || (g.socket == 1) != v6 {
							t.Fatalf("from %v by socket %d", g.src, g.socket)
						}
						want = want[n:]
					}
				}
			})
		}
	}
}

func TestPortsAndRebind(t *testing.T) {
	s, in := start(t, Config{})
	p4, p6 := s.Ports()
	if p4 == 0 || p6 != 0 && p4 != p6 {
		t.Fatalf("ports %d and %d", p4, p6)
	}
	other, in2 := start(t, Config{Port: p4}) // taken
	if o4, _ := other.Ports(); o4 == p4 || o4 == 0 {
		t.Errorf("the port of two sockets is %d", o4)
	}
	for range 20 {
		if err := s.Rebind(); err != nil {
			t.Fatal(err)
		}
		if q4, q6 := s.Ports(); q4 != p4 || q6 != p6 {
			t.Fatalf("ports %d and %d after a rebind, were %d and %d", q4, q6, p4, p6)
		}
		if err := other.Send(loop(s, false), []byte("there"), 5); err != nil {
			t.Fatal(err)
		}
		if g := <-in; string(g.b) != "there" {
			t.Errorf("%q", g.b)
		}
		if err := s.Send(loop(other, false), []byte("back"), 4); err != nil {
			t.Fatal(err)
		}
		if g := <-in2; string(g.b) != "back" || g.src.Port() != p4 {
			t.Errorf("%q from %v", g.b, g.src)
		}
	}
	s.Close()
	s.Close()
	if err := s.Rebind(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := s.Send(loop(other, false), []byte("x"), 1); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestOneFamily(t *testing.T) {
	no := errors.New("no such family")
	open := func(want string) func(network, address string) (PacketConn, error) {
		return func(network, address string) (PacketConn, error) {
			if network != want {
				return nil, no
			}
			return listenSystem(network, address)
		}
	}
	s, _ := start(t, Config{Listen: open("udp4")})
	if p4, p6 := s.Ports(); p4 == 0 || p6 != 0 {
		t.Errorf("ports %d and %d", p4, p6)
	}
	if err := s.Send(netip.MustParseAddrPort("[::1]:9"), []byte("x"), 1); !errors.Is(err, ErrNoSocket) {
		t.Error(err)
	}
	if _, err := Open(Config{Listen: open("")}); !errors.Is(err, no) {
		t.Error(err)
	}
}

func TestAllocations(t *testing.T) {
	for _, cfg := range []Config{{}, {NoOffload: true}, {Plain: true}} {
		a, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		b, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		arrived := make(chan struct{}, 1)
		b.Start(func(_ int, _ netip.AddrPort, b []byte, _ int) {
			if b[len(b)-1] == 1 {
				arrived <- struct{}{}
			}
		})
		msg := make([]byte, 20*1312)
		msg[len(msg)-1] = 1
		dst := loop(b, false)
		if n := testing.AllocsPerRun(200, func() {
			a.Send(dst, msg, 1312)
			<-arrived
		}); n > 0.1 {
			t.Errorf("%+v: %v allocations for 20 packets", cfg, n)
		}
	}
}

// TestLame: a device that cannot do segmentation spoils it for those behind it alone, unless there are many.
func TestLame(t *testing.T) {
	var c conn
	c.gso.Store(true)
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }
	for range 3 {
		c.gsoFailed(errIO, addr(1))
	}
	if !c.isLame(addr(1)) || c.isLame(addr(2)) || !c.gso.Load() {
		t.Error("not the one address")
	}
	for i := range maxLame {
		c.gsoFailed(errIO, addr(i+2))
	}
	if c.gso.Load() || len(*c.lame.Load()) != maxLame {
		t.Errorf("%d addresses are spared", len(*c.lame.Load()))
	}
}

// TestMaxPayload: the loopback interface carries what it says.
func TestMaxPayload(t *testing.T) {
	s, in := start(t, Config{})
	dst := loop(s, false)
	n := s.MaxPayload(dst)
	if n < 1472 {
		t.Fatalf("%d bytes to %v", n, dst)
	}
	if err := s.Send(dst, make([]byte, min(n, plainSize)), 0); err != nil {
		t.Fatal(err)
	}
	if g := <-in; len(g.b) != min(n, plainSize) {
		t.Errorf("%d bytes arrived", len(g.b))
	}
	s.Close()
	if n := s.MaxPayload(dst); n != 0 {
		t.Errorf("%d bytes by no socket", n)
	}
}

func BenchmarkLoopback(b *testing.B) {
	for name, cfg := range map[string]Config{"offload": {}, "many": {NoOffload: true}, "plain": {Plain: true}} {
		b.Run(name, func(b *testing.B) {
			x, err := Open(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer x.Close()
			y, err := Open(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer y.Close()
			done := make(chan struct{}, 1)
			y.Start(func(_ int, _ netip.AddrPort, b []byte, _ int) {
				if b[len(b)-1] == 1 {
					done <- struct{}{}
				}
			})
			const n = 40
			msg := make([]byte, n*1312)
			msg[len(msg)-1] = 1
			dst := loop(y, false)
			b.SetBytes(int64(len(msg)))
			b.ReportAllocs()
			for b.Loop() {
				x.Send(dst, msg, 1312)
				<-done
			}
		})
	}
}
