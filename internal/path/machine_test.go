package path

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// FuzzMachine drives a machine with any sequence of events and holds it to its bounds.
func FuzzMachine(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte{3, 200, 0, 9, 1, 5, 9, 9, 9, 2, 6, 7, 9, 4, 9, 9, 8})
	f.Add([]byte{4, 40, 1, 0, 2, 0, 2, 1, 9, 1, 9, 255, 1, 1, 9, 99, 5, 0})
	f.Add([]byte{1, 0, 11, 129, 12, 0, 2, 200, 9, 10, 13, 0, 2, 255, 9, 100, 11, 145, 9, 200, 8, 0, 9, 200})
	f.Add([]byte{3, 2, 1, 0, 2, 0, 10, 40, 2, 0, 2, 0, 10, 40, 9, 4, 10, 30, 9, 1, 2, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		script = script[:min(len(script), 400)]
		now := time.Unix(1e9, 0)
		var n uint64
		mc := newMachine(now, func() (tx disco.TxID) {
			n++
			binary.BigEndian.PutUint64(tx[:], n)
			return tx
		})
		var reqs []*pingRequest
		addr := func(b byte) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, b}), uint16(b))
		}
		for len(script) >= 2 {
			op, x := script[0], script[1]
			script = script[2:]
			switch op % 15 {
			case 0:
				req := &pingRequest{pad: int(x), done: make(chan PingResult, 1)}
				reqs = append(reqs, req)
				mc.ping(now, req)
			case 1:
				mc.sending(now, now.Add(-time.Duration(x)*20*time.Millisecond))
			case 2: // a pong to one of the pings in flight
				if len(mc.sent) > 0 {
					s := mc.sent[int(x)%len(mc.sent)]
					from := s.to
					if !from.addr.IsValid() {
						from.region = 1
					}
					if rtt := mc.gotPong(now, from, &disco.Pong{TxID: s.tx}); rtt <= 0 {
						t.Fatal("a pong in time is not taken")
					}
					if mc.gotPong(now, from, &disco.Pong{TxID: s.tx}) != 0 {
						t.Fatal("a pong counts twice")
					}
				}
			case 3:
				eps := make([]netip.AddrPort, 0, x)
				for i := range x {
					eps = append(eps, addr(i))
				}
				mc.endpoints(now, eps)
			case 4:
				mc.callMeMaybe(now, []netip.AddrPort{addr(x), addr(x + 1)})
			case 5:
				mc.gotPing(now, via{addr: addr(x)}, addr(x), &disco.Ping{})
			case 6:
				mc.gotPing(now, via{region: 1}, addr(x), &disco.Ping{})
			case 7:
				if len(reqs) > 0 {
					mc.cancel(reqs[int(x)%len(reqs)])
				}
			case 8:
				mc.changed(now)
			case 10:
				mc.bulk(now, int(x)*40)
			case 11: // an endpoint on one of a few relays, ours or the peer's
				ep := disco.RelayEndpoint{VNI: uint32(x % 5), LamportID: uint64(x / 16), BindLifetime: time.Duration(x) * time.Second,
					Addrs: []netip.AddrPort{addr(x), addr(x + 1)}}
				ep.Server = key.DiscoPublicFromRaw([32]byte{x % 16})
				mc.relayEndpoint(now, &ep, x >= 128)
			case 12: // a relay's challenge
				if n := len(mc.r.shakes); n > 0 {
					s := mc.r.shakes[int(x)%n]
					mc.challenged(now, s, addr(x), [disco.ChallengeLen]byte{x})
				}
			case 13: // a ping by a relay
				if n := len(mc.r.shakes); n > 0 {
					h := mc.r.shakes[int(x)%n].hop()
					mc.gotPing(now, via{addr: h.addr, vni: h.vni}, h.addr, &disco.Ping{})
				}
			case 14:
				mc.relayed(now)
			case 9:
				now = now.Add(time.Duration(x) * 50 * time.Millisecond)
				for range 3 {
					mc.tick(now)
				}
				if next := mc.next(); !next.After(now) && !mc.idle(now) {
					t.Fatalf("wants a tick %v ago, right after one", now.Sub(next))
				}
			}
			routes, shakes := 0, 0
			for _, a := range mc.acts {
				switch a.kind {
				case pingAnswer:
					select {
					case a.req.done <- a.result:
					default:
						t.Fatal("a ping is answered twice")
					}
				case shaking:
					shakes++
				case setRoute:
					routes++
					if a.to.addr.IsValid() && !a.until.After(now) {
						t.Fatal("a path that may not be used any more")
					}
				}
			}
			mc.acts = mc.acts[:0]
			if len(mc.sent) > maxSent || len(mc.d.cands) > 2*maxListed+maxObserved+maxShakes+1 || len(mc.r.shakes) > maxShakes || shakes > 1 {
				t.Fatalf("%d pings and %d candidates", len(mc.sent), len(mc.d.cands))
			}
			if mc.d.best.IsValid() && mc.d.find(mc.d.best) == nil {
				t.Fatal("the path in use is not a candidate")
			}
		}
	})
}
