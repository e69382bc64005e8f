package datapath

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// send carries n bytes over one connection from a to an address of b, and compares what arrives.
func (a *end) send(b *end, to netip.Addr, n int) {
	a.t.Helper()
	ln, err := b.Stack().ListenTCP(netip.AddrPortFrom(netip.IPv6Unspecified(), 90))
	if err != nil {
		a.t.Fatal(err)
	}
	defer ln.Close()
	sum := make(chan []byte, 1)
	go func() {
		h := sha256.New()
		if c, err := ln.Accept(); err == nil {
			c.SetDeadline(time.Now().Add(3 * time.Minute))
			io.Copy(h, c)
			c.Close()
		}
		sum <- h.Sum(nil)
	}()
	c, err := a.Stack().DialTCP(within(a.t, time.Minute), netip.AddrPortFrom(to, 90))
	if err != nil {
		a.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Minute))
	h := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(c, h), rand.NewChaCha8([32]byte{1}), int64(n)); err != nil {
		a.t.Fatal(err)
	}
	c.Close()
	if !bytes.Equal(<-sum, h.Sum(nil)) {
		a.t.Error("what arrived is not what was sent")
	}
}

// TestRelayedSize: by a relay, TCP data between two of ours goes in messages that a relay's frame holds, and a
// masqueraded node's too.
func TestRelayedSize(t *testing.T) {
	ForceRelay.Store(true)
	defer ForceRelay.Store(false)
	a, b := newPair(t)
	m4 := netip.MustParseAddr("100.99.1.1")
	average := func(f func()) int {
		before := a.relay.Stats()
		f()
		after := a.relay.Stats()
		return int(after.BytesIn-before.BytesIn) / int(after.PacketsIn-before.PacketsIn)
	}
	for _, to := range []netip.Addr{b.a4, b.a6} {
		// Acknowledgements count as well.
		if n := average(func() { a.send(b, to, 4<<20) }); n < path.BaseMTU {
			t.Errorf("to %v: messages of %d bytes on average", to, n)
		}
	}
	n := b.node()
	n.SelfNodeV4MasqAddrForThisPeer = &m4
	a.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	n = a.node()
	n.Addresses = []netip.Prefix{netip.PrefixFrom(m4, 32)}
	b.tell(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	if n := average(func() { a.send(b, b.a4, 4<<20) }); n < path.BaseMTU {
		t.Errorf("masqueraded: messages of %d bytes on average", n)
	}
}

// TestDirectSize: a direct path over the loopback interface is found to carry more than the base size.
func TestDirectSize(t *testing.T) {
	a, b := newPair(t)
	deadline := time.Now().Add(3 * time.Minute)
	for longest := 0; longest <= path.BaseMTU; {
		if time.Now().After(deadline) {
			t.Fatalf("longest packet %d", longest)
		}
		a.send(b, b.a4, 4<<20)
		p := a.trans.Load().peer(b.key.Public())
		if p.path.Path().Addr.IsValid() {
			longest = p.path.MTU(0)
		}
	}
}

func TestOwnAddr(t *testing.T) {
	n := &netmap.Node{Addresses: []netip.Prefix{netip.MustParsePrefix("100.64.0.7/32"), netip.MustParsePrefix("10.0.0.0/8")}}
	for a, want := range map[string]bool{"100.64.0.7": true, "100.64.0.8": false, "10.0.0.0": false, "10.1.2.3": false} {
		if got := ownAddr(n, netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
}
