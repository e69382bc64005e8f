package noise

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"io"
	"os"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
)

var update = flag.Bool("update", false, "write the golden vectors")

const vectorFile = "../../testdata/vectors/noise.json"

// vectors is testdata/vectors/noise.json. All byte strings are hex.
type vectors struct {
	Comment  string   `json:"comment"`
	Channels []vector `json:"channels"`
}

// vector is one channel: the keys of both ends, the handshake that they give, and records.
type vector struct {
	Comment           string   `json:"comment"`
	Version           uint16   `json:"version"`
	Machine           string   `json:"machine_private"`
	MachineEphemeral  string   `json:"machine_ephemeral_private"`
	Control           string   `json:"control_private"`
	ControlEphemeral  string   `json:"control_ephemeral_private"`
	ControlPublic     string   `json:"control_public"`
	Initiation        string   `json:"initiation"`
	Response          string   `json:"response"`
	HandshakeHash     string   `json:"handshake_hash"`
	ClientToServerKey string   `json:"client_to_server_key"`
	ServerToClientKey string   `json:"server_to_client_key"`
	ClientToServer    []record `json:"client_to_server"`
	ServerToClient    []record `json:"server_to_client"`
}

type record struct {
	Comment   string `json:"comment,omitempty"`
	Plaintext string `json:"plaintext"`
	Wire      string `json:"wire"` // the frames of one Write
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func private(t testing.TB, s string) key.MachinePrivate {
	return key.PrivateFromRaw[key.Machine]([32]byte(unhex(t, s)))
}

// fixed fills 32 bytes with one value, for keys that a reader can type.
func fixed(b byte) string { return hex.EncodeToString(bytes.Repeat([]byte{b}, 32)) }

func TestVectors(t *testing.T) {
	if *update {
		writeVectors(t)
	}
	raw, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var vs vectors
	if err := json.Unmarshal(raw, &vs); err != nil {
		t.Fatal(err)
	}
	if len(vs.Channels) == 0 {
		t.Fatal("no vectors")
	}
	for _, v := range vs.Channels {
		t.Run(v.Comment, func(t *testing.T) {
			got := compute(t, v)
			a, _ := json.Marshal(v)
			b, _ := json.Marshal(got)
			if !bytes.Equal(a, b) {
				t.Errorf("computed\n%s\nwant\n%s", b, a)
			}
		})
	}
}

// compute fills in what follows from v's keys, version and plaintexts.
func compute(t testing.TB, v vector) vector {
	control := private(t, v.Control)
	pub := control.Public().Raw()
	v.ControlPublic = hex.EncodeToString(pub[:])
	i, err := NewInitiator(private(t, v.Machine), control.Public(), v.Version, private(t, v.MachineEphemeral))
	if err != nil {
		t.Fatal(err)
	}
	v.Initiation = hex.EncodeToString(i.Message())
	r := NewResponder(control, private(t, v.ControlEphemeral))
	if err := r.Read(i.Message()); err != nil {
		t.Fatal(err)
	}
	if r.Peer() != private(t, v.Machine).Public() || r.Version() != v.Version {
		t.Error("the responder took the client for another")
	}
	resp, server, err := r.Finish()
	if err != nil {
		t.Fatal(err)
	}
	v.Response = hex.EncodeToString(resp)
	client, err := i.Finish(resp)
	if err != nil {
		t.Fatal(err)
	}
	if client.Hash != server.Hash || client.Send != server.Recv || client.Recv != server.Send {
		t.Error("the ends disagree")
	}
	v.HandshakeHash = hex.EncodeToString(client.Hash[:])
	v.ClientToServerKey = hex.EncodeToString(client.Send[:])
	v.ServerToClientKey = hex.EncodeToString(client.Recv[:])
	v.ClientToServer = records(t, client, server, v.ClientToServer)
	v.ServerToClient = records(t, server, client, v.ServerToClient)
	return v
}

// records writes the plaintexts from one end and checks that the other reads them.
func records(t testing.TB, from, to Session, in []record) []record {
	var wire, all bytes.Buffer
	w := NewConn(&half{w: &wire}, from)
	out := make([]record, len(in))
	var stream []byte
	for i, r := range in {
		p := unhex(t, r.Plaintext)
		wire.Reset()
		if _, err := w.Write(p); err != nil {
			t.Fatal(err)
		}
		all.Write(wire.Bytes())
		stream = append(stream, p...)
		r.Wire = hex.EncodeToString(wire.Bytes())
		out[i] = r
	}
	got, err := io.ReadAll(NewConn(&half{r: &all}, to))
	if err != nil || !bytes.Equal(got, stream) {
		t.Errorf("read back %x: %v", got, err)
	}
	return out
}

func writeVectors(t *testing.T) {
	long := bytes.Repeat([]byte("tailnode"), (MaxPlaintext+15)/8)
	vs := vectors{Comment: "Control's Noise channel (docs/protocol/control.md). Private keys are clamped before use. From the keys and the version " +
		"everything else follows; the wire form of a plaintext is what one write of it puts on the wire, in the given order."}
	for i, v := range []uint16{1, 119, 65535} {
		b := byte(i * 16)
		c := vector{
			Comment: map[uint16]string{1: "the lowest version", 119: "the version in use", 65535: "the highest version: five digits in the prologue"}[v],
			Version: v, Machine: fixed(b + 1), MachineEphemeral: fixed(b + 2), Control: fixed(b + 3), ControlEphemeral: fixed(b + 4),
			ClientToServer: []record{
				{Comment: "the first record has nonce 0", Plaintext: hex.EncodeToString([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))},
				{Comment: "nonce 1", Plaintext: "00"},
			},
			ServerToClient: []record{{Comment: "each direction has a key and nonces of its own", Plaintext: hex.EncodeToString([]byte("\xff\xff\xffTS\x00\x00\x00\x02{}"))}},
		}
		if v == 119 {
			c.ServerToClient = append(c.ServerToClient, record{Comment: "longer than one record: two of them", Plaintext: hex.EncodeToString(long[:MaxPlaintext+1])})
		}
		vs.Channels = append(vs.Channels, compute(t, c))
	}
	j, err := json.MarshalIndent(vs, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(vectorFile, append(j, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}
