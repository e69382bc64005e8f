// Package key holds the Curve25519 keys of a tailnet as distinct types, so that a
// node key is never used where a machine key belongs, and so that a private key
// cannot reach a log by accident.
//
// A tailnet knows a key by its role. Every role has the same arithmetic and the same
// text form, a prefix and 64 hex digits:
//
//	role       public text   used for
//	Machine    mkey:…        the Noise channel to the coordination server
//	Node       nodekey:…     WireGuard, DERP, and a node's identity in the netmap
//	Disco      discokey:…    sealing path discovery messages
//	Challenge  chalpub:…     control's proof-of-possession challenge
//
// A private key's text form is "privkey:" and 64 hex digits whatever its role; only
// [Private.MarshalText] gives it. Formatting one with fmt or slog prints "privkey:redacted".
//
// All values are safe for concurrent use: none is changed after it is made, except by
// UnmarshalText.
package key

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"golang.org/x/crypto/curve25519"
	"golang.org/x/crypto/nacl/secretbox"
	//lint:ignore SA1019 crypto_box needs HSalsa20 alone; nacl/box would link BLAKE2b for a mode that is not used here
	"golang.org/x/crypto/salsa20/salsa"
)

// Size is the length in bytes of every key, public and private.
const Size = 32

// Role says what a key is for. It exists at compile time only.
type Role interface{ prefix() string }

// The roles.
type (
	Machine   struct{}
	Node      struct{}
	Disco     struct{}
	Challenge struct{}
)

func (Machine) prefix() string   { return "mkey:" }
func (Node) prefix() string      { return "nodekey:" }
func (Disco) prefix() string     { return "discokey:" }
func (Challenge) prefix() string { return "chalpub:" }

// The key types that the rest of the tree names.
type (
	MachinePublic    = Public[Machine]
	MachinePrivate   = Private[Machine]
	NodePublic       = Public[Node]
	NodePrivate      = Private[Node]
	DiscoPublic      = Public[Disco]
	DiscoPrivate     = Private[Disco]
	ChallengePublic  = Public[Challenge]
	ChallengePrivate = Private[Challenge]
)

const privPrefix = "privkey:"

var (
	// ErrLowOrder reports a public key with which a Diffie-Hellman exchange gives no secret.
	ErrLowOrder = errors.New("key: public key is a low-order point")
	// ErrOpen reports a sealed message that was not made for this key, or was changed on the way.
	ErrOpen = errors.New("key: message does not authenticate")
)

// Public is a public key. The zero value is no key at all: IsZero reports it. Values compare with ==.
type Public[R Role] struct{ k [Size]byte }

// PublicFromRaw returns the public key whose 32 bytes are raw, in the order Curve25519 defines.
func PublicFromRaw[R Role](raw [Size]byte) Public[R] { return Public[R]{raw} }

// NodePublicFromRaw, MachinePublicFromRaw and DiscoPublicFromRaw spell out the role.
func NodePublicFromRaw(raw [Size]byte) NodePublic       { return NodePublic{raw} }
func MachinePublicFromRaw(raw [Size]byte) MachinePublic { return MachinePublic{raw} }
func DiscoPublicFromRaw(raw [Size]byte) DiscoPublic     { return DiscoPublic{raw} }

// Raw returns the key's 32 bytes.
func (p Public[R]) Raw() [Size]byte { return p.k }

// AppendTo appends the key's 32 bytes to b.
func (p Public[R]) AppendTo(b []byte) []byte { return append(b, p.k[:]...) }

// IsZero reports whether p is the zero value.
func (p Public[R]) IsZero() bool { return p == Public[R]{} }

// Compare orders keys by their bytes.
func (p Public[R]) Compare(q Public[R]) int { return bytes.Compare(p.k[:], q.k[:]) }

// String returns the text form.
func (p Public[R]) String() string { t, _ := p.MarshalText(); return string(t) }

// ShortString returns the first five characters of the base64 form in brackets, the
// form in which operators are used to see node keys in logs.
func (p Public[R]) ShortString() string {
	const b64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	k := p.k
	return string([]byte{'[',
		b64[k[0]>>2], b64[(k[0]<<4|k[1]>>4)&63], b64[(k[1]<<2|k[2]>>6)&63], b64[k[2]&63], b64[k[3]>>2],
		']'})
}

// AppendText appends the text form to b.
func (p Public[R]) AppendText(b []byte) ([]byte, error) {
	var r R
	return hex.AppendEncode(append(b, r.prefix()...), p.k[:]), nil
}

// MarshalText returns the text form.
func (p Public[R]) MarshalText() ([]byte, error) { return p.AppendText(nil) }

// UnmarshalText parses the text form.
func (p *Public[R]) UnmarshalText(b []byte) error {
	var r R
	return parse(&p.k, r.prefix(), b)
}

// ParseNodePublic parses the text form of a node's public key.
func ParseNodePublic(s string) (p NodePublic, err error) {
	err = p.UnmarshalText([]byte(s))
	return p, err
}

// ParseMachinePublic parses the text form of a machine's public key.
func ParseMachinePublic(s string) (p MachinePublic, err error) {
	err = p.UnmarshalText([]byte(s))
	return p, err
}

// Private is a private key. The zero value is no key at all: IsZero reports it.
type Private[R Role] struct {
	_ [0]func() // not comparable with ==: use Equal, which takes constant time
	k [Size]byte
}

// New returns a new private key from the system's random source.
func New[R Role]() Private[R] {
	var p Private[R]
	rand.Read(p.k[:]) // never fails: crypto/rand ends the process instead
	p.k[0] &= 248
	p.k[31] = p.k[31]&127 | 64
	return p
}

// NewNode, NewMachine, NewDisco and NewChallenge return a new private key.
func NewNode() NodePrivate           { return New[Node]() }
func NewMachine() MachinePrivate     { return New[Machine]() }
func NewDisco() DiscoPrivate         { return New[Disco]() }
func NewChallenge() ChallengePrivate { return New[Challenge]() }

// PrivateFromRaw returns the private key whose scalar is raw, clamped.
func PrivateFromRaw[R Role](raw [Size]byte) Private[R] {
	raw[0] &= 248
	raw[31] = raw[31]&127 | 64
	return Private[R]{k: raw}
}

// Raw returns the scalar. The caller must keep it out of logs and errors.
func (p Private[R]) Raw() [Size]byte { return p.k }

// IsZero reports whether p is the zero value.
func (p Private[R]) IsZero() bool { return p.Equal(Private[R]{}) }

// Equal reports in constant time whether p and q are the same key.
func (p Private[R]) Equal(q Private[R]) bool { return subtle.ConstantTimeCompare(p.k[:], q.k[:]) == 1 }

// Public returns the public key. It panics if p is zero, which is a fault of the program.
func (p Private[R]) Public() Public[R] {
	if p.IsZero() {
		panic("key: Public of a zero private key")
	}
	pub, err := curve25519.X25519(p.k[:], curve25519.Basepoint)
	if err != nil {
		panic("key: " + err.Error()) // the base point is never of low order
	}
	return Public[R]{[Size]byte(pub)}
}

// DH returns the Curve25519 shared secret of p and pub, or [ErrLowOrder].
func (p Private[R]) DH(pub Public[R]) ([Size]byte, error) {
	s, err := curve25519.X25519(p.k[:], pub.k[:])
	if err != nil {
		return [Size]byte{}, ErrLowOrder
	}
	return [Size]byte(s), nil
}

// Seal returns msg sealed by p for pub: a random 24-byte nonce, then the NaCl box.
func (p Private[R]) Seal(pub Public[R], msg []byte) []byte {
	s := p.Shared(pub)
	return s.AppendSeal(nil, msg)
}

// Open opens what the holder of pub sealed for p, or returns [ErrOpen].
func (p Private[R]) Open(pub Public[R], sealed []byte) ([]byte, error) {
	s := p.Shared(pub)
	return s.AppendOpen(nil, sealed)
}

// Shared is the precomputed NaCl box key of two parties; it spares the scalar
// multiplication on every message.
type Shared struct {
	_ [0]func()
	k [Size]byte
}

// Shared returns the box key of p and pub: crypto_box of NaCl is a secretbox
// under HSalsa20 of the Curve25519 secret. (Package nacl/box does the same, and
// links BLAKE2b for anonymous boxes that nobody here makes.)
func (p Private[R]) Shared(pub Public[R]) (s Shared) {
	dh, _ := p.DH(pub) // all zero for a point of low order, as in NaCl
	salsa.HSalsa20(&s.k, new([16]byte), &dh, &salsa.Sigma)
	return s
}

// AppendSeal appends to dst a random nonce and the box of msg.
func (s *Shared) AppendSeal(dst, msg []byte) []byte {
	var nonce [24]byte
	rand.Read(nonce[:])
	return secretbox.Seal(append(dst, nonce[:]...), msg, &nonce, &s.k)
}

// AppendOpen appends to dst the message sealed in sealed, or returns [ErrOpen].
func (s *Shared) AppendOpen(dst, sealed []byte) ([]byte, error) {
	if len(sealed) < 24+secretbox.Overhead {
		return dst, ErrOpen
	}
	nonce := [24]byte(sealed)
	out, ok := secretbox.Open(dst, sealed[24:], &nonce, &s.k)
	if !ok {
		return dst, ErrOpen
	}
	return out, nil
}

// MarshalText returns the text form of the secret, for a state store and nothing else.
func (p Private[R]) MarshalText() ([]byte, error) {
	return hex.AppendEncode([]byte(privPrefix), p.k[:]), nil
}

// UnmarshalText parses the text form.
func (p *Private[R]) UnmarshalText(b []byte) error { return parse(&p.k, privPrefix, b) }

const redacted = privPrefix + "redacted"

// String returns a fixed text that holds nothing of the key.
func (p Private[R]) String() string { return redacted }

// GoString returns a fixed text that holds nothing of the key.
func (p Private[R]) GoString() string { return redacted }

// Format writes a fixed text that holds nothing of the key, whatever the verb.
func (p Private[R]) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue returns a fixed text that holds nothing of the key.
func (p Private[R]) LogValue() slog.Value { return slog.StringValue(redacted) }

func parse(k *[Size]byte, prefix string, b []byte) error {
	if len(b) > 256 {
		b = b[:256]
	}
	hexits, ok := bytes.CutPrefix(b, []byte(prefix))
	if !ok {
		return fmt.Errorf("key: want the form %s<64 hex digits>", prefix)
	}
	if len(hexits) != 2*Size {
		return fmt.Errorf("key: after %q stand %d characters, want %d hex digits", prefix, len(hexits), 2*Size)
	}
	var out [Size]byte
	if _, err := hex.Decode(out[:], hexits); err != nil {
		return fmt.Errorf("key: after %q stands a character that is not a hex digit", prefix)
	}
	*k = out
	return nil
}
