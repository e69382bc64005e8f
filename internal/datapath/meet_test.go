package datapath

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestKnock lets a peer dial before control has told of it.
func TestKnock(t *testing.T) {
	a, b := newPair(t)
	a.listen(80)
	a.tell(&tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{tailcfg.NodeID(b.id)}})
	dialled := make(chan error, 1)
	go func() { dialled <- b.dial(time.Minute, netip.AddrPortFrom(a.a4, 80)) }()
	k := &a.trans.Load().knocks
	for waiting := 0; waiting == 0; runtime.Gosched() {
		k.mu.Lock()
		waiting = len(k.list)
		k.mu.Unlock()
	}
	if a.Live(b.key.Public()).Known {
		t.Fatal("somebody unknown was let in")
	}
	n := b.node()
	n.HomeDERP, n.DiscoKey = 0, key.DiscoPublic{} // there is no way to it but the one that it came by
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	if !a.Live(b.key.Public()).Known {
		t.Error("the knock was not answered when its sender became known")
	}
	if err := <-dialled; err != nil {
		t.Error(err)
	}
}

func TestKnocksAreBounded(t *testing.T) {
	var k knocks
	msg := make([]byte, initiationLen)
	msg[0] = 1
	for i := range 3 * maxKnocks {
		msg[4] = byte(i)
		if !k.add(now(), path.Source{}, msg) {
			t.Fatal("not kept")
		}
	}
	for _, bad := range [][]byte{nil, msg[1:], append(msg[:len(msg):len(msg)], 0), make([]byte, initiationLen)} {
		if k.add(now(), path.Source{}, bad) {
			t.Errorf("%d bytes that are no initiation were kept", len(bad))
		}
	}
	got := k.take(now())
	if len(got) != maxKnocks || got[0].msg[4] != 2*maxKnocks || len(k.take(now())) != 0 {
		t.Errorf("kept %d, the oldest number %d", len(got), got[0].msg[4])
	}
	k.add(now(), path.Source{}, msg)
	k.list[0].at = now().Add(-knockLife - time.Second)
	if len(k.take(now())) != 0 {
		t.Error("an old one was kept")
	}
}

// TestPeerRestarts has a peer end and start again, as the same node with another disco key, and be dialled before control has told
// of the new life.
func TestPeerRestarts(t *testing.T) {
	a, b := newPair(t)
	b.listen(80)
	dst := netip.AddrPortFrom(b.a4, 80)
	if err := a.dial(2*time.Minute, dst); err != nil {
		t.Fatal(err)
	}
	b.Close()
	dialled := make(chan error, 1)
	go func() { dialled <- a.dial(2*time.Minute, dst) }()

	b.disco = key.NewDisco()
	up := make(chan struct{}, 16)
	e, err := New(Config{NodeKey: b.key, DiscoKey: b.disco, RelayState: func(_ int, connected bool, _ error) {
		if connected {
			up <- struct{}{}
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	b.Engine = e
	b.listen(80)
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{b.node()}})
	b.tell(&tailcfg.MapResponse{Node: b.node(), Peers: []*tailcfg.Node{a.node()}, DERPMap: a.Netmap().DERPMap, PacketFilter: &allowAll})
	b.SetHome(1)
	<-up
	if err := <-dialled; err != nil {
		t.Error(err)
	}
}
