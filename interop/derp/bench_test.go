package derp

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// BenchmarkRelay moves 1,400-byte packets from one client to another over TLS on loopback,
// with a window of packets in flight that the relay's queue holds. One op is one packet;
// cpu-ns/pkt is of both clients and the relay together.
func BenchmarkRelay(b *testing.B) {
	for _, r := range []string{"our relay", "upstream relay"} {
		for _, c := range []string{"our client", "upstream client"} {
			for _, batch := range []int{1, 8} {
				window := 256
				if r == "upstream relay" {
					window = 32 // its queue holds no more
				}
				b.Run(fmt.Sprintf("%s/%s/batch=%d", r, c, batch), func(b *testing.B) {
					benchRelay(b, relays[r](b), peers[c], batch, window)
				})
			}
		}
	}
}

func benchRelay(b *testing.B, region *tailcfg.DERPRegion, newPeer func(testing.TB, *tailcfg.DERPRegion, bool) *peer, batch, window int) {
	src, dst := newPeer(b, region, false), newPeer(b, region, false)
	buf := make([]byte, 1400*batch)
	b.SetBytes(1400)
	b.ReportAllocs()
	b.ResetTimer()
	before := cpu()
	lost := int64(0)
	wait := func(sent, room int64) {
		for sent-lost-dst.count.Load() > room {
			select {
			case <-dst.arrived:
			case <-time.After(20 * time.Millisecond):
				lost = sent - dst.count.Load()
			}
		}
	}
	sent := int64(0)
	for sent < int64(b.N) {
		if err := src.send(dst.key, buf); err != nil {
			b.Fatal(err)
		}
		sent += int64(batch)
		wait(sent, int64(window-batch))
	}
	wait(sent, 7)
	b.ReportMetric(float64(dst.count.Load())/b.Elapsed().Seconds(), "pkt/s")
	b.ReportMetric(float64(cpu()-before)/float64(dst.count.Load()), "cpu-ns/pkt")
	b.ReportMetric(100*float64(sent-dst.count.Load()-min(lost, 7))/float64(sent), "%lost")
}

// cpu is the processor time the process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRoundTrip sends one packet there and one back, one at a time.
func BenchmarkRoundTrip(b *testing.B) {
	for _, r := range []string{"our relay", "upstream relay"} {
		for _, c := range []string{"our client", "upstream client"} {
			b.Run(r+"/"+c, func(b *testing.B) {
				region := relays[r](b)
				src, dst := peers[c](b, region, true), peers[c](b, region, true)
				msg := make([]byte, 100)
				for b.Loop() {
					src.send(dst.key, msg)
					within(b, "packet", dst.packets)
					dst.send(src.key, msg)
					within(b, "packet", src.packets)
				}
			})
		}
	}
}
