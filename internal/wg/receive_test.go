package wg

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// TestBadMessages gives a device with a live session and a pending handshake what it must refuse.
func TestBadMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		a.peer.Send(src(ip4(100, 1)))
		data := a.out.take()[0]
		stranger := newDevice(t, nil)
		sw := new(wire)
		sp, _ := stranger.AddPeer(b.dev.Public(), sw, nil)
		sp.Rekey()
		foreign := sw.take()[0]
		cut := func(m []byte, n int) []byte { return bytes.Clone(m[:n]) }
		set := func(m []byte, at int, v byte) []byte { m = bytes.Clone(m); m[at] = v; return m }
		for _, tc := range []struct {
			name string
			msg  []byte
			want error
		}{
			{"empty", nil, ErrMalformed},
			{"one byte", []byte{4}, ErrMalformed},
			{"shorter than a tag", cut(data, 31), ErrMalformed},
			{"type 0", set(data, 0, 0), ErrMalformed},
			{"type 5", set(data, 0, 5), ErrMalformed},
			{"reserved bytes", set(data, 2, 1), ErrMalformed},
			{"short initiation", cut(foreign, 147), ErrMalformed},
			{"long initiation", append(cut(foreign, 148), 0), ErrMalformed},
			{"data as a response", append([]byte{2, 0, 0, 0}, make([]byte, 88)...), ErrUnknownIndex},
			{"short response", append([]byte{2, 0, 0, 0}, make([]byte, 87)...), ErrMalformed},
			{"cookie for nothing", append([]byte{3, 0, 0, 0}, make([]byte, 60)...), ErrUnknownIndex},
			{"long cookie", append([]byte{3, 0, 0, 0}, make([]byte, 61)...), ErrMalformed},
			{"unknown index", set(data, 5, data[5]^1), ErrUnknownIndex},
			{"cut short", cut(data, len(data)-1), ErrAuth},
			{"nothing but a tag", cut(data, 32), ErrAuth},
			{"counter changed", set(data, 8, data[8]^64), ErrAuth},
			{"counter at its end", append(append(cut(data, 8), bytes.Repeat([]byte{255}, 8)...), data[16:]...), ErrExpired},
			{"stranger", foreign, ErrUnknownPeer},
			{"mac1 wrong", set(foreign, iMAC1, foreign[iMAC1]^1), ErrAuth},
		} {
			if pkt, p, err := b.dev.Receive(nil, tc.msg, nil); !errors.Is(err, tc.want) || pkt != nil || p != nil {
				t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
			}
		}
		if got := b.give(t, data); len(got) != 1 {
			t.Error("the session did not survive")
		}
	})
}

// TestForgedHandshakes changes every byte of both handshake messages, MACs made anew where the
// attacker can make them.
func TestForgedHandshakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		a.dev.t.firstRetry, a.dev.t.rekeyTimeout = int64(time.Hour), int64(time.Hour) // this one initiation is what it is about
		a.peer.Rekey()
		init := a.out.take()[0]
		apub, bpub := a.dev.Public().Raw(), b.dev.Public().Raw()
		for i := range iMAC1 {
			b.dev.gate.free = 0
			m := bytes.Clone(init)
			m[i] ^= 4
			putMACs(m, &bpub, nil)
			_, p, err := b.dev.Receive(nil, m, nil)
			switch {
			case i < 4:
				if !errors.Is(err, ErrMalformed) {
					t.Errorf("initiation byte %d: %v", i, err)
				}
			case i >= iSender && i < iEphemeral:
				// Only the AEADs are authenticated; the index is bound by the response's use of it. Such
				// an initiation is as good as the true one, and its response goes to the wrong index.
				if err != nil || p == nil {
					t.Errorf("initiation byte %d: %v", i, err)
				}
				b.peer.lastStamp = timestamp{}
				b.peer.lastInitRx = 0
			default:
				if !errors.Is(err, ErrAuth) {
					t.Errorf("initiation byte %d: %v", i, err)
				}
			}
		}
		b.out.take()
		b.give(t, bytes.Clone(init))
		b.dev.gate.free = 0
		if _, _, err := b.dev.Receive(nil, bytes.Clone(init), nil); !errors.Is(err, ErrReplay) {
			t.Errorf("replayed initiation: %v", err)
		}
		resp := b.out.take()[0]
		for i := range rMAC1 {
			if i >= rSender && i < rReceiver {
				continue // not authenticated by itself: the session it makes reaches nobody
			}
			m := bytes.Clone(resp)
			m[i] ^= 4
			putMACs(m, &apub, nil)
			a.peer.hs.bad = 0
			_, _, err := a.dev.Receive(nil, m, nil)
			want := ErrAuth
			switch {
			case i < 4:
				want = ErrMalformed
			case i < rEphemeral:
				want = ErrUnknownIndex
			}
			if !errors.Is(err, want) {
				t.Errorf("response byte %d: %v, want %v", i, err, want)
			}
		}
		a.give(t, resp)
		if _, _, err := a.dev.Receive(nil, bytes.Clone(resp), nil); !errors.Is(err, ErrUnknownIndex) {
			t.Errorf("replayed response: %v", err)
		}
	})
}

func TestForgedResponsesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		a.peer.Rekey()
		b.give(t, a.out.take()...)
		good := b.out.take()[0]
		bad := bytes.Clone(good)
		bad[rEphemeral] ^= 1
		apub := a.dev.Public().Raw()
		putMACs(bad, &apub, nil)
		for range maxBadResponses {
			if _, _, err := a.dev.Receive(nil, bytes.Clone(bad), nil); !errors.Is(err, ErrAuth) {
				t.Fatal(err)
			}
		}
		if _, _, err := a.dev.Receive(nil, good, nil); !errors.Is(err, ErrUnknownIndex) {
			t.Errorf("worked on one more: %v", err)
		}
	})
}

func TestPlaintextMustBeIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		v4 := func(total int) []byte { p := ip4(64, 1); p[2], p[3] = byte(total>>8), byte(total); return p }
		for _, tc := range []struct {
			name string
			pkt  []byte
			want int // length, or 0 for an error
		}{
			{"IPv4", ip4(64, 1), 64},
			{"IPv4 with padding inside", v4(50), 50},
			{"IPv4 longer than the message", v4(65), 0},
			{"IPv4 shorter than its header", v4(19), 0},
			{"IPv6", ip6(64), 64},
			{"IPv6 too short", ip6(48)[:32], 0},
			{"version 5", append([]byte{0x50}, make([]byte, 63)...), 0},
			{"zeros", make([]byte, 64), 0},
			{"one byte", []byte{0x45}, 0},
		} {
			a.peer.Send(src(tc.pkt))
			pkt, p, err := b.dev.Receive(nil, a.out.take()[0], nil)
			if tc.want == 0 {
				if !errors.Is(err, ErrMalformed) || pkt != nil || p != nil {
					t.Errorf("%s: %v", tc.name, err)
				}
			} else if err != nil || len(pkt) != tc.want {
				t.Errorf("%s: %d bytes, %v", tc.name, len(pkt), err)
			}
		}
	})
}

func TestDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		want := ip4(100, 7)
		next := func(head, tail int) []byte {
			a.peer.Send(src(want))
			m := a.out.take()[0]
			return append(append(make([]byte, head), m...), make([]byte, tail)...)[head : head+len(m)]
		}
		for _, tc := range []struct {
			name string
			dst  func(m []byte) []byte
			own  bool // the plaintext lies in dst
		}{
			{"nil", func(m []byte) []byte { return nil }, false},
			{"the message", func(m []byte) []byte { return m }, false},
			{"its payload", func(m []byte) []byte { return m[16:] }, false},
			{"its middle", func(m []byte) []byte { return m[20:] }, false},
			{"elsewhere", func(m []byte) []byte { return make([]byte, 112) }, true},
			{"elsewhere and longer", func(m []byte) []byte { return make([]byte, 2000) }, true},
		} {
			m := next(32, 32)
			dst := tc.dst(m)
			got, _, err := b.dev.Receive(dst, m, nil)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %v", tc.name, err)
				continue
			}
			if tc.own && &got[0] != &dst[0] || !tc.own && &got[0] != &m[16] {
				t.Errorf("%s: the packet lies elsewhere", tc.name)
			}
		}
		m := next(0, 0)
		if _, _, err := b.dev.Receive(make([]byte, 111), m, nil); !errors.Is(err, ErrShortBuffer) {
			t.Errorf("short: %v", err)
		}
		big := make([]byte, 300)
		for i := range big {
			big[i] = 0xee
		}
		if _, _, err := b.dev.Receive(big[:112], m, nil); err != nil {
			t.Errorf("after a short buffer: %v", err)
		}
		if !bytes.Equal(big[112:], bytes.Repeat([]byte{0xee}, 188)) {
			t.Error("wrote past dst")
		}
	})
}

func TestPresharedKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		psk := [32]byte{1, 2, 3}
		a, b := newPair(t, nil)
		a.peer.SetPresharedKey(psk)
		a.peer.Rekey()
		b.give(t, a.out.take()...)
		if _, _, err := a.dev.Receive(nil, b.out.take()[0], nil); !errors.Is(err, ErrAuth) {
			t.Errorf("with a key on one side only: %v", err)
		}
		a, b = newPair(t, nil)
		a.peer.SetPresharedKey(psk)
		b.peer.SetPresharedKey(psk)
		connect(t, a, b)
	})
}

// sourced is a Conduit that says where it leads.
type sourced struct {
	wire
	src string
}

func (s *sourced) AppendSource(b []byte) []byte { return append(b, s.src...) }

func TestCookieUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		b.dev.gate.alwaysLoad = true
		reply := &sourced{src: "192.0.2.1:7"}
		a.peer.Rekey()
		init := a.out.take()[0]
		if _, _, err := b.dev.Receive(nil, bytes.Clone(init), nil); !errors.Is(err, ErrLoad) {
			t.Fatalf("under load: %v", err)
		}
		if _, _, err := b.dev.Receive(nil, init, reply); !errors.Is(err, ErrLoad) {
			t.Fatalf("under load: %v", err)
		}
		if len(b.out.msgs) != 0 || len(reply.msgs) != 1 {
			t.Fatal("want a cookie, by way of reply")
		}
		cookie := reply.take()[0]
		bad := bytes.Clone(cookie)
		bad[40] ^= 1
		if _, _, err := a.dev.Receive(nil, bad, nil); !errors.Is(err, ErrAuth) {
			t.Errorf("forged cookie: %v", err)
		}
		a.give(t, bytes.Clone(cookie))
		if _, _, err := a.dev.Receive(nil, cookie, nil); err == nil {
			t.Error("a cookie was taken twice")
		}
		a.peer.meet.next.Store(0)
		a.peer.Rekey()
		init = a.out.take()[0]
		if _, _, err := b.dev.Receive(nil, bytes.Clone(init), &sourced{src: "192.0.2.9:7"}); !errors.Is(err, ErrLoad) {
			t.Errorf("a cookie from another source: %v", err)
		}
		if _, p, err := b.dev.Receive(nil, init, reply); err != nil || p != b.peer {
			t.Fatalf("with the cookie: %v", err)
		}
		a.give(t, b.out.take()...)
		b.give(t, a.out.take()...)
		if !b.peer.HasSession() {
			t.Error("no session")
		}
		if s := b.dev.Stats(); s != (DeviceStats{Peers: 1, Sessions: 1, Handshakes: 1, Cookies: 3}) {
			t.Errorf("%+v", s)
		}
	})
}

func TestHandshakedHook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var done [2][]*Peer
		i := 0
		a, b := newPair(t, func(c *Config) {
			n := i
			i++
			c.Handshaked = func(p *Peer) { done[n] = append(done[n], p) }
		})
		connect(t, a, b)
		if len(done[0]) != 1 || done[0][0] != a.peer || len(done[1]) != 1 || done[1][0] != b.peer {
			t.Errorf("%d and %d calls", len(done[0]), len(done[1]))
		}
		st := a.peer.Stats()
		if st.LastHandshake.IsZero() || st.LastReceive.IsZero() || st.TxBytes != 148+32 || st.RxBytes != 92 {
			t.Errorf("%+v", st)
		}
		if st := (&Peer{dev: a.dev, pub: key.NodePublic{}}).Stats(); !st.LastHandshake.IsZero() || !st.LastReceive.IsZero() {
			t.Errorf("%+v", st)
		}
	})
}
