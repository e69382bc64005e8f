package disco

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"
)

const geneveVectors = "../../testdata/vectors/geneve.json"

// geneveVector is one header, or with Bad something that must not be taken for one.
type geneveVector struct {
	Comment  string   `json:"comment"`
	Packet   string   `json:"packet"`
	Bad      bool     `json:"bad,omitempty"`
	VNI      uint32   `json:"vni,omitempty"`
	Protocol Protocol `json:"protocol,omitempty"`
	Control  bool     `json:"control,omitempty"`
}

func TestGeneveVectors(t *testing.T) {
	b, err := os.ReadFile(geneveVectors)
	if err != nil {
		t.Fatal(err)
	}
	var vs []geneveVector
	if err := json.Unmarshal(b, &vs); err != nil {
		t.Fatal(err)
	}
	for _, v := range vs {
		pkt, err := hex.DecodeString(v.Packet)
		if err != nil {
			t.Fatal(err)
		}
		g, ok := ParseGeneve(pkt)
		want := Geneve{VNI: v.VNI, Protocol: v.Protocol, Control: v.Control}
		switch {
		case ok == v.Bad:
			t.Errorf("%s: taken %v", v.Comment, ok)
		case ok && g != want:
			t.Errorf("%s: %+v", v.Comment, g)
		case ok && !bytes.Equal(want.Append(nil), pkt[:GeneveLen]):
			t.Errorf("%s: written as %x", v.Comment, want.Append(nil))
		}
	}
}

func FuzzGeneve(f *testing.F) {
	f.Add([]byte{0, 0x80, 0x7a, 0x11, 1, 2, 3, 0, 9})
	f.Add([]byte{0, 0, 0x7a, 0x12, 0xff, 0xff, 0xff, 0})
	f.Add([]byte("TS\xf0\x9f\x92\xac..."))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, ok := ParseGeneve(b)
		if !ok {
			return
		}
		if Is(b) || g.VNI > MaxVNI || !bytes.Equal(g.Append(nil), b[:GeneveLen]) {
			t.Errorf("%x: %+v", b, g)
		}
	})
}
