package derp

import (
	"testing"

	"github.com/tailnode/tailnode/internal/budget"
)

func TestPacketCost(t *testing.T) {
	payload := make([]byte, 1400)
	rd := NewReader(repeat(AppendPacket(nil, RecvPacket, peerPub, payload)), 4<<10, nil)
	budget.Check(t, "allocs.derp.receive", testing.AllocsPerRun(2000, func() {
		if _, _, err := rd.Next(); err != nil {
			t.Fatal(err)
		}
	}))
	q := Queue{MaxBytes: 1 << 20, MaxFrames: 1000}
	var f Flow
	budget.Check(t, "allocs.derp.send", testing.AllocsPerRun(2000, func() {
		q.Push(SendPacket, named('a'), payload, &f)
		for c := q.Pop(); c != nil; c = q.Pop() {
			c.Release()
		}
	}))
}
