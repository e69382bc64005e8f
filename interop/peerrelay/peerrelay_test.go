// Package peerrelay runs our node and upstream's as clients of each other's peer relays, with upstream's coordination server.
// interop/nat does so between real NATs, with ours.
package peerrelay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

// TestUpstreamControl: upstream's node, which the harness keeps from direct paths, and ours meet on a peer relay, ours or upstream's.
func TestUpstreamControl(t *testing.T) {
	for _, tt := range []struct {
		name  string
		relay harness.NodeMaker
	}{{"our relay", harness.OurNode}, {"upstream's relay", harness.UpstreamNode}} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			derp, err := harness.OurRelay(nil)
			if err != nil {
				t.Fatal(err)
			}
			defer derp.Close()
			control, err := harness.UpstreamControlPeerRelays(derp.Info(), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer control.Close()
			up := func(mk harness.NodeMaker, name string, port *uint16) harness.Node {
				n, err := mk(harness.NodeConfig{Hostname: name, Dir: t.TempDir(), ControlURL: control.URL(), AuthKey: "tskey-any", PeerRelay: port})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { n.Close() })
				if err := n.Up(ctx); err != nil {
					t.Fatal(err)
				}
				return n
			}
			up(tt.relay, "relay", new(uint16(0)))
			ours, theirs := up(harness.OurNode, "ours", nil), up(harness.UpstreamNode, "theirs", nil)
			ln, err := theirs.Listen("tcp", ":7")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go func() { io.Copy(c, c); c.Close() }()
				}
			}()
			if err := harness.Until(ctx, "the nodes to know each other", func() (bool, error) {
				a, err := ours.Status(ctx)
				if err != nil || len(a.Peers) != 2 {
					return false, err
				}
				b, err := theirs.Status(ctx)
				return err == nil && len(b.Peers) == 2, err
			}); err != nil {
				t.Fatal(err)
			}
			v4, _ := theirs.Addrs()
			conn, err := ours.Dial(ctx, "tcp", net.JoinHostPort(v4.String(), "7"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if d, ok := ctx.Deadline(); ok {
				conn.SetDeadline(d)
			}
			var path [2]string
			if err := harness.Until(ctx, "a path by the peer relay", func() (bool, error) {
				if _, err := conn.Write([]byte("x")); err != nil {
					return false, err
				}
				var b [1]byte
				if _, err := io.ReadFull(conn, b[:]); err != nil {
					return false, err
				}
				a, err := ours.Status(ctx)
				if err != nil {
					return false, err
				}
				b2, err := theirs.Status(ctx)
				if err != nil {
					return false, err
				}
				path = [2]string{a.Peers["theirs"].PeerRelay, b2.Peers["ours"].PeerRelay}
				return path[0] != "" && path[1] != "", nil
			}); err != nil {
				t.Fatal(err)
			}
			// Both write the endpoint alike, whichever of the relay's addresses each has taken.
			if vni := func(s string) string { _, v, _ := strings.Cut(s, ":vni:"); return v }; vni(path[0]) == "" || vni(path[0]) != vni(path[1]) {
				t.Errorf("%q and %q", path[0], path[1])
			}
			data := make([]byte, 4<<20)
			rand.NewChaCha8([32]byte{1}).Read(data)
			go conn.Write(data)
			h := sha256.New()
			if _, err := io.CopyN(h, conn, int64(len(data))); err != nil {
				t.Fatal(err)
			}
			if want := sha256.Sum256(data); !bytes.Equal(h.Sum(nil), want[:]) {
				t.Error("other bytes")
			}
			if names := harness.PeerRelays(control); !slices.Equal(names, []string{"relay"}) {
				t.Errorf("peer relays by their own word: %v", names)
			}
			t.Logf("%v", path)
		})
	}
}
