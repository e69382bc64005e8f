package derp

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"io"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

var update = flag.Bool("update", false, "write testdata/vectors/derp.json anew")

const vectorFile = "../../testdata/vectors/derp.json"

type vectors struct {
	Comment       string   `json:"comment"`
	ServerPrivate string   `json:"server_private"`
	ClientPrivate string   `json:"client_private"`
	PeerPublic    string   `json:"peer_public"`
	Frames        []vector `json:"frames"`
	Bad           []vector `json:"bad"`
}

type vector struct {
	Name    string `json:"name"`
	Comment string `json:"comment"`
	Frame   string `json:"frame"`
	Plain   string `json:"plain,omitempty"` // the JSON inside a sealed frame
	Err     string `json:"error,omitempty"`
}

var (
	serverPriv = key.PrivateFromRaw[key.Node]([32]byte(bytes.Repeat([]byte{0x11}, 32)))
	clientPriv = key.PrivateFromRaw[key.Node]([32]byte(bytes.Repeat([]byte{0x22}, 32)))
	peerPub    = key.NodePublicFromRaw([32]byte(bytes.Repeat([]byte{0x33}, 32)))
	clientJSON = ClientInfo{Version: 2, CanAckPings: true, AppName: "example"}
	serverJSON = ServerInfo{Version: 2, TokenBucketBytesPerSecond: 1000000, TokenBucketBytesBurst: 200000}
)

// frames builds one frame of every type a client or relay of ours sends or takes.
func frames(tb testing.TB) []vector {
	sealed := func(b []byte, err error) []byte {
		if err != nil {
			tb.Fatal(err)
		}
		return b
	}
	v := func(name, comment string, b []byte) vector {
		return vector{Name: name, Comment: comment, Frame: hex.EncodeToString(b)}
	}
	addr := netip.MustParseAddrPort("192.0.2.1:41641")
	out := []vector{
		v("ServerKey", "server to client, first on the connection: magic and the server's public key", AppendServerKey(nil, serverPriv.Public())),
		v("ClientInfo", "client to server: node key, nonce, NaCl box for the server key; the nonce is random", sealed(AppendClientInfo(nil, clientPriv, serverPriv.Public(), clientJSON))),
		v("ServerInfo", "server to client: nonce, NaCl box for the node key; the nonce is random", sealed(AppendServerInfo(nil, serverPriv, clientPriv.Public(), serverJSON))),
		v("SendPacket", "client to server: destination key, packet", AppendPacket(nil, SendPacket, peerPub, []byte("packet"))),
		v("RecvPacket", "server to client: source key, packet", AppendPacket(nil, RecvPacket, peerPub, []byte("packet"))),
		v("KeepAlive", "server to client", AppendHeader(nil, KeepAliveT, 0)),
		v("NotePreferred", "client to server: this relay is the client's home", AppendNotePreferred(nil, true)),
		v("NotePreferred off", "client to server: no longer", AppendNotePreferred(nil, false)),
		v("PeerGone disconnected", "server to client: reason 0", AppendPeerGone(nil, peerPub, GoneDisconnected)),
		v("PeerGone not here", "server to client: reason 1", AppendPeerGone(nil, peerPub, GoneNotHere)),
		v("PeerGone without reason", "older servers; reads as reason 0", AppendFrame(nil, PeerGone, peerPub.AppendTo(nil))),
		v("PeerPresent", "server to mesh client: key, 192.0.2.1 as IPv6, port 41641, regular", AppendPeerPresent(nil, peerPub, addr, PresentRegular)),
		v("Ping", "either way", AppendPing(nil, Ping, [8]byte{1, 2, 3, 4, 5, 6, 7, 8})),
		v("Pong", "the answer", AppendPing(nil, Pong, [8]byte{1, 2, 3, 4, 5, 6, 7, 8})),
		v("Health", "server to client: a problem", AppendFrame(nil, Health, []byte("duplicate"))),
		v("Health cleared", "server to client", AppendFrame(nil, Health, nil)),
		v("Restarting", "server to client: reconnect in 1.5 s, try for 10 s", AppendRestarting(nil, 1500*time.Millisecond, 10*time.Second)),
		v("unknown", "a frame of a type not known yet is skipped", AppendFrame(nil, 0x7f, []byte("later"))),
	}
	plain := func(x any) string { b, _ := json.Marshal(x); return string(b) }
	out[1].Plain, out[2].Plain = plain(clientJSON), plain(serverJSON)
	return out
}

func TestVectors(t *testing.T) {
	if *update {
		f := vectors{
			Comment:       "DERP frames, docs/protocol/derp.md. Private keys are raw Curve25519 scalars after clamping. Frames are whole: type, length, payload.",
			ServerPrivate: rawHex(serverPriv.Raw()), ClientPrivate: rawHex(clientPriv.Raw()), PeerPublic: rawHex(peerPub.Raw()),
			Frames: frames(t),
			Bad: []vector{
				{Name: "too large", Comment: "RecvPacket of 64 KiB + 65 bytes", Frame: hex.EncodeToString(AppendHeader(nil, RecvPacket, MaxPayload+1)), Err: "too large"},
				{Name: "huge unknown", Comment: "above what is skipped", Frame: hex.EncodeToString(AppendHeader(nil, 0x7f, maxSkip+1)), Err: "too large"},
				{Name: "cut in header", Comment: "the stream ends", Frame: "0500", Err: "unexpected EOF"},
				{Name: "cut in payload", Comment: "the stream ends", Frame: "120000000801", Err: "unexpected EOF"},
			},
		}
		b, _ := json.MarshalIndent(f, "", "  ")
		if err := os.WriteFile(vectorFile, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var f vectors
	if err := json.Unmarshal(text, &f); err != nil {
		t.Fatal(err)
	}
	built := frames(t)
	if len(f.Frames) != len(built) {
		t.Fatalf("%d vectors, want %d", len(f.Frames), len(built))
	}
	for i, v := range f.Frames {
		t.Run(v.Name, func(t *testing.T) {
			raw, err := hex.DecodeString(v.Frame)
			if err != nil {
				t.Fatal(err)
			}
			ft, p, err := NewReader(bytes.NewReader(raw), 0, nil).Next()
			if err != nil {
				t.Fatal(err)
			}
			switch ft { // those with a random nonce can only be opened
			case ClientInfoT:
				k, info, err := ParseClientInfo(serverPriv, p)
				if err != nil || k != clientPriv.Public() || info != clientJSON {
					t.Errorf("got %v %+v %v", k, info, err)
				}
			case ServerInfoT:
				info, err := ParseServerInfo(clientPriv, serverPriv.Public(), p)
				if err != nil || info != serverJSON {
					t.Errorf("got %+v %v", info, err)
				}
			default:
				if v.Frame != built[i].Frame {
					t.Errorf("we build %s", built[i].Frame)
				}
			}
			parsesBack(t, ft, p)
		})
	}
	for _, v := range f.Bad {
		t.Run(v.Name, func(t *testing.T) {
			raw, _ := hex.DecodeString(v.Frame)
			_, _, err := NewReader(bytes.NewReader(raw), 0, nil).Next()
			if err == nil || !bytes.Contains([]byte(err.Error()), []byte(v.Err)) {
				t.Errorf("got %v, want %s", err, v.Err)
			}
		})
	}
}

func rawHex(b [32]byte) string { return hex.EncodeToString(b[:]) }

// parsesBack checks the values that the vectors' comments state.
func parsesBack(t *testing.T, ft FrameType, p []byte) {
	t.Helper()
	ok := true
	var err error
	switch ft {
	case ServerKey:
		var k key.NodePublic
		k, err = ParseServerKey(p)
		ok = k == serverPriv.Public()
	case SendPacket, RecvPacket:
		var k key.NodePublic
		var rest []byte
		k, rest, err = CutKey(p)
		ok = k == peerPub && string(rest) == "packet"
	case PeerGone:
		var k key.NodePublic
		k, _, err = ParsePeerGone(p)
		ok = k == peerPub
	case PeerPresent:
		k, addr, flags, perr := ParsePeerPresent(p)
		err, ok = perr, k == peerPub && addr.String() == "192.0.2.1:41641" && flags == PresentRegular
	case Ping, Pong:
		var d [8]byte
		d, err = ParsePing(p)
		ok = d == [8]byte{1, 2, 3, 4, 5, 6, 7, 8}
	case Restarting:
		in, tryFor, perr := ParseRestarting(p)
		err, ok = perr, in == 1500*time.Millisecond && tryFor == 10*time.Second
	}
	if err != nil || !ok {
		t.Errorf("%v does not parse back: %v", ft, err)
	}
}

func FuzzReadFrame(f *testing.F) {
	for _, v := range frames(f) {
		raw, _ := hex.DecodeString(v.Frame)
		f.Add(raw)
	}
	f.Add(AppendHeader(nil, RecvPacket, MaxPayload+1))
	f.Add(AppendHeader(nil, 0x7f, 300_000))
	f.Add([]byte{0x05, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		// However the bytes are cut up, the same frames come out.
		whole := collect(NewReader(bytes.NewReader(data), 512, nil))
		bytewise := collect(NewReader(iotestOneByte{bytes.NewReader(data)}, 512, nil))
		if whole != bytewise {
			t.Fatalf("cut into bytes, %q reads differently", data)
		}
		half := len(data) / 2
		if pre := collect(NewReader(bytes.NewReader(data[half:]), 512, data[:half])); pre != whole {
			t.Fatalf("half of %q read before, it reads differently", data)
		}
		rd := NewReader(bytes.NewReader(data), 512, nil)
		for {
			_, p, err := rd.Next()
			if err != nil {
				break
			}
			// No parser may panic on any payload.
			ParseServerKey(p)
			ParseClientInfo(serverPriv, p)
			ParseServerInfo(clientPriv, serverPriv.Public(), p)
			ParsePeerGone(p)
			ParsePeerPresent(p)
			ParsePing(p)
			ParseRestarting(p)
			LooksLikeDisco(p)
		}
	})
}

type iotestOneByte struct{ r io.Reader }

func (o iotestOneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

// collect renders all frames of rd, and the error that ends them.
func collect(rd *Reader) string {
	var out []byte
	for {
		t, p, err := rd.Next()
		if err != nil {
			return string(out) + err.Error()
		}
		out = AppendFrame(out, t, p)
	}
}
