package disco

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

var update = flag.Bool("update", false, "write the golden vectors again")

const vectorFile = "../../testdata/vectors/disco.json"

// vector is one golden message. See docs/protocol/disco.md.
type vector struct {
	Comment   string `json:"comment"`
	Plaintext string `json:"plaintext"`
	// A sealed message has these as well; the keys are raw.
	SenderPrivate   string `json:"sender_private,omitempty"`
	ReceiverPrivate string `json:"receiver_private,omitempty"`
	Sealed          string `json:"sealed,omitempty"`
}

func pattern(start byte) (k [key.Size]byte) {
	for i := range k {
		k[i] = start + byte(i)
	}
	return k
}

func discoKey(b byte) key.DiscoPublic { return key.DiscoPublicFromRaw(pattern(b)) }

func addrs(s ...string) (out []netip.AddrPort) {
	for _, a := range s {
		out = append(out, netip.MustParseAddrPort(a))
	}
	return out
}

var (
	tx       = TxID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	endpoint = RelayEndpoint{
		Server: discoKey(1), Clients: [2]key.DiscoPublic{discoKey(2), discoKey(3)},
		LamportID: 123, VNI: 456, BindLifetime: time.Second, SteadyStateLifetime: time.Minute,
		Addrs: addrs("1.2.3.4:567", "[2001::3456]:789"),
	}
	bind = BindCommon{VNI: 1, Generation: 2, RemoteKey: discoKey(4), Challenge: [ChallengeLen]byte(pattern(0x40))}
)

// messages are the plaintexts of the vectors, built, and how to read them back.
var messages = []struct {
	comment string
	build   []byte
	want    any
	parse   func(version byte, body []byte) (any, error)
}{
	{"ping with a node key", (&Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(pattern(9))}).Append(nil),
		Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(pattern(9))}, parsePing},
	{"ping with a node key and 3 bytes of padding", (&Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(pattern(9)), Padding: 3}).Append(nil),
		Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(pattern(9)), Padding: 3}, parsePing},
	{"ping of an old node, without a node key", (&Ping{TxID: tx}).Append(nil), Ping{TxID: tx}, parsePing},
	{"pong, IPv4", (&Pong{TxID: tx, Src: addrs("2.3.4.5:1234")[0]}).Append(nil),
		Pong{TxID: tx, Src: addrs("2.3.4.5:1234")[0]}, parsePong},
	{"pong, IPv6", (&Pong{TxID: tx, Src: addrs("[fed0::12]:6666")[0]}).Append(nil),
		Pong{TxID: tx, Src: addrs("[fed0::12]:6666")[0]}, parsePong},
	{"pong to a ping that came over relay region 12", (&Pong{TxID: tx, Src: addrs("127.3.3.40:12")[0]}).Append(nil),
		Pong{TxID: tx, Src: addrs("127.3.3.40:12")[0]}, parsePong},
	{"call-me-maybe without endpoints", (&CallMeMaybe{}).Append(nil), CallMeMaybe{}, parseCMM},
	{"call-me-maybe, IPv4 and IPv6", (&CallMeMaybe{Endpoints: addrs("1.2.3.4:567", "[2001::3456]:789")}).Append(nil),
		CallMeMaybe{Endpoints: addrs("1.2.3.4:567", "[2001::3456]:789")}, parseCMM},
	{"bind, client to peer relay", bind.Append(nil, TypeBindEndpoint), bind, parseBind},
	{"bind challenge, peer relay to client", bind.Append(nil, TypeBindEndpointChallenge), bind, parseBind},
	{"bind answer, client to peer relay", bind.Append(nil, TypeBindEndpointAnswer), bind, parseBind},
	{"call-me-maybe-via", (&CallMeMaybeVia{endpoint}).Append(nil), CallMeMaybeVia{endpoint}, parseVia},
	{"allocation request", (&AllocateRequest{Clients: endpoint.Clients, Generation: 7}).Append(nil),
		AllocateRequest{Clients: endpoint.Clients, Generation: 7}, parseAllocReq},
	{"allocation response", (&AllocateResponse{Generation: 7, RelayEndpoint: endpoint}).Append(nil),
		AllocateResponse{Generation: 7, RelayEndpoint: endpoint}, parseAllocResp},
}

func parsePing(_ byte, b []byte) (any, error)      { return ParsePing(b) }
func parsePong(_ byte, b []byte) (any, error)      { return ParsePong(b) }
func parseCMM(v byte, b []byte) (any, error)       { return ParseCallMeMaybe(v, b, nil), nil }
func parseBind(_ byte, b []byte) (any, error)      { return ParseBind(b) }
func parseVia(v byte, b []byte) (any, error)       { return ParseCallMeMaybeVia(v, b) }
func parseAllocReq(v byte, b []byte) (any, error)  { return ParseAllocateRequest(v, b) }
func parseAllocResp(v byte, b []byte) (any, error) { return ParseAllocateResponse(v, b) }
func private(b byte) key.DiscoPrivate              { return key.PrivateFromRaw[key.Disco](pattern(b)) }
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestVectors(t *testing.T) {
	if *update {
		var out []vector
		for _, m := range messages {
			out = append(out, vector{Comment: m.comment, Plaintext: hex.EncodeToString(m.build)})
		}
		a, b := private(0x10), private(0x50)
		shared := a.Shared(b.Public())
		araw, braw := a.Raw(), b.Raw()
		sealed := Seal(nil, a.Public(), &shared, messages[0].build)
		out = append(out, vector{
			Comment: "the first ping, sealed", Plaintext: hex.EncodeToString(messages[0].build),
			SenderPrivate: hex.EncodeToString(araw[:]), ReceiverPrivate: hex.EncodeToString(braw[:]),
			Sealed: hex.EncodeToString(sealed),
		})
		j, _ := json.MarshalIndent(out, "", "\t")
		if err := os.WriteFile(vectorFile, append(j, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(raw, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) != len(messages)+1 {
		t.Fatalf("%d vectors, want %d", len(vectors), len(messages)+1)
	}
	for i, m := range messages {
		t.Run(m.comment, func(t *testing.T) {
			v := vectors[i]
			want := unhex(t, v.Plaintext)
			if v.Comment != m.comment || !bytes.Equal(m.build, want) {
				t.Fatalf("%s: built %x, want %x", v.Comment, m.build, want)
			}
			typ, version, body, err := Split(want)
			if err != nil || version != 0 || typ.String() == "unknown" {
				t.Fatalf("%v, version %d, %v", typ, version, err)
			}
			got, err := m.parse(version, body)
			if err != nil || !reflect.DeepEqual(got, m.want) {
				t.Errorf("read %+v, %v\nwant %+v", got, err, m.want)
			}
		})
	}
	v := vectors[len(messages)]
	recv := key.PrivateFromRaw[key.Disco]([key.Size]byte(unhex(t, v.ReceiverPrivate)))
	send := key.PrivateFromRaw[key.Disco]([key.Size]byte(unhex(t, v.SenderPrivate)))
	sealed := unhex(t, v.Sealed)
	from, ok := Sender(sealed)
	if !ok || from != send.Public() {
		t.Fatalf("sender %v, %v", from, ok)
	}
	shared := recv.Shared(from)
	if got, err := Open(nil, &shared, sealed); err != nil || hex.EncodeToString(got) != v.Plaintext {
		t.Errorf("opened %x, %v", got, err)
	}
}

func TestSealedMessageRejected(t *testing.T) {
	a, b, c := key.NewDisco(), key.NewDisco(), key.NewDisco()
	ab, bc := a.Shared(b.Public()), b.Shared(c.Public())
	good := Seal(nil, a.Public(), &ab, (&Ping{TxID: tx}).Append(nil))
	change := func(i int) []byte {
		x := bytes.Clone(good)
		x[i] ^= 1
		return x
	}
	for _, tt := range []struct {
		name   string
		shared *key.Shared
		b      []byte
		want   error
	}{
		{"empty", &ab, nil, ErrNotDisco},
		{"short", &ab, good[:Overhead-1], ErrNotDisco},
		{"magic", &ab, change(0), ErrNotDisco},
		{"nonce", &ab, change(HeaderLen), key.ErrOpen},
		{"tag", &ab, change(HeaderLen + nonceLen), key.ErrOpen},
		{"last byte", &ab, change(len(good) - 1), key.ErrOpen},
		{"cut", &ab, good[:len(good)-1], key.ErrOpen},
		{"another's key", &bc, good, key.ErrOpen},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Open(nil, tt.shared, tt.b); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestBadPlaintexts(t *testing.T) {
	for _, n := range []int{0, 1} {
		if _, _, _, err := Split(make([]byte, n)); !errors.Is(err, ErrShort) {
			t.Errorf("plaintext of %d bytes: %v", n, err)
		}
	}
	for _, tt := range []struct {
		name  string
		parse func(byte, []byte) (any, error)
		ver   byte
		n     int
		want  error
	}{
		{"ping", parsePing, 0, TxIDLen - 1, ErrShort},
		{"ping with half a key: padding", parsePing, 0, TxIDLen + 5, nil},
		{"pong", parsePong, 0, pongLen - 1, ErrShort},
		{"pong, longer", parsePong, 0, pongLen + 9, nil},
		{"bind", parseBind, 0, commonLen - 1, ErrShort},
		{"allocation request", parseAllocReq, 0, allocReqLen - 1, ErrShort},
		{"allocation request, version", parseAllocReq, 1, allocReqLen, ErrVersion},
		{"allocation response, empty", parseAllocResp, 0, 3, ErrShort},
		{"allocation response without addresses", parseAllocResp, 0, 4 + endpointLen, ErrShort},
		{"allocation response with half an address", parseAllocResp, 0, 4 + endpointLen + addrPortLen + 1, ErrShort},
		{"allocation response, version", parseAllocResp, 9, 4 + endpointLen + addrPortLen, ErrVersion},
		{"via without addresses", parseVia, 0, endpointLen, ErrShort},
		{"via, version", parseVia, 1, endpointLen + addrPortLen, ErrVersion},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := tt.parse(tt.ver, make([]byte, tt.n)); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	if m := ParseCallMeMaybe(0, make([]byte, addrPortLen+1), nil); m.Endpoints != nil {
		t.Errorf("uneven call-me-maybe: %v", m)
	}
	if m := ParseCallMeMaybe(1, make([]byte, addrPortLen), nil); m.Endpoints != nil {
		t.Errorf("call-me-maybe of another version: %v", m)
	}
	if m := ParseCallMeMaybe(0, make([]byte, 3000*addrPortLen), nil); len(m.Endpoints) != MaxEndpoints || cap(m.Endpoints) > MaxEndpoints {
		t.Errorf("%d endpoints", len(m.Endpoints))
	}
	if Type(0x77).String() != "unknown" {
		t.Error("unknown type has a name")
	}
}

func TestPaddingLengths(t *testing.T) {
	for _, n := range []int{0, 1, 127, 128, 129, 8972} {
		b := (&Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(pattern(1)), Padding: n}).Append(nil)
		if len(b) != PlainHeaderLen+PingLen+n || strings.Trim(string(b[PlainHeaderLen+PingLen:]), "\x00") != "" {
			t.Errorf("padding %d: %d bytes", n, len(b))
		}
		if m, err := ParsePing(b[PlainHeaderLen:]); err != nil || m.Padding != n {
			t.Errorf("padding %d: %+v, %v", n, m, err)
		}
	}
}

func TestAllocations(t *testing.T) {
	shared := key.NewDisco().Shared(key.NewDisco().Public())
	from := discoKey(1)
	ping := Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(pattern(1))}
	plain, out, back := make([]byte, 0, 512), make([]byte, 0, 512), make([]byte, 0, 512)
	if n := testing.AllocsPerRun(100, func() {
		plain = ping.Append(plain[:0])
		out = Seal(out[:0], from, &shared, plain)
		back, _ = Open(back[:0], &shared, out)
		_, _, body, _ := Split(back)
		if m, err := ParsePing(body); err != nil || m.TxID != tx {
			t.Fatal(m, err)
		}
	}); n > 2 { // the nonces: box wants them by pointer
		t.Errorf("%v allocations", n)
	}
}

func FuzzParse(f *testing.F) {
	for _, m := range messages {
		f.Add(m.build)
	}
	f.Add([]byte{9, 0, 0, 0, 0, 1})
	f.Add([]byte{0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		typ, version, body, err := Split(b)
		if err != nil {
			return
		}
		// What is read can be written, and is then read the same.
		var again []byte
		switch typ {
		case TypePing:
			if m, err := ParsePing(body); err == nil {
				again = m.Append(nil)
				if len(again) != len(b) && !m.NodeKey.IsZero() {
					t.Fatalf("%d bytes became %d", len(b), len(again))
				}
			}
		case TypePong:
			if m, err := ParsePong(body); err == nil {
				again = m.Append(nil)
				if x, _ := ParsePong(again[2:]); x != m {
					t.Fatalf("%+v became %+v", m, x)
				}
			}
		case TypeCallMeMaybe:
			m := ParseCallMeMaybe(version, body, nil)
			again = m.Append(nil)
			if x := ParseCallMeMaybe(0, again[2:], nil); !reflect.DeepEqual(x, m) {
				t.Fatalf("%+v became %+v", m, x)
			}
		case TypeBindEndpoint, TypeBindEndpointChallenge, TypeBindEndpointAnswer:
			if m, err := ParseBind(body); err == nil && !bytes.Equal(m.Append(nil, typ)[2:], body[:commonLen]) {
				t.Fatal("bind changed")
			}
		case TypeCallMeMaybeVia:
			if m, err := ParseCallMeMaybeVia(version, body); err == nil {
				if x, err := ParseCallMeMaybeVia(0, m.Append(nil)[2:]); err != nil || !reflect.DeepEqual(x, m) {
					t.Fatalf("%+v became %+v, %v", m, x, err)
				}
			}
		case TypeAllocateRequest:
			if m, err := ParseAllocateRequest(version, body); err == nil && !bytes.Equal(m.Append(nil)[2:], body[:allocReqLen]) {
				t.Fatal("request changed")
			}
		case TypeAllocateResponse:
			if m, err := ParseAllocateResponse(version, body); err == nil {
				if g := binary.BigEndian.Uint32(body); g != m.Generation || len(m.Addrs) > MaxEndpoints {
					t.Fatal("response changed")
				}
			}
		}
	})
}

func FuzzOpen(f *testing.F) {
	a, b := private(0x10), private(0x50)
	shared := a.Shared(b.Public())
	f.Add(Seal(nil, a.Public(), &shared, messages[0].build))
	f.Add([]byte(Magic))
	f.Fuzz(func(t *testing.T, p []byte) {
		_, ok := Sender(p)
		if _, err := Open(nil, &shared, p); err == nil && !ok {
			t.Fatal("opened what is not disco")
		}
	})
}
