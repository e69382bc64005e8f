package path

import (
	"net/netip"
	"slices"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
)

// How long a packet inside the tunnel may be. Any path is taken to carry BaseMTU; by relays it is a matter of framing,
// and direct paths are tried with padded pings while there is traffic to which it makes a difference. See docs/protocol/paths.md §6.
const (
	// BaseMTU is the longest inner packet that goes by any path.
	BaseMTU = 1280
	// RelayMTU is the longest by a relay, for those who take it. A relay's frame holds 64 KiB, but what a frame holds is lost,
	// and keeps others waiting, together. This is about a TLS record, and four sealed ones fill a batch.
	RelayMTU = 16000
	// sealing is what a data message adds to its packet (WireGuard paper §5.4.6).
	sealing     = 32
	baseMessage = BaseMTU + sealing

	// leastBulk is how much must be sent within bulkFor for longer packets to be worth a probe.
	leastBulk = 64 << 10
	bulkFor   = time.Second
	// bulkEvery is how often the machine is told that such traffic goes on, and then tries whether the size in use still passes.
	bulkEvery = 500 * time.Millisecond
	// sizeWait is how long a padded ping may take at the least, in round trips sizeTrips.
	sizeWait  = 150 * time.Millisecond
	sizeTrips = 3
	// growAgain is when larger sizes are tried again, shrunkAgain when after the one in use has failed.
	growAgain   = 10 * time.Minute
	shrunkAgain = time.Minute
)

// linkMTUs are those to try if the first link's own, or likelyMTU, is not it: what Ethernet's 1500 bytes leave under PPPoE, in
// common clouds and tunnels, and in tunnels in those; and jumbo frames.
var linkMTUs = [...]int{8896, 1500, 1492, 1480, 1460, 1440, 1420, 1380}

const likelyMTU = 1400

// pathSize is what is known of the longest message that the path in use carries.
type pathSize struct {
	to    hop // the path that the rest is about
	size  int // longest message that passes, 0: baseMessage
	limit int // longest that leaves this host whole

	out     []int     // sizes of pings that are not answered
	stage   sizeStage // what out is for
	due     time.Time // when it is given up; zero: nothing is out
	all     bool      // other sizes than the likely ones are to be tried
	againAt time.Time // when larger sizes are worth a try
}

type sizeStage uint8

const (
	sizeCheck sizeStage = iota // of the size in use
	sizeGuess                  // the likely sizes
	sizeAll                    // all others
)

// messageIn returns the longest message in an IP packet of mtu bytes to h.
func messageIn(mtu int, h hop) int {
	if h.vni != 0 {
		mtu -= disco.GeneveLen
	}
	if h.addr.Addr().Is4() {
		return mtu - 20 - 8
	}
	return mtu - 40 - 8
}

// bulk says that data is being sent to which longer messages make a difference. limit is the longest message that leaves this
// host whole to the path in use, 0 if that is not known: then nothing is tried.
func (mc *machine) bulk(now time.Time, limit int) {
	d, u := &mc.d, &mc.size
	if !d.trusted(now) {
		return
	}
	if u.to != d.best {
		*u = pathSize{to: d.best}
	}
	u.limit = min(limit, MaxPingSize)
	switch {
	case u.size > max(u.limit, baseMessage): // the host has learned better
		mc.shrink(now)
	case !u.due.IsZero():
	case !now.Before(u.againAt):
		mc.guessSize(now)
	case u.all:
		mc.allSizes(now)
	default:
		mc.checkSize(now)
	}
}

// checkSize tries whether the size in use still passes.
func (mc *machine) checkSize(now time.Time) {
	if u := &mc.size; u.size > 0 && u.to == mc.d.best && u.due.IsZero() {
		mc.trySizes(now, sizeCheck, u.size)
	}
}

// guessSize tries the likely sizes, and the one in use with them.
func (mc *machine) guessSize(now time.Time) {
	u := &mc.size
	u.againAt, u.all = now.Add(growAgain), false
	mc.trySizes(now, sizeGuess, u.size, u.limit, messageIn(likelyMTU, u.to))
}

// allSizes tries what is between the size in use and the host's limit, and that once more: a ping may just have been lost.
func (mc *machine) allSizes(now time.Time) {
	u := &mc.size
	u.all = false
	sizes := [len(linkMTUs) + 2]int{u.limit, messageIn(likelyMTU, u.to)}
	for i, m := range linkMTUs {
		sizes[i+2] = messageIn(m, u.to)
	}
	mc.trySizes(now, sizeAll, sizes[:]...)
}

// trySizes pings with those of sizes that say something new.
func (mc *machine) trySizes(now time.Time, stage sizeStage, sizes ...int) {
	u := &mc.size
	c := mc.d.find(u.to)
	if c == nil {
		return
	}
	u.stage, u.out = stage, u.out[:0]
	for _, n := range sizes {
		if n <= baseMessage || n > u.limit || n < u.size || n == u.size && stage == sizeAll || contains(u.out, n) {
			continue
		}
		u.out = append(u.out, n)
		mc.pingSized(now, c, n)
	}
	if u.due = (time.Time{}); len(u.out) > 0 {
		u.due = now.Add(max(sizeWait, sizeTrips*c.rtt))
	}
}

func contains(s []int, n int) bool {
	for _, x := range s {
		if x == n {
			return true
		}
	}
	return false
}

// pingSized pings c with a message of n bytes.
func (mc *machine) pingSized(now time.Time, c *candidate, n int) {
	mc.pingTo(now, c, nil)
	mc.sent[len(mc.sent)-1].size = n
	mc.acts[len(mc.acts)-1].pad = n - pingSize
}

// pingSize is the length of a ping without padding.
const pingSize = disco.Overhead + disco.PlainHeaderLen + disco.PingLen

// sizePong takes the answer to a ping of n bytes to h.
func (mc *machine) sizePong(h hop, n int) {
	u := &mc.size
	if h != u.to || h != mc.d.best {
		return
	}
	for i, x := range u.out {
		if x == n {
			u.out = append(u.out[:i], u.out[i+1:]...)
			break
		}
	}
	if len(u.out) == 0 {
		u.due = time.Time{}
	}
	if n > u.size && n <= u.limit {
		u.size = n
		mc.route()
	}
}

// route puts the path in use in force with the size that it carries.
func (mc *machine) route() {
	d := &mc.d
	a := action{kind: setRoute, to: via{addr: d.best.addr, vni: d.best.vni}, until: d.trustUntil}
	if mc.size.to == d.best {
		a.size = mc.size.size
	}
	mc.acts = append(mc.acts, a)
}

// shrink gives up the size in use, and looks for what still passes.
func (mc *machine) shrink(now time.Time) {
	mc.size.size = 0
	mc.route()
	mc.guessSize(now)
	mc.size.againAt = now.Add(shrunkAgain)
}

// sizeTick acts on pings that were not answered in time.
func (mc *machine) sizeTick(now time.Time) {
	u := &mc.size
	if !due(now, u.due) {
		return
	}
	u.due = time.Time{}
	switch {
	case u.to != mc.d.best:
	case u.stage == sizeCheck || u.size > 0 && contains(u.out, u.size):
		mc.shrink(now)
	case u.stage == sizeGuess:
		u.all = true // with the next news of traffic: the host may have learned of a smaller link meanwhile
	}
}

// MTU returns how long a packet inside the tunnel may be, in bytes, by the path that is in use now: at least [BaseMTU]. n is how
// much is to be sent at once to a receiver that takes packets of any size; once that is much, what the path carries is found out.
func (p *Peer) MTU(n int) int {
	now := p.m.now()
	rt := p.route.Load()
	if rt == nil || now >= rt.until {
		if p.region() != 0 {
			return RelayMTU
		}
		return BaseMTU
	}
	if n > BaseMTU && (rt.size > 0 || p.isBulk(now, n)) {
		if told := p.bulkAt.Load(); (told == 0 || now-told >= int64(bulkEvery)) && p.bulkAt.CompareAndSwap(told, max(now, 1)) {
			p.tell(flagBulk)
		}
	}
	return max(rt.size-sealing, BaseMTU)
}

// isBulk counts what is sent, and reports whether it is much.
func (p *Peer) isBulk(now int64, n int) bool {
	if from := p.bulkFrom.Load(); (from == 0 || now-from > int64(bulkFor)) && p.bulkFrom.CompareAndSwap(from, max(now, 1)) {
		p.bulkSum.Store(0)
	}
	return p.bulkSum.Add(int64(n)) >= leastBulk
}

// carries reports whether the path is known to carry messages of n bytes.
func (rt *route) carries(n int) bool { return n <= max(rt.size, baseMessage) }

// Sizer is a [UDP] that knows what the first link carries, or the host has learned of the links behind it.
type Sizer interface {
	// MaxPayload returns how long a datagram to dst may be, in bytes, to leave this host in one piece, 0 if that is not known.
	MaxPayload(dst netip.AddrPort) int
}

// sizeLimit returns the longest message that leaves this host whole by a's path, 0 if that is not known.
func (o *owner) sizeLimit(a *active) int {
	s, ok := o.m.cfg.UDP.(Sizer)
	if !ok || !a.mc.d.best.IsValid() {
		return 0
	}
	limit := s.MaxPayload(a.mc.d.best.addr)
	if limit > 0 && a.mc.d.best.vni != 0 {
		limit -= disco.GeneveLen
	}
	return limit
}

// gotPong gives a's machine a pong. What the host has learned since a padded ping may be why that was answered, however late: it went
// in fragments.
func (o *owner) gotPong(now time.Time, a *active, from via, m *disco.Pong) time.Duration {
	if slices.ContainsFunc(a.mc.sent, func(s sentPing) bool { return s.tx == m.TxID && s.size > 0 }) {
		a.mc.size.limit = min(a.mc.size.limit, o.sizeLimit(a))
	}
	return a.mc.gotPong(now, from, m)
}
