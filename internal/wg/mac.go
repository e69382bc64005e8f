package wg

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"sync"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
)

const (
	labelMAC1   = "mac1----"
	labelCookie = "cookie--"
)

// labelled is HASH(label || pub), a key that whoever knows pub can make (paper §5.4.4).
func labelled(label string, pub *[32]byte) [32]byte {
	return blake2s.Sum256(append([]byte(label), pub[:]...))
}

// mac is keyed BLAKE2s with a 16-byte result.
func mac(k, b []byte) (out [16]byte) {
	h, err := blake2s.New128(k)
	if err != nil {
		panic("wg: " + err.Error()) // keys here are 16 or 32 bytes
	}
	h.Write(b)
	h.Sum(out[:0])
	return out
}

func equal(a, b []byte) bool { return subtle.ConstantTimeCompare(a, b) == 1 }

// checkMAC1 reports whether msg, a handshake message, was made by someone who knows our public
// key. Without it no work is done and nothing is answered: we stay silent to scanners.
func (id *identity) checkMAC1(msg []byte) bool {
	n := len(msg) - 32
	m := mac(id.mac1Key[:], msg[:n])
	return equal(m[:], msg[n:n+16])
}

// putMACs fills in the MACs of msg, a handshake message to the holder of remote, and returns
// mac1. cookie may be nil: mac2 is zero then.
func putMACs(msg []byte, remote *[32]byte, cookie *[16]byte) (mac1 [16]byte) {
	n := len(msg) - 32
	k := labelled(labelMAC1, remote)
	mac1 = mac(k[:], msg[:n])
	copy(msg[n:], mac1[:])
	clear(msg[n+16:])
	if cookie != nil {
		m := mac(cookie[:], msg[:n+16])
		copy(msg[n+16:], m[:])
	}
	return mac1
}

// cookieMaker makes and checks the cookies we give out under load (paper §5.4.7): a cookie is
// a MAC of its holder's source address under a secret that changes every two minutes. The
// secret before the present one is good too, so that every cookie lives at least as long as
// its holder uses it.
type cookieMaker struct {
	mu          sync.Mutex
	secret, old [32]byte
	since       int64 // when secret was made; 0 is never
	oldOK       bool
}

// cookies returns the cookies for src that are good now, newest first.
func (c *cookieMaker) cookies(src []byte, now, refresh int64) (fresh, old [16]byte, oldOK bool) {
	c.mu.Lock()
	if c.since == 0 || now-c.since >= refresh {
		c.oldOK = c.since != 0 && now-c.since < 2*refresh
		c.old = c.secret
		rand.Read(c.secret[:])
		c.since = now
	}
	s, o, ok := c.secret, c.old, c.oldOK
	c.mu.Unlock()
	fresh = mac(s[:], src)
	if ok {
		old = mac(o[:], src)
	}
	return fresh, old, ok
}

// checkMAC2 reports whether msg carries a cookie that we gave to src.
func (c *cookieMaker) checkMAC2(msg, src []byte, now, refresh int64) bool {
	n := len(msg) - 16
	fresh, old, oldOK := c.cookies(src, now, refresh)
	m := mac(fresh[:], msg[:n])
	ok := equal(m[:], msg[n:])
	if oldOK {
		m = mac(old[:], msg[:n])
		ok = equal(m[:], msg[n:]) || ok
	}
	return ok
}

// reply writes the cookie reply to msg, which came from src.
// Layout: type 4, receiver 4, nonce 24, cookie 16+16.
func (c *cookieMaker) reply(out *[sizeCookie]byte, id *identity, msg, src []byte, now, refresh int64) {
	fresh, _, _ := c.cookies(src, now, refresh)
	le.PutUint32(out[:], typeCookie)
	copy(out[4:8], msg[4:8]) // the sender of either handshake message stands there
	rand.Read(out[8:32])
	a, _ := chacha20poly1305.NewX(id.cookieKey[:])
	n := len(msg) - 32
	a.Seal(out[:32], out[8:32], fresh[:], msg[n:n+16])
}

// cookieJar is what a peer keeps of the cookies it was given.
type cookieJar struct {
	cookie [16]byte
	at     int64 // when it came
}

// openCookie reads a cookie reply from the holder of remote to our message with mac1.
func openCookie(msg *[sizeCookie]byte, remote *[32]byte, mac1 *[16]byte) (cookie [16]byte, err error) {
	k := labelled(labelCookie, remote)
	a, _ := chacha20poly1305.NewX(k[:])
	if _, err := a.Open(cookie[:0], msg[8:32], msg[32:], mac1[:]); err != nil {
		return cookie, ErrAuth
	}
	return cookie, nil
}

// timestamp is a TAI64N label: seconds and nanoseconds, big-endian, so that later ones are
// larger byte strings.
type timestamp [12]byte

func (t timestamp) after(u timestamp) bool { return bytes.Compare(t[:], u[:]) > 0 }

// whiten is the grain of our timestamps: they must not tell a stranger our clock's phase.
const whiten = 1 << 24

func stampOf(t time.Time) (ts timestamp) {
	binary.BigEndian.PutUint64(ts[:], 1<<62+10+uint64(t.Unix()))
	binary.BigEndian.PutUint32(ts[8:], uint32(t.Nanosecond())&^(whiten-1))
	return ts
}

// stamper gives out timestamps that only grow, whatever the wall clock does: a peer would
// ignore an initiation whose timestamp does not.
type stamper struct {
	mu   sync.Mutex
	last time.Time
}

func (s *stamper) next() timestamp {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now().Round(0) // the wall clock alone
	if stampOf(now).after(stampOf(s.last)) || s.last.IsZero() {
		s.last = now
	} else {
		s.last = s.last.Add(whiten)
	}
	return stampOf(s.last)
}
