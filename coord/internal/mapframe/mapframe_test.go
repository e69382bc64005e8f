package mapframe

import (
	"encoding/binary"
	"encoding/json"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestBytes(t *testing.T) {
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	for name, f := range map[string]*Frame{
		`{"KeepAlive":true}`:                       {Base: tailcfg.MapResponse{KeepAlive: true}},
		`{"Peers":[{"ID":1},{"ID":2}]}`:            {List: "Peers", Peers: [][]byte{[]byte(`{"ID":1}`), []byte(`{"ID":2}`)}},
		`{"Domain":"x","PeersChanged":[{"ID":1}]}`: {Base: tailcfg.MapResponse{Domain: "x"}, List: "PeersChanged", Peers: [][]byte{[]byte(`{"ID":1}`)}},
	} {
		for _, compress := range []bool{false, true} {
			b, err := f.Bytes(compress)
			if err != nil {
				t.Fatal(err)
			}
			if n := int(binary.LittleEndian.Uint32(b)); n != len(b)-4 {
				t.Errorf("%s: length %d of %d", name, n, len(b)-4)
			}
			got := b[4:]
			if compress {
				if got, err = dec.DecodeAll(got, nil); err != nil {
					t.Fatal(err)
				}
			}
			if string(got) != name || !json.Valid(got) {
				t.Errorf("got %s, want %s", got, name)
			}
		}
	}
}

func TestOrNil(t *testing.T) {
	for _, f := range []*Frame{{}, {List: "PeersChanged"}} {
		if f.OrNil() != nil {
			t.Errorf("%+v says something", f)
		}
	}
	for _, f := range []*Frame{{List: "Peers"}, {Base: tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{1}}}, {List: "PeersChanged", Peers: [][]byte{[]byte(`{}`)}}} {
		if f.OrNil() == nil {
			t.Errorf("%+v says nothing", f)
		}
	}
}
