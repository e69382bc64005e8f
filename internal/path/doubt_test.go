package path

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

var doubtAddr = netip.MustParseAddrPort("192.0.2.1:7")

// directMachine returns a machine with a direct path of 10 ms and nothing left to do, and the time.
func directMachine(t *testing.T) (*machine, time.Time) {
	t.Helper()
	now := time.Unix(1e9, 0)
	var n uint64
	mc := newMachine(now, func() (tx disco.TxID) {
		n++
		binary.BigEndian.PutUint64(tx[:], n)
		return tx
	})
	mc.endpoints(now, []netip.AddrPort{doubtAddr})
	mc.sending(now, time.Time{})
	tx := mc.sent[0].tx
	now = now.Add(10 * time.Millisecond)
	mc.gotPong(now, via{addr: doubtAddr}, &disco.Pong{TxID: tx})
	if !mc.d.trusted(now) {
		t.Fatal("no direct path")
	}
	mc.acts = nil
	return mc, now
}

// take returns the kinds of the actions since the last call.
func take(mc *machine) (kinds []actionKind) {
	for _, a := range mc.acts {
		kinds = append(kinds, a.kind)
	}
	mc.acts = nil
	return kinds
}

func want(t *testing.T, mc *machine, kinds ...actionKind) {
	t.Helper()
	if got := take(mc); !slices.Equal(got, kinds) {
		t.Fatalf("actions %v, want %v", got, kinds)
	}
}

func TestUnansweredDataRaisesADoubt(t *testing.T) {
	mc, now := directMachine(t)
	mc.sending(now, time.Time{})
	want(t, mc)
	mc.tick(now.Add(suspectAfter - 1))
	want(t, mc)
	now = now.Add(suspectAfter)
	mc.tick(now)
	want(t, mc, sendPing, doubt)
	mc.tick(now.Add(suspectWait))
	want(t, mc, setRoute, sendPing, sendCall)
	if mc.d.best.IsValid() {
		t.Error("the path is still in use")
	}
}

func TestAnsweredDataRaisesNone(t *testing.T) {
	mc, now := directMachine(t)
	mc.sending(now, time.Time{})
	now = now.Add(suspectAfter)
	mc.dataHeard(now.Add(-50 * time.Millisecond))
	mc.tick(now)
	want(t, mc)
}

// TestPongsTeachPatience: a peer that never sends anything is not pinged every third of a second.
func TestPongsTeachPatience(t *testing.T) {
	mc, now := directMachine(t)
	pings := 0
	for end := now.Add(20 * time.Second); now.Before(end); now = now.Add(10 * time.Millisecond) {
		mc.sending(now, time.Time{})
		mc.tick(now)
		for _, a := range mc.acts {
			if a.kind == sendPing {
				pings++
				mc.gotPong(now, via{addr: doubtAddr}, &disco.Pong{TxID: a.tx})
			}
		}
		mc.acts = nil
	}
	if pings > 25 {
		t.Errorf("%d pings in 20 s", pings)
	}
}

// TestSilenceIsLookedInto: a receiver whose sender falls silent asks once whether the path is still there.
func TestSilenceIsLookedInto(t *testing.T) {
	mc, now := directMachine(t)
	now = now.Add(time.Second)
	mc.sending(now, now)
	take(mc)
	now = now.Add(quietAfter)
	mc.dataHeard(now.Add(-quietAfter / 2))
	mc.tick(now)
	want(t, mc)
	now = now.Add(quietAfter / 2)
	mc.tick(now)
	want(t, mc, sendPing, doubt)
	tx := mc.sent[len(mc.sent)-1].tx
	mc.gotPong(now, via{addr: doubtAddr}, &disco.Pong{TxID: tx})
	take(mc)
	mc.tick(now.Add(time.Second))
	want(t, mc)
}

// TestPeerOnTheRelay: a peer that sends by the relay, or calls, although we reach it directly, is helped to find the
// path, and ours is looked at.
func TestPeerOnTheRelay(t *testing.T) {
	mc, now := directMachine(t)
	mc.relayed(now)
	want(t, mc, sendPing, doubt, sendCall)
	mc.relayed(now.Add(askBack / 2))
	want(t, mc)

	mc, now = directMachine(t)
	other := netip.MustParseAddrPort("192.0.2.2:8")
	mc.callMeMaybe(now, []netip.AddrPort{other})
	want(t, mc, sendPing, doubt, sendPing, sendPing)
}

// TestPingIsMetAtOnce: a ping shows that the peer's NAT now lets ours in, even if we have just tried.
func TestPingIsMetAtOnce(t *testing.T) {
	mc, now := directMachine(t)
	mc.distrust(now)
	take(mc)
	now = now.Add(5 * time.Millisecond)
	mc.gotPing(now, via{addr: doubtAddr}, doubtAddr, &disco.Ping{})
	want(t, mc, sendPong, sendPing)
	mc.gotPing(now.Add(pingBack/2), via{addr: doubtAddr}, doubtAddr, &disco.Ping{})
	want(t, mc, sendPong)
}

type countingUDP struct{ n int }

func (u *countingUDP) Send(netip.AddrPort, []byte, int) error { u.n++; return nil }
func (u *countingUDP) Ports() (v4, v6 uint16)                 { return 7, 0 }

// TestDoubtSendsBoth: while a path is in doubt data goes both ways, and a relay's failure then does not count.
func TestDoubtSendsBoth(t *testing.T) {
	r, u := &fakeRelay{}, &countingUDP{}
	m, err := New(Config{NodeKey: key.NewNode().Public(), DiscoKey: key.NewDisco(), Relay: r, UDP: u, NewSink: func() Sink { return &nullSink{} }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	p := &Peer{m: m}
	p.info.Store(&PeerInfo{})
	p.told.Store(m.now() + int64(time.Hour)) // the owner need not hear of this
	p.home.Store(1)
	p.route.Store(&route{hop: hop{addr: doubtAddr}, until: m.now() + int64(time.Hour), since: time.Now()})
	for _, tt := range []struct {
		name       string
		doubt      time.Duration
		err        error
		udp, relay int
	}{
		{"no doubt", -1, nil, 1, 0},
		{"doubt", time.Minute, nil, 1, 1},
		{"doubt, and the relay fails", time.Minute, ErrNoPath, 1, 1},
	} {
		u.n, r.n, r.err = 0, 0, tt.err
		p.doubt.Store(m.now() + int64(tt.doubt))
		if err := p.Send(wgPacket(64), 64); err != nil || u.n != tt.udp || r.n != tt.relay {
			t.Errorf("%s: %v, %d by UDP, %d by the relay", tt.name, err, u.n, r.n)
		}
	}
}
