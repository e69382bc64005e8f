package wg

import (
	"bytes"
	"errors"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
)

var receiveErrors = []error{ErrMalformed, ErrUnknownIndex, ErrUnknownPeer, ErrAuth, ErrReplay, ErrExpired, ErrLoad, ErrShortBuffer, ErrKey, ErrClosed}

func oneOf(err error) bool {
	for _, e := range receiveErrors {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// FuzzReceive gives arbitrary messages to a device with a live session, a pending handshake and
// a peer that it may have to learn of. No message may harm the session.
func FuzzReceive(f *testing.F) {
	a, b := newPair(f, func(c *Config) { c.Unknown = func(key.NodePublic) bool { return false } })
	a.dev.t.firstRetry = a.dev.t.rekeyTimeout // time for a slow machine to carry a handshake over
	connect(f, a, b)
	w := new(wire)
	other, _ := b.dev.AddPeer(key.NewNode().Public(), w, nil)
	other.Rekey()
	init := w.take()[0]
	a.peer.Send(src(ip4(64, 1)))
	data := a.out.take()[0]
	f.Add(data, uint16(0))
	f.Add(init, uint16(0))
	f.Add(append([]byte{2, 0, 0, 0, 1, 2, 3, 4}, append(bytes.Clone(init[4:8]), make([]byte, 80)...)...), uint16(0))
	f.Add(append([]byte{3, 0, 0, 0}, append(bytes.Clone(init[4:8]), make([]byte, 56)...)...), uint16(0))
	f.Add([]byte{4, 0, 0, 0}, uint16(100))
	// The second argument is the size of dst; its top bit has the fuzzer's message find the session,
	// whose index it cannot know.
	f.Fuzz(func(t *testing.T, msg []byte, n uint16) {
		m := bytes.Clone(msg)
		if n&0x8000 != 0 && len(m) >= 8 {
			copy(m, data[:8])
		}
		dst := make([]byte, n&0x3fff)
		pkt, p, err := b.dev.Receive(dst, m, &sourced{src: "x"})
		if err != nil && !oneOf(err) {
			t.Fatalf("an error of no known kind: %v", err)
		}
		if err != nil && (pkt != nil || p != nil) {
			t.Fatal("a result beside an error")
		}
		a.peer.Send(src(ip4(64, 2)))
		msgs := a.out.take()
		if len(msgs) == 0 || msgs[len(msgs)-1][0] != typeData {
			connect(t, a, b) // the session's time is over
			return
		}
		got, p, err := b.dev.Receive(nil, msgs[len(msgs)-1], nil)
		if err != nil {
			t.Fatalf("the session does not work any more: %v", err)
		}
		if err == nil && (p != b.peer || !bytes.Equal(got, ip4(64, 2))) {
			t.Fatal("the session gives other packets")
		}
		b.out.take()
	})
}

// FuzzHandshake gives arbitrary handshake messages, with good MACs, to the handshake itself.
func FuzzHandshake(f *testing.F) {
	id, _ := newIdentity(key.NewNode())
	remote, _ := newIdentity(key.NewNode())
	ss, _ := dh(remote.priv, &id.pub)
	eph := newEphemeral()
	var init [sizeInitiation]byte
	initiate(&init, remote, &id.pub, &ss, eph, 7, timestamp{1})
	f.Add(init[:], true)
	f.Add(init[:sizeResponse], false)
	f.Add([]byte{}, true)
	f.Fuzz(func(t *testing.T, msg []byte, first bool) {
		if first {
			var m [sizeInitiation]byte
			copy(m[:], msg)
			var r responder
			if err := r.readStatic(&m, id); err != nil {
				return
			}
			if _, err := r.readTimestamp(&m, &ss); err != nil {
				return
			}
			if !bytes.Equal(m[iEphemeral:iMAC1], init[iEphemeral:iMAC1]) {
				t.Fatal("a forged initiation was believed")
			}
			var out [sizeResponse]byte
			if _, err := r.respond(&out, &zeroPSK, newEphemeral(), 9); err != nil {
				t.Fatal(err)
			}
			return
		}
		var sent [sizeInitiation]byte
		st, err := initiate(&sent, id, &remote.pub, &ss, eph, 8, timestamp{2})
		if err != nil {
			t.Fatal(err)
		}
		var m [sizeResponse]byte
		copy(m[:], msg)
		if _, err := st.finish(&m, id, &zeroPSK); err == nil {
			t.Fatal("a forged response was believed")
		}
		if m := (*[sizeCookie]byte)(m[:sizeCookie]); m != nil {
			if _, err := openCookie(m, &remote.pub, &[16]byte{}); err == nil {
				t.Fatal("a forged cookie was believed")
			}
		}
	})
}
