package datapath

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestStraySYN: whatever has SYN goes by way of the bound for strays, also where an Inbox does not see that it is TCP.
func TestStraySYN(t *testing.T) {
	a, _ := newPair(t)
	a.listen(80)
	c := &end{t: t, id: 3, key: key.NewNode(), disco: key.NewDisco()} // which is away, and resets nothing
	c.a4, c.a6 = addrs(c.id)
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{c.node()}})
	tr := a.trans.Load()
	p, s := tr.peer(c.key.Public()), tr.newSink()
	dst := netip.AddrPortFrom(a.a6, 80)
	send := func(port uint16, flags uint8, edit func([]byte) []byte) netip.AddrPort {
		src := netip.AddrPortFrom(c.a6, port)
		pkt, err := packet.AppendTCP(nil, src, dst, packet.TCPHeader{Seq: 1, Flags: flags, Window: 65535}, nil)
		if err != nil {
			t.Fatal(err)
		}
		s.packet(p, edit(pkt))
		s.Flush()
		return src
	}
	plain := func(b []byte) []byte { return b }
	options := func(b []byte) []byte { // destination options: padding
		b = append(b[:40:40], append([]byte{b[6], 0, 1, 4, 0, 0, 0, 0}, b[40:]...)...)
		b[6] = 60
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
		return b
	}
	refused := map[string]netip.AddrPort{
		"SYN and FIN":      send(1001, packet.TCPSyn|packet.TCPFin, plain),
		"extension header": send(1002, packet.TCPSyn, options),
	}
	last := send(1003, packet.TCPSyn, plain)
	for a.Stack().Taker(dst, last) != netstack.Handshake {
		runtime.Gosched()
	}
	for name, src := range refused {
		if to := a.Stack().Taker(dst, src); to != netstack.Listener {
			t.Errorf("%s began a connection: %v", name, to)
		}
	}
}
