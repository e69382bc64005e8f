package stun

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"testing"
)

type message struct {
	Comment, Kind, Hex, Tx, Addr, Error string
	Build                               bool
}

func load(tb testing.TB) []message {
	text, err := os.ReadFile("../../testdata/vectors/stun.json")
	if err != nil {
		tb.Fatal(err)
	}
	var f struct{ Messages []message }
	if err := json.Unmarshal(text, &f); err != nil {
		tb.Fatal(err)
	}
	return f.Messages
}

func TestVectors(t *testing.T) {
	sentinel := map[string]error{"": nil, "software": ErrSoftware, "malformed": ErrMalformed, "not response": ErrNotResponse,
		"not request": ErrNotRequest, "not STUN": ErrNotSTUN, "fingerprint": ErrFingerprint}
	for _, m := range load(t) {
		t.Run(m.Comment, func(t *testing.T) {
			b, err := hex.DecodeString(m.Hex)
			if err != nil {
				t.Fatal(err)
			}
			want, ok := sentinel[m.Error]
			if !ok {
				t.Fatalf("unknown error %q", m.Error)
			}
			var tx TxID
			var addr netip.AddrPort
			if m.Kind == "request" {
				tx, err = ParseRequest(b)
			} else {
				tx, addr, err = ParseResponse(b)
			}
			if !errors.Is(err, want) {
				t.Fatalf("got %v, want %v", err, want)
			}
			if err != nil {
				return
			}
			if got := hex.EncodeToString(tx[:]); got != m.Tx {
				t.Errorf("transaction %s", got)
			}
			if m.Addr != "" && addr.String() != m.Addr {
				t.Errorf("address %v", addr)
			}
			if m.Build {
				built := AppendResponse(nil, tx, addr)
				if m.Kind == "request" {
					built = AppendRequest(nil, tx)
				}
				if got := hex.EncodeToString(built); got != m.Hex {
					t.Errorf("we build %s", got)
				}
			}
		})
	}
}

// The fingerprints of RFC 5769 come out of our CRC.
func TestFingerprintOfRFC5769(t *testing.T) {
	for _, m := range load(t)[:3] {
		b, _ := hex.DecodeString(m.Hex)
		n := len(b) - fingerprintLen
		if got, want := fingerprint(b[:n]), binary.BigEndian.Uint32(b[n+4:]); got != want {
			t.Errorf("%s: %08x, want %08x", m.Comment, got, want)
		}
	}
}

// What answers must not be longer than what asked, or spoofed requests would pay off.
func TestNoAmplification(t *testing.T) {
	for _, a := range []string{"[2001:db8::1]:65535", "192.0.2.1:1", "[::ffff:192.0.2.1]:1"} {
		if r := AppendResponse(nil, NewTxID(), netip.MustParseAddrPort(a)); len(r) > RequestLen+4 {
			t.Errorf("%s: answer of %d bytes to a request of %d", a, len(r), RequestLen)
		}
	}
	if r := AppendResponse(nil, TxID{}, netip.AddrPort{}); r != nil {
		t.Error("an answer without address")
	}
}

func TestMappedV4ReadsAsV4(t *testing.T) {
	tx := NewTxID()
	_, addr, err := ParseResponse(AppendResponse(nil, tx, netip.MustParseAddrPort("[::ffff:192.0.2.1]:9")))
	if err != nil || addr != netip.MustParseAddrPort("192.0.2.1:9") {
		t.Errorf("%v %v", addr, err)
	}
}

func FuzzParse(f *testing.F) {
	for _, m := range load(f) {
		b, _ := hex.DecodeString(m.Hex)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if tx, err := ParseRequest(b); err == nil {
			if again, err := ParseRequest(b); err != nil || again != tx {
				t.Error("not stable")
			}
		}
		if tx, addr, err := ParseResponse(b); err == nil {
			tx2, addr2, err := ParseResponse(AppendResponse(nil, tx, addr))
			if err != nil || tx2 != tx || addr2 != addr {
				t.Errorf("%v %v does not survive: %v %v %v", tx, addr, tx2, addr2, err)
			}
		}
	})
}
