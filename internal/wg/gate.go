package wg

import (
	"hash/maphash"
	"sync"
	"time"
)

// How much handshake work the device does for others. An initiation that turns out forged
// costs one scalar multiplication, a good one four; 100 forged ones a second are about 1 %
// of a core, which is the most that a flood without cookies can burn.
const (
	freeInterval   = int64(time.Second / 100) // without a cookie
	freeBurst      = 200
	cookieInterval = int64(time.Second / 1000) // cookie replies
	cookieBurst    = 500
	provedInterval = int64(time.Second / 500) // with a cookie, from all sources
	provedBurst    = 1000
	sourceInterval = int64(time.Second / 20) // with a cookie, from one source
	sourceBurst    = 5
	loadTime       = int64(time.Second) // how long we stay under load after the last sign of it
	sourceBuckets  = 1 << 10
)

// rate is a bucket that admits one thing per interval on average, and a burst at once. It
// holds the time at which the bucket will be full again (GCRA).
type rate int64

func (r *rate) allow(now, interval, burst int64) bool {
	t := max(int64(*r), now)
	if t-now > (burst-1)*interval {
		return false
	}
	*r = rate(t + interval)
	return true
}

// verdict is what to do with a handshake message.
type verdict int

const (
	work       verdict = iota // read it
	drop                      // forget it
	giveCookie                // answer with a cookie
)

// gate decides whether a handshake message with a good MAC1 is worked on. The zero value is
// ready. Sources share 1,024 buckets, which exist only under load: memory is bounded whatever
// comes, and a collision costs a handshake some delay at worst.
type gate struct {
	mu                    sync.Mutex
	free, cookie, proved  rate
	loadUntil             int64
	sources               *[sourceBuckets]rate
	seed                  maphash.Seed
	alwaysLoad            bool   // tests
	worked, cookies, shed uint64 // for DeviceStats
}

// admit is asked for every message. Only under load it asks for the message's source, and then
// whether the message carries a good cookie for that.
func (g *gate) admit(now int64, source func() []byte, proved func() bool) verdict {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now >= g.loadUntil && !g.alwaysLoad {
		if g.sources != nil {
			g.sources = nil
		}
		if g.free.allow(now, freeInterval, freeBurst) {
			g.worked++
			return work
		}
	}
	if now >= g.loadUntil {
		g.loadUntil = now + loadTime
	}
	src := source()
	if !proved() {
		if !g.cookie.allow(now, cookieInterval, cookieBurst) {
			g.shed++
			return drop
		}
		g.cookies++
		return giveCookie
	}
	if g.sources == nil {
		g.sources = new([sourceBuckets]rate)
		g.seed = maphash.MakeSeed()
	}
	b := &g.sources[maphash.Bytes(g.seed, src)%sourceBuckets]
	if !b.allow(now, sourceInterval, sourceBurst) || !g.proved.allow(now, provedInterval, provedBurst) {
		g.shed++
		return drop
	}
	g.worked++
	return work
}
