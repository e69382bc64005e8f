package datapath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestThousandKnownPeers: peers that the netmap names, and nobody speaks to, have no WireGuard state, no goroutine and no connection, and
// nothing is sent to them, however often control says something new of them.
func TestThousandKnownPeers(t *testing.T) {
	const peers = 1000
	a, _ := newPair(t)
	online := true
	node := func(i, round int) *tailcfg.Node {
		var k [32]byte
		binary.BigEndian.PutUint32(k[:], uint32(i+1))
		ip := netip.AddrFrom4([4]byte{100, 65, byte(i >> 8), byte(i)})
		return &tailcfg.Node{
			ID: tailcfg.NodeID(1000 + i), StableID: tailcfg.StableNodeID(fmt.Sprint("p", i)), Name: fmt.Sprintf("p%d.example.ts.net.", i),
			Key: key.NodePublicFromRaw(k), DiscoKey: key.DiscoPublicFromRaw(k), HomeDERP: 1, Cap: tailcfg.CurrentCapabilityVersion,
			Online: &online, MachineAuthorized: true, Addresses: []netip.Prefix{netip.PrefixFrom(ip, 32)},
			Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(round+1))},
		}
	}
	tr := a.trans.Load()
	sent := func() (n uint64) {
		for _, s := range tr.relays.Stats() {
			n += s.Sent
		}
		return n
	}
	known := func() int {
		tr.mu.RLock()
		defer tr.mu.RUnlock()
		return len(tr.peers)
	}
	packets, states, goroutines := sent(), known(), runtime.NumGoroutine()
	for round := range 3 {
		var changed []*tailcfg.Node
		for i := range peers {
			changed = append(changed, node(i, round))
		}
		a.tell(&tailcfg.MapResponse{PeersChanged: changed})
	}
	if n := known() - states; n != 0 {
		t.Errorf("WireGuard state for %d peers", n)
	}
	if n := sent() - packets; n != 0 {
		t.Errorf("%d packets by the relay", n)
	}
	if n := runtime.NumGoroutine() - goroutines; n > 10 { // the pair's own may come and go
		t.Errorf("%d goroutines more", n)
	}
	if n := a.Netmap().Len(); n != peers+1 {
		t.Errorf("%d peers", n)
	}
}
