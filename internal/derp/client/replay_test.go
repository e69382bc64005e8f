package client

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"os"
	"testing"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
)

// TestReplayOfUpstreamRelay plays what upstream's relay once sent to upstream's client, as recorded by
// interop/derp with -update.
func TestReplayOfUpstreamRelay(t *testing.T) {
	text, err := os.ReadFile("../../../testdata/vectors/derp-flow.json")
	if err != nil {
		t.Fatal(err)
	}
	var flow struct {
		Server string `json:"server_to_client"`
	}
	if err := json.Unmarshal(text, &flow); err != nil {
		t.Fatal(err)
	}
	stream, err := hex.DecodeString(flow.Server)
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	go io.Copy(io.Discard, far)
	go func() { far.Write(stream); far.Close() }()
	rd := derp.NewReader(near, 0, nil)
	ft, p, err := rd.Next()
	if err != nil || ft != derp.ServerKey {
		t.Fatal(ft, err)
	}
	server, err := derp.ParseServerKey(p)
	if err != nil {
		t.Fatal(err)
	}
	priv := func(b byte) key.NodePrivate {
		return key.PrivateFromRaw[key.Node]([32]byte(bytes.Repeat([]byte{b}, 32)))
	}
	if server != priv(0x11).Public() {
		t.Error("another relay")
	}
	o := &Options{PrivateKey: priv(0x22)}
	bc := derp.NewBufConn(near)
	c := newConn(o, node("x"), bc, bc, rd, server, newOutbox())
	l := make(log, 100)
	c.Serve(l)
	if !c.ready.Load() {
		t.Error("the server info was not accepted")
	}
	var got []string
	for len(l) > 0 {
		if e := <-l; e.what != "flush" {
			got = append(got, e.what+" "+e.text)
		}
	}
	want := []string{"gone 1", "packet to the client", "gone 0"}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("got %q, want %q", got, want)
	}
}
