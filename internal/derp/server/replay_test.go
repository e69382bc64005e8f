package server

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
)

// TestReplayOfUpstreamClient plays what upstream's client once sent to upstream's relay, as recorded by
// interop/derp with -update, and expects the frames that relay sent.
func TestReplayOfUpstreamClient(t *testing.T) {
	text, err := os.ReadFile("../../../testdata/vectors/derp-flow.json")
	if err != nil {
		t.Fatal(err)
	}
	var flow struct {
		Client string `json:"client_to_server"`
		Server string `json:"server_to_client"`
	}
	if err := json.Unmarshal(text, &flow); err != nil {
		t.Fatal(err)
	}
	up, err1 := hex.DecodeString(flow.Client)
	down, err2 := hex.DecodeString(flow.Server)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	priv := func(b byte) key.NodePrivate {
		return key.PrivateFromRaw[key.Node]([32]byte(bytes.Repeat([]byte{b}, 32)))
	}
	run(t, Config{PrivateKey: priv(0x11)}, func(t *testing.T, s *Server) {
		b := join(t, s, priv(0x33))
		a := dial(t, s, priv(0x22))
		go a.nc.Write(up)
		recorded := derp.NewReader(bytes.NewReader(down), 0, nil)
		for {
			want, wp, err := recorded.Next()
			if err != nil {
				break
			}
			switch want { // what the peer did at this point
			case derp.RecvPacket:
				b.wantPacket(a.pub, "from the client")
				b.send(a.pub, "to the client")
			case derp.PeerGone:
				if wp[32] == derp.GoneDisconnected {
					b.nc.Close()
				}
			}
			got, gp := a.next()
			if want == derp.ServerInfoT { // under a random nonce
				wp, gp = nil, nil
			}
			if got != want || !bytes.Equal(gp, wp) {
				t.Errorf("got %v %x, want %v %x", got, gp, want, wp)
			}
		}
	})
}
