package key

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestPrivateNeverPrints(t *testing.T) {
	p := NewNode()
	text, err := p.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	secret := strings.TrimPrefix(string(text), privPrefix)
	var buf bytes.Buffer
	slog.New(slog.NewTextHandler(&buf, nil)).Info("key", "k", p, "in", struct{ K NodePrivate }{p})
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		fmt.Fprintf(&buf, verb, p)
		fmt.Fprintf(&buf, verb, &p)
		fmt.Fprintf(&buf, verb, struct{ K NodePrivate }{p})
	}
	got := strings.ToLower(buf.String())
	raw := p.Raw()
	for _, leak := range []string{secret, secret[:16], fmt.Sprint(raw[:4])[1:8]} {
		if strings.Contains(got, leak) {
			t.Errorf("output holds part of the private key")
		}
	}
	if !strings.Contains(got, "redacted") {
		t.Error("output does not say that the key was redacted")
	}
}

func TestText(t *testing.T) {
	var raw [Size]byte
	for i := range raw {
		raw[i] = byte(i)
	}
	const want = "nodekey:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	p := NodePublicFromRaw(raw)
	if p.String() != want {
		t.Errorf("String = %q, want %q", p, want)
	}
	if got := p.ShortString(); got != "[AAECA]" {
		t.Errorf("ShortString = %q", got)
	}
	got, err := ParseNodePublic(want)
	if err != nil || got != p {
		t.Errorf("ParseNodePublic = %v, %v", got, err)
	}
	for _, bad := range []string{"", "nodekey:", "mkey:" + want[8:], want + "0", want[:len(want)-1], want[:len(want)-1] + "g", want[8:]} {
		if _, err := ParseNodePublic(bad); err == nil {
			t.Errorf("ParseNodePublic(%q) gave no error", bad)
		}
	}
	m := map[NodePublic]int{p: 1}
	j, err := json.Marshal(m)
	if err != nil || !strings.Contains(string(j), want) {
		t.Errorf("as a JSON map key: %s, %v", j, err)
	}
}

func TestSealOpen(t *testing.T) {
	a, b, c := NewDisco(), NewDisco(), NewDisco()
	msg := []byte("hello")
	sealed := a.Seal(b.Public(), msg)
	if got, err := b.Open(a.Public(), sealed); err != nil || !bytes.Equal(got, msg) {
		t.Fatalf("Open = %q, %v", got, err)
	}
	if _, err := c.Open(a.Public(), sealed); err != ErrOpen {
		t.Errorf("opened by the wrong key: %v", err)
	}
	s, r := a.Shared(b.Public()), b.Shared(a.Public())
	got, err := r.AppendOpen([]byte("x"), s.AppendSeal(nil, msg))
	if err != nil || string(got) != "xhello" {
		t.Errorf("AppendOpen = %q, %v", got, err)
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if _, err := b.Open(a.Public(), bad); err == nil {
			t.Fatalf("a change of byte %d was not noticed", i)
		}
		if _, err := b.Open(a.Public(), sealed[:i]); err == nil {
			t.Fatalf("a cut at byte %d was not noticed", i)
		}
	}
}

func TestDH(t *testing.T) {
	a, b := NewMachine(), NewMachine()
	ab, err1 := a.DH(b.Public())
	ba, err2 := b.DH(a.Public())
	if err1 != nil || err2 != nil || ab != ba {
		t.Fatal("the two sides do not agree")
	}
	if _, err := a.DH(MachinePublic{}); err != ErrLowOrder {
		t.Errorf("DH with the zero point: %v", err)
	}
}

func FuzzPublicUnmarshalText(f *testing.F) {
	f.Add([]byte("nodekey:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"))
	f.Add([]byte("nodekey:"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p NodePublic
		if p.UnmarshalText(b) == nil {
			again, _ := p.MarshalText()
			if !strings.EqualFold(string(again), string(b)) {
				t.Errorf("%q came back as %q", b, again)
			}
		}
	})
}
