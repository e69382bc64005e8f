package path

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/udp"
)

// TestOverLoopback has two Managers find each other over real sockets, and reports how long that takes.
func TestOverLoopback(t *testing.T) {
	var pair [2]*loopNode
	for i := range pair {
		pair[i] = newLoopNode(t, udp.Config{})
	}
	a, b := pair[0], pair[1]
	a.peer, b.peer = b, a
	a.m.UpsertPeer(b.info())
	b.m.UpsertPeer(a.info())
	start := time.Now()
	for n := 0; ; n++ {
		a.m.Peer(b.key).Send(wgPacket(100), 100)
		select {
		case <-a.up:
			t.Logf("direct after %v and %d packets", time.Since(start), n+1)
			if !a.m.Path(b.key).Addr.IsValid() {
				t.Errorf("%+v", a.m.Path(b.key))
			}
			return
		case <-time.After(time.Millisecond):
			if time.Since(start) > time.Minute {
				t.Fatalf("%+v", a.m.Path(b.key))
			}
		}
	}
}

type loopNode struct {
	key   key.NodePublic
	disco key.DiscoPrivate
	socks *udp.Sockets
	m     *Manager
	peer  *loopNode
	up    chan struct{}
	bytes chan int
}

func newLoopNode(t testing.TB, cfg udp.Config) *loopNode {
	n := &loopNode{key: key.NewNode().Public(), disco: key.NewDisco(), up: make(chan struct{}, 10), bytes: make(chan int, 1)}
	var err error
	if n.socks, err = udp.Open(cfg); err != nil {
		t.Fatal(err)
	}
	n.m, err = New(Config{NodeKey: n.key, DiscoKey: n.disco, Relay: n, NewSink: func() Sink { return &loopSink{n: n} }, UDP: n.socks,
		DirectUp: func(*Peer, bool) { n.up <- struct{}{} }})
	if err != nil {
		t.Fatal(err)
	}
	n.m.RelayState(1, true, nil)
	n.socks.Start(n.m.FromUDP)
	t.Cleanup(func() {
		n.socks.Close()
		n.m.Close()
	})
	return n
}

func (n *loopNode) info() PeerInfo {
	p4, _ := n.socks.Ports()
	return PeerInfo{Key: n.key, Disco: n.disco.Public(), HomeRegion: 1,
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p4)}}
}

// Send implements Relay.
func (n *loopNode) Send(region int, _ key.NodePublic, b []byte, seg int) error {
	n.peer.m.FromRelay(region, n.key, slices.Clone(b))
	return nil
}

type loopSink struct {
	n   *loopNode
	got int
}

func (s *loopSink) WireGuard(src Source, _ *Peer, b []byte) {
	if src.Region == 0 {
		s.n.m.Peer(s.n.peer.key).Heard(src)
	}
	if s.got += len(b); b[8] == 1 {
		select {
		case s.n.bytes <- s.got:
		default:
		}
		s.got = 0
	}
}
func (s *loopSink) Flush() {}

// BenchmarkManagers sends batches of 48 messages from one Manager to another over loopback, waiting for each to arrive.
func BenchmarkManagers(b *testing.B) {
	for _, plain := range []bool{false, true} {
		b.Run(fmt.Sprintf("plain=%v", plain), func(b *testing.B) {
			x, y := newLoopNode(b, udp.Config{Plain: plain}), newLoopNode(b, udp.Config{Plain: plain})
			x.peer, y.peer = y, x
			x.m.UpsertPeer(y.info())
			y.m.UpsertPeer(x.info())
			p := x.m.Peer(y.key)
			p.Send(wgPacket(100), 100)
			<-x.up
			const seg, n = 1312, 48
			msg := make([]byte, seg*n)
			for i := range n {
				copy(msg[i*seg:], wgPacket(seg))
			}
			msg[(n-1)*seg+8] = 1
			b.SetBytes(int64(len(msg)))
			b.ReportAllocs()
			for b.Loop() {
				p.Send(msg, seg)
				<-y.bytes
			}
		})
	}
}
