package nat

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

const (
	relayPort = 40404
	// relayWithin bounds the time to a path by a peer relay: upstream's relay may say at first that it is not ready, and is asked
	// again by our node after 2.5 s, by upstream's after 3 s, and then every 30 s, which it gives each attempt, too.
	relayWithin = 3 * time.Minute
	relaySize   = 8 << 20
)

// TestPeerRelays: pairs without a direct path meet on a peer relay, whoever is which of the three.
func TestPeerRelays(t *testing.T) {
	require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := newLab(ctx, t)
	type group struct {
		relay   *proc
		clients [4]*proc // two of ours, two of upstream's
	}
	groups := map[string]*group{"ours": {}, "upstream": {}}
	made := inParallel(t, 2*atOnce)
	for who, g := range groups {
		made.run(func() (err error) {
			g.relay, err = l.startNode(ctx, l.newSite(kind{name: "open", v4: true}), who, upArgs{Hostname: "relay-" + who, PeerRelay: new(uint16(relayPort))})
			return err
		})
		for i, client := range []string{"ours", "ours", "upstream", "upstream"} {
			made.run(func() (err error) {
				g.clients[i], err = l.node(ctx, l.newSite(kind{name: "symmetric", v4: true, nat: symmetric}), client, fmt.Sprintf("%s%d-by-%s", client, i%2, who))
				return err
			})
		}
	}
	made.wait()
	if t.Failed() {
		return
	}
	var grants []grantArgs
	for _, g := range groups {
		a := grantArgs{Dst: []string{g.relay.up.IP4}}
		for _, c := range g.clients {
			a.Src = append(a.Src, c.up.IP4)
		}
		grants = append(grants, a)
	}
	if err := l.coord.call(ctx, "grant", grants, nil); err != nil {
		t.Fatal(err)
	}
	for who, g := range groups {
		at := fmt.Sprintf("198.18.%d.10:%d:vni:", g.relay.site.n, relayPort)
		for _, p := range [][2]int{{0, 1}, {0, 2}, {3, 1}, {2, 3}} {
			a, b := g.clients[p[0]], g.clients[p[1]]
			t.Run(fmt.Sprintf("%s dials %s by %s", a.who, b.who, who), func(t *testing.T) {
				if err := meetAt(ctx, t, a, b, at); err != nil {
					t.Error(err)
				}
			})
		}
	}
	t.Run("the relay dies", func(t *testing.T) {
		relayDies(ctx, t, groups["ours"].relay, groups["ours"].clients[0], groups["ours"].clients[1])
	})
}

// meetAt checks that a and b meet on the relay at an address, and that data gets through it whole.
func meetAt(ctx context.Context, t *testing.T, a, b *proc, at string) error {
	var there, back probeResult
	backDone := make(chan error, 1)
	go func() {
		backDone <- b.call(ctx, "await", probeArgs{IP: a.up.IP4, Wait: relayWithin, PeerRelay: true}, &back)
	}()
	if err := a.call(ctx, "probe", probeArgs{IP: b.up.IP4, Wait: relayWithin, PeerRelay: true}, &there); err != nil {
		return err
	}
	if err := <-backDone; err != nil {
		return err
	}
	for _, r := range []probeResult{there, back} {
		if !strings.HasPrefix(r.Path.PeerRelay, at) {
			return fmt.Errorf("path %+v, want by %s", r.Path, at)
		}
	}
	var sent sendResult
	for _, x := range [][2]*proc{{a, b}, {b, a}} {
		if err := x[0].call(ctx, "send", sendArgs{x[1].up.IP4, relaySize}, &sent); err != nil {
			return err
		}
		if !sent.Same {
			return fmt.Errorf("%d bytes arrived of %d, or not the same", sent.Bytes, relaySize)
		}
		var r probeResult
		if err := x[0].call(ctx, "await", probeArgs{IP: x[1].up.IP4, Wait: relayWithin, PeerRelay: true}, &r); err != nil {
			return err
		}
		if !strings.HasPrefix(r.Path.PeerRelay, at) {
			return fmt.Errorf("after the transfer the path is %+v", r.Path)
		}
		t.Logf("%s to %s: %.0f Mbit/s by %s", x[0].name, x[1].name, relaySize*8/sent.Took.Seconds()/1e6, r.Path.PeerRelay)
	}
	t.Logf("on it after %v, back after %v", there.Direct.Sub(there.Began).Round(time.Millisecond), back.Direct.Sub(there.Began).Round(time.Millisecond))
	return nil
}

// relayDies has the relay end, without a word, under a transfer.
func relayDies(ctx context.Context, t *testing.T, relay, a, b *proc) {
	var id int
	if err := a.call(ctx, "stream", streamArgs{b.up.IP4, 1 << 20}, &id); err != nil {
		t.Fatal(err)
	}
	if err := harness.Until(ctx, "the peer relay to be in use", func() (bool, error) {
		p, err := a.path(ctx, b)
		return err == nil && p.PeerRelay != "", err
	}); err != nil {
		t.Fatal(err)
	}
	relay.site.cut("meta l4proto udp")
	if err := harness.Until(ctx, "the fall back", func() (bool, error) {
		p, err := a.path(ctx, b)
		return err == nil && p.PeerRelay == "" && p.Addr == "", err
	}); err != nil {
		t.Fatal(err)
	}
	relay.site.mend()
	if err := harness.Until(ctx, "the peer relay to be in use again", func() (bool, error) {
		p, err := a.path(ctx, b)
		return err == nil && p.PeerRelay != "", err
	}); err != nil {
		t.Fatal(err)
	}
	var r sendResult
	if err := a.call(ctx, "stop", id, &r); err != nil {
		t.Fatal(err)
	}
	if !r.Same {
		t.Errorf("%d bytes, not the same", r.Bytes)
	}
	t.Logf("%d bytes, stalls %v", r.Bytes, r.Stalls)
}
