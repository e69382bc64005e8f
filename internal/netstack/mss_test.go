package netstack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// TestMarks: what a peer says comes out of gVisor's arithmetic again, whatever options it subtracts.
func TestMarks(t *testing.T) {
	for _, ipLen := range []int{20, 40} {
		for _, mtu := range []int{1280, 1281, 1283, 1500, 9000} {
			limit := mssLimit(mtu, ipLen)
			for mss := 0; mss <= 65535; mss++ {
				m := marked(mss, limit)
				if m > mss || m < mss-3 && m != limit-1 && m != limit-2 {
					t.Fatalf("MSS %d of limit %d becomes %d", mss, limit, m)
				}
				want := 0
				if mss >= AnyMSS {
					want = markAny
				} else if mss >= limit {
					want = markWhole
				}
				for _, opts := range []int{0, 12, 28, 36, 40} {
					got := markOf(m-opts, limit)
					if want >= markWhole && got != want || want == 0 && got >= markWhole {
						t.Fatalf("MSS %d of limit %d, %d bytes of options: mark %d, want %d", mss, limit, opts, got, want)
					}
				}
			}
		}
	}
}

func TestMSSOption(t *testing.T) {
	base := make([]byte, header.TCPMinimumSize)
	for _, tc := range []struct {
		name string
		opts []byte
		at   int
	}{
		{"none", nil, 0},
		{"alone", []byte{2, 4, 4, 216}, 22},
		{"behind padding", []byte{1, 1, 2, 4, 4, 216}, 24},
		{"at an odd place", []byte{1, 2, 4, 4, 216}, 23},
		{"behind window scale", []byte{3, 3, 7, 2, 4, 4, 216}, 25},
		{"behind the end", []byte{0, 2, 4, 4, 216}, 0},
		{"cut off", []byte{2, 4, 4}, 0},
		{"cut off before its length", []byte{1, 1, 2}, 0},
		{"of a wrong length, before a right one", []byte{2, 3, 4, 2, 4, 4, 216}, 25},
		{"behind one of length 0", []byte{5, 0, 2, 4, 4, 216}, 0},
		{"behind one of length 1", []byte{5, 1, 2, 4, 4, 216}, 0},
		{"behind one that is too long", []byte{5, 200, 2, 4, 4, 216}, 0},
	} {
		if at := mssOption(append(bytes.Clone(base), tc.opts...)); at != tc.at {
			t.Errorf("%s: at %d, want %d", tc.name, at, tc.at)
		}
	}
}

func FuzzMSSOption(f *testing.F) {
	f.Add([]byte{1, 1, 2, 4, 4, 216})
	f.Add([]byte{5, 0, 2, 4})
	f.Fuzz(func(t *testing.T, opts []byte) {
		tcp := append(make([]byte, header.TCPMinimumSize), opts...)
		if at := mssOption(tcp); at != 0 && (at < 22 || at+2 > len(tcp)) {
			t.Fatalf("at %d of %d", at, len(tcp))
		}
	})
}

// synPacket is a SYN with right checksums.
func synPacket(src, dst netip.AddrPort, opts []byte) []byte {
	g := superSegment{src: src, dst: dst, seq: 7, flags: tcpSYN, opts: opts}
	pkt := g.header(0)
	ipLen, addrs := 20, pkt[12:20]
	if src.Addr().Is6() {
		ipLen, addrs = 40, pkt[8:40]
	}
	tcp := pkt[ipLen:]
	sum := checksum.Combine(checksum.Checksum(addrs, protoTCP), uint16(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], ^checksum.Checksum(tcp, sum))
	return pkt
}

func validTCP(pkt []byte) bool {
	ipLen, addrs := 20, pkt[12:20]
	if pkt[0]>>4 == 6 {
		ipLen, addrs = 40, pkt[8:40]
	}
	tcp := pkt[ipLen:]
	sum := checksum.Combine(checksum.Checksum(addrs, protoTCP), uint16(len(tcp)))
	return checksum.Checksum(tcp, sum) == 0xffff
}

func TestOfferAnyMSS(t *testing.T) {
	for _, opts := range [][]byte{
		{2, 4, 4, 216},
		{1, 2, 4, 4, 216, 1, 1, 1},
		{2, 4, 0xff, 0xff},
		{2, 4, 0, 0, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7},
	} {
		for _, ap := range [][2]netip.Addr{{a4, b4}, {a6, b6}} {
			pkt := synPacket(netip.AddrPortFrom(ap[0], 1), netip.AddrPortFrom(ap[1], 2), opts)
			if !validTCP(pkt) {
				t.Fatal("the test's own packet is wrong")
			}
			offerAnyMSS(pkt)
			ipLen := len(pkt) - 20 - len(opts)
			at := mssOption(pkt[ipLen:])
			if got := binary.BigEndian.Uint16(pkt[ipLen+at:]); got != AnyMSS {
				t.Errorf("MSS %d", got)
			}
			if !validTCP(pkt) {
				t.Errorf("the checksum of a SYN with options % x is wrong", opts)
			}
		}
	}
}

// TestSizes: between two stacks that say AnyMSS, segments fill whatever room there is; with one that does not, none
// is longer than the MTU; and the SYN itself, and what is no TCP, never are.
func TestSizes(t *testing.T) {
	for _, tc := range []struct {
		name       string
		here, peer bool
		room, want int
	}{
		{"both", true, true, 16000, 16000},
		{"both, Ethernet", true, true, 1440, 1440},
		{"the peer does not", true, false, 16000, DefaultMTU},
		{"neither", false, false, DefaultMTU, DefaultMTU},
	} {
		for _, dst := range []netip.Addr{b4, b6} {
			t.Run(tc.name+" "+dst.String(), func(t *testing.T) {
				p := newPair(t, nil)
				p.ab.any, p.ba.any = tc.here, tc.peer
				p.ab.mtu, p.ba.mtu = tc.room, tc.room
				var longest int
				p.ab.drop = func(pkt []byte) bool {
					longest = max(longest, len(pkt))
					return false
				}
				transferSum(t, p, dst, 4<<20)
				p.ab.mu.Lock()
				defer p.ab.mu.Unlock()
				if longest != tc.want {
					t.Errorf("longest packet %d, want %d", longest, tc.want)
				}
			})
		}
	}
}

// transferSum sends n bytes from a to b and compares checksums.
func transferSum(t *testing.T, p *pair, dst netip.Addr, n int) {
	t.Helper()
	ln, err := p.b.ListenTCP(netip.AddrPortFrom(dst, 80))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	type result struct {
		sum [32]byte
		n   int64
		err error
	}
	got := make(chan result, 1)
	go func() {
		var r result
		var c net.Conn
		if c, r.err = ln.Accept(); r.err == nil {
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Minute))
			h := sha256.New()
			r.n, r.err = io.Copy(h, c)
			h.Sum(r.sum[:0])
		}
		got <- r
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c, err := p.a.DialTCP(ctx, netip.AddrPortFrom(dst, 80))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	data := make([]byte, 256<<10)
	chacha := rand.NewChaCha8([32]byte{1})
	h := sha256.New()
	for sent := 0; sent < n; {
		b := data[:min(len(data), n-sent)]
		chacha.Read(b)
		h.Write(b)
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		sent += len(b)
	}
	c.(interface{ CloseWrite() error }).CloseWrite()
	r := <-got
	if r.err != nil || r.n != int64(n) || !bytes.Equal(r.sum[:], h.Sum(nil)) {
		t.Fatalf("received %d of %d bytes, %v, right sum: %v", r.n, n, r.err, bytes.Equal(r.sum[:], h.Sum(nil)))
	}
}

// TestSizeChangesUnderLoss: what is sent again may be cut otherwise than the first time, longer or shorter, and
// what the receiver has of it may end in the middle of what comes; nothing is lost by it.
func TestSizeChangesUnderLoss(t *testing.T) {
	rooms := []int{1280, 1440, 16000, 8940, 1290, 65475}
	for seed := range uint64(3) {
		p := newPair(t, nil)
		p.lossy(seed, 0.005, 0.01)
		for i, w := range []*wire{p.ab, p.ba} {
			w.any = true
			r := rand.New(rand.NewPCG(seed, uint64(10+i)))
			w.taps = func(*Packet) {
				if r.IntN(20) == 0 {
					w.mtu = rooms[r.IntN(len(rooms))]
				}
			}
		}
		dst := b4
		if seed == 1 {
			dst = b6
		}
		transferSum(t, p, dst, 1<<20)
	}
}

// TestBlackHoleOfLongPackets: a wire that eats what is longer than the base size stops a connection for good neither if
// it does so from the start nor if the size in use is never corrected: what TCP sends again is never longer.
func TestBlackHoleOfLongPackets(t *testing.T) {
	p := newPair(t, nil)
	p.ab.any, p.ba.any = true, true
	p.ab.mtu = 1440
	n := 0
	p.ab.drop = func(pkt []byte) bool {
		if len(pkt) > DefaultMTU {
			n++
		}
		if n == 12 {
			p.ab.mtu = DefaultMTU // found out
		}
		return len(pkt) > DefaultMTU
	}
	transferSum(t, p, b4, 1<<20)
	if n == 0 {
		t.Error("no long packet was sent")
	}
}
