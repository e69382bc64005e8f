package datapath

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/packet"
)

// TestDatagramsStayInOrder sends datagrams without a pause and now and then with one: what comes comes in order, and the last one comes.
// It has one path: what goes by two of them, as while one of them is in doubt, overtakes.
func TestDatagramsStayInOrder(t *testing.T) {
	ForceRelay.Store(true)
	defer ForceRelay.Store(false)
	a, b := newPair(t)
	c, pc := a.datagrams(b)
	const rounds, run = 40, 150 // a run fits the receive queue
	done := make(chan error, 1)
	read := make(chan struct{}, 1)
	go func() {
		buf := make([]byte, 1500)
		next := uint32(0)
		pc.SetReadDeadline(time.Now().Add(5 * time.Minute))
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

// TestStream: where datagrams do not cease a goroutine takes care of them, which ends when they do; what is urgent begins none, and does not
// wait for it; and everything comes, in order.
func TestStream(t *testing.T) {
	ForceRelay.Store(true)
	defer ForceRelay.Store(false)
	a, b := newPair(t)
	echo(t, a, b, b.a4) // there is a session
	pc, err := b.Stack().ListenUDP(netip.AddrPortFrom(b.a4, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	p := a.trans.Load().peer(b.key.Public())
	g := &p.gather
	at := now() // all are sent at once
	sent := uint32(0)
	send := func(n int, urgent bool) {
		for range n {
			pkt, err := packet.AppendUDP(nil, netip.AddrPortFrom(a.a4, 4000), netip.AddrPortFrom(b.a4, 53), binary.BigEndian.AppendUint32(nil, sent))
			if err != nil {
				t.Fatal(err)
			}
			sent++
			p.datagram((*one)(&pkt), len(pkt), at, urgent)
		}
	}
	state := func() (ticking, waits bool) {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.ticking, g.wait != nil
	}
	came := func() {
		t.Helper()
		pc.SetReadDeadline(time.Now().Add(time.Minute))
		buf := make([]byte, 100)
		for i := range sent {
			if n, _, err := pc.ReadFrom(buf); err != nil || n != 4 || binary.BigEndian.Uint32(buf) != i {
				t.Fatalf("datagram %d: %x, %v", i, buf[:n], err)
			}
		}
		sent = 0
	}
	send(2*streamRun, true)
	if ticking, _ := state(); ticking {
		t.Error("a stream of what is urgent")
	}
	came()
	seen := false
	for end := time.Now().Add(2 * time.Minute); !seen && time.Now().Before(end); { // this goroutine may be away for longer than a tick
		send(2*streamRun, false)
		ticking, _ := state()
		send(1, true)
		after, waits := state()
		if seen = ticking && after; seen && waits {
			t.Error("what is urgent waits")
		}
		came()
	}
	if !seen {
		t.Fatal("no stream")
	}
	ended := make(chan struct{})
	go func() { a.streams.wg.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the stream does not end")
	}
	if ticking, waits := state(); ticking || waits {
		t.Errorf("the stream has ended, and left: ticking %v, something waits %v", ticking, waits)
	}
	send(2*streamRun, false) // and one that Close ends
	a.Close()
	if a.streams.run(func(<-chan struct{}) {}) {
		t.Error("a stream after Close")
	}
}

// BenchmarkDatagramsOneWay sends datagrams without a pause.
func BenchmarkDatagramsOneWay(b *testing.B) {
	x, y := newPair(b)
	c, _ := x.datagrams(y)
	msg := make([]byte, 1200)
	b.ReportAllocs()
	b.SetBytes(int64(len(msg)))
	for b.Loop() {
		if _, err := c.Write(msg); err != nil {
			b.Fatal(err)
		}
	}
}
