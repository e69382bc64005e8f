// Package noise is the secure channel between a machine and its coordination server:
// Noise_IK_25519_ChaChaPoly_BLAKE2s (Noise revision 34) with the framing and prologue that
// docs/protocol/control.md § Noise describes.
//
// [Initiator] and [Responder] are the handshake without I/O. [Client], [ClientDeferred]
// and [Server] run it over a connection and return a [Conn], which is a net.Conn.
package noise

import (
	"crypto/cipher"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"strconv"

	"github.com/tailnode/tailnode/internal/key"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
)

const (
	protocolName   = "Noise_IK_25519_ChaChaPoly_BLAKE2s" // 33 bytes, so it is hashed (Noise §5.2)
	prologuePrefix = "Tailscale Control Protocol v"      // then the version in decimal

	tagSize = chacha20poly1305.Overhead

	// InitiationSize is the length of the client's handshake message with its header.
	InitiationSize = initHeaderSize + key.Size + key.Size + tagSize + tagSize
	// ResponseSize is the length of the server's handshake message with its header.
	ResponseSize = headerSize + key.Size + tagSize

	// The frame types.
	typeInitiation = 1
	typeResponse   = 2
	typeError      = 3
	typeRecord     = 4

	headerSize     = 3 // type, then big-endian length
	initHeaderSize = 5 // big-endian version before that
)

var (
	// ErrHandshake is wrapped by every error of a handshake whose messages do not fit the keys
	// or the layout. On a client the usual cause is a server whose key is another one.
	ErrHandshake = errors.New("noise: handshake failed")
	// ErrState reports a call on a handshake that has finished or has failed. A handshake
	// that failed once stays failed: its hash no longer agrees with the peer's.
	ErrState = errors.New("noise: handshake used out of order")
)

// Session is what a completed handshake yields.
type Session struct {
	Send, Recv [32]byte           // ChaCha20-Poly1305 keys of the two directions
	Hash       [blake2s.Size]byte // the handshake hash, which names this channel (Noise §11.2)
	Peer       key.MachinePublic
	Version    uint16 // protocol version that the client announced
}

// String returns a fixed text that holds nothing of the keys.
func (Session) String() string { return "noise.Session(redacted)" }

// GoString returns a fixed text that holds nothing of the keys.
func (Session) GoString() string { return "noise.Session(redacted)" }

// symmetric is Noise's SymmetricState (§5.2) with the CipherState's key inside. Every
// key of this pattern encrypts one message at most, so the nonce is always zero.
type symmetric struct {
	h, ck [blake2s.Size]byte
	k     [chacha20poly1305.KeySize]byte
}

func (s *symmetric) init(version uint16, responder key.MachinePublic) {
	s.h = blake2s.Sum256([]byte(protocolName))
	s.ck = s.h
	var b [len(prologuePrefix) + 5]byte
	s.mixHash(strconv.AppendUint(append(b[:0], prologuePrefix...), uint64(version), 10))
	s.mixKey(responder) // the pre-message "<- s"
}

func (s *symmetric) mixHash(data []byte) {
	h := newHash()
	h.Write(s.h[:])
	h.Write(data)
	h.Sum(s.h[:0])
}

func (s *symmetric) mixKey(p key.MachinePublic) {
	raw := p.Raw()
	s.mixHash(raw[:])
}

// mixDH is MixKey(DH(priv, pub)).
func (s *symmetric) mixDH(priv key.MachinePrivate, pub key.MachinePublic) error {
	secret, err := priv.DH(pub)
	if err != nil {
		return err
	}
	s.ck, s.k = hkdf2(s.ck[:], secret[:])
	clear(secret[:])
	return nil
}

// seal appends EncryptAndHash(plain) to dst.
func (s *symmetric) seal(dst, plain []byte) []byte {
	var nonce [chacha20poly1305.NonceSize]byte
	n := len(dst)
	dst = newAEAD(s.k).Seal(dst, nonce[:], plain, s.h[:])
	s.mixHash(dst[n:])
	return dst
}

// open appends DecryptAndHash(sealed) to dst.
func (s *symmetric) open(dst, sealed []byte) ([]byte, error) {
	var nonce [chacha20poly1305.NonceSize]byte
	plain, err := newAEAD(s.k).Open(dst, nonce[:], sealed, s.h[:])
	if err != nil {
		return nil, err
	}
	s.mixHash(sealed)
	return plain, nil
}

// split returns the keys of the initiator's and the responder's direction.
func (s *symmetric) split() (initiator, responder [32]byte) {
	initiator, responder = hkdf2(s.ck[:], nil)
	clear(s.ck[:])
	clear(s.k[:])
	return
}

// hkdf2 is Noise's HKDF with two outputs (§4.3).
func hkdf2(ck, ikm []byte) (a, b [blake2s.Size]byte) {
	m := hmac.New(newHash, ck)
	m.Write(ikm)
	var t [blake2s.Size]byte
	m.Sum(t[:0])
	m = hmac.New(newHash, t[:])
	m.Write([]byte{1})
	m.Sum(a[:0])
	m.Reset()
	m.Write(a[:])
	m.Write([]byte{2})
	m.Sum(b[:0])
	clear(t[:])
	return a, b
}

func newHash() hash.Hash {
	h, err := blake2s.New256(nil)
	if err != nil {
		panic("noise: " + err.Error()) // only for a key that is too long
	}
	return h
}

func newAEAD(k [chacha20poly1305.KeySize]byte) cipher.AEAD {
	a, err := chacha20poly1305.New(k[:])
	if err != nil {
		panic("noise: " + err.Error()) // only for a key of the wrong length
	}
	return a
}

// Initiator is the client's side of one handshake. It does no I/O and is used by one
// goroutine at a time. Any error is final.
type Initiator struct {
	s          symmetric
	machine, e key.MachinePrivate
	control    key.MachinePublic
	version    uint16
	msg        [InitiationSize]byte
	done       bool
}

// NewInitiator prepares a handshake with the server whose key is control, announcing version.
// ephemeral is zero but in tests that replay a handshake; a zero one is replaced by a new key.
func NewInitiator(machine key.MachinePrivate, control key.MachinePublic, version uint16, ephemeral key.MachinePrivate) (*Initiator, error) {
	if machine.IsZero() || control.IsZero() {
		return nil, errors.New("noise: a machine key and a control key are needed")
	}
	if ephemeral.IsZero() {
		ephemeral = key.NewMachine()
	}
	i := &Initiator{machine: machine, e: ephemeral, control: control, version: version}
	i.s.init(version, control)

	b := binary.BigEndian.AppendUint16(i.msg[:0], version)
	b = append(b, typeInitiation)
	b = binary.BigEndian.AppendUint16(b, InitiationSize-initHeaderSize)

	// -> e, es, s, ss (Noise §7.5, IK), with an empty payload
	b = i.e.Public().AppendTo(b)
	i.s.mixKey(i.e.Public())
	if err := i.s.mixDH(i.e, control); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	static := machine.Public().Raw()
	b = i.s.seal(b, static[:])
	if err := i.s.mixDH(machine, control); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	i.s.seal(b, nil)
	return i, nil
}

// Message returns the handshake message to send, InitiationSize bytes. The caller may keep
// it but not change it.
func (i *Initiator) Message() []byte { return i.msg[:] }

// Finish reads the server's answer, which is a whole frame of ResponseSize bytes, and
// completes the handshake. It can be called once.
func (i *Initiator) Finish(resp []byte) (Session, error) {
	if i.done {
		return Session{}, ErrState
	}
	i.done = true
	defer func() { i.machine, i.e = key.MachinePrivate{}, key.MachinePrivate{} }()
	if len(resp) != ResponseSize || resp[0] != typeResponse || binary.BigEndian.Uint16(resp[1:]) != ResponseSize-headerSize {
		return Session{}, fmt.Errorf("%w: malformed response", ErrHandshake)
	}
	// <- e, ee, se
	re := key.MachinePublicFromRaw([key.Size]byte(resp[headerSize:]))
	i.s.mixKey(re)
	if err := i.s.mixDH(i.e, re); err != nil {
		return Session{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	if err := i.s.mixDH(i.machine, re); err != nil {
		return Session{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	if _, err := i.s.open(nil, resp[headerSize+key.Size:]); err != nil {
		return Session{}, fmt.Errorf("%w: the response does not authenticate", ErrHandshake)
	}
	ses := Session{Peer: i.control, Version: i.version, Hash: i.s.h}
	ses.Send, ses.Recv = i.s.split()
	return ses, nil
}

// Responder is the server's side of one handshake. It does no I/O and is used by one
// goroutine at a time. Any error is final.
type Responder struct {
	s          symmetric
	control, e key.MachinePrivate
	re         key.MachinePublic // the client's ephemeral
	peer       key.MachinePublic
	version    uint16
	state      byte // 0: wants an initiation; 1: has answered or can answer; 2: over
}

// NewResponder returns a responder with the server's key. ephemeral is as for NewInitiator.
func NewResponder(control, ephemeral key.MachinePrivate) *Responder {
	if ephemeral.IsZero() {
		ephemeral = key.NewMachine()
	}
	return &Responder{control: control, e: ephemeral}
}

// Read reads the client's initiation, which is a whole message of InitiationSize bytes.
// When it returns nil, Peer and Version are known, and the client holds the key Peer.
func (r *Responder) Read(init []byte) error {
	if r.state != 0 {
		return ErrState
	}
	r.state = 2
	switch {
	case len(init) != InitiationSize:
		return fmt.Errorf("%w: initiation of %d bytes, want %d", ErrHandshake, len(init), InitiationSize)
	case init[2] != typeInitiation:
		return fmt.Errorf("%w: first message has type %d, want %d", ErrHandshake, init[2], typeInitiation)
	case binary.BigEndian.Uint16(init[3:]) != InitiationSize-initHeaderSize:
		return fmt.Errorf("%w: wrong length in the initiation's header", ErrHandshake)
	}
	r.version = binary.BigEndian.Uint16(init)
	r.s.init(r.version, r.control.Public())

	// -> e, es, s, ss
	b := init[initHeaderSize:]
	r.re = key.MachinePublicFromRaw([key.Size]byte(b))
	r.s.mixKey(r.re)
	if err := r.s.mixDH(r.control, r.re); err != nil {
		return fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	b = b[key.Size:]
	var static [key.Size]byte
	if _, err := r.s.open(static[:0], b[:key.Size+tagSize]); err != nil {
		return fmt.Errorf("%w: the initiation is not for this server's key", ErrHandshake)
	}
	peer := key.MachinePublicFromRaw(static)
	if err := r.s.mixDH(r.control, peer); err != nil {
		return fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	if _, err := r.s.open(nil, b[key.Size+tagSize:]); err != nil {
		return fmt.Errorf("%w: the initiation does not authenticate", ErrHandshake)
	}
	r.peer = peer
	r.state = 1
	return nil
}

// Peer returns the client's key, once Read has succeeded.
func (r *Responder) Peer() key.MachinePublic { return r.peer }

// Version returns the protocol version that the client announced, once Read has succeeded.
func (r *Responder) Version() uint16 { return r.version }

// Finish returns the answer to send, ResponseSize bytes, and completes the handshake.
func (r *Responder) Finish() ([]byte, Session, error) {
	if r.state != 1 {
		return nil, Session{}, ErrState
	}
	r.state = 2
	b := make([]byte, 0, ResponseSize)
	b = append(b, typeResponse)
	b = binary.BigEndian.AppendUint16(b, ResponseSize-headerSize)

	// <- e, ee, se, with an empty payload
	b = r.e.Public().AppendTo(b)
	r.s.mixKey(r.e.Public())
	if err := r.s.mixDH(r.e, r.re); err != nil {
		return nil, Session{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	if err := r.s.mixDH(r.e, r.peer); err != nil {
		return nil, Session{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	b = r.s.seal(b, nil)
	ses := Session{Peer: r.peer, Version: r.version, Hash: r.s.h}
	ses.Recv, ses.Send = r.s.split()
	r.control, r.e = key.MachinePrivate{}, key.MachinePrivate{}
	return b, ses, nil
}
