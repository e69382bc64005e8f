package peerrelay

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/stun"
)

const (
	// maxProbes bounds the STUN servers that are asked at a time.
	maxProbes = 6
	// A round of STUN requests: they go out again after resend, the answers that have come after settle count once one has
	// come, and after roundEnd what has not come does not.
	resend   = 150 * time.Millisecond
	settle   = 30 * time.Millisecond
	roundEnd = 500 * time.Millisecond
	// freshFor is how long an answer is good for: NATs keep a mapping for 30 s at the least.
	freshFor = 27 * time.Second
	// While there are endpoints the servers are asked again after refreshMin to refreshMin + refreshSpread.
	refreshMin    = 20 * time.Second
	refreshSpread = 6 * time.Second
)

// finder finds out at which addresses the relay can be reached. It does no I/O and reads no clock.
type finder struct {
	fixed  []netip.AddrPort // by the user
	port   uint16           // that the user has chosen, 0: none
	local  []netip.Addr
	v4, v6 uint16 // ports of the sockets
	stun   []netip.AddrPort

	public []netip.AddrPort // as of the last round with an answer
	fresh  time.Time        // when that was

	probes   []probe
	answers  []netip.AddrPort
	resendAt time.Time // zero: done, or no round
	endAt    time.Time // zero: no round
}

type probe struct {
	tx   stun.TxID
	dst  netip.AddrPort
	done bool
}

func (f *finder) usable(ap netip.AddrPort) bool {
	a := ap.Addr()
	return a.IsValid() && ap.Port() != 0 && !a.IsUnspecified() && !a.IsMulticast() && (a.Is4() && f.v4 != 0 || a.Is6() && f.v6 != 0)
}

// begin starts a round unless one is in progress, and reports whether there are requests to send.
func (f *finder) begin(now time.Time) bool {
	if !f.endAt.IsZero() {
		return false
	}
	f.probes, f.answers = f.probes[:0], nil
	for _, ap := range f.stun {
		if f.usable(ap) && len(f.probes) < maxProbes {
			f.probes = append(f.probes, probe{tx: stun.NewTxID(), dst: ap})
		}
	}
	if len(f.probes) == 0 {
		f.fresh = now // as good as it gets; and the next refresh must not be due at once
		return false
	}
	f.resendAt, f.endAt = now.Add(resend), now.Add(roundEnd)
	return true
}

// answer takes a STUN response. One that answers none of the requests is ignored.
func (f *finder) answer(now time.Time, src netip.AddrPort, pkt []byte) {
	tx, addr, err := stun.ParseResponse(pkt)
	if err != nil || f.endAt.IsZero() {
		return
	}
	open, found := 0, false
	for i := range f.probes {
		if p := &f.probes[i]; !p.done && p.tx == tx && p.dst == src {
			p.done, found = true, true
		} else if !p.done {
			open++
		}
	}
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	if !found || !f.usable(addr) {
		return
	}
	if !slices.Contains(f.answers, addr) {
		f.answers = append(f.answers, addr)
	}
	if t := now.Add(settle); t.Before(f.endAt) {
		f.endAt = t
	}
	if open == 0 {
		f.endAt = now
	}
}

// finish ends the round that is due. One without an answer leaves what was known.
func (f *finder) finish(now time.Time) {
	f.endAt, f.resendAt = time.Time{}, time.Time{}
	if len(f.answers) > 0 {
		f.public, f.answers = f.answers, nil
	}
	f.fresh = now
}

// isFresh reports whether the addresses are as good as they get.
func (f *finder) isFresh(now time.Time) bool {
	return len(f.stun) == 0 || f.endAt.IsZero() && !f.fresh.IsZero() && now.Sub(f.fresh) < freshFor
}

// refreshAt returns when the next round is due while there are endpoints, zero for never.
func (f *finder) refreshAt() time.Time {
	if len(f.stun) == 0 || f.fresh.IsZero() || !f.endAt.IsZero() {
		return time.Time{}
	}
	return f.fresh.Add(refreshMin + rand.N(refreshSpread))
}

// addrs lists where the relay can be reached, at most as many as a message's reader takes.
func (f *finder) addrs() []netip.AddrPort {
	var out []netip.AddrPort
	add := func(ap netip.AddrPort) {
		if f.usable(ap) && len(out) < disco.MaxEndpoints && !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	for _, ap := range f.fixed {
		add(netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
	}
	for _, ap := range f.public {
		add(ap)
	}
	for i, ap := range f.public {
		// A NAT whose mapping depends on the destination: the port that was chosen may have been forwarded on it.
		if f.port != 0 && ap.Addr().Is4() && slices.ContainsFunc(f.public[:i], func(x netip.AddrPort) bool { return x.Addr() == ap.Addr() }) {
			add(netip.AddrPortFrom(ap.Addr(), f.port))
		}
	}
	local := func(a netip.Addr) {
		if a = a.Unmap(); a.Is4() {
			add(netip.AddrPortFrom(a, f.v4))
		} else if a.Zone() == "" && !a.IsLinkLocalUnicast() {
			add(netip.AddrPortFrom(a, f.v6))
		}
	}
	for _, a := range f.local {
		local(a)
	}
	if len(out) == 0 { // a host without a network may still relay for itself
		local(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
		local(netip.IPv6Loopback())
	}
	return out
}
