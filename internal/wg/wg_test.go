package wg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/key"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A wire is a Conduit that keeps what it is given, in order, one entry per message.
type wire struct {
	mu      sync.Mutex
	msgs    [][]byte
	batches []batch
}

type batch struct{ n, seg int }

func (w *wire) Send(b []byte, seg int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.batches = append(w.batches, batch{len(b), seg})
	for len(b) > 0 {
		n := min(seg, len(b))
		w.msgs = append(w.msgs, bytes.Clone(b[:n]))
		b = b[n:]
	}
	return nil
}

func (w *wire) take() [][]byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.msgs
	w.msgs, w.batches = nil, nil
	return m
}

// packets is a Source.
type packets [][]byte

func (s *packets) Next(dst []byte) int {
	if len(*s) == 0 {
		return 0
	}
	n := copy(dst, (*s)[0])
	*s = (*s)[1:]
	return n
}

func src(p ...[]byte) *packets { s := packets(p); return &s }

// ip4 returns an IPv4 packet of n bytes, n at least 24, that carries id.
func ip4(n int, id uint32) []byte {
	b := make([]byte, n)
	b[0] = 0x45
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	binary.BigEndian.PutUint32(b[20:], id)
	for i := 24; i < n; i++ {
		b[i] = byte(i)
	}
	return b
}

func ip6(n int) []byte {
	b := make([]byte, n)
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(n-40))
	for i := 40; i < n; i++ {
		b[i] = byte(i)
	}
	return b
}

type end struct {
	dev  *Device
	peer *Peer // the other end
	out  *wire
}

func newDevice(t testing.TB, mod func(*Config)) *Device {
	t.Helper()
	cfg := Config{PrivateKey: key.NewNode()}
	if mod != nil {
		mod(&cfg)
	}
	d, err := NewDevice(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// newPair returns two devices that know each other, with nothing between them but what the
// test carries over. In a synctest bubble no time passes meanwhile; outside of one a slow machine
// has a handshake begun anew before the test has carried the first over.
func newPair(t testing.TB, mod func(*Config)) (a, b *end) {
	t.Helper()
	a = &end{dev: newDevice(t, mod), out: new(wire)}
	b = &end{dev: newDevice(t, mod), out: new(wire)}
	for _, e := range []struct{ x, y *end }{{a, b}, {b, a}} {
		p, err := e.x.dev.AddPeer(e.y.dev.Public(), e.x.out, nil)
		if err != nil {
			t.Fatal(err)
		}
		e.x.peer = p
	}
	return a, b
}

// give hands msgs to e and returns the packets in them.
func (e *end) give(t testing.TB, msgs ...[]byte) (got [][]byte) {
	t.Helper()
	for _, m := range msgs {
		pkt, p, err := e.dev.Receive(nil, m, nil)
		if err != nil {
			t.Fatalf("Receive: %v", err)
		}
		if p != e.peer {
			t.Fatalf("Receive: peer %v, want %v", p, e.peer)
		}
		if pkt != nil {
			got = append(got, bytes.Clone(pkt))
		}
	}
	return got
}

// connect completes a handshake that a begins.
func connect(t testing.TB, a, b *end) {
	t.Helper()
	if err := a.peer.Rekey(); err != nil {
		t.Fatal(err)
	}
	b.give(t, a.out.take()...)
	a.give(t, b.out.take()...)
	b.give(t, a.out.take()...)
	if !a.peer.HasSession() || !b.peer.HasSession() {
		t.Fatal("no session after the handshake")
	}
}

func TestHandshakeAndData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		first := ip4(100, 1)
		if err := a.peer.Send(src(first)); err != nil {
			t.Fatal(err)
		}
		init := a.out.take()
		if len(init) != 1 || len(init[0]) != 148 {
			t.Fatalf("want one initiation, got %d messages", len(init))
		}
		b.give(t, init...)
		resp := b.out.take()
		if len(resp) != 1 || len(resp[0]) != 92 {
			t.Fatalf("want one response, got %d messages", len(resp))
		}
		if b.peer.HasSession() {
			t.Error("the responder may not send before it has heard")
		}
		a.give(t, resp...)
		if got := b.give(t, a.out.take()...); len(got) != 1 || !bytes.Equal(got[0], first) {
			t.Fatalf("staged packet did not arrive: %x", got)
		}
		for _, pkt := range [][]byte{ip4(24, 2), ip4(1280, 3), ip6(40), ip6(1279)} {
			b.peer.Send(src(pkt))
			if got := a.give(t, b.out.take()...); len(got) != 1 || !bytes.Equal(got[0], pkt) {
				t.Errorf("%d bytes did not arrive whole", len(pkt))
			}
		}
	})
}

func TestReplayAndForgery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newPair(t, nil)
		connect(t, a, b)
		a.peer.Send(src(ip4(100, 1)))
		m := a.out.take()[0]
		bad := bytes.Clone(m)
		bad[40] ^= 1
		if _, _, err := b.dev.Receive(nil, bad, nil); !errors.Is(err, ErrAuth) {
			t.Errorf("forged: %v", err)
		}
		again := bytes.Clone(m)
		b.give(t, m)
		if _, _, err := b.dev.Receive(nil, again, nil); !errors.Is(err, ErrReplay) {
			t.Errorf("replayed: %v", err)
		}
	})
}

func TestWipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if !canWipe {
			t.Fatal("the cipher's layout has changed: session keys are not wiped")
		}
		a, b := newPair(t, nil)
		connect(t, a, b)
		s := a.peer.current.Load()
		seal := func() []byte { return s.send.Seal(nil, zeroNonce[:], []byte("x"), nil) }
		before := seal()
		a.peer.Remove()
		after := seal()
		zero := newAEAD(new([32]byte)).Seal(nil, zeroNonce[:], []byte("x"), nil)
		if bytes.Equal(before, after) || !bytes.Equal(after, zero) {
			t.Error("the key outlived its session")
		}
	})
}
