package netstack

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"
)

// testCtx ends before the test binary's own limit, so that a hang is a failure with a name.
func testCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func listen(t testing.TB, s *Stack, addr string) net.Listener {
	t.Helper()
	l, err := s.ListenTCP(netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// connect returns both ends of a new connection from p.a to addr of p.b.
func connect(t testing.TB, from *Stack, l net.Listener, addr netip.Addr) (client, server net.Conn) {
	t.Helper()
	ch := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		ch <- c
	}()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	client, err := from.DialTCP(testCtx(t), netip.AddrPortFrom(addr, port))
	if err != nil {
		t.Fatal(err)
	}
	server = <-ch
	if server == nil {
		t.FailNow()
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
}

// exchange sends n bytes each way at once, with a half-close after them, and compares.
func exchange(t *testing.T, c, d net.Conn, n int) {
	t.Helper()
	send := func(c net.Conn, seed uint64) (sum [32]byte) {
		h, r := sha256.New(), rand.New(rand.NewPCG(seed, 1))
		b := make([]byte, 100_000)
		for left := n; left > 0; {
			k := min(left, 1+r.IntN(len(b)))
			for i := 0; i < k; i += 1 + r.IntN(50) {
				b[i] = byte(r.Uint32())
			}
			h.Write(b[:k])
			if _, err := c.Write(b[:k]); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			left -= k
		}
		closeWrite(t, c)
		h.Sum(sum[:0])
		return
	}
	receive := func(c net.Conn) (sum [32]byte) {
		h := sha256.New()
		k, err := io.Copy(h, c)
		if err != nil || k != int64(n) {
			t.Errorf("read %d bytes, want %d: %v", k, n, err)
		}
		h.Sum(sum[:0])
		return
	}
	got, sent := make(chan [32]byte, 2), make(chan [32]byte, 2)
	go func() { got <- receive(c) }()
	go func() { sent <- send(d, 2) }()
	go func() {
		x := receive(d)
		got <- x
	}()
	s1 := send(c, 1)
	s2 := <-sent
	g1, g2 := <-got, <-got
	if !(s1 == g1 && s2 == g2 || s1 == g2 && s2 == g1) {
		t.Error("the streams differ")
	}
}

func TestBulkBothWays(t *testing.T) {
	for _, tc := range []struct {
		name          string
		addr          netip.Addr
		mtu, size     int
		loss, reorder float64
	}{
		{name: "v4", addr: b4, size: 16 << 20},
		{name: "v6", addr: b6, size: 16 << 20},
		{name: "big mtu", addr: b4, mtu: 8960, size: 16 << 20},
		{name: "lossy v4", addr: b4, size: 1 << 20, loss: 0.01, reorder: 0.02},
		{name: "lossy v6", addr: b6, size: 1 << 20, loss: 0.01, reorder: 0.02},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, func(c *Config) { c.MTU = tc.mtu })
			l := listen(t, p.b, "[::]:80")
			c, d := connect(t, p.a, l, tc.addr)
			if tc.loss > 0 {
				p.lossy(7, tc.loss, tc.reorder)
			}
			exchange(t, c, d, tc.size)
		})
	}
}

func TestRefused(t *testing.T) {
	p := newPair(t, nil)
	_, err := p.a.DialTCP(testCtx(t), netip.AddrPortFrom(b4, 81))
	if !errors.Is(err, ErrRefused) {
		t.Fatalf("err = %v", err)
	}
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "dial" || op.Net != "tcp" || op.Addr.String() != "100.64.0.2:81" {
		t.Fatalf("err = %#v", err)
	}
}
