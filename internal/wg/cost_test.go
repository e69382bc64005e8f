package wg

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/budget"
)

// TestPacketCost counts what a packet allocates besides what the cipher does where it has no assembly.
func TestPacketCost(t *testing.T) { synctest.Test(t, testPacketCost) }

func testPacketCost(t *testing.T) {
	a, buf := newAEAD(new([32]byte)), make([]byte, 1280, 1296)
	bare := testing.AllocsPerRun(100, func() { a.Seal(buf[:0], zeroNonce[:], buf, nil) })
	x, y := benchPair(t, 1280)
	s := &stream{pkt: ip4(1280, 1)}
	budget.Check(t, "allocs.wg.seal", testing.AllocsPerRun(1000, func() {
		s.left = 1
		x.peer.Send(s)
	})-bare)
	w := new(wire)
	x.peer.conduit = w
	s.left = 1100
	x.peer.Send(s)
	msgs := w.take()
	budget.Check(t, "allocs.wg.open", testing.AllocsPerRun(1000, func() {
		if _, _, err := y.dev.Receive(nil, msgs[0], nil); err != nil {
			t.Fatal(err)
		}
		msgs = msgs[1:]
	})-bare)
}

// TestPeerCost weighs peers whose sessions have become idle.
func TestPeerCost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 10_000
		d, w := newDevice(t, nil), new(wire)
		idle := func() {
			time.Sleep(time.Minute)
			synctest.Wait()
			w.take()
		}
		addWithSession(t, d, w, true)
		idle()
		before := heap()
		for range n {
			addWithSession(t, d, w, false)
		}
		idle()
		budget.Check(t, "bytes.peer.wg", (heap()-before)/n)
	})
}
