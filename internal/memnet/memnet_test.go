package memnet

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	_ net.Conn       = (*Conn)(nil)
	_ net.Listener   = (*Listener)(nil)
	_ net.PacketConn = (*PacketConn)(nil)
)

func dial(t *testing.T, n *Network) (*Conn, *Conn) {
	t.Helper()
	l, err := n.Host("10.0.0.2").Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := n.Host("10.0.0.1").DialContext(t.Context(), "tcp", "10.0.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*Conn), s.(*Conn)
}

func TestStreamCarriesEverythingAndHalfCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s := dial(t, New(1, Link{Latency: 5 * time.Millisecond}))
		want := make([]byte, 3*bufferBytes+17)
		rand.Read(want)
		go func() {
			c.Write(want)
			c.CloseWrite()
		}()
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read %d bytes, %v; want %d", len(got), err, len(want))
		}
		start := time.Now()
		if _, err := s.Write([]byte("back")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 10)
		if n, err := c.Read(b); err != nil || string(b[:n]) != "back" {
			t.Fatalf("%q, %v", b[:n], err)
		}
		if d := time.Since(start); d != 5*time.Millisecond {
			t.Errorf("took %v", d)
		}
		s.Close()
		if _, err := c.Read(b); err != io.EOF {
			t.Errorf("after the other side closed: %v", err)
		}
		if _, err := c.Write(b); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after the other side closed: %v", err)
		}
	})
}

func TestStreamDeadlinesAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s := dial(t, New(1, Link{Latency: time.Millisecond}))
		c.SetReadDeadline(time.Now().Add(time.Second))
		start := time.Now()
		if _, err := c.Read(make([]byte, 1)); !IsTimeout(err) || time.Since(start) != time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		var ne net.Error
		if _, err := c.Read(make([]byte, 1)); !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%v", err)
		}
		c.SetReadDeadline(time.Time{})
		s.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Errorf("after the deadline was taken away: %v", err)
		}
		c.SetWriteDeadline(time.Now().Add(time.Second))
		if n, err := c.Write(make([]byte, 2*bufferBytes)); n != bufferBytes || !IsTimeout(err) {
			t.Errorf("%d, %v", n, err)
		}
		go func() {
			time.Sleep(time.Second)
			c.Close()
		}()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
		s.Reset()
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v", err)
		}
	})
}

func TestDialFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Link{Latency: time.Millisecond})
		h := n.Host("10.0.0.1")
		if _, err := h.DialContext(t.Context(), "tcp", "10.0.0.2:80"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		if _, err := h.DialContext(t.Context(), "tcp", "[fd00::1]:80"); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("no address of the family: %v", err)
		}
		n.SetLink(func(netip.AddrPort, netip.AddrPort, bool) Link { return Link{Down: true} })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := h.DialContext(ctx, "tcp", "10.0.0.2:80"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("link down: %v", err)
		}
		l, _ := h.Listen("tcp", ":0")
		go func() {
			time.Sleep(time.Second)
			l.Close()
		}()
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
	})
}

func TestDatagrams(t *testing.T) {
	const count = 1000
	for _, tt := range []struct {
		name     string
		link     Link
		min, max int
		reorders bool
	}{
		{"clean", Link{Latency: 3 * time.Millisecond}, count, count, false},
		{"lossy", Link{Loss: 0.25}, 650, 850, false},
		{"doubling", Link{Duplicate: 0.5}, 1400, 1600, false},
		{"reordering", Link{Latency: time.Millisecond, Reorder: 0.1}, count, count, true},
		{"jittering", Link{Latency: time.Millisecond, Jitter: 5 * time.Millisecond}, count, count, true},
		{"down", Link{Down: true}, 0, 0, false},
		{"small MTU", Link{MTU: 3}, 0, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := New(7, tt.link)
				a, _ := n.Host("fd00::1").ListenPacket("udp6", ":0")
				b, _ := n.Host("10.1.1.1", "fd00::2").ListenPacket("udp6", ":53")
				defer a.Close()
				defer b.Close()
				for i := range count {
					if _, err := a.WriteTo([]byte{byte(i >> 8), byte(i), 0, 0}, b.LocalAddr()); err != nil {
						t.Fatal(err)
					}
					time.Sleep(100 * time.Microsecond)
				}
				b.SetReadDeadline(time.Now().Add(time.Second))
				got, last, reordered := 0, -1, false
				for {
					buf := make([]byte, 100)
					k, src, err := b.ReadFromUDPAddrPort(buf)
					if err != nil {
						if !IsTimeout(err) {
							t.Fatal(err)
						}
						break
					}
					if k != 4 || src != a.LocalAddrPort() {
						t.Fatalf("%d bytes from %v", k, src)
					}
					i := int(buf[0])<<8 | int(buf[1])
					reordered = reordered || i < last
					last = i
					got++
				}
				if got < tt.min || got > tt.max || reordered != tt.reorders {
					t.Errorf("%d arrived, reordered %v", got, reordered)
				}
			})
		})
	}
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, Link{})
		a, _ := n.Host("10.0.0.1").ListenPacket("udp", ":0")
		b, _ := n.Host("10.0.0.2").ListenPacket("udp", ":1")
		defer a.Close()
		for range 1000 {
			a.WriteToUDPAddrPort(make([]byte, 1024), b.LocalAddrPort())
		}
		if b.bytes > queueBytes || b.bytes < queueBytes-1024 {
			t.Errorf("%d bytes queued", b.bytes)
		}
		b.Close()
		if _, _, err := b.ReadFrom(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
		if c, err := n.Host("10.0.0.2").ListenPacket("udp", ":1"); err != nil {
			t.Errorf("address not freed: %v", err)
		} else if _, err := n.Host("10.0.0.2").ListenPacket("udp", ":1"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%v", err)
		} else {
			c.Close()
		}
	})
}
