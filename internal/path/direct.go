package path

import (
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
)

// The direct side of a machine: candidate addresses, which of them works best, and for how long that may be
// believed. See docs/protocol/paths.md §4. Without a UDP socket a machine is never told of candidates and does none of this.
const (
	// sessionFor is how long after the last packet to a peer its path is looked after.
	sessionFor = 45 * time.Second
	// heartbeat is how often the path in use is pinged during a session.
	heartbeat = 3 * time.Second
	// trustFor is how long a pong vouches for a path: two heartbeats and some.
	trustFor = 6500 * time.Millisecond
	// If nothing is heard for suspectAfter after something was sent, or some round trips if that is longer, the path is
	// pinged, and after suspectWait without an answer it is given up. Meanwhile everything goes by the relay as
	// well. TCP in trouble sends again after about 0.2, 0.6 and 1.4 s: the second of these is to get through.
	suspectAfter = 300 * time.Millisecond
	suspectWait  = 300 * time.Millisecond
	maxPatience  = 2 * time.Second
	// quietAfter is after how much silence of a peer that was sending the path is pinged, at most every quietEvery: a
	// receiver has nothing to say that could go unanswered, and its NAT may have lost both the path and the relay's connection.
	quietAfter = 400 * time.Millisecond
	quietEvery = time.Second
	// upgradeEvery is how often other candidates are tried while a path works that is not
	// goodEnough.
	upgradeEvery = time.Minute
	goodEnough   = 5 * time.Millisecond
	// roundEvery is how often all candidates are tried while none works, after firstRounds.
	roundEvery = 5 * time.Second
	// pingBack is the least time between pings of a candidate that is pinged because it pinged us: what was sent to it
	// before may have met a NAT that had not heard of us, which now has.
	pingBack = time.Second
	// askBack is the least time between call-me-maybes to a peer that sends by the relay although it is reached directly.
	askBack = time.Second
	// callWindow is how long after a call-me-maybe a node without traffic of its own pings back.
	callWindow = 5 * time.Second
	// observedFor is how long an address is remembered that nothing but a ping made known.
	observedFor = 5 * time.Minute
	// callEvery is the least time between call-me-maybes of a peer that we act on.
	callEvery = 250 * time.Millisecond

	// maxListed bounds the candidates from each of control and call-me-maybe, maxObserved the others.
	maxListed   = disco.MaxEndpoints
	maxObserved = 8
)

// firstRounds are the distances of the first rounds of pings. NATs let the peer's pings in once
// ours have gone out, so the first round may fail where the second does not.
var firstRounds = [...]time.Duration{300 * time.Millisecond, 700 * time.Millisecond, 2 * time.Second}

type origin uint8

const (
	fromControl origin = 1 << iota
	fromCall           // a call-me-maybe
	fromPing           // an authenticated ping came from there
	fromShake          // a peer relay that both nodes are bound to
)

// hop is where datagrams to a peer go: to an address of its own, or, with a VNI, to the peer relay there.
type hop struct {
	addr netip.AddrPort
	vni  uint32
}

// IsValid reports whether there is one.
func (h hop) IsValid() bool { return h.addr.IsValid() }

// candidate is an address that may reach the peer.
type candidate struct {
	hop
	from     origin
	lastBack time.Time // ours to it because it pinged us
	lastSeen time.Time // a ping from it
	rtt      time.Duration
}

// direct is the state of the direct side.
type direct struct {
	cands []candidate

	best       hop // the path in use; invalid: the relay
	trustUntil time.Time

	traffic      time.Time     // of the last packet to the peer
	heard        time.Time     // last sign of life by the path in use
	unanswered   time.Time     // of the first packet after that, as far as is known; zero: none
	suspectAt    time.Time     // when unanswered becomes a suspicion; zero: not at all
	suspectUntil time.Time     // zero: no suspicion
	quietAt      time.Time     // when silence is worth a ping; zero: not at all
	quiet        time.Time     // when it last was
	patience     time.Duration // beyond suspectAfter, for a peer that has nothing to say but pongs

	round     int       // rounds of the discovery in progress
	roundAt   time.Time // zero: none in progress
	beatAt    time.Time
	upgradeAt time.Time

	called time.Time // last call-me-maybe acted on
	asked  time.Time // last call-me-maybe for the peer's sake
}

// usable reports whether an address that somebody names as an endpoint may be pinged.
func usable(ap netip.AddrPort) bool {
	a := ap.Addr()
	return a.IsValid() && ap.Port() != 0 && !a.IsUnspecified() && !a.IsMulticast() && a != derpMagic &&
		!a.Is4In6() && !tailnet6.Contains(a)
}

// tailnet6 holds the addresses inside tailnets. A path to a peer cannot go through the tunnel to it.
var tailnet6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")

func (d *direct) find(h hop) *candidate {
	for i := range d.cands {
		if d.cands[i].hop == h {
			return &d.cands[i]
		}
	}
	return nil
}

// list makes eps the candidates of origin o.
func (d *direct) list(eps []netip.AddrPort, o origin) {
	for i := range d.cands {
		d.cands[i].from &^= o
	}
	n := 0
	for _, ap := range eps {
		if !usable(ap) {
			continue
		}
		if n++; n > maxListed {
			break
		}
		if c := d.find(hop{addr: ap}); c != nil {
			c.from |= o
		} else {
			d.cands = append(d.cands, candidate{hop: hop{addr: ap}, from: o})
		}
	}
	d.prune()
}

// prune drops candidates that nobody names any more, but for the path in use.
func (d *direct) prune() {
	kept := d.cands[:0]
	for _, c := range d.cands {
		if c.from != 0 || c.hop == d.best {
			kept = append(kept, c)
		}
	}
	clear(d.cands[len(kept):])
	d.cands = kept
}

// observe notes that an authenticated ping came from ap.
func (d *direct) observe(now time.Time, ap netip.AddrPort) *candidate {
	if !usable(ap) {
		return nil
	}
	c := d.find(hop{addr: ap})
	if c == nil {
		n, oldest := 0, -1
		for i := range d.cands {
			if x := &d.cands[i]; x.from == fromPing && x.hop != d.best {
				n++
				if oldest < 0 || x.lastSeen.Before(d.cands[oldest].lastSeen) {
					oldest = i
				}
			}
		}
		if n >= maxObserved {
			d.cands[oldest] = candidate{}
			d.cands = append(d.cands[:oldest], d.cands[oldest+1:]...)
		}
		d.cands = append(d.cands, candidate{hop: hop{addr: ap}})
		c = &d.cands[len(d.cands)-1]
	}
	c.from |= fromPing
	c.lastSeen = now
	return c
}

// inSession reports whether there has been traffic lately.
func (d *direct) inSession(now time.Time) bool {
	return !d.traffic.IsZero() && now.Sub(d.traffic) < sessionFor
}

func (d *direct) trusted(now time.Time) bool { return d.best.IsValid() && now.Before(d.trustUntil) }

// settled reports whether there is nothing better to look for: a path that is trusted, and not by way of a peer relay.
func (d *direct) settled(now time.Time) bool { return d.best.vni == 0 && d.trusted(now) }

// endpoints takes the peer's endpoints from control.
func (mc *machine) endpoints(now time.Time, eps []netip.AddrPort) {
	mc.d.list(eps, fromControl)
	if mc.d.inSession(now) && !mc.d.settled(now) {
		mc.startRounds(now)
	}
}

// callMeMaybe takes the endpoints that the peer itself names. It has just pinged us, or tried; our pings now
// pass its NAT, and open ours for its next ones. It would not call if it reached us directly, so a path that we believe
// in may be dead, or the way back.
func (mc *machine) callMeMaybe(now time.Time, eps []netip.AddrPort) {
	d := &mc.d
	if now.Sub(d.called) < callEvery {
		return
	}
	d.called = now
	mc.lastUsed = now
	d.list(eps, fromCall)
	if d.settled(now) { // by way of a peer relay there are calls as long as there is hope for better
		mc.suspect(now)
	}
	mc.pingAll(now, nil)
}

// relayed says that data of the peer came by a relay although there is a direct path: the peer does not know of
// it, or has found it dead.
func (mc *machine) relayed(now time.Time) {
	d := &mc.d
	if !d.trusted(now) {
		return
	}
	mc.suspect(now)
	if now.Sub(d.asked) >= askBack {
		d.asked = now
		if s := mc.shakeOf(d.best); s != nil {
			mc.acts = append(mc.acts, action{kind: sendVia, shake: s})
		} else {
			mc.acts = append(mc.acts, action{kind: sendCall})
		}
	}
}

// sending says that packets are being sent to the peer. heard is when an authenticated packet last came by
// the direct path in use; zero for never. The driver need not call it for each packet: a few times a second do.
func (mc *machine) sending(now, heard time.Time) {
	d := &mc.d
	mc.lastUsed = now
	fresh := !d.inSession(now)
	d.traffic = now
	mc.dataHeard(heard)
	if fresh {
		d.beatAt = now.Add(heartbeat)
		d.upgradeAt = now.Add(upgradeEvery)
	}
	if !d.settled(now) && d.roundAt.IsZero() {
		mc.startRounds(now)
	}
	if !d.trusted(now) {
		return
	}
	if d.unanswered.IsZero() {
		d.unanswered = now
		d.suspectAt = now.Add(max(suspectAfter, 3*d.find(d.best).rtt) + d.patience)
	}
}

// suspect gives the path in use a last chance to answer: silence, or an error on sending, speaks against it.
func (mc *machine) suspect(now time.Time) {
	d := &mc.d
	if !d.trusted(now) || !d.suspectUntil.IsZero() {
		return
	}
	c := d.find(d.best)
	mc.pingTo(now, c, nil)
	mc.checkSize(now) // it may be only what is long that does not pass any more
	d.suspectAt, d.quietAt, d.suspectUntil = time.Time{}, time.Time{}, now.Add(max(suspectWait, 4*c.rtt))
	mc.acts = append(mc.acts, action{kind: doubt, until: d.suspectUntil})
}

// dataHeard notes when data was last heard by the path in use.
func (mc *machine) dataHeard(at time.Time) {
	if d := &mc.d; at.After(d.heard) {
		d.patience = 0
		d.quietAt = at.Add(quietAfter)
		if t := d.quiet.Add(quietEvery); t.After(d.quietAt) {
			d.quietAt = t
		}
	}
	mc.alive(at)
}

// alive notes a sign of life by the path in use.
func (mc *machine) alive(at time.Time) {
	if d := &mc.d; at.After(d.heard) {
		d.heard = at
		d.suspectUntil = time.Time{}
		if !at.Before(d.unanswered) {
			d.unanswered, d.suspectAt = time.Time{}, time.Time{}
		}
	}
}

// changed says that this node's own network has changed: nothing learned before counts.
func (mc *machine) changed(now time.Time) {
	for i := range mc.d.cands {
		mc.d.cands[i].rtt = 0
	}
	mc.dropShakes()
	mc.distrust(now)
}

// distrust gives up the path in use.
func (mc *machine) distrust(now time.Time) {
	d := &mc.d
	if d.best.IsValid() {
		mc.acts = append(mc.acts, action{kind: setRoute})
	}
	mc.size = pathSize{}
	if s := mc.shakeOf(d.best); s != nil && d.inSession(now) {
		mc.lostShake(s)
	}
	d.best, d.trustUntil, d.suspectUntil = hop{}, time.Time{}, time.Time{}
	d.unanswered, d.suspectAt, d.quietAt = time.Time{}, time.Time{}, time.Time{}
	d.prune()
	if d.inSession(now) {
		mc.startRounds(now)
	}
}

// startRounds begins a discovery with a round at once.
func (mc *machine) startRounds(now time.Time) {
	mc.d.round = 0
	mc.nextRound(now)
}

// nextRound pings all candidates and has the peer do the same.
func (mc *machine) nextRound(now time.Time) {
	d := &mc.d
	for i := range d.cands {
		if c := &d.cands[i]; c.from&fromPing != 0 && now.Sub(c.lastSeen) > observedFor {
			c.from &^= fromPing
		}
	}
	d.prune()
	mc.pingAll(now, nil)
	mc.acts = append(mc.acts, action{kind: sendCall})
	if d.round > 0 {
		mc.askRelays(now)
	}
	wait := roundEvery
	if d.round < len(firstRounds) {
		wait = firstRounds[d.round]
	}
	d.round++
	d.roundAt = now.Add(wait)
}

func (mc *machine) pingAll(now time.Time, req *pingRequest) {
	for i := range mc.d.cands {
		if c := &mc.d.cands[i]; req != nil || c.vni == 0 || c.hop != mc.d.best { // else the heartbeat does
			mc.pingTo(now, c, req)
		}
	}
}

func (mc *machine) pingTo(now time.Time, c *candidate, req *pingRequest) {
	mc.send(now, via{addr: c.addr, vni: c.vni}, req)
}

// directPing acts on an authenticated ping from ap beyond answering it.
func (mc *machine) directPing(now time.Time, ap netip.AddrPort) {
	d := &mc.d
	c := d.observe(now, ap)
	if c == nil || d.settled(now) || now.Sub(c.lastBack) < pingBack {
		return
	}
	if d.inSession(now) || now.Sub(d.called) < callWindow {
		c.lastBack = now
		mc.pingTo(now, c, nil)
	}
}

// directPong takes the round trip of a candidate.
func (mc *machine) directPong(now time.Time, h hop, rtt time.Duration) {
	d := &mc.d
	c := d.find(h)
	if c == nil {
		return // no longer one
	}
	if c.rtt == 0 || h != d.best {
		c.rtt = rtt
	} else {
		c.rtt = (7*c.rtt + rtt) / 8 // one slow pong does not make a slow path
	}
	if h == d.best {
		if !d.suspectUntil.IsZero() {
			d.patience = min(maxPatience, 2*d.patience+suspectAfter)
		}
		mc.alive(now)
	} else if b := d.find(d.best); d.trusted(now) && b != nil && !better(c, b) {
		return
	}
	if d.best != h {
		d.best, d.heard, d.suspectUntil = h, now, time.Time{}
		d.unanswered, d.suspectAt = time.Time{}, time.Time{}
		if !d.inSession(now) {
			d.beatAt = time.Time{}
		} else if d.beatAt.IsZero() {
			d.beatAt = now.Add(heartbeat)
		}
	}
	d.trustUntil = now.Add(trustFor)
	if h.vni == 0 {
		d.roundAt = time.Time{}
	}
	mc.route()
}

// cost is a round trip, shortened for what counts in an address's favour besides: a private network is spared
// the router, and IPv6 the NAT with its time-outs.
func cost(c *candidate) time.Duration {
	t := c.rtt
	switch a := c.addr.Addr(); {
	case a.IsLoopback():
		t = t * 6 / 10
	case a.IsPrivate() || a.IsLinkLocalUnicast():
		t = t * 7 / 10
	case a.Is6():
		t = t * 9 / 10
	}
	return t
}

// better reports whether a is enough better than b, the path in use, to change. Any direct path is better than one by way of
// a peer relay.
func better(a, b *candidate) bool {
	if (a.vni == 0) != (b.vni == 0) {
		return a.vni == 0
	}
	ca, cb := cost(a), cost(b)
	return ca < cb*8/10 && cb-ca > 100*time.Microsecond
}

// directTick does what has become due.
func (mc *machine) directTick(now time.Time) {
	d := &mc.d
	if d.best.IsValid() && (!now.Before(d.trustUntil) || !d.suspectUntil.IsZero() && !now.Before(d.suspectUntil)) {
		mc.distrust(now)
	}
	if !d.inSession(now) {
		d.roundAt, d.beatAt, d.upgradeAt = time.Time{}, time.Time{}, time.Time{}
		d.unanswered, d.suspectAt, d.quietAt = time.Time{}, time.Time{}, time.Time{}
		return
	}
	if due(now, d.suspectAt) {
		d.suspectAt = time.Time{}
		mc.suspect(now)
	}
	if due(now, d.quietAt) {
		d.quiet, d.quietAt = now, time.Time{}
		mc.suspect(now)
	}
	if due(now, d.roundAt) {
		mc.nextRound(now)
	}
	if due(now, d.upgradeAt) {
		d.upgradeAt = now.Add(upgradeEvery)
		if c := d.find(d.best); c != nil && c.rtt > goodEnough {
			mc.pingAll(now, nil)
			d.beatAt = now.Add(heartbeat)
		}
	}
	if due(now, d.beatAt) {
		d.beatAt = now.Add(heartbeat)
		if c := d.find(d.best); c != nil {
			mc.pingTo(now, c, nil)
		}
	}
}

func due(now, t time.Time) bool { return !t.IsZero() && !now.Before(t) }

// directNext returns when directTick has something to do, zero for never.
func (d *direct) directNext() (t time.Time) {
	times := [...]time.Time{d.roundAt, d.beatAt, d.upgradeAt, d.suspectUntil, d.suspectAt, d.quietAt, {}, {}}
	if d.best.IsValid() {
		times[6] = d.trustUntil
	}
	if !d.roundAt.IsZero() || !d.beatAt.IsZero() || !d.upgradeAt.IsZero() {
		times[7] = d.traffic.Add(sessionFor)
	}
	for _, x := range times {
		if !x.IsZero() && (t.IsZero() || x.Before(t)) {
			t = x
		}
	}
	return t
}
