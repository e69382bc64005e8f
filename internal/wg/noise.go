package wg

import (
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"
	"hash"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/tailnode/tailnode/internal/key"
)

// The handshake is Noise_IKpsk2 (Noise rev 34 §7, §9) with the messages of paper §5.4. This
// file holds it as functions of their arguments: no clock, no randomness, no locks.

const (
	construction = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
	identifier   = "WireGuard v1 zx2c4 Jason@zx2c4.com"
)

// Message types and sizes (paper §5.4.2 to §5.4.7). Every message starts with its type and
// three zero bytes; numbers are little-endian.
const (
	typeInitiation = 1
	typeResponse   = 2
	typeCookie     = 3
	typeData       = 4

	sizeInitiation = 148
	sizeResponse   = 92
	sizeCookie     = 64
	sizeHeader     = 16 // type, receiver, counter
	sizeTag        = 16
	sizeKeepalive  = sizeHeader + sizeTag // a data message with nothing in it
)

// initiation: type 4, sender 4, ephemeral 32, static 32+16, timestamp 12+16, mac1 16, mac2 16.
const (
	iSender    = 4
	iEphemeral = 8
	iStatic    = 40
	iTimestamp = 88
	iMAC1      = 116
	iMAC2      = 132
)

// response: type 4, sender 4, receiver 4, ephemeral 32, empty 0+16, mac1 16, mac2 16.
const (
	rSender    = 4
	rReceiver  = 8
	rEphemeral = 12
	rEmpty     = 44
	rMAC1      = 60
	rMAC2      = 76
)

var le = binary.LittleEndian

// initial is the state before any message: ck = HASH(construction), h = HASH(ck || identifier).
var initial = func() (s symmetric) {
	s.ck = blake2s.Sum256([]byte(construction))
	s.h = s.ck
	s.mixHash([]byte(identifier))
	return s
}()

// symmetric is the chaining key and the transcript hash.
type symmetric struct{ ck, h [32]byte }

func (s *symmetric) wipe() { *s = symmetric{} }

func (s *symmetric) mixHash(b []byte) {
	x, _ := blake2s.New256(nil)
	x.Write(s.h[:])
	x.Write(b)
	x.Sum(s.h[:0])
}

// mixKey is ck = KDF1(ck, b); mixKey2 is (ck, k) = KDF2(ck, b).
func (s *symmetric) mixKey(b []byte) { kdf(&s.ck, b, &s.ck) }
func (s *symmetric) mixKey2(b []byte) (k [32]byte) {
	kdf(&s.ck, b, &s.ck, &k)
	return k
}

// mixPSK is (ck, t, k) = KDF3(ck, psk), h = HASH(h || t).
func (s *symmetric) mixPSK(psk *[32]byte) (k [32]byte) {
	var t [32]byte
	kdf(&s.ck, psk[:], &s.ck, &t, &k)
	s.mixHash(t[:])
	return k
}

// seal writes the AEAD of plain under k to dst, which has room for it, with the transcript as
// associated data, and adds the result to the transcript. Each k is used once: the nonce is 0.
func (s *symmetric) seal(dst []byte, k *[32]byte, plain []byte) {
	a := newAEAD(k)
	out := a.Seal(dst[:0], zeroNonce[:], plain, s.h[:])
	wipeAEAD(a)
	clear(k[:])
	s.mixHash(out)
}

// open is the other end of seal. dst has len(sealed)-16 bytes.
func (s *symmetric) open(dst []byte, k *[32]byte, sealed []byte) error {
	a := newAEAD(k)
	_, err := a.Open(dst[:0], zeroNonce[:], sealed, s.h[:])
	wipeAEAD(a)
	clear(k[:])
	if err != nil {
		return ErrAuth
	}
	s.mixHash(sealed)
	return nil
}

var zeroNonce [chacha20poly1305.NonceSize]byte

func newBlake2s() hash.Hash { h, _ := blake2s.New256(nil); return h }

// kdf fills out with HKDF over HMAC-BLAKE2s (paper §5.4). out[0] may be ck itself.
func kdf(ck *[32]byte, in []byte, out ...*[32]byte) {
	m := hmac.New(newBlake2s, ck[:])
	m.Write(in)
	var prk [32]byte
	m.Sum(prk[:0])
	m = hmac.New(newBlake2s, prk[:])
	var prev []byte
	for i, o := range out {
		m.Reset()
		m.Write(prev)
		m.Write([]byte{byte(i + 1)})
		m.Sum(o[:0])
		prev = o[:]
	}
	clear(prk[:])
}

func newAEAD(k *[32]byte) cipher.AEAD {
	a, err := chacha20poly1305.New(k[:])
	if err != nil {
		panic("wg: " + err.Error()) // the key has the right size
	}
	return a
}

// identity is the device's static key with what is derived from it.
type identity struct {
	priv      *ecdh.PrivateKey
	pub       [32]byte
	mac1Key   [32]byte // for messages to us
	cookieKey [32]byte // for cookie replies from us
}

func newIdentity(k key.NodePrivate) (*identity, error) {
	if k.IsZero() {
		return nil, ErrKey
	}
	raw := k.Raw()
	defer clear(raw[:])
	priv, err := ecdh.X25519().NewPrivateKey(raw[:])
	if err != nil {
		return nil, ErrKey
	}
	id := &identity{priv: priv, pub: [32]byte(priv.PublicKey().Bytes())}
	id.mac1Key = labelled(labelMAC1, &id.pub)
	id.cookieKey = labelled(labelCookie, &id.pub)
	return id, nil
}

// dh agrees on a secret, or fails with ErrKey for a point of low order.
func dh(priv *ecdh.PrivateKey, pub *[32]byte) (s [32]byte, err error) {
	p, err := ecdh.X25519().NewPublicKey(pub[:])
	if err != nil {
		return s, ErrKey
	}
	b, err := priv.ECDH(p)
	if err != nil {
		return s, ErrKey
	}
	copy(s[:], b)
	clear(b)
	return s, nil
}

// newEphemeral returns a fresh key pair.
func newEphemeral() *ecdh.PrivateKey {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		panic("wg: " + err.Error()) // crypto/rand does not fail
	}
	return k
}

// keys are the two keys of a session (paper §5.4.5).
type keys struct{ send, recv [32]byte }

func (k *keys) wipe() { *k = keys{} }

// initiator is the state between our initiation and its response.
type initiator struct {
	symmetric
	eph *ecdh.PrivateKey
}

// initiate writes an initiation to msg, all but its MACs, and returns the state with which its
// response is read (paper §5.4.2). ss is the secret of the two static keys.
func initiate(msg *[sizeInitiation]byte, id *identity, remote, ss *[32]byte, eph *ecdh.PrivateKey, sender uint32, ts timestamp) (*initiator, error) {
	s := &initiator{symmetric: initial, eph: eph}
	es, err := dh(eph, remote)
	if err != nil {
		return nil, err
	}
	le.PutUint32(msg[:], typeInitiation)
	le.PutUint32(msg[iSender:], sender)
	copy(msg[iEphemeral:], eph.PublicKey().Bytes())
	s.mixHash(remote[:])
	s.mixHash(msg[iEphemeral:iStatic])
	s.mixKey(msg[iEphemeral:iStatic])
	k := s.mixKey2(es[:])
	clear(es[:])
	s.seal(msg[iStatic:iTimestamp], &k, id.pub[:])
	k = s.mixKey2(ss[:])
	s.seal(msg[iTimestamp:iMAC1], &k, ts[:])
	return s, nil
}

// responder is the state between an initiation and our response.
type responder struct {
	symmetric
	eph, static [32]byte // the initiator's
	sender      uint32
}

// readStatic reads an initiation as far as the initiator's static key, which is not proved yet.
func (r *responder) readStatic(msg *[sizeInitiation]byte, id *identity) error {
	r.symmetric = initial
	r.sender = le.Uint32(msg[iSender:])
	copy(r.eph[:], msg[iEphemeral:])
	es, err := dh(id.priv, &r.eph)
	if err != nil {
		return ErrAuth
	}
	r.mixHash(id.pub[:])
	r.mixHash(r.eph[:])
	r.mixKey(r.eph[:])
	k := r.mixKey2(es[:])
	clear(es[:])
	return r.open(r.static[:], &k, msg[iStatic:iTimestamp])
}

// readTimestamp reads the rest; when it succeeds the initiator holds its static key.
func (r *responder) readTimestamp(msg *[sizeInitiation]byte, ss *[32]byte) (ts timestamp, err error) {
	k := r.mixKey2(ss[:])
	return ts, r.open(ts[:], &k, msg[iTimestamp:iMAC1])
}

// respond writes the response to msg, all but its MACs, and returns the session's keys (paper
// §5.4.3). The state is of no use afterwards.
func (r *responder) respond(msg *[sizeResponse]byte, psk *[32]byte, eph *ecdh.PrivateKey, sender uint32) (keys, error) {
	defer r.wipe()
	ee, err := dh(eph, &r.eph)
	if err != nil {
		return keys{}, err
	}
	se, err := dh(eph, &r.static)
	if err != nil {
		return keys{}, err
	}
	le.PutUint32(msg[:], typeResponse)
	le.PutUint32(msg[rSender:], sender)
	le.PutUint32(msg[rReceiver:], r.sender)
	copy(msg[rEphemeral:], eph.PublicKey().Bytes())
	r.mixHash(msg[rEphemeral:rEmpty])
	r.mixKey(msg[rEphemeral:rEmpty])
	r.mixKey(ee[:])
	r.mixKey(se[:])
	clear(ee[:])
	clear(se[:])
	k := r.mixPSK(psk)
	r.seal(msg[rEmpty:rMAC1], &k, nil)
	var out keys
	kdf(&r.ck, nil, &out.recv, &out.send)
	return out, nil
}

// finish reads the response to the initiation that s began. s stays as it was, so that a
// forged response does not end the handshake.
func (s *initiator) finish(msg *[sizeResponse]byte, id *identity, psk *[32]byte) (keys, error) {
	w := s.symmetric
	defer w.wipe()
	e := [32]byte(msg[rEphemeral:rEmpty])
	ee, err := dh(s.eph, &e)
	if err != nil {
		return keys{}, ErrAuth
	}
	se, err := dh(id.priv, &e)
	if err != nil {
		return keys{}, ErrAuth
	}
	w.mixHash(e[:])
	w.mixKey(e[:])
	w.mixKey(ee[:])
	w.mixKey(se[:])
	clear(ee[:])
	clear(se[:])
	k := w.mixPSK(psk)
	if err := w.open(nil, &k, msg[rEmpty:rMAC1]); err != nil {
		return keys{}, err
	}
	var out keys
	kdf(&w.ck, nil, &out.send, &out.recv)
	return out, nil
}
