package datapath

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// discoInUse returns the key with which e seals what it sends to the peer.
func (e *end) discoInUse(peer *end) key.DiscoPublic {
	t := e.trans.Load()
	t.saidMu.Lock()
	defer t.saidMu.Unlock()
	return t.discoOf(e.Netmap().PeerByKey(peer.key.Public()))
}

// TestDiscoKeyFromThePeer: a peer's word through the session counts until control says something new.
func TestDiscoKeyFromThePeer(t *testing.T) {
	a, b := newPair(t)
	if _, _, err := a.PingTSMP(within(t, time.Minute), b.a4); err != nil { // a session
		t.Fatal(err)
	}
	tr := a.trans.Load()
	p := tr.known(b.key.Public())
	older, newer := b.disco.Public(), key.NewDisco().Public()
	say := func(k key.DiscoPublic) {
		tr.saidMu.Lock()
		p.said.at = time.Time{} // the pace is another test's
		tr.saidMu.Unlock()
		pkt, err := packet.AppendTSMPDisco(nil, b.a4, a.a4, k)
		if err != nil {
			t.Fatal(err)
		}
		var h packet.Parsed
		if err := h.Decode(pkt); err != nil {
			t.Fatal(err)
		}
		a.intercept(p, &h)
	}
	check := func(what string, want key.DiscoPublic) {
		t.Helper()
		if got := a.discoInUse(b); got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	check("at first", older)
	say(key.DiscoPublic{})
	check("a zero key", older)
	say(newer)
	check("told", newer)
	n := b.node()
	n.Endpoints = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:1")}
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	check("control has not heard of it", newer)
	n = b.node()
	n.DiscoKey = newer
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	check("control has", newer)
	if !p.wg.HasSession() {
		t.Error("the session is being renewed")
	}
	n = b.node() // and back: that is control's word now
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	check("control's word", older)
	say(newer)
	third := key.NewDisco().Public()
	a.tell(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: n.ID, DiscoKey: &third}}})
	check("control's patch", third)
}

// TestDiscoKeyFlood: a peer that tells ever new keys costs no more than a few.
func TestDiscoKeyFlood(t *testing.T) {
	a, b := newPair(t)
	if _, _, err := a.PingTSMP(within(t, time.Minute), b.a4); err != nil {
		t.Fatal(err)
	}
	tr := a.trans.Load()
	p := tr.known(b.key.Public())
	first := key.NewDisco().Public()
	tr.learn(p, first)
	tr.saidMu.Lock()
	p.said.at = time.Now().Add(time.Hour) // no time passes
	tr.saidMu.Unlock()
	for range 100 {
		tr.learn(p, key.NewDisco().Public())
	}
	if got := a.discoInUse(b); got != first {
		t.Errorf("%v, want %v", got, first)
	}
}

// TestDiscoKeyIsTold: a ping inside the tunnel tells the peer this node's key, and where control wants it, a
// call-me-maybe does; not otherwise, and not again and again.
func TestDiscoKeyIsTold(t *testing.T) {
	a, b := newPair(t)
	told := func() key.DiscoPublic { // a ping may overtake the key, by another path
		for end := time.Now().Add(time.Minute); ; {
			if _, _, err := a.PingTSMP(within(t, time.Minute), b.a4); err != nil {
				t.Fatal(err)
			}
			if k := b.discoInUse(a); k == a.disco.Public() || time.Now().After(end) {
				return k
			}
		}
	}
	forget := func() {
		tr := b.trans.Load()
		tr.saidMu.Lock()
		defer tr.saidMu.Unlock()
		if p := tr.known(a.key.Public()); p != nil {
			p.said = said{}
		}
	}
	if got := told(); got != a.disco.Public() {
		t.Errorf("%v", got)
	}
	// Control's word is stale.
	stale := a.node()
	stale.DiscoKey = key.NewDisco().Public()
	b.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{stale}})
	forget()
	if got := told(); got != a.disco.Public() {
		t.Errorf("after a TSMP ping %v, want %v", got, a.disco.Public())
	}
	tr := a.trans.Load()
	at := tr.paths.Peer(b.key.Public())
	advertised := func() time.Time {
		tr.saidMu.Lock()
		defer tr.saidMu.Unlock()
		return tr.known(b.key.Public()).said.advertised
	}
	tr.called(at)
	if !advertised().IsZero() {
		t.Error("told without control's wish")
	}
	me := a.node()
	me.CapMap = tailcfg.NodeCapMap{attrCacheNetmaps: nil}
	a.tell(&tailcfg.MapResponse{Node: me})
	tr.called(at)
	first := advertised()
	if first.IsZero() {
		t.Error("not told")
	}
	tr.called(at)
	if advertised() != first {
		t.Error("told again")
	}
}
