package path

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Where this node may be reached: its own addresses, those that STUN servers see, and port mappings. See
// docs/protocol/paths.md §5.
const (
	// maxProbes bounds the STUN servers that are asked at a time.
	maxProbes = 6
	// probesEnd is when a round of STUN requests is over whatever has come.
	probesEnd = time.Second
	// callWait is how long a call-me-maybe waits for the first answer, and settle for others after it.
	callWait = 300 * time.Millisecond
	settle   = 30 * time.Millisecond
	// freshFor is how long an answer is good for a call-me-maybe: NATs keep a mapping for 30 s at the least that is seen.
	freshFor = 27 * time.Second
	// During sessions STUN servers are asked again after refreshMin to refreshMin + refreshSpread.
	refreshMin    = 20 * time.Second
	refreshSpread = 6 * time.Second
	// silentRounds is after how many rounds without an answer UDP counts as blocked.
	silentRounds = 2
)

// resend is when requests without an answer are sent again.
var resend = [...]time.Duration{150 * time.Millisecond, 450 * time.Millisecond}

// probe is a STUN request in flight.
type probe struct {
	tx   stun.TxID
	dst  netip.AddrPort
	done bool
}

// self is what this node knows of its own endpoints. It belongs to the owner, does no I/O and reads no clock.
type self struct {
	servers []netip.AddrPort
	local   []netip.Addr
	mapped  []Endpoint
	v4, v6  uint16
	fixed   uint16 // the port that was asked for, 0: any

	public []netip.AddrPort // as of the last round with an answer
	fresh  time.Time        // when that was

	probes    []probe // of the round in progress
	began     time.Time
	resent    int
	answers   []netip.AddrPort
	settleAt  time.Time // zero: settled, or no round
	endAt     time.Time // zero: no round
	refreshAt time.Time
	silent    int

	told []Endpoint
}

// usable reports whether there is a socket for the family.
func (s *self) usable(ap netip.AddrPort) bool {
	if ap.Addr().Is4() {
		return s.v4 != 0
	}
	return s.v6 != 0
}

// begin starts a round unless one is in progress, and reports whether there are requests to send.
func (s *self) begin(now time.Time) bool {
	if !s.endAt.IsZero() {
		return false
	}
	s.refreshAt = time.Time{}
	s.probes = s.probes[:0]
	for _, ap := range s.servers {
		if s.usable(ap) && len(s.probes) < maxProbes {
			s.probes = append(s.probes, probe{tx: stun.NewTxID(), dst: ap})
		}
	}
	if len(s.probes) == 0 {
		return false
	}
	s.began, s.resent, s.answers = now, 0, nil
	s.settleAt, s.endAt = now.Add(callWait), now.Add(probesEnd)
	return true
}

// answer takes a response.
func (s *self) answer(now time.Time, src netip.AddrPort, pkt []byte) {
	tx, addr, err := stun.ParseResponse(pkt)
	if err != nil || s.endAt.IsZero() {
		return
	}
	open := 0
	found := false
	for i := range s.probes {
		p := &s.probes[i]
		if !p.done && p.tx == tx && p.dst == src {
			p.done, found = true, true
		}
		if !p.done {
			open++
		}
	}
	if !found {
		return
	}
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	if usable(addr) && !slices.Contains(s.answers, addr) {
		s.answers = append(s.answers, addr)
	}
	if !s.settleAt.IsZero() {
		if t := now.Add(settle); t.Before(s.settleAt) {
			s.settleAt = t
		}
	}
	s.public, s.fresh, s.silent = s.answers, now, 0
	if open == 0 {
		s.settleAt, s.endAt = now, now
	}
}

// next returns when there is something to do, zero for never.
func (s *self) next() (t time.Time) {
	at := func(x time.Time) {
		if !x.IsZero() && (t.IsZero() || x.Before(t)) {
			t = x
		}
	}
	if !s.endAt.IsZero() {
		at(s.endAt)
		at(s.settleAt)
		if s.resent < len(resend) {
			at(s.began.Add(resend[s.resent]))
		}
	} else {
		at(s.refreshAt)
	}
	return t
}

// isFresh reports whether the public endpoints are as good as they get.
func (s *self) isFresh(now time.Time) bool {
	return s.settleAt.IsZero() && (len(s.servers) == 0 || !s.fresh.IsZero() && now.Sub(s.fresh) < freshFor)
}

// endpoints lists where this node may be reached, the most useful to strangers first.
func (s *self) endpoints() []Endpoint {
	var out []Endpoint
	add := func(ap netip.AddrPort, t tailcfg.EndpointType) {
		if usable(ap) && len(out) < disco.MaxEndpoints && !slices.ContainsFunc(out, func(e Endpoint) bool { return e.Addr == ap }) {
			out = append(out, Endpoint{ap, t})
		}
	}
	for _, e := range s.mapped {
		add(e.Addr, e.Type)
	}
	for _, ap := range s.public {
		add(ap, tailcfg.EndpointSTUN)
	}
	if ap, ok := s.guess(); ok {
		add(ap, tailcfg.EndpointSTUN4LocalPort)
	}
	local := func(a netip.Addr) {
		if a = a.Unmap(); a.Is4() && s.v4 != 0 {
			add(netip.AddrPortFrom(a, s.v4), tailcfg.EndpointLocal)
		} else if a.Is6() && a.Zone() == "" && s.v6 != 0 {
			add(netip.AddrPortFrom(a, s.v6), tailcfg.EndpointLocal)
		}
	}
	for _, a := range s.local {
		local(a)
	}
	if len(s.local) == 0 { // a host without a network may still have peers on itself
		local(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
		local(netip.IPv6Loopback())
	}
	return out
}

// guess returns where a static mapping would lead to: behind a NAT whose mappings vary by destination, somebody who
// chose the port may have told the router to forward it.
func (s *self) guess() (netip.AddrPort, bool) {
	if s.fixed == 0 || s.fixed != s.v4 {
		return netip.AddrPort{}, false
	}
	var first netip.AddrPort
	for _, ap := range s.public { // one for each mapping that a server has seen
		switch {
		case !ap.Addr().Is4():
		case !first.IsValid():
			first = ap
		default:
			return netip.AddrPortFrom(first.Addr(), s.v4), true
		}
	}
	return netip.AddrPort{}, false
}

// probeSelf starts a round of STUN requests.
func (o *owner) probeSelf(now time.Time) {
	if o.self.begin(now) {
		o.m.stunWant.Store(int32(2 * len(o.self.probes) * (1 + len(resend))))
		o.sendProbes()
	}
}

func (o *owner) sendProbes() {
	for _, p := range o.self.probes {
		if !p.done {
			o.out = stun.AppendRequest(o.out[:0], p.tx)
			o.m.cfg.UDP.Send(p.dst, o.out, len(o.out)) // as good as lost if it fails
		}
	}
}

// tickSelf does what is due for this node's own endpoints.
func (o *owner) tickSelf(now time.Time) {
	s := &o.self
	if due(now, s.settleAt) {
		s.settleAt = time.Time{}
		o.report()
		o.calls(now)
	}
	if due(now, s.endAt) {
		s.endAt = time.Time{}
		o.m.stunWant.Store(0)
		if len(s.answers) == 0 {
			s.silent++
		}
		o.m.noAnswer.Store(s.silent >= silentRounds)
		o.report()
		o.keepFresh(now)
	} else if !s.endAt.IsZero() && s.resent < len(resend) && due(now, s.began.Add(resend[s.resent])) {
		s.resent++
		o.sendProbes()
	}
	if s.endAt.IsZero() && due(now, s.refreshAt) {
		s.refreshAt = time.Time{}
		if o.inSession(now) {
			o.probeSelf(now)
		}
	}
}

// inSession reports whether there is traffic with any peer.
func (o *owner) inSession(now time.Time) bool {
	for _, a := range o.active {
		if a.mc.d.inSession(now) {
			return true
		}
	}
	return false
}

// keepFresh plans the next round, if there is traffic.
func (o *owner) keepFresh(now time.Time) {
	s := &o.self
	if len(s.servers) == 0 || !s.endAt.IsZero() || !s.refreshAt.IsZero() || !o.inSession(now) {
		return
	}
	last := s.began
	s.refreshAt = last.Add(refreshMin + rand.N(refreshSpread))
	if s.refreshAt.Before(now) {
		o.probeSelf(now)
	}
}

// report tells control, by the callback, of endpoints that have changed.
func (o *owner) report() {
	eps := o.self.endpoints()
	if slices.Equal(eps, o.self.told) {
		return
	}
	o.self.told = eps
	if f := o.m.cfg.Endpoints; f != nil {
		f(slices.Clone(eps))
	}
}

// call sends a call-me-maybe to a, once the public endpoints are fresh.
func (o *owner) call(now time.Time, a *active) {
	if o.m.cfg.UDP == nil {
		return
	}
	if !o.self.isFresh(now) {
		o.probeSelf(now)
		if !o.self.settleAt.IsZero() {
			a.wantsCall = true
			return
		}
	}
	o.sendCall(a)
}

// calls sends the call-me-maybes that waited.
func (o *owner) calls(now time.Time) {
	for _, a := range o.active {
		if a.wantsCall {
			a.wantsCall = false
			o.sendCall(a)
		}
	}
}

func (o *owner) sendCall(a *active) {
	if len(o.self.told) == 0 {
		return
	}
	m := disco.CallMeMaybe{Endpoints: make([]netip.AddrPort, len(o.self.told))}
	for i, e := range o.self.told {
		m.Endpoints[i] = e.Addr
	}
	o.plain = m.Append(o.plain[:0])
	o.send(a, via{})
	if f := o.m.cfg.Called; f != nil {
		f(a.p)
	}
}
