package path

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// sizedPath is a machine with a direct path that carries messages of up to carries bytes, and takes 10 ms.
type sizedPath struct {
	t       *testing.T
	mc      *machine
	now     time.Time
	limit   int // that the host knows of
	carries int
	lose    int // pings to lose, whatever their size

	size  int // in force
	pings int // padded ones, so far
	least int // smallest size in force since it was last reset
	pongs []pongAt
}

type pongAt struct {
	at time.Time
	tx disco.TxID
}

func newSizedPath(t *testing.T, limit, carries int) *sizedPath {
	mc, now := directMachine(t)
	return &sizedPath{t: t, mc: mc, now: now, limit: limit, carries: carries}
}

// run lets d pass, with bulk traffic that is answered, or without any.
func (s *sizedPath) run(d time.Duration, bulk bool) {
	const step = 10 * time.Millisecond
	told := time.Time{}
	for end := s.now.Add(d); s.now.Before(end); s.now = s.now.Add(step) {
		for len(s.pongs) > 0 && !s.pongs[0].at.After(s.now) {
			s.mc.gotPong(s.now, via{addr: doubtAddr}, &disco.Pong{TxID: s.pongs[0].tx})
			s.pongs = s.pongs[1:]
		}
		s.mc.sending(s.now, s.now)
		if bulk && s.now.Sub(told) >= bulkEvery {
			told = s.now
			s.mc.bulk(s.now, s.limit)
		}
		s.mc.tick(s.now)
		acts := s.mc.acts
		s.mc.acts = nil
		for _, a := range acts {
			switch a.kind {
			case sendPing:
				if a.pad > 0 {
					s.pings++
				}
				switch {
				case a.pad > 0 && s.lose > 0:
					s.lose--
				case pingSize+a.pad <= s.carries:
					s.pongs = append(s.pongs, pongAt{s.now.Add(step), a.tx})
				}
			case setRoute:
				if a.to.addr != doubtAddr {
					s.t.Fatal("the path is lost")
				}
				s.size = a.size
				s.least = min(s.least, a.size)
			}
		}
	}
}

func TestPathSize(t *testing.T) {
	for _, tc := range []struct {
		name           string
		limit, carries int
		want           int
		pings          int // at most
	}{
		{"Ethernet", 1472, 1472, 1472, 3},
		{"PPPoE behind Ethernet", 1472, 1464, 1464, 11},
		{"a cloud of 1460", 1472, 1432, 1432, 11},
		{"1400", 1472, 1372, 1372, 11},
		{"1399", 1472, 1371, 1352, 11},
		{"nothing beyond the base", 1472, 1312, 0, 11},
		{"not even the base", 1472, 1000, 0, 11},
		{"jumbo frames", 8972, 8972, 8972, 3},
		{"jumbo frames on the first link alone", 8972, 1472, 1472, 11},
		{"loopback", 65507, 65507, MaxPingSize, 3},
		{"the host knows of 1400", 1372, 1372, 1372, 2},
		{"the host's link has 1300", 1272, 1272, 0, 0},
		{"a host that knows nothing", 0, 1472, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSizedPath(t, tc.limit, tc.carries)
			s.run(5*time.Second, false)
			if s.pings != 0 {
				t.Fatalf("%d padded pings without bulk traffic", s.pings)
			}
			s.run(bulkEvery+sizeWait, true)
			if s.size != tc.want {
				t.Errorf("size %d, want %d", s.size, tc.want)
			}
			if s.pings > tc.pings {
				t.Errorf("%d pings, want %d at most", s.pings, tc.pings)
			}
			before := s.pings
			s.run(time.Minute, true)
			if s.size != tc.want {
				t.Errorf("size %d a minute later, want %d", s.size, tc.want)
			}
			if n := s.pings - before; n > 121 || tc.want == 0 && n > 0 {
				t.Errorf("%d pings in a minute of bulk traffic", n)
			}
			before = s.pings
			s.run(time.Minute, false)
			if s.pings > before+1 {
				t.Errorf("%d pings in a minute without", s.pings-before)
			}
		})
	}
}

// TestBlackHole: a path that stops to carry what it carried is found out by the next check, and data is cut
// shorter before it is known what still passes.
func TestBlackHole(t *testing.T) {
	s := newSizedPath(t, 1472, 1472)
	s.run(3*time.Second, true)
	if s.size != 1472 {
		t.Fatal(s.size)
	}
	s.carries, s.least = 1372, s.size
	s.run(bulkEvery+sizeWait+50*time.Millisecond, true)
	if s.least != 0 || s.size != 1372 {
		t.Errorf("size %d by way of %d, want 1372 by way of 0", s.size, s.least)
	}
	before := s.pings
	s.carries = 1472
	s.run(shrunkAgain+time.Second, true)
	if s.size != 1472 {
		t.Errorf("size %d after the path has recovered", s.size)
	}
	if n := s.pings - before; n > 150 {
		t.Errorf("%d pings", n)
	}
}

// TestSilenceChecksTheSize: where nothing comes back at all, silence raises a doubt first, and the check comes with it.
func TestSilenceChecksTheSize(t *testing.T) {
	s := newSizedPath(t, 1472, 1472)
	s.run(time.Second, true)
	s.carries = 1400
	now := s.now
	s.mc.acts = nil
	s.mc.sending(now, now.Add(-time.Second))
	now = now.Add(suspectAfter)
	s.mc.tick(now)
	var padded, plain int
	for _, a := range s.mc.acts {
		if a.kind == sendPing && a.pad > 0 {
			padded++
		} else if a.kind == sendPing {
			plain++
		}
	}
	if padded != 1 || plain != 1 {
		t.Errorf("%d padded and %d plain pings, want one each", padded, plain)
	}
}

// TestLostCheck: one lost ping costs a round trip at the base size.
func TestLostCheck(t *testing.T) {
	s := newSizedPath(t, 1472, 1472)
	s.run(time.Second, true)
	s.lose, s.least = 1, s.size
	s.run(bulkEvery+sizeWait+50*time.Millisecond, true)
	if s.least != 0 || s.size != 1472 {
		t.Errorf("size %d by way of %d", s.size, s.least)
	}
}

// TestLostGuess: both first pings lost, the second time they arrive.
func TestLostGuess(t *testing.T) {
	s := newSizedPath(t, 1472, 1472)
	s.lose = 2
	s.run(bulkEvery+100*time.Millisecond, true)
	if s.size != 1472 {
		t.Errorf("size %d", s.size)
	}
}

// TestHostLearnsOfASmallerLink: what an ICMP message has told the host counts at once.
func TestHostLearnsOfASmallerLink(t *testing.T) {
	s := newSizedPath(t, 1472, 1472)
	s.run(time.Second, true)
	s.limit, s.carries = 1352, 1352
	s.run(bulkEvery+30*time.Millisecond, true)
	if s.size != 1352 {
		t.Errorf("size %d", s.size)
	}
}

// sizedWire is a wire whose host knows how much leaves it whole.
type sizedWire struct {
	wire
	max int
}

func (w *sizedWire) MaxPayload(netip.AddrPort) int { return w.max }

// TestLatePongOfFragments: a ping that was answered because the host had learned to send it in fragments says nothing, however late
// the answer comes.
func TestLatePongOfFragments(t *testing.T) {
	for _, late := range []time.Duration{0, 2 * sizeWait} {
		me, d, u := key.NewDisco(), key.NewDisco(), &sizedWire{max: 1472}
		o := newOwner(t, me, u)
		now := time.Now()
		p := o.m.UpsertPeer(PeerInfo{Key: key.NewNode().Public(), Disco: d.Public(), HomeRegion: 1, Endpoints: []netip.AddrPort{doubtAddr}})
		a, sh := o.get(now, p), d.Shared(me.Public())
		pong := func(s sentPing) {
			m := disco.Pong{TxID: s.tx, Src: doubtAddr}
			p.queued.Add(1)
			o.handle(now, event{kind: evDisco, p: p, src: Source{Addr: doubtAddr}, pkt: disco.Seal(nil, d.Public(), &sh, m.Append(nil))})
		}
		a.mc.sending(now, time.Time{})
		pong(a.mc.sent[0])
		a.mc.bulk(now, o.sizeLimit(a))
		o.run(now, a)
		i := slices.IndexFunc(a.mc.sent, func(s sentPing) bool { return s.size > 1272 && s.size < 1472 })
		if i < 0 {
			t.Fatal("no padded ping")
		}
		s := a.mc.sent[i]
		u.max = 1272 // an ICMP message has come
		now = now.Add(late)
		a.mc.tick(now)
		pong(s)
		if a.mc.size.size != 0 {
			t.Errorf("after %v: size %d, of which the host sends %d at a time", late, a.mc.size.size, u.max)
		}
	}
}

// TestSizeIsOfThePath: another path starts from the base.
func TestSizeIsOfThePath(t *testing.T) {
	s := newSizedPath(t, 1472, 1472)
	s.run(time.Second, true)
	s.mc.changed(s.now)
	s.mc.acts = nil
	other := netip.MustParseAddrPort("192.0.2.9:9")
	s.mc.endpoints(s.now, []netip.AddrPort{other})
	s.mc.acts = nil
	s.mc.startRounds(s.now)
	var tx disco.TxID
	for _, p := range s.mc.sent {
		if p.to.addr == other {
			tx = p.tx
		}
	}
	s.mc.gotPong(s.now.Add(time.Millisecond), via{addr: other}, &disco.Pong{TxID: tx})
	for _, a := range s.mc.acts {
		if a.kind == setRoute && a.to.addr == other && a.size != 0 {
			t.Errorf("size %d before it was tried", a.size)
		}
	}
}

func TestIsBulk(t *testing.T) {
	var p Peer
	at := func(d time.Duration) int64 { return int64(d) + 1 }
	for i := range 20 { // 12 KB a second
		if p.isBulk(at(time.Duration(i)*200*time.Millisecond), 2400) {
			t.Fatal("a trickle is taken for bulk")
		}
	}
	n := 0
	for i := range 100 { // as acknowledgements let it go
		if p.isBulk(at(10*time.Second+time.Duration(i)*time.Millisecond), 2400) {
			n++
		}
	}
	if n < 70 {
		t.Errorf("2.4 MB/s were taken for bulk %d times of 100", n)
	}
}

func TestRouteCarries(t *testing.T) {
	for _, tc := range []struct {
		size, n int
		want    bool
	}{{0, baseMessage, true}, {0, baseMessage + 1, false}, {1472, 1472, true}, {1472, 1473, false}, {0, 148, true}} {
		if got := (&route{size: tc.size}).carries(tc.n); got != tc.want {
			t.Errorf("size %d, message of %d: %v", tc.size, tc.n, got)
		}
	}
}
