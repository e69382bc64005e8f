package packet

import (
	"testing"

	"github.com/tailnode/tailnode/internal/budget"
)

func TestPacketCost(t *testing.T) {
	all := seeds()
	var p Parsed
	budget.Check(t, "allocs.packet.decode", testing.AllocsPerRun(100, func() {
		for _, b := range all {
			p.Decode(b)
		}
	})/float64(len(all)))
}
