package datapath

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/budget"
)

// TestWholePathAllocations counts what a datagram allocates from one program to another: stack, filter, WireGuard,
// path, socket, and all of it back up again. gVisor allocates seven times, and nobody else at all.
func TestWholePathAllocations(t *testing.T) {
	a, b := newPair(t)
	c, pc := a.datagrams(b)
	pc.SetDeadline(time.Now().Add(5 * time.Minute))
	in := pc.(interface {
		ReadFromAddrPort([]byte) (int, netip.AddrPort, error)
	})
	out, buf := make([]byte, 1200), make([]byte, 1500)
	one := func() {
		if _, err := c.Write(out); err != nil {
			t.Fatal(err)
		}
		if _, _, err := in.ReadFromAddrPort(buf); err != nil {
			t.Fatal(err)
		}
	}
	one() // the handshake
	n := testing.AllocsPerRun(2000, one)
	for range 4 { // the least: what goes on beside it counts too, the more the longer it takes
		n = min(n, testing.AllocsPerRun(500, one))
	}
	budget.Check(t, "allocs.datagram", n)
}

// BenchmarkDatagram is the way of a datagram from one program to another and the answer's way back.
func BenchmarkDatagram(b *testing.B) {
	x, y := newPair(b)
	pc, err := y.Stack().ListenUDP(netip.AddrPortFrom(y.a4, 53))
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(buf[:n], from)
		}
	}()
	defer func() { pc.Close(); <-done }()
	c, err := x.Stack().DialUDP(b.Context(), netip.AddrPortFrom(y.a4, 53))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	msg, buf := make([]byte, 100), make([]byte, 1500)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(msg); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}
