package relay

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/derp/client"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type packet struct {
	src  key.NodePublic
	data string
}

// sink is a client.Handler that passes on what it gets.
type sink struct {
	packets chan packet
	gone    chan key.NodePublic
	state   chan bool
}

func newSink() *sink {
	return &sink{make(chan packet, 100), make(chan key.NodePublic, 100), make(chan bool, 100)}
}
func (s *sink) Packet(_ int, src key.NodePublic, b []byte)  { s.packets <- packet{src, string(b)} }
func (s *sink) Flush(int)                                   {}
func (s *sink) PeerGone(_ int, peer key.NodePublic, _ byte) { s.gone <- peer }
func (s *sink) State(_ int, connected bool, _ error)        { s.state <- connected }

func derpMap(s *Server, id int) *tailcfg.DERPMap {
	r := s.Region(id)
	out := &tailcfg.DERPRegion{RegionID: id, RegionCode: r.RegionCode}
	for _, n := range r.Nodes {
		out.Nodes = append(out.Nodes, &tailcfg.DERPNode{Name: n.Name, RegionID: id, HostName: n.HostName, CertName: n.CertName,
			IPv4: n.IPv4, IPv6: n.IPv6, STUNPort: n.STUNPort, DERPPort: n.DERPPort})
	}
	return &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{id: out}}
}

func within[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(10 * time.Second):
		t.Fatalf("no %s", what)
	}
	return v
}

func TestRelayBetweenTwoNodes(t *testing.T) {
	s := &Server{Addr: "127.0.0.1:0"}
	if err := s.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	join := func() (key.NodePublic, *client.Regions, *sink) {
		k, h := key.NewNode(), newSink()
		rs := client.NewRegions(client.RegionsConfig{PrivateKey: k, Handler: h})
		t.Cleanup(rs.Close)
		rs.SetMap(derpMap(s, 1))
		rs.SetHome(1)
		if !within(t, "connection", h.state) {
			t.Fatal("not connected:", rs.Stats()[0].Err)
		}
		return k.Public(), rs, h
	}
	ka, a, ha := join()
	kb, b, hb := join()
	if err := a.Send(1, kb, []byte("onetwothree!"), 3); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one", "two", "thr", "ee!"} {
		if got := within(t, "packet", hb.packets); got != (packet{ka, want}) {
			t.Errorf("got %q, want %q", got.data, want)
		}
	}
	if err := b.Send(1, ka, []byte("back"), 0); err != nil {
		t.Fatal(err)
	}
	if got := within(t, "packet", ha.packets); got != (packet{kb, "back"}) {
		t.Errorf("got %q", got.data)
	}
	if _, err := a.Ping(t.Context(), 1); err != nil {
		t.Error(err)
	}
	b.Close()
	if got := within(t, "peer gone", ha.gone); got != kb {
		t.Errorf("gone: %v", got)
	}
	if _, gone := a.Gone(1, kb); !gone {
		t.Error("that the peer is gone was not learned")
	}
}
