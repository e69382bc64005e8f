package netstack

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
)

// direct is an Output that splits each packet into one large buffer, from which the other stack's receive loop copies
// into its Inbox: a tunnel without cipher and socket, for the cost of this package and of gVisor alone.
type direct struct {
	mu    sync.Mutex
	queue []byte // whole packets, back to back
	sizes []int
	wake  chan struct{}
	pkts  int
	drops int
}

func (d *direct) WritePacket(p *Packet) {
	d.mu.Lock()
	if cap(d.queue) == 0 {
		d.queue = make([]byte, 0, 8<<20)
	}
	for {
		at := len(d.queue)
		if at+DefaultMTU > cap(d.queue) {
			d.drops++ // with what is left of the segment
			break
		}
		n := p.Next(d.queue[at : at+DefaultMTU])
		if n == 0 {
			break
		}
		d.queue = d.queue[:at+n]
		d.sizes = append(d.sizes, n)
		d.pkts++
	}
	d.mu.Unlock()
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *direct) pump(s *Stack, done chan struct{}) {
	in := s.NewInbox()
	var queue []byte
	var sizes []int
	for {
		select {
		case <-d.wake:
		case <-done:
			return
		}
		d.mu.Lock()
		queue, d.queue = d.queue, queue[:0]
		sizes, d.sizes = d.sizes, sizes[:0]
		d.mu.Unlock()
		b := queue
		for _, n := range sizes {
			in.Commit(append(in.Room(n + 16)[:0], b[:n]...))
			b = b[n:]
		}
		in.Flush()
	}
}

func benchPair(b *testing.B) (*Stack, *Stack, *direct) {
	ab, ba := &direct{wake: make(chan struct{}, 1)}, &direct{wake: make(chan struct{}, 1)}
	x, err := New(Config{Output: ab})
	if err != nil {
		b.Fatal(err)
	}
	y, err := New(Config{Output: ba})
	if err != nil {
		b.Fatal(err)
	}
	x.SetAddresses([]netip.Addr{a4, a6})
	y.SetAddresses([]netip.Addr{b4, b6})
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { ab.pump(y, done) })
	wg.Go(func() { ba.pump(x, done) })
	b.Cleanup(func() {
		x.Close()
		y.Close()
		close(done)
		wg.Wait()
	})
	return x, y, ab
}

func BenchmarkBulk(b *testing.B) {
	for _, size := range []int{1000, 4 << 10, 32 << 10, 64 << 10, 256 << 10} {
		for _, streams := range []int{1, 8} {
			if streams > 1 && size != 64<<10 {
				continue
			}
			b.Run(fmt.Sprintf("write=%d/streams=%d", size, streams), func(b *testing.B) {
				x, y, wire := benchPair(b)
				l := listen(b, y, "[::]:80")
				var wg sync.WaitGroup
				var conns []net.Conn
				for range streams {
					c, d := connect(b, x, l, b4)
					conns = append(conns, c)
					wg.Go(func() { io.Copy(io.Discard, d) })
				}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				before := wire.pkts
				b.ResetTimer()
				for i, c := range conns {
					wg.Go(func() {
						buf := make([]byte, size)
						for j := i; j < b.N; j += streams {
							if _, err := c.Write(buf); err != nil {
								b.Error(err)
								return
							}
						}
						closeWrite(b, c)
					})
				}
				wg.Wait()
				b.StopTimer()
				b.ReportMetric(float64(wire.pkts-before)/float64(b.N), "pkts/op")
				b.ReportMetric(float64(wire.drops), "drops")
				st := x.gv.Stats().TCP
				b.ReportMetric(float64(st.Retransmits.Value()), "retransmits")
				b.ReportMetric(float64(st.Timeouts.Value()), "timeouts")
			})
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	x, y, _ := benchPair(b)
	l := listen(b, y, "[::]:80")
	c, d := connect(b, x, l, b4)
	go io.Copy(d, d)
	buf := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkConnect(b *testing.B) {
	x, y, _ := benchPair(b)
	l := listen(b, y, "[::]:80")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	ctx := testCtx(b)
	b.ReportAllocs()
	for b.Loop() {
		c, err := x.DialTCP(ctx, netip.AddrPortFrom(b4, 80))
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

// BenchmarkSplit is Packet.Next alone, over one segment of 58,000 bytes.
func BenchmarkSplit(b *testing.B) {
	g := superSegment{
		src: netip.AddrPortFrom(a4, 1), dst: netip.AddrPortFrom(b4, 2), flags: tcpACK, opts: timestamps,
		payload: make([]byte, 58_000),
	}
	pk := g.packetBuffer(1228)
	dst := make([]byte, DefaultMTU)
	b.SetBytes(58_000)
	b.ReportAllocs()
	for b.Loop() {
		p := newPacket()
		p.set(pk, DefaultMTU)
		for p.Next(dst) > 0 {
		}
		p.free()
	}
}

// BenchmarkJoin is the Inbox alone, over 48 packets of one flow.
func BenchmarkJoin(b *testing.B) {
	c := &Stack{link: &link{mtu: DefaultMTU}}
	in := c.NewInbox()
	payload := make([]byte, 1228)
	var pkts [][]byte
	for i := range 47 {
		pkts = append(pkts, seg(uint32(i*len(payload)), tcpACK, timestamps, payload))
	}
	b.SetBytes(47 * 1228)
	b.ReportAllocs()
	for b.Loop() {
		for _, p := range pkts {
			in.Commit(append(in.Room(len(p) + 16)[:0], p...))
		}
		in.Flush()
	}
}
