package wg

import (
	"bytes"
	"crypto/ecdh"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/tailnode/tailnode/internal/key"
)

var update = flag.Bool("update", false, "write testdata/vectors/wireguard.json anew")

// hexBytes is a byte string that JSON holds as hex.
type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }
func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.AppendDecode(nil, b)
	return err
}

func (h hexBytes) key() [32]byte { return [32]byte(h) }

type vectors struct {
	Comment  string         `json:"comment"`
	Sessions []vectorSess   `json:"sessions"`
	Cookies  []vectorCookie `json:"cookies"`
	Bad      []vectorBad    `json:"bad"`
}

type vectorSess struct {
	Comment             string       `json:"comment"`
	InitiatorPrivate    hexBytes     `json:"initiator_private"`
	InitiatorPublic     hexBytes     `json:"initiator_public"`
	ResponderPrivate    hexBytes     `json:"responder_private"`
	ResponderPublic     hexBytes     `json:"responder_public"`
	PresharedKey        hexBytes     `json:"preshared_key"`
	InitiatorEphemeral  hexBytes     `json:"initiator_ephemeral_private"`
	ResponderEphemeral  hexBytes     `json:"responder_ephemeral_private"`
	InitiatorIndex      uint32       `json:"initiator_index"`
	ResponderIndex      uint32       `json:"responder_index"`
	TimeUnixNano        int64        `json:"time_unix_nano"`
	Timestamp           hexBytes     `json:"timestamp"`
	Initiation          hexBytes     `json:"initiation"`
	Response            hexBytes     `json:"response"`
	InitiatorToResponse hexBytes     `json:"key_initiator_to_responder"`
	ResponderToInit     hexBytes     `json:"key_responder_to_initiator"`
	Data                []vectorData `json:"data"`
}

type vectorData struct {
	Comment string   `json:"comment"`
	From    string   `json:"from"`
	Counter uint64   `json:"counter"`
	Packet  hexBytes `json:"packet"`
	Message hexBytes `json:"message"`
}

type vectorCookie struct {
	Comment    string   `json:"comment"`
	Secret     hexBytes `json:"secret"`
	Source     hexBytes `json:"source"`
	Cookie     hexBytes `json:"cookie"`
	Nonce      hexBytes `json:"nonce"`
	Initiation hexBytes `json:"initiation"`
	Reply      hexBytes `json:"reply"`
	WithMAC2   hexBytes `json:"initiation_with_mac2"`
}

type vectorBad struct {
	Comment string   `json:"comment"`
	Message hexBytes `json:"message"`
	Error   string   `json:"error"`
}

var vectorErrors = map[string]error{"malformed": ErrMalformed, "auth": ErrAuth, "unknown-index": ErrUnknownIndex}

func seq(first byte, n int) hexBytes {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// derive fills in all that follows from a session's inputs.
func (v *vectorSess) derive(t *testing.T) {
	ii := must(newIdentity(key.PrivateFromRaw[key.Node](v.InitiatorPrivate.key())))
	ri := must(newIdentity(key.PrivateFromRaw[key.Node](v.ResponderPrivate.key())))
	psk := v.PresharedKey.key()
	ts := stampOf(time.Unix(0, v.TimeUnixNano))
	v.InitiatorPublic, v.ResponderPublic, v.Timestamp = ii.pub[:], ri.pub[:], ts[:]
	ss := must(dh(ii.priv, &ri.pub))
	eph := func(h hexBytes) *ecdh.PrivateKey { return must(ecdh.X25519().NewPrivateKey(h)) }

	var init [sizeInitiation]byte
	st := must(initiate(&init, ii, &ri.pub, &ss, eph(v.InitiatorEphemeral), v.InitiatorIndex, ts))
	putMACs(init[:], &ri.pub, nil)
	v.Initiation = init[:]

	var r responder
	if err := r.readStatic(&init, ri); err != nil || r.static != ii.pub {
		t.Fatal(err)
	}
	if got, err := r.readTimestamp(&init, &ss); err != nil || got != ts {
		t.Fatal(err)
	}
	var resp [sizeResponse]byte
	rk := must(r.respond(&resp, &psk, eph(v.ResponderEphemeral), v.ResponderIndex))
	putMACs(resp[:], &ii.pub, nil)
	v.Response = resp[:]

	ik := must(st.finish(&resp, ii, &psk))
	if ik.send != rk.recv || ik.recv != rk.send {
		t.Fatal("the two sides have different keys")
	}
	v.InitiatorToResponse, v.ResponderToInit = ik.send[:], ik.recv[:]
	for i := range v.Data {
		d := &v.Data[i]
		s := &session{remote: v.ResponderIndex, counter: d.Counter, send: newAEAD(&ik.send)}
		if d.From == "responder" {
			s.remote, s.send = v.InitiatorIndex, newAEAD(&rk.send)
		}
		n := (len(d.Packet) + 15) &^ 15
		m := make([]byte, n+sizeKeepalive)
		copy(m[sizeHeader:], d.Packet)
		sealAt(m, s, n)
		d.Message = m
	}
}

func (v *vectorCookie) derive(t *testing.T, s *vectorSess) {
	ri := must(newIdentity(key.PrivateFromRaw[key.Node](s.ResponderPrivate.key())))
	v.Initiation = s.Initiation
	cookie := mac(v.Secret, v.Source)
	v.Cookie = cookie[:]
	x := must(chacha20poly1305.NewX(ri.cookieKey[:]))
	mac1 := [16]byte(v.Initiation[iMAC1:])
	v.Reply = x.Seal(append(append([]byte{3, 0, 0, 0}, v.Initiation[4:8]...), v.Nonce...), v.Nonce, cookie[:], mac1[:])
	if got, err := openCookie((*[sizeCookie]byte)(v.Reply), &ri.pub, &mac1); err != nil || got != cookie {
		t.Fatal("the reply does not open")
	}
	v.WithMAC2 = bytes.Clone(v.Initiation)
	putMACs(v.WithMAC2, &ri.pub, &cookie)
	c := cookieMaker{secret: [32]byte(v.Secret), since: 1}
	if !c.checkMAC2(v.WithMAC2, v.Source, 1, defaultTiming.cookieRefresh) {
		t.Fatal("mac2 is not accepted")
	}
}

func freshVectors() *vectors {
	base := vectorSess{
		InitiatorPrivate: seq(0x01, 32), ResponderPrivate: seq(0x21, 32), PresharedKey: make(hexBytes, 32),
		InitiatorEphemeral: seq(0x41, 32), ResponderEphemeral: seq(0x61, 32),
		InitiatorIndex: 0x11223344, ResponderIndex: 0x55667788, TimeUnixNano: 1700000000123456789,
		Data: []vectorData{
			{Comment: "keepalive: the initiator confirms the session", From: "initiator", Counter: 0},
			{Comment: "40 bytes of IPv4, padded to 48", From: "initiator", Counter: 1, Packet: ip4(40, 1)},
			{Comment: "48 bytes of IPv6, no padding", From: "responder", Counter: 0, Packet: ip6(48)},
			{Comment: "a large counter", From: "responder", Counter: 1<<40 + 7, Packet: ip4(24, 2)},
		},
	}
	a, b := base, base
	a.Comment = "no preshared key, as on a tailnet"
	b.Comment = "with a preshared key"
	b.PresharedKey = seq(0xa0, 32)
	b.Data = append([]vectorData(nil), base.Data...)
	return &vectors{
		Comment: "WireGuard messages as docs/protocol/wireguard.md lays them out. Hex; numbers in messages are little-endian. " +
			"The private keys are given before clamping. The entries of bad are given to the responder of the first session, " +
			"right after it answered that session's initiation and got its first data message.",
		Sessions: []vectorSess{a, b},
		Cookies: []vectorCookie{{Comment: "cookie = mac(secret, source); the reply answers the first session's initiation",
			Secret: seq(0x80, 32), Source: []byte("\xc0\x00\x02\x01\xca\x6c"), Nonce: seq(0xc0, 24)}},
	}
}

func badOnes(v *vectors) []vectorBad {
	s := &v.Sessions[0]
	data := s.Data[1].Message
	flip := func(b hexBytes, at int) hexBytes { b = bytes.Clone(b); b[at] ^= 0x80; return b }
	remac := func(b hexBytes) hexBytes {
		pub := s.ResponderPublic.key()
		putMACs(b, &pub, nil)
		return b
	}
	return []vectorBad{
		{"empty", hexBytes{}, "malformed"},
		{"no such type", append(hexBytes{9}, data[1:]...), "malformed"},
		{"a reserved byte is set", flip(data, 1), "malformed"},
		{"initiation without its last byte", s.Initiation[:147], "malformed"},
		{"data shorter than header and tag", data[:31], "malformed"},
		{"initiation with a wrong mac1", flip(s.Initiation, iMAC1), "auth"},
		{"initiation with another ephemeral", remac(flip(s.Initiation, iEphemeral)), "auth"},
		{"initiation whose ephemeral is a point of low order", remac(append(append(bytes.Clone(s.Initiation[:iEphemeral]), make([]byte, 32)...), s.Initiation[iStatic:]...)), "auth"},
		{"initiation with another static", remac(flip(s.Initiation, iStatic)), "auth"},
		{"initiation with another timestamp", remac(flip(s.Initiation, iTimestamp)), "auth"},
		{"response to no initiation", append(append(bytes.Clone(s.Response[:rReceiver]), 1, 2, 3, 4), s.Response[rEphemeral:]...), "unknown-index"},
		{"cookie reply to no message", v.Cookies[0].Reply, "unknown-index"},
		{"data for another index", flip(data, 4), "unknown-index"},
		{"data with another counter", flip(data, 12), "auth"},
		{"data with a changed byte", flip(data, 20), "auth"},
		{"data with a changed tag", flip(data, len(data)-1), "auth"},
		{"data cut by 16", data[:len(data)-16], "auth"},
	}
}

func TestVectors(t *testing.T) {
	path := filepath.Join("..", "..", "testdata", "vectors", "wireguard.json")
	if *update {
		v := freshVectors()
		for i := range v.Sessions {
			v.Sessions[i].derive(t)
		}
		for i := range v.Cookies {
			v.Cookies[i].derive(t, &v.Sessions[0])
		}
		v.Bad = badOnes(v)
		b := must(json.MarshalIndent(v, "", "  "))
		if err := os.WriteFile(path, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var want, got vectors
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	json.Unmarshal(b, &got)
	for i := range got.Sessions {
		got.Sessions[i].derive(t)
	}
	for i := range got.Cookies {
		got.Cookies[i].derive(t, &got.Sessions[0])
	}
	if a, b := must(json.Marshal(want)), must(json.Marshal(got)); !bytes.Equal(a, b) {
		t.Errorf("the vectors differ from what we make of their inputs:\n%s\n%s", a, b)
	}
	if len(want.Sessions) < 2 || len(want.Bad) < 10 {
		t.Error("vectors are missing")
	}

	// The bad ones, to a device in the state that the comment describes.
	s := &want.Sessions[0]
	d := must(NewDevice(Config{PrivateKey: key.PrivateFromRaw[key.Node](s.ResponderPrivate.key())}))
	defer d.Close()
	p := must(d.AddPeer(key.NodePublicFromRaw(s.InitiatorPublic.key()), nowhere{}, nil))
	if _, _, err := d.Receive(nil, bytes.Clone(s.Initiation), nil); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.next.kill()
	k := keys{send: s.ResponderToInit.key(), recv: s.InitiatorToResponse.key()}
	p.next = newSession(p, s.ResponderIndex, s.InitiatorIndex, false, d.now(), &k)
	d.table.insert(p.next)
	p.mu.Unlock()
	if _, _, err := d.Receive(nil, bytes.Clone(s.Data[0].Message), nil); err != nil {
		t.Fatal(err)
	}
	for _, bad := range want.Bad {
		e := vectorErrors[bad.Error]
		if _, _, err := d.Receive(nil, bytes.Clone(bad.Message), nil); e == nil || !errors.Is(err, e) {
			t.Errorf("%s: %v, want %s", bad.Comment, err, bad.Error)
		}
	}
	if pkt, _, err := d.Receive(nil, bytes.Clone(s.Data[1].Message), nil); err != nil || !bytes.Equal(pkt, s.Data[1].Packet) {
		t.Errorf("the good one after them: %v", err)
	}
}

// TestInitialState checks the constants that every implementation starts from.
func TestInitialState(t *testing.T) {
	if hex.EncodeToString(initial.ck[:]) != "60e26daef327efc02ec335e2a025d2d016eb4206f87277f52d38d1988b78cd36" {
		t.Errorf("ck %x", initial.ck)
	}
	if want := blake2s.Sum256(append(bytes.Clone(initial.ck[:]), identifier...)); want != initial.h {
		t.Errorf("h %x", initial.h)
	}
}
