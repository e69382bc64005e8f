package netstack

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// seg is a TCP packet of one flow, for the tests of the Inbox.
func seg(seq uint32, flags byte, opts, payload []byte) []byte {
	return segFrom(1234, seq, flags, opts, payload)
}

func segFrom(port uint16, seq uint32, flags byte, opts, payload []byte) []byte {
	g := superSegment{
		src: netip.AddrPortFrom(a4, port), dst: netip.AddrPortFrom(b4, 80),
		seq: seq, ack: 77, flags: flags, opts: opts,
	}
	b := append(g.header(len(payload)), payload...)
	binary.BigEndian.PutUint16(b[10:], 0)
	binary.BigEndian.PutUint16(b[10:], ^refSum(b[:20]))
	return b
}

func ts(val, ecr uint32) []byte {
	o := bytes.Clone(timestamps)
	binary.BigEndian.PutUint32(o[4:], val)
	binary.BigEndian.PutUint32(o[8:], ecr)
	return o
}

func (c *collector) commit(pkts ...[]byte) {
	for _, b := range pkts {
		c.in.Commit(append(c.in.Room(len(b))[:0], b...))
	}
}

// TestJoinOrNot: what is collected and what is not. Each case lists the payload lengths that reach the stack.
func TestJoinOrNot(t *testing.T) {
	x := bytes.Repeat([]byte("x"), 1000)
	edit := func(b []byte, f func(b []byte)) []byte { f(b); return b }
	for _, tc := range []struct {
		name string
		in   [][]byte
		want []int
	}{
		{"contiguous", [][]byte{seg(0, tcpACK, nil, x), seg(1000, tcpACK|tcpPSH, nil, x), seg(2000, tcpACK, nil, x[:5])}, []int{2005}},
		{"gap", [][]byte{seg(0, tcpACK, nil, x), seg(1001, tcpACK, nil, x)}, []int{1000, 1000}},
		{"repeated", [][]byte{seg(0, tcpACK, nil, x), seg(0, tcpACK, nil, x)}, []int{1000, 1000}},
		{"wrapping", [][]byte{seg(0xffffff00, tcpACK, nil, x), seg(744, tcpACK, nil, x)}, []int{2000}},
		{"fin", [][]byte{seg(0, tcpACK, nil, x), seg(1000, tcpACK|tcpFIN, nil, x)}, []int{1000, 1000}},
		{"syn", [][]byte{seg(0, tcpSYN, nil, nil), seg(1, tcpACK, nil, x)}, []int{0, 1000}},
		{"urgent", [][]byte{seg(0, tcpACK, nil, x), seg(1000, tcpACK|0x20, nil, x), seg(2000, tcpACK, nil, x)}, []int{1000, 1000, 1000}},
		{"pure ack between", [][]byte{seg(0, tcpACK, nil, x), seg(1000, tcpACK, nil, nil), seg(1000, tcpACK, nil, x)}, []int{1000, 0, 1000}},
		{"timestamps advance", [][]byte{seg(0, tcpACK, ts(5, 6), x), seg(1000, tcpACK, ts(6, 7), x)}, []int{2000}},
		{"timestamps go back", [][]byte{seg(0, tcpACK, ts(5, 6), x), seg(1000, tcpACK, ts(4, 6), x)}, []int{1000, 1000}},
		{"options differ", [][]byte{seg(0, tcpACK, ts(5, 6), x), seg(1000, tcpACK, nil, x)}, []int{1000, 1000}},
		{"sack", [][]byte{seg(0, tcpACK, []byte{1, 1, 5, 10, 1, 2, 3, 4, 5, 6, 7, 8}, x), seg(1000, tcpACK, []byte{1, 1, 5, 10, 1, 2, 3, 4, 5, 6, 7, 9}, x)}, []int{1000, 1000}},
		{"congestion mark", [][]byte{seg(0, tcpACK, nil, x), edit(seg(1000, tcpACK, nil, x), func(b []byte) { b[1] = 3; b[10]--; b[11] -= 3 })}, nil},
		{"ack goes back", [][]byte{seg(0, tcpACK, nil, x), edit(seg(1000, tcpACK, nil, x), func(b []byte) { b[31] = 76 })}, []int{1000, 1000}},
		{"ack advances", [][]byte{seg(0, tcpACK, nil, x), edit(seg(1000, tcpACK, nil, x), func(b []byte) { b[31] = 78 })}, []int{2000}},
		{"two flows", [][]byte{segFrom(1, 0, tcpACK, nil, x), segFrom(2, 0, tcpACK, nil, x), segFrom(1, 1000, tcpACK, nil, x)}, []int{1000, 1000, 1000}},
		{"ack of another flow", [][]byte{segFrom(1, 0, tcpACK, nil, x), segFrom(2, 0, tcpACK, nil, nil), segFrom(1, 1000, tcpACK, nil, x)}, []int{0, 2000}},
		{"fragment", [][]byte{seg(0, tcpACK, nil, x), edit(seg(1000, tcpACK, nil, x), func(b []byte) { b[6] = 0x20; b[10] += 0x20 })}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCollector(t)
			c.commit(tc.in...)
			c.in.Flush()
			var got []int
			for _, b := range c.pkts {
				got = append(got, len(b)-20-int(b[32]>>4)*4)
			}
			if tc.want == nil { // not joined, whatever the lengths
				if len(got) != len(tc.in) {
					t.Errorf("%d packets became %d", len(tc.in), len(got))
				}
				return
			}
			if len(got) != len(tc.want) {
				t.Fatalf("payloads %v, want %v", got, tc.want)
			}
			for i := range got {
				if got[i] != tc.want[i] {
					t.Fatalf("payloads %v, want %v", got, tc.want)
				}
			}
		})
	}

	c := newCollector(t)
	c.commit(seg(0, tcpACK, ts(5, 6), x), edit(seg(1000, tcpACK|tcpPSH, ts(7, 8), x), func(b []byte) { b[31] = 78; b[35] = 99 }))
	c.in.Flush()
	b := c.pkts[0][20:]
	if b[11] != 78 || b[13] != tcpACK|tcpPSH || b[15] != 99 || binary.BigEndian.Uint32(b[24:]) != 5 || binary.BigEndian.Uint32(b[28:]) != 8 {
		t.Errorf("joined header %x", b[:32])
	}
}

// TestInboxMemory: a small packet does not hold a chunk, large ones share one, and a chunk is given up when it is full.
func TestInboxMemory(t *testing.T) {
	c := newCollector(t)
	for i := range 10_000 {
		c.commit(segFrom(uint16(i), 0, tcpACK, nil, []byte("a small one")))
	}
	c.in.Flush()
	for _, pk := range c.raw {
		views, _ := pk.AsViewList()
		for v := views.Front(); v != nil; v = v.Next() {
			if v.Capacity() > 128 {
				t.Fatalf("11 bytes hold %d", v.Capacity())
			}
		}
	}
}

// TestInboxStream: a long stream among other traffic, with rooms that are not committed and bytes from elsewhere.
func TestInboxStream(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for round := range 20 {
		c := newCollector(t)
		var want []byte
		other := 0
		for range 400 {
			payload := make([]byte, 1+r.IntN(1240))
			for i := range payload {
				payload[i] = byte(r.Uint32())
			}
			b := seg(uint32(len(want)), tcpACK, timestamps, payload)
			switch r.IntN(8) {
			case 0: // rejected after decryption
				room := c.in.Room(1 + r.IntN(65536))
				for i := range room[:min(len(room), 3000)] {
					room[i] = 0xee
				}
			case 1: // not in the room
				c.in.Room(r.IntN(3000))
				c.in.Commit(bytes.Clone(b))
				want = append(want, payload...)
				continue
			case 2:
				garbage := make([]byte, r.IntN(200))
				for i := range garbage {
					garbage[i] = byte(r.Uint32())
				}
				if len(garbage) > 0 {
					garbage[0] = 0x15 // neither 4 nor 6
				}
				c.commit(garbage)
			case 3:
				c.commit(append(ipHeader(b4, a4, protoUDP, 16), make([]byte, 16)...))
				other++
			case 4:
				if r.IntN(4) == 0 {
					c.in.Flush()
				}
			}
			c.commit(b)
			want = append(want, payload...)
		}
		c.in.Flush()
		kept := c.pkts[:0]
		var raw = c.raw[:0]
		for i, b := range c.pkts {
			if b[9] == protoUDP {
				other--
				continue
			}
			kept, raw = append(kept, b), append(raw, c.raw[i])
		}
		c.pkts, c.raw = kept, raw
		if other != 0 {
			t.Errorf("%d other packets missing", other)
		}
		if got := c.stream(0); !bytes.Equal(got, want) {
			t.Fatalf("round %d: %d bytes, want %d", round, len(got), len(want))
		}
	}
}

// FuzzInbox commits arbitrary bytes, cut into packets by their own contents, to a real stack with a listener.
func FuzzInbox(f *testing.F) {
	x := bytes.Repeat([]byte("x"), 60)
	f.Add(bytes.Join([][]byte{seg(0, tcpACK, nil, x), seg(60, tcpACK, nil, x)}, nil), uint16(100))
	f.Add(seg(0, tcpSYN, []byte{2, 4, 5, 0xb4}, nil), uint16(44))
	f.Add(echoRequest(b4, a4, 1, 2, x), uint16(88))
	f.Add(echoRequest(b6, a6, 1, 2, x), uint16(108))
	f.Add(append(ipHeader(b6, a6, 0, 8), 6, 0, 0, 0, 0, 0, 0, 0), uint16(48))
	f.Add(append(ipHeader(b6, a6, 44, 8), 6, 0, 0, 1, 0, 0, 0, 0), uint16(48))
	f.Add(append(ipHeader(b4, a4, 17, 8), 0, 53, 0, 53, 0, 99, 0, 0), uint16(28))
	f.Add([]byte{0x4f, 0, 0, 20}, uint16(3))

	f.Fuzz(func(t *testing.T, data []byte, size uint16) {
		s, err := New(Config{Output: discardOutput{}})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.SetAddresses([]netip.Addr{a4, a6})
		if _, err := s.ListenTCP(netip.MustParseAddrPort("[::]:80")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ListenUDP(netip.MustParseAddrPort("[::]:53")); err != nil {
			t.Fatal(err)
		}
		in := s.NewInbox()
		for i := 0; len(data) > 0; i++ {
			n := min(len(data), max(1, int(size)))
			b := data[:n]
			data = data[n:]
			room := in.Room(n + i%3)
			switch i % 5 {
			case 4: // twice
				in.Commit(room[:copy(room, b)])
				in.Commit(room[:n])
			case 3: // from the middle of the room
				k := copy(room[min(1, len(room)):], b)
				in.Commit(room[min(1, len(room)):][:k])
			default:
				in.Commit(room[:copy(room, b)])
			}
			size = size<<1 | size>>15
		}
		in.Flush()
		in.Flush()
	})
}

type discardOutput struct{}

func (discardOutput) WritePacket(*Packet) {}
