package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/waiter"
)

func TestUDPDatagrams(t *testing.T) {
	for _, addr := range []netip.Addr{b4, b6} {
		p := newPair(t, nil)
		srv, err := p.b.ListenUDP(netip.MustParseAddrPort("[::]:53"))
		if err != nil {
			t.Fatal(err)
		}
		defer srv.Close()
		c, err := p.a.DialUDP(testCtx(t), netip.AddrPortFrom(addr, 53))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		deadline := time.Now().Add(5 * time.Minute)
		srv.SetDeadline(deadline)
		c.SetDeadline(deadline)
		buf := make([]byte, 70000)
		for _, n := range []int{0, 1, 3, 100, 1200, 1232, 1252, 1253, 4000, 60000} { // the last few go in fragments
			msg := bytes.Repeat([]byte{byte(n), 7}, n/2+1)[:n]
			if _, err := c.Write(msg); err != nil {
				t.Fatalf("%v, %d bytes: %v", addr, n, err)
			}
			k, from, err := srv.ReadFrom(buf)
			if err != nil || !bytes.Equal(buf[:k], msg) || from.String() != c.LocalAddr().String() {
				t.Fatalf("%v, %d bytes: got %d from %v: %v", addr, n, k, from, err)
			}
			if _, err := srv.WriteTo(append(msg, 'r'), from); err != nil {
				t.Fatal(err)
			}
			if k, err := c.Read(buf); err != nil || !bytes.Equal(buf[:k], append(msg, 'r')) {
				t.Fatalf("%v, %d bytes: reply of %d: %v", addr, n, k, err)
			}
		}
		c.Write([]byte("cut off"))
		if k, _, err := srv.ReadFrom(buf[:3]); k != 3 || err != nil {
			t.Errorf("short buffer: %d, %v", k, err)
		}
		c.Write([]byte("next"))
		if k, _, err := srv.ReadFrom(buf); string(buf[:k]) != "next" {
			t.Errorf("after a short read: %q, %v", buf[:k], err)
		}
	}
}

func TestUDPErrors(t *testing.T) {
	p := newPair(t, nil)
	srv, err := p.b.ListenUDP(netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	port := netip.MustParseAddrPort(srv.LocalAddr().String()).Port()
	if _, err := p.b.ListenUDP(netip.AddrPortFrom(netip.Addr{}, port)); !errors.Is(err, ErrInUse) {
		t.Errorf("second socket: %v", err)
	}
	if _, err := p.b.ListenUDP(netip.MustParseAddrPort("100.64.9.9:53")); !errors.Is(err, ErrNotLocal) {
		t.Errorf("foreign address: %v", err)
	}
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.a.DialUDP(cancelled, netip.AddrPortFrom(b4, 53)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := p.a.DialUDP(testCtx(t), netip.AddrPort{}); err == nil {
		t.Error("dialled nowhere")
	}

	c, err := p.a.DialUDP(testCtx(t), netip.AddrPortFrom(b4, port^1)) // nobody there
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 9)); !errors.Is(err, ErrRefused) {
		t.Errorf("port unreachable: %v", err)
	}
	if _, err := c.(net.PacketConn).WriteTo([]byte("x"), srv.LocalAddr()); !errors.Is(err, net.ErrWriteToConnected) {
		t.Errorf("WriteTo when connected: %v", err)
	}
	if _, err := srv.(*packetConn).Write([]byte("x")); err == nil {
		t.Error("Write when not connected")
	}
	if _, err := srv.WriteTo([]byte("x"), &net.UnixAddr{}); err == nil {
		t.Error("wrote to a unix address")
	}

	srv.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, _, err := srv.ReadFrom(make([]byte, 9)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	srv.SetReadDeadline(time.Time{})
	errc := make(chan error)
	go func() { _, _, err := srv.ReadFrom(make([]byte, 9)); errc <- err }()
	srv.Close()
	if err := <-errc; !errors.Is(err, net.ErrClosed) {
		t.Errorf("close: %v", err)
	}
	if err := srv.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
	go func() { _, err := c.Read(make([]byte, 9)); errc <- err }()
	p.a.Close()
	if err := <-errc; !errors.Is(err, net.ErrClosed) {
		t.Errorf("stack close: %v", err)
	}
}

// TestUDPBounded: what nobody reads is dropped beyond the socket's buffer.
func TestUDPBounded(t *testing.T) {
	s, err := New(Config{Output: discardOutput{}, UDPBuffer: 16 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.SetAddresses([]netip.Addr{a4})
	srv, err := s.ListenUDP(netip.MustParseAddrPort("[::]:53"))
	if err != nil {
		t.Fatal(err)
	}
	in := s.NewInbox()
	for range 200 {
		b := append(ipHeader(b4, a4, protoUDP, 1008), 0, 9, 0, 53, 1008>>8, 1008&0xff, 0, 0)
		in.Commit(append(append(in.Room(1028)[:0], b...), make([]byte, 1000)...))
	}
	in.Flush()
	n := 0
	for ; srv.(*packetConn).ep.Readiness(waiter.ReadableEvents) != 0; n++ {
		if _, _, err := srv.ReadFrom(make([]byte, 2000)); err != nil {
			t.Fatal(err)
		}
	}
	if n < 5 || n > 20 {
		t.Errorf("%d of 200 datagrams of 1,000 bytes kept in 16 KiB", n)
	}
}

// record is an Output that keeps what goes out.
type record struct{ pkts chan []byte }

func (r record) WritePacket(p *Packet) {
	b := make([]byte, 65536)
	for n := p.Next(b); n > 0; n = p.Next(b) {
		r.pkts <- bytes.Clone(b[:n])
	}
}

func TestEcho(t *testing.T) {
	r := record{make(chan []byte, 10)}
	s, err := New(Config{Output: r})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.SetAddresses([]netip.Addr{a4, a6})
	in := s.NewInbox()
	for _, tc := range []struct{ src, dst netip.Addr }{{b4, a4}, {b6, a6}} {
		data := []byte("ping data")
		req := echoRequest(tc.src, tc.dst, 7, 3, data)
		in.Commit(in.Room(len(req))[:copy(in.Room(len(req)), req)])
		in.Flush()
		select {
		case rep := <-r.pkts:
			src, dst, body := checkPacket(t, rep)
			if src != tc.dst || dst != tc.src || !bytes.Equal(body[4:], req[len(req)-len(data)-4:]) {
				t.Errorf("reply %x", rep)
			}
		case <-testCtx(t).Done():
			t.Fatal("no reply")
		}
		if !s.SendRaw(req) {
			t.Fatal("SendRaw refused")
		}
		if got := <-r.pkts; !bytes.Equal(got, req) {
			t.Errorf("SendRaw sent %x", got)
		}
	}
	for _, bad := range [][]byte{nil, {0x45}, make([]byte, 100), append([]byte{0x45}, make([]byte, 1300)...)} {
		if s.SendRaw(bad) {
			t.Errorf("SendRaw took %d bytes", len(bad))
		}
	}
}

func echoRequest(src, dst netip.Addr, id, seq uint16, data []byte) []byte {
	body := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(body[4:], id)
	binary.BigEndian.PutUint16(body[6:], seq)
	body = append(body, data...)
	if src.Is4() {
		body[0] = 8
		binary.BigEndian.PutUint16(body[2:], ^refSum(body))
		return append(ipHeader(src, dst, 1, len(body)), body...)
	}
	body[0] = 128
	binary.BigEndian.PutUint16(body[2:], ^refSum(refPseudo(src, dst, 58, len(body)), body))
	return append(ipHeader(src, dst, 58, len(body)), body...)
}

func ipHeader(src, dst netip.Addr, proto byte, n int) []byte {
	if src.Is4() {
		h := make([]byte, header.IPv4MinimumSize)
		h[0], h[6], h[8], h[9] = 0x45, 0x40, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+n))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], ^refSum(h))
		return h
	}
	h := make([]byte, header.IPv6MinimumSize)
	h[0], h[6], h[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(h[4:], uint16(n))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return h
}

// refSum is the Internet checksum as RFC 1071 spells it, 16 bits at a time: the tests' own, to check the package's.
// Every part but the last must have an even length.
func refSum(parts ...[]byte) uint16 {
	var s uint32
	for _, b := range parts {
		for i := 0; i < len(b); i += 2 {
			w := uint32(b[i]) << 8
			if i+1 < len(b) {
				w |= uint32(b[i+1])
			}
			s += w
			s = s>>16 + s&0xffff
		}
	}
	return uint16(s)
}

func refPseudo(src, dst netip.Addr, proto byte, n int) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	return append(b, 0, 0, byte(n>>8), byte(n), 0, 0, 0, proto)
}

// checkPacket verifies the lengths and checksums of an IP packet and returns its parts.
func checkPacket(t testing.TB, b []byte) (src, dst netip.Addr, body []byte) {
	t.Helper()
	var proto byte
	switch b[0] >> 4 {
	case 4:
		src, dst, proto = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9]
		if n := int(binary.BigEndian.Uint16(b[2:])); n != len(b) {
			t.Errorf("IPv4 length %d in a packet of %d", n, len(b))
		}
		if s := refSum(b[:20]); s != 0xffff {
			t.Errorf("IPv4 header checksum is off: %#x", s)
		}
		body = b[20:]
	case 6:
		src, dst, proto = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6]
		if n := int(binary.BigEndian.Uint16(b[4:])); n != len(b)-40 {
			t.Errorf("IPv6 length %d in a packet of %d", n, len(b))
		}
		body = b[40:]
	default:
		t.Fatalf("no IP packet: %x", b)
	}
	var s uint16
	if proto == 1 {
		s = refSum(body)
	} else {
		s = refSum(refPseudo(src, dst, proto, len(body)), body)
	}
	if s != 0xffff {
		t.Errorf("protocol %d checksum is off: %#x", proto, s)
	}
	return src, dst, body
}
