package filter

import (
	"testing"

	"github.com/tailnode/tailnode/internal/budget"
	"github.com/tailnode/tailnode/internal/packet"
)

func TestPacketCost(t *testing.T) {
	f, fl := manyRules(t, 1000), NewFlows(0)
	out, in := pkt(packet.UDP, "100.64.0.1:4000", "100.64.0.2:53"), pkt(packet.UDP, "100.64.0.2:53", "100.64.0.1:4000")
	f.Out(out, fl, now) // the flow's first packet may allocate
	budget.Check(t, "allocs.filter", testing.AllocsPerRun(1000, func() {
		f.Out(out, fl, now)
		f.In(in, fl, now)
	}))
}
