package path

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// TestThousandPeersFallIdle: of a thousand peers that were all spoken to nothing is left but their entries when the traffic has ended: no
// machine, no timer, no goroutine, no packet, for a day.
func TestThousandPeersFallIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const peers = 1000
		w := newInternet(t)
		a := w.node(nodeOpts{}, "1.1.1.1")
		time.Sleep(time.Minute)
		synctest.Wait()
		goroutines := runtime.NumGoroutine() + peers/100 // one that has ended is counted for a moment more
		var all []*Peer
		for i := range peers {
			var k [32]byte
			binary.BigEndian.PutUint32(k[:], uint32(i+1))
			all = append(all, a.m.UpsertPeer(PeerInfo{Key: key.NodePublicFromRaw(k), Disco: key.DiscoPublicFromRaw(k), HomeRegion: 1,
				Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{5, 5, byte(i >> 8), byte(i)}), 1)}}))
		}
		active := func() (n int) {
			for _, p := range all {
				if p.active.Load() {
					n++
				}
			}
			return n
		}
		sent := func() int {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.datagram
		}
		before := sent()
		for _, p := range all {
			if err := p.Send(wgPacket(100), 100); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if n := active(); n != peers {
			t.Errorf("%d of %d peers are looked after", n, peers)
		}
		if g := runtime.NumGoroutine(); g > goroutines {
			t.Errorf("%d goroutines, %d are enough for %d peers with traffic", g, goroutines, peers)
		}
		time.Sleep(sessionFor + 2*idleAfter)
		if n := sent() - before; n == 0 || n > peers*40 {
			t.Errorf("%d datagrams for %d peers that do not answer", n, peers)
		}
		if n := active(); n > 0 {
			t.Errorf("%d peers are still looked after", n)
		}
		before = sent()
		time.Sleep(24 * time.Hour)
		synctest.Wait() // what else was due at this moment
		if n := sent() - before; n > 0 {
			t.Errorf("%d datagrams in a day without traffic", n)
		}
		if g := runtime.NumGoroutine(); g > goroutines {
			t.Errorf("%d goroutines, %d are enough for peers without traffic", g, goroutines)
		}
		// The owner's heap has a timer for none: it would have made what it stands for active.
		if n := active(); n > 0 {
			t.Errorf("%d peers woke up", n)
		}
	})
}
