package datapath

import (
	"encoding/binary"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// tooBig is an ICMP error of src to dst: a packet of the connection from one to other needs fragmentation, for an MTU of mtu.
func tooBig(t *testing.T, src, dst netip.Addr, one, other netip.AddrPort, mtu uint16) []byte {
	t.Helper()
	inner, err := packet.AppendTCP(nil, one, other, packet.TCPHeader{Seq: 1, Flags: packet.TCPAck}, nil)
	if err != nil {
		t.Fatal(err)
	}
	body := append([]byte{3, 4, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, inner[:28]...)
	binary.BigEndian.PutUint16(body[2:], packet.Checksum(body, 0))
	b, err := packet.AppendIP(nil, src, dst, packet.ICMPv4, len(body))
	if err != nil {
		t.Fatal(err)
	}
	return append(b, body...)
}

// TestICMPErrors: what a peer says of packets to another is not believed, nor a path on which nothing gets on. Otherwise one packet, of
// anybody in the netmap, has a connection of others go on with a byte in each packet.
func TestICMPErrors(t *testing.T) {
	a, b := newPair(t)
	c := &end{t: t, id: 3, key: key.NewNode(), disco: key.NewDisco()}
	c.a4, c.a6 = addrs(3)
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{c.node()}})
	ln, err := a.Stack().ListenTCP(netip.AddrPortFrom(a.a4, 443))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cb, err := b.Stack().DialTCP(within(t, time.Minute), netip.AddrPortFrom(a.a4, 443))
	if err != nil {
		t.Fatal(err)
	}
	defer cb.Close()
	ca, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	here, there := ca.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort(), ca.RemoteAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort()
	tr := a.trans.Load()
	m := a.netmap.Load()
	for _, tt := range []struct {
		what   string
		from   *end
		mtu    uint16
		about  netip.AddrPort
		belief bool
	}{
		{"a stranger to the connection", c, 1000, there, false},
		{"a stranger, of no packet ever", c, 0, there, false},
		{"the peer, of a path on which nothing gets on", b, 0, there, false},
		{"the peer, of less than all must take", b, 575, there, false},
		{"the peer, of packets to a stranger", b, 1000, netip.AddrPortFrom(c.a4, 7), false},
		{"the peer", b, 1000, there, true},
	} {
		pkt := tooBig(t, tt.from.a4, a.a4, here, tt.about, tt.mtu)
		var h packet.Parsed
		if err := h.Decode(pkt); err != nil || !h.IsICMPError() {
			t.Fatal(err)
		}
		if got := credible(m, m.PeerByKey(tt.from.key.Public()), &h); got != tt.belief {
			t.Errorf("%s is believed: %v", tt.what, got)
		}
		if !tt.belief {
			s := tr.newSink()
			s.packet(tr.peer(tt.from.key.Public()), pkt)
			s.Flush()
		}
	}
	const n = 64 << 10
	before := a.Live(b.key.Public()).TxBytes
	go ca.Write(make([]byte, n))
	cb.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if _, err := io.ReadFull(cb, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	if sent := a.Live(b.key.Public()).TxBytes - before; sent > 20*n { // a byte in each packet would be more than 80 times as much
		t.Errorf("%d bytes were sent for %d", sent, n)
	}
}
