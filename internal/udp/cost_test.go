package udp

import (
	"net/netip"
	"testing"

	"github.com/tailnode/tailnode/internal/budget"
)

func TestPacketCost(t *testing.T) {
	a, err := Open(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := Open(Config{})
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
	const packets, size = 20, 1312
	msg := make([]byte, packets*size)
	msg[len(msg)-1] = 1
	dst := loop(b, false)
	budget.Check(t, "allocs.udp.batch", testing.AllocsPerRun(200, func() {
		if err := a.Send(dst, msg, size); err != nil {
			t.Fatal(err)
		}
		<-arrived
	}))
}
