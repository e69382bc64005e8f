package path

import (
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
)

const (
	// retryPing is how long an unanswered ping that somebody waits for stays alone.
	retryPing = time.Second
	// pingTTL is how long a pong may take. A later one is ignored.
	pingTTL = 5 * time.Second
	// idleAfter is how long a machine without work is kept; it holds the box key, which costs
	// a scalar multiplication to make again, and the peer's allowance of answers.
	idleAfter = time.Minute
	// maxSent bounds the pings in flight to one peer.
	maxSent = 256
	// A peer's pings are answered at pongRate a second, after a burst of pongBurst: an upstream
	// node pings every endpoint that it knows of, at once, and again as it likes.
	pongRate  = 20
	pongBurst = 60
)

// via is one way to a peer: by a relay region, or straight to an address. The zero value is
// the relay by which the peer's data goes at that moment.
type via struct {
	region uint16
	addr   netip.AddrPort
	vni    uint32 // addr is a peer relay's
}

func (v via) hop() hop { return hop{v.addr, v.vni} }

type actionKind uint8

const (
	sendPing   actionKind = iota + 1 // to, tx, pad
	sendPong                         // to, tx, src
	pingAnswer                       // req, result
	sendCall                         // a call-me-maybe with this node's endpoints, over the relay
	setRoute                         // to, until: data goes straight to the address; invalid: by the relay
	doubt                            // until: data goes by the relay as well
	askRelays                        // peer relays are asked for an endpoint
	sendVia                          // a call-me-maybe-via with the endpoint of shake, over the relay
	sendBind                         // to, shake: a bind message
	sendAnswer                       // to, shake: the answer to its challenge
	shaking                          // shake has begun
	shaken                           // shake is over
)

// action is what a machine wants done.
type action struct {
	kind   actionKind
	to     via
	tx     disco.TxID
	pad    int
	src    netip.AddrPort
	req    *pingRequest
	result PingResult
	until  time.Time
	size   int // of setRoute: the longest message that the path carries, 0: not known
	shake  *shake
}

// pingRequest is a ping that somebody waits for.
type pingRequest struct {
	pad  int
	next time.Time // when to send the next ping
	done chan PingResult
}

type sentPing struct {
	tx  disco.TxID
	to  via
	at  time.Time
	req *pingRequest // who waits for it, if anybody

	size int // of the message, if that is what it is about
}

// machine is the path discovery of one peer: events and the time in, actions out, appended to
// acts. It does no I/O, reads no clock and starts nothing; it is not safe for concurrent use. A machine
// exists only while its peer has something going on, and next says when it wants tick.
type machine struct {
	newTx func() disco.TxID
	acts  []action

	sent []sentPing // oldest first
	reqs []*pingRequest
	d    direct
	size pathSize
	r    relaying

	tokens   float64 // answers that the peer may still have
	tokensAt time.Time
	lastUsed time.Time
}

func newMachine(now time.Time, newTx func() disco.TxID) *machine {
	return &machine{newTx: newTx, tokens: pongBurst, tokensAt: now, lastUsed: now}
}

// ping starts a ping for req, repeated every retryPing until it is answered or cancelled.
func (mc *machine) ping(now time.Time, req *pingRequest) {
	mc.lastUsed = now
	mc.reqs = append(mc.reqs, req)
	mc.sendFor(now, req)
}

// sendFor pings by the relay and, if the direct path in use is not trusted, by all candidates.
func (mc *machine) sendFor(now time.Time, req *pingRequest) {
	req.next = now.Add(retryPing)
	if mc.d.settled(now) {
		mc.pingTo(now, mc.d.find(mc.d.best), req)
		return
	}
	if !mc.d.trusted(now) {
		mc.send(now, via{}, req)
	}
	mc.pingAll(now, req)
	mc.acts = append(mc.acts, action{kind: sendCall}) // so that the next ping may show a better path
	mc.askRelays(now)
}

// send sends a ping and remembers it.
func (mc *machine) send(now time.Time, to via, req *pingRequest) {
	mc.forget(now)
	if len(mc.sent) == maxSent {
		mc.sent = append(mc.sent[:0], mc.sent[1:]...)
	}
	tx := mc.newTx()
	mc.sent = append(mc.sent, sentPing{tx: tx, to: to, at: now, req: req})
	a := action{kind: sendPing, to: to, tx: tx}
	if req != nil {
		a.pad = req.pad
	}
	mc.acts = append(mc.acts, a)
}

// cancel ends req. Its pings may still be answered, which says something of their paths.
func (mc *machine) cancel(req *pingRequest) {
	for i, r := range mc.reqs {
		if r == req {
			mc.reqs = append(mc.reqs[:i], mc.reqs[i+1:]...)
			break
		}
	}
	for i := range mc.sent {
		if mc.sent[i].req == req {
			mc.sent[i].req = nil
		}
	}
}

// gotPing answers a ping, the way it came. src is the address from which it came, as the
// pong reports it.
func (mc *machine) gotPing(now time.Time, from via, src netip.AddrPort, m *disco.Ping) {
	mc.lastUsed = now
	mc.tokens = min(pongBurst, mc.tokens+max(0, now.Sub(mc.tokensAt).Seconds())*pongRate)
	mc.tokensAt = now
	if mc.tokens < 1 {
		return
	}
	mc.tokens--
	mc.acts = append(mc.acts, action{kind: sendPong, to: from, tx: m.TxID, src: src})
	switch {
	case from.vni != 0:
		mc.shakePing(now, from.hop())
	case from.region == 0:
		mc.directPing(now, from.addr)
	}
}

// gotPong takes a pong; one that answers no ping in flight is ignored. It returns the round trip, 0 for none.
func (mc *machine) gotPong(now time.Time, from via, m *disco.Pong) time.Duration {
	mc.forget(now)
	for i, s := range mc.sent {
		if s.tx != m.TxID {
			continue
		}
		mc.lastUsed = now
		mc.sent = append(mc.sent[:i], mc.sent[i+1:]...)
		rtt := max(now.Sub(s.at), 1)
		if s.to.addr.IsValid() && from.region == 0 {
			// The ping arrived where it was sent, whatever the pong's source: a NAT may change that.
			from = s.to
			if from.vni != 0 {
				mc.shakePong(now, from.hop())
			}
			mc.directPong(now, from.hop(), rtt)
			if s.size > 0 {
				mc.sizePong(from.hop(), s.size)
			}
		}
		if s.req != nil {
			mc.acts = append(mc.acts, action{kind: pingAnswer, req: s.req,
				result: PingResult{Latency: rtt, Addr: from.addr, VNI: from.vni, Region: int(from.region)}})
			mc.cancel(s.req)
		}
		return rtt
	}
	return 0
}

// tick does what has become due.
func (mc *machine) tick(now time.Time) {
	mc.forget(now)
	for _, r := range mc.reqs {
		if !now.Before(r.next) {
			mc.sendFor(now, r)
		}
	}
	mc.directTick(now)
	mc.sizeTick(now)
	mc.shakeTick(now)
}

// forget drops pings that nobody may answer any more.
func (mc *machine) forget(now time.Time) {
	n := 0
	for n < len(mc.sent) && now.Sub(mc.sent[n].at) > pingTTL {
		n++
	}
	if n > 0 {
		k := copy(mc.sent, mc.sent[n:])
		clear(mc.sent[k:])
		mc.sent = mc.sent[:k]
	}
}

// idle reports whether the machine may be thrown away.
func (mc *machine) idle(now time.Time) bool {
	return len(mc.reqs) == 0 && mc.working().IsZero() && now.Sub(mc.lastUsed) >= idleAfter
}

// working returns when tick has something to do for the paths, zero for never.
func (mc *machine) working() time.Time {
	t, r := mc.d.directNext(), mc.r.next()
	if t.IsZero() || !r.IsZero() && r.Before(t) {
		t = r
	}
	if at := mc.size.due; !at.IsZero() && (t.IsZero() || at.Before(t)) {
		t = at
	}
	return t
}

// next returns when tick or idle has something to say.
func (mc *machine) next() time.Time {
	t := mc.working()
	if t.IsZero() && len(mc.reqs) == 0 {
		return mc.lastUsed.Add(idleAfter)
	}
	for _, r := range mc.reqs {
		if t.IsZero() || r.next.Before(t) {
			t = r.next
		}
	}
	return t
}
