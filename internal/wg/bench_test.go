package wg

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// nowhere is a Conduit that forgets.
type nowhere struct{}

func (nowhere) Send([]byte, int) error { return nil }

// stream is a Source that yields the same packet left times.
type stream struct {
	pkt  []byte
	left int
}

func (s *stream) Next(dst []byte) int {
	if s.left == 0 {
		return 0
	}
	s.left--
	return copy(dst, s.pkt)
}

func benchPair(b testing.TB, mtu int) (x, y *end) {
	x, y = newPair(b, func(c *Config) { c.MTU = mtu })
	connect(b, x, y)
	x.peer.conduit = nowhere{}
	y.peer.conduit = nowhere{}
	return x, y
}

func batchOf(d *Device) int { return d.pool.large / (d.mtu + sizeHeader + sizeTag) }

// BenchmarkRaw is the cipher alone, the limit of what follows.
func BenchmarkRaw(b *testing.B) {
	for _, n := range []int{1280, 1420} {
		a := newAEAD(&[32]byte{1})
		buf := make([]byte, n, n+16)
		b.Run(fmt.Sprint("Seal/", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				a.Seal(buf[:0], zeroNonce[:], buf, nil)
			}
		})
		sealed := a.Seal(nil, zeroNonce[:], buf, nil)
		out := make([]byte, n)
		b.Run(fmt.Sprint("Open/", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				if _, err := a.Open(out[:0], zeroNonce[:], sealed, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSeal(b *testing.B) {
	for _, n := range []int{1280, 1420} {
		x, _ := benchPair(b, n)
		for _, count := range []int{1, batchOf(x.dev)} {
			b.Run(fmt.Sprintf("%d/batch%d", n, count), func(b *testing.B) {
				b.SetBytes(int64(n * count))
				b.ReportAllocs()
				s := &stream{pkt: ip4(n, 1)}
				for b.Loop() {
					s.left = count
					if err := x.peer.Send(s); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, n := range []int{1280, 1420} {
		x, y := benchPair(b, n)
		count := batchOf(x.dev)
		w := new(wire)
		x.peer.conduit = w
		for _, per := range []int{1, count} {
			b.Run(fmt.Sprintf("%d/batch%d", n, per), func(b *testing.B) {
				b.SetBytes(int64(n * per))
				b.ReportAllocs()
				dst := make([]byte, n)
				var msgs [][]byte
				for b.Loop() {
					for range per {
						if len(msgs) == 0 {
							b.StopTimer()
							x.peer.Send(&stream{pkt: ip4(n, 1), left: 4096})
							msgs = w.take()
							b.StartTimer()
						}
						if _, _, err := y.dev.Receive(dst, msgs[0], nil); err != nil {
							b.Fatal(err)
						}
						msgs = msgs[1:]
					}
				}
			})
		}
	}
}

// BenchmarkOverhead measures us and the bare cipher in turns, so that a busy machine slows both:
// its metrics are medians in nanoseconds per packet, over batches as long as a batch may be.
func BenchmarkOverhead(b *testing.B) {
	for _, n := range []int{1280, 1420} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x, y := benchPair(b, n)
			count := batchOf(x.dev)
			w, s := new(wire), &stream{pkt: ip4(n, 1)}
			a := newAEAD(&[32]byte{1})
			buf := make([]byte, count*(n+32))
			sealed, out := a.Seal(nil, zeroNonce[:], buf[:n], nil), make([]byte, n)
			var msgs [][]byte
			runs := []struct {
				name string
				f    func()
			}{
				{"raw-seal", func() {
					for i := range count {
						at := i*(n+32) + 16
						a.Seal(buf[at:at], zeroNonce[:], buf[at:at+n], nil)
					}
				}},
				{"seal", func() { s.left = count; x.peer.Send(s) }},
				{"raw-open", func() {
					for range count {
						a.Open(out[:0], zeroNonce[:], sealed, nil)
					}
				}},
				{"open", func() {
					for _, m := range msgs {
						y.dev.Receive(out, m, nil)
					}
				}},
			}
			times := make([][]float64, len(runs))
			for b.Loop() {
				x.peer.conduit = w
				s.left = count
				x.peer.Send(s)
				msgs = w.take()
				x.peer.conduit = nowhere{}
				for i, r := range runs {
					start := time.Now()
					r.f()
					times[i] = append(times[i], float64(time.Since(start))/float64(count))
				}
			}
			for i, r := range runs {
				slices.Sort(times[i])
				b.ReportMetric(times[i][len(times[i])/2], r.name+"-ns")
			}
		})
	}
}

func BenchmarkHandshake(b *testing.B) {
	x, y := newPair(b, nil)
	for b.Loop() {
		y.peer.lastInitRx = 0
		y.dev.gate.free = 0
		x.peer.meet.next.Store(0)
		connect(b, x, y)
	}
}

// BenchmarkFlood is what a forged initiation with a good MAC1 costs, in a flood of them.
func BenchmarkFlood(b *testing.B) {
	d := newDevice(b, nil)
	reply := &sourced{src: "192.0.2.1:7"}
	msg := make([]byte, sizeInitiation)
	msg[0] = typeInitiation
	pub := d.Public().Raw()
	putMACs(msg, &pub, nil)
	for b.Loop() {
		d.Receive(nil, msg, reply)
		reply.take()
	}
}

// TestNoAllocationPerPacket: none but the cipher's own, which where it has assembly (amd64) are none.
func TestNoAllocationPerPacket(t *testing.T) { synctest.Test(t, testNoAllocationPerPacket) }

func testNoAllocationPerPacket(t *testing.T) {
	a, buf := newAEAD(new([32]byte)), make([]byte, 1280, 1296)
	bare := testing.AllocsPerRun(100, func() { a.Seal(buf[:0], zeroNonce[:], buf, nil) })
	if runtime.GOARCH == "amd64" && bare != 0 {
		t.Logf("the cipher itself makes %v", bare)
	}
	x, y := benchPair(t, 1280)
	s := &stream{pkt: ip4(1280, 1)}
	if n := testing.AllocsPerRun(1000, func() {
		s.left = 3
		x.peer.Send(s)
	}); n > 3*bare {
		t.Errorf("Send: %v allocations", n)
	}
	w := new(wire)
	x.peer.conduit = w
	s.left = 4000
	x.peer.Send(s)
	msgs := w.take()
	if n := testing.AllocsPerRun(1000, func() {
		if _, _, err := y.dev.Receive(nil, msgs[0], nil); err != nil {
			t.Fatal(err)
		}
		msgs = msgs[1:]
	}); n > bare {
		t.Errorf("Receive in place: %v allocations", n)
	}
	dst := make([]byte, 1280)
	if n := testing.AllocsPerRun(1000, func() {
		if _, _, err := y.dev.Receive(dst, msgs[0], nil); err != nil {
			t.Fatal(err)
		}
		msgs = msgs[1:]
	}); n > bare {
		t.Errorf("Receive elsewhere: %v allocations", n)
	}
}
