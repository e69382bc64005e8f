package datapath

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
)

// TestDatagramsStayInOrder sends datagrams without a pause and now and then with one: what comes comes in order, and the last one comes.
// It has one path: what goes by two of them, as while one of them is in doubt, overtakes.
func TestDatagramsStayInOrder(t *testing.T) {
	ForceRelay.Store(true)
	defer ForceRelay.Store(false)
	a, b := newPair(t)
	pc, err := b.Stack().ListenUDP(netip.AddrPortFrom(b.a4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	c, err := a.Stack().DialUDP(t.Context(), netip.AddrPortFrom(b.a4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const rounds, run = 40, 150 // a run fits the receive queue
	done := make(chan error, 1)
	read := make(chan struct{}, 1)
	go func() {
		buf := make([]byte, 1500)
		next := uint32(0)
		pc.SetReadDeadline(time.Now().Add(60 * time.Second))
		for next < rounds*run {
			n, _, err := pc.ReadFrom(buf)
			if err != nil {
				done <- err
				return
			}
			got := binary.BigEndian.Uint32(buf)
			if got < next || n != 4+int(got)%1200 {
				t.Errorf("datagram %d of %d bytes after %d", got, n, next)
			}
			if next = got + 1; next%run == 0 {
				read <- struct{}{}
			}
		}
		done <- nil
	}()
	buf := make([]byte, 1500)
	for i := range uint32(rounds * run) {
		binary.BigEndian.PutUint32(buf, i)
		if _, err := c.Write(buf[:4+int(i)%1200]); err != nil {
			t.Fatal(err)
		}
		if (i+1)%run == 0 {
			select {
			case <-read:
			case err := <-done:
				t.Fatal(err)
			}
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// BenchmarkDatagramsOneWay sends datagrams without a pause.
func BenchmarkDatagramsOneWay(b *testing.B) {
	x, y := newPair(b)
	pc, err := y.Stack().ListenUDP(netip.AddrPortFrom(y.a4, 53))
	if err != nil {
		b.Fatal(err)
	}
	defer pc.Close()
	c, err := x.Stack().DialUDP(b.Context(), netip.AddrPortFrom(y.a4, 53))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	msg := make([]byte, 1200)
	b.ReportAllocs()
	b.SetBytes(int64(len(msg)))
	for b.Loop() {
		if _, err := c.Write(msg); err != nil {
			b.Fatal(err)
		}
	}
}
