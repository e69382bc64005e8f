package path

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// The side of a machine that uses peer relays: UDP relays that nodes of the tailnet run, for pairs that find no direct path. An
// endpoint on one is allocated over DERP, by whichever node may, and told to the other; both bind to it by a handshake with the relay;
// a ping and a pong through it make it a candidate like others, which any direct path beats. See docs/protocol/paths.md §7.
const (
	// maxShakes bounds the endpoints of one peer, maxShakeAddrs the addresses of a relay that are tried.
	maxShakes     = 8
	maxShakeAddrs = 16
	// shakeFor is how long a handshake may take, with the ping through the relay: the other node has to do the same.
	shakeFor = 30 * time.Second
	// shakeLife is how long an endpoint without traffic is believed to be there, a little less than the relays' own time.
	shakeLife = 4*time.Minute + 30*time.Second
	// askWhenUp is how often relays are asked while one is in use: another may be better, and the other node, which may have no
	// relays to ask, may have lost its way.
	askWhenUp = time.Minute
	// maxBinds is how often a relay is sent a bind message that it does not answer.
	maxBinds = 5
	// maxShakePings bounds the pings that answer the other node's while a handshake is under way.
	maxShakePings = 10
	// What others allocate is taken at vias a second, after a burst of viaBurst.
	viaRate  = 1
	viaBurst = maxShakes
)

// askAgain are the distances of the first requests to relays without success; the last holds on.
var askAgain = [...]time.Duration{2500 * time.Millisecond, 10 * time.Second, 30 * time.Second}

// bindAgain are the distances at which the messages of a handshake are sent again; the last holds on.
var bindAgain = [...]time.Duration{200 * time.Millisecond, 400 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second}

// relaying is the state of this side.
type relaying struct {
	shakes []*shake
	asked  time.Time // when relays were last asked; zero: not since there was a path
	tries  int       // how often without success

	tokens   float64 // endpoints that the peer may still bring up
	tokensAt time.Time
}

// shake is an endpoint on a peer relay, and the handshake that binds this node to it.
type shake struct {
	ep         disco.RelayEndpoint
	generation uint32
	shared     key.Shared // with the relay; the owner makes it
	keyed      bool       // it has
	until      time.Time  // when the handshake is over without success
	nextAt     time.Time  // when to send again
	sent       int
	pings      int

	at        netip.AddrPort // the relay's address that has challenged us first; all goes there. Invalid: none has
	challenge [disco.ChallengeLen]byte
	up        bool      // a pong has come through it
	alive     time.Time // when one last has
}

func (s *shake) hop() hop { return hop{s.at, s.ep.VNI} }

func (s *shake) key() shakeKey { return shakeKey{s.ep.Server, s.ep.VNI} }

// shakeOf returns the endpoint that h leads to, nil if h is none.
func (mc *machine) shakeOf(h hop) *shake {
	if h.vni == 0 {
		return nil
	}
	for _, s := range mc.r.shakes {
		if s.hop() == h {
			return s
		}
	}
	return nil
}

// askRelays asks the relays for an endpoint, not more often than is due.
func (mc *machine) askRelays(now time.Time) {
	r := &mc.r
	wait := askWhenUp
	if !mc.d.trusted(now) {
		wait = askAgain[min(max(r.tries-1, 0), len(askAgain)-1)]
	}
	if !r.asked.IsZero() && now.Sub(r.asked) < wait {
		return
	}
	r.asked = now
	r.tries++
	mc.acts = append(mc.acts, action{kind: askRelays})
}

// relayEndpoint takes an endpoint that a relay has allocated for this node and the peer: to a request of ours, or by the peer's word.
func (mc *machine) relayEndpoint(now time.Time, ep *disco.RelayEndpoint, ours bool) {
	r := &mc.r
	mc.lastUsed = now
	if !ours {
		r.tokens = min(viaBurst, r.tokens+max(0, now.Sub(r.tokensAt).Seconds())*viaRate)
		if r.tokensAt.IsZero() {
			r.tokens = viaBurst
		}
		r.tokensAt = now
		if r.tokens < 1 {
			return
		}
		r.tokens--
	}
	addrs := make([]netip.AddrPort, 0, min(len(ep.Addrs), maxShakeAddrs))
	for _, ap := range ep.Addrs {
		if usable(ap) && len(addrs) < maxShakeAddrs {
			addrs = append(addrs, ap)
		}
	}
	if ep.VNI == 0 || ep.VNI > disco.MaxVNI || ep.Server.IsZero() || len(addrs) == 0 {
		return
	}
	known := *ep
	known.Addrs = addrs
	s := &shake{ep: known, until: now.Add(shakeFor)}
	if ep.BindLifetime > 0 && ep.BindLifetime < shakeFor {
		s.until = now.Add(ep.BindLifetime)
	}
	if ours {
		mc.acts = append(mc.acts, action{kind: sendVia, shake: s}) // whatever we know of it: the peer may not
	}
	for _, old := range r.shakes {
		if old.ep.Server != ep.Server {
			continue
		}
		same := old.ep.LamportID == ep.LamportID
		switch {
		case old.ep.LamportID > ep.LamportID:
			return // overtaken
		case same && !old.up && now.Before(old.until):
			return // under way
		case same && old.hop() == mc.d.best && mc.d.trusted(now):
			return // a new handshake could only disturb it
		}
		// The relay has another endpoint for us now, or nobody knows whether this one still works: NATs forget.
		mc.dropShake(old)
		break
	}
	if len(r.shakes) >= maxShakes && !mc.evict() {
		return
	}
	tx := mc.newTx()
	s.generation = binary.BigEndian.Uint32(tx[:]) | 1
	r.shakes = append(r.shakes, s)
	mc.acts = append(mc.acts, action{kind: shaking, shake: s})
	mc.bind(now, s)
}

// evict makes room for an endpoint, and reports whether it could.
func (mc *machine) evict() bool {
	for _, s := range mc.r.shakes {
		if s.up && s.hop() != mc.d.best {
			mc.dropShake(s)
			return true
		}
	}
	return false
}

// bind sends what the handshake needs next.
func (mc *machine) bind(now time.Time, s *shake) {
	s.nextAt = now.Add(bindAgain[min(s.sent, len(bindAgain)-1)])
	s.sent++
	if !s.at.IsValid() {
		for _, ap := range s.ep.Addrs {
			mc.acts = append(mc.acts, action{kind: sendBind, to: via{addr: ap, vni: s.ep.VNI}, shake: s})
		}
		if s.sent == maxBinds {
			s.nextAt = s.until
		}
		return
	}
	// The answer may have been lost; a relay that has it ignores another.
	to := via{addr: s.at, vni: s.ep.VNI}
	mc.acts = append(mc.acts, action{kind: sendAnswer, to: to, shake: s})
	mc.send(now, to, nil)
}

// challenged takes the relay's challenge. The address that answered first is the one that is used.
func (mc *machine) challenged(now time.Time, s *shake, from netip.AddrPort, challenge [disco.ChallengeLen]byte) {
	if s.at.IsValid() {
		return
	}
	s.at, s.challenge, s.sent = from, challenge, 0
	mc.bind(now, s)
}

// shakePing acts on a ping of the peer through a relay: it is bound, and our ping before may have come too early.
func (mc *machine) shakePing(now time.Time, h hop) {
	if s := mc.shakeOf(h); s != nil && !s.up && s.pings < maxShakePings {
		s.pings++
		mc.send(now, via{addr: h.addr, vni: h.vni}, nil)
	}
}

// shakePong makes the endpoint a candidate: both nodes are bound to it.
func (mc *machine) shakePong(now time.Time, h hop) {
	s := mc.shakeOf(h)
	if s == nil {
		return
	}
	s.up, s.alive = true, now
	mc.r.tries = 0
	if mc.d.find(h) == nil {
		mc.d.cands = append(mc.d.cands, candidate{hop: h, from: fromShake})
	}
}

// lostShake drops the endpoint in use, which does not carry any more, and has others asked for at once.
func (mc *machine) lostShake(s *shake) {
	mc.dropShake(s)
	mc.r.asked, mc.r.tries = time.Time{}, 0
}

// dropShake forgets an endpoint.
func (mc *machine) dropShake(s *shake) {
	for i, x := range mc.r.shakes {
		if x == s {
			mc.r.shakes = append(mc.r.shakes[:i:i], mc.r.shakes[i+1:]...)
			break
		}
	}
	if c := mc.d.find(s.hop()); c != nil && s.ep.VNI != 0 {
		c.from &^= fromShake
		mc.d.prune()
	}
	mc.acts = append(mc.acts, action{kind: shaken, shake: s})
}

// dropShakes forgets all of them: they are bound to addresses that this node has no more.
func (mc *machine) dropShakes() {
	for len(mc.r.shakes) > 0 {
		mc.dropShake(mc.r.shakes[0])
	}
	mc.r.asked, mc.r.tries = time.Time{}, 0
}

// shakeTick does what has become due.
func (mc *machine) shakeTick(now time.Time) {
	for i := 0; i < len(mc.r.shakes); {
		s := mc.r.shakes[i]
		switch {
		case !s.up && !now.Before(s.until), s.up && s.hop() != mc.d.best && now.Sub(s.alive) > shakeLife:
			mc.dropShake(s)
			continue
		case !s.up && due(now, s.nextAt):
			mc.bind(now, s)
		}
		i++
	}
}

// next returns when shakeTick has something to do, zero for never. An endpoint that is up wants nothing by itself.
func (r *relaying) next() (t time.Time) {
	for _, s := range r.shakes {
		if s.up {
			continue
		}
		for _, x := range [...]time.Time{s.nextAt, s.until} {
			if t.IsZero() || x.Before(t) {
				t = x
			}
		}
	}
	return t
}
