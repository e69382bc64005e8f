// Package disco checks our codec of discovery messages against upstream's, both ways round.
package disco

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"os"
	"testing"
	"time"

	"go4.org/mem"
	theirs "tailscale.com/disco"
	tkey "tailscale.com/types/key"

	ours "github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

func raw(b byte) (k [32]byte) {
	for i := range k {
		k[i] = b + byte(i)
	}
	return k
}

func theirDisco(b byte) tkey.DiscoPublic {
	k := raw(b)
	return tkey.DiscoPublicFromRaw32(mem.B(k[:]))
}

func ourDisco(b byte) key.DiscoPublic { return key.DiscoPublicFromRaw(raw(b)) }

func TestEncodingsAgree(t *testing.T) {
	tx := [12]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	nk := raw(9)
	eps := []netip.AddrPort{netip.MustParseAddrPort("1.2.3.4:567"), netip.MustParseAddrPort("[2001::3456]:789")}
	challenge := raw(0x40)
	tc := theirs.BindUDPRelayEndpointCommon{VNI: 1, Generation: 2, RemoteKey: theirDisco(4), Challenge: challenge}
	oc := ours.BindCommon{VNI: 1, Generation: 2, RemoteKey: ourDisco(4), Challenge: challenge}
	te := theirs.UDPRelayEndpoint{
		ServerDisco: theirDisco(1), ClientDisco: [2]tkey.DiscoPublic{theirDisco(2), theirDisco(3)},
		LamportID: 123, VNI: 456, BindLifetime: time.Second, SteadyStateLifetime: time.Minute, AddrPorts: eps,
	}
	oe := ours.RelayEndpoint{
		Server: ourDisco(1), Clients: [2]key.DiscoPublic{ourDisco(2), ourDisco(3)},
		LamportID: 123, VNI: 456, BindLifetime: time.Second, SteadyStateLifetime: time.Minute, Addrs: eps,
	}
	for _, tt := range []struct {
		name   string
		theirs theirs.Message
		ours   []byte
	}{
		{"ping", &theirs.Ping{TxID: tx, NodeKey: tkey.NodePublicFromRaw32(mem.B(nk[:])), Padding: 77},
			(&ours.Ping{TxID: tx, NodeKey: key.NodePublicFromRaw(nk), Padding: 77}).Append(nil)},
		{"old ping", &theirs.Ping{TxID: tx}, (&ours.Ping{TxID: tx}).Append(nil)},
		{"pong 4", &theirs.Pong{TxID: tx, Src: eps[0]}, (&ours.Pong{TxID: tx, Src: eps[0]}).Append(nil)},
		{"pong 6", &theirs.Pong{TxID: tx, Src: eps[1]}, (&ours.Pong{TxID: tx, Src: eps[1]}).Append(nil)},
		{"call-me-maybe", &theirs.CallMeMaybe{MyNumber: eps}, (&ours.CallMeMaybe{Endpoints: eps}).Append(nil)},
		{"call-me-maybe, empty", &theirs.CallMeMaybe{}, (&ours.CallMeMaybe{}).Append(nil)},
		{"bind", &theirs.BindUDPRelayEndpoint{BindUDPRelayEndpointCommon: tc}, oc.Append(nil, ours.TypeBindEndpoint)},
		{"challenge", &theirs.BindUDPRelayEndpointChallenge{BindUDPRelayEndpointCommon: tc}, oc.Append(nil, ours.TypeBindEndpointChallenge)},
		{"answer", &theirs.BindUDPRelayEndpointAnswer{BindUDPRelayEndpointCommon: tc}, oc.Append(nil, ours.TypeBindEndpointAnswer)},
		{"via", &theirs.CallMeMaybeVia{UDPRelayEndpoint: te}, (&ours.CallMeMaybeVia{RelayEndpoint: oe}).Append(nil)},
		{"request", &theirs.AllocateUDPRelayEndpointRequest{ClientDisco: te.ClientDisco, Generation: 7},
			(&ours.AllocateRequest{Clients: oe.Clients, Generation: 7}).Append(nil)},
		{"response", &theirs.AllocateUDPRelayEndpointResponse{Generation: 7, UDPRelayEndpoint: te},
			(&ours.AllocateResponse{Generation: 7, RelayEndpoint: oe}).Append(nil)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if want := tt.theirs.AppendMarshal(nil); !bytes.Equal(want, tt.ours) {
				t.Errorf("upstream writes %x\nwe write       %x", want, tt.ours)
			}
		})
	}
}

func TestGoldenVectorsAreUpstreams(t *testing.T) {
	b, err := os.ReadFile("../../testdata/vectors/disco.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct{ Comment, Plaintext string }
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	for _, v := range vectors {
		plain, err := hex.DecodeString(v.Plaintext)
		if err != nil {
			t.Fatal(err)
		}
		m, err := theirs.Parse(plain)
		if err != nil {
			t.Errorf("%s: %v", v.Comment, err)
			continue
		}
		if got := m.AppendMarshal(nil); !bytes.Equal(got, plain) {
			t.Errorf("%s: upstream writes %x", v.Comment, got)
		}
	}
}

func TestSealing(t *testing.T) {
	them, us := tkey.NewDisco(), key.NewDisco()
	theirPub := key.DiscoPublicFromRaw([32]byte(them.Public().AppendTo(nil)))
	ourPub := us.Public().Raw()
	theirShared := them.Shared(tkey.DiscoPublicFromRaw32(mem.B(ourPub[:])))
	ourShared := us.Shared(theirPub)
	ping := (&theirs.Ping{TxID: [12]byte{1}}).AppendMarshal(nil)

	sealed := them.Public().AppendTo([]byte(theirs.Magic))
	sealed = append(sealed, theirShared.Seal(ping)...)
	if from, ok := ours.Sender(sealed); !ok || from != theirPub {
		t.Errorf("sender %v, %v", from, ok)
	}
	if got, err := ours.Open(nil, &ourShared, sealed); err != nil || !bytes.Equal(got, ping) {
		t.Errorf("we open %x, %v", got, err)
	}

	sealed = ours.Seal(nil, us.Public(), &ourShared, ping)
	src, ok := theirs.Source(sealed)
	if !ok || !bytes.Equal(src, ourPub[:]) {
		t.Errorf("upstream sees sender %x, %v", src, ok)
	}
	if got, ok := theirShared.Open(sealed[len(theirs.Magic)+32:]); !ok || !bytes.Equal(got, ping) {
		t.Errorf("upstream opens %x, %v", got, ok)
	}
}
