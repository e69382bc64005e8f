package tailnode_test

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

// visitor returns a server that joins by somebody's visit to a URL, and what it shows its user.
func (tn *tailnet) visitor(t *testing.T, name string) (*tailnode.Server, <-chan string) {
	t.Helper()
	s := tn.server(name)
	s.AuthKey = ""
	lines := make(chan string, 10)
	s.UserLogf = func(f string, a ...any) { lines <- fmt.Sprintf(f, a...) }
	return s, lines
}

// urlOf takes the URL out of a line for the user.
func urlOf(line string) string { return line[strings.Index(line, "http"):] }

// shown waits for the next line for the user.
func shown(t *testing.T, ctx context.Context, lines <-chan string) string {
	t.Helper()
	select {
	case l := <-lines:
		return l
	case <-ctx.Done():
		t.Fatal("no URL was shown")
		return ""
	}
}

// TestExpiryOfAVisitor lets the key of a node without an auth key expire: somebody has to visit
// a URL again, and what was open goes on.
func TestExpiryOfAVisitor(t *testing.T) {
	for name, expire := range map[string]func(*coord.Server) error{
		"by control":   func(c *coord.Server) error { return c.ExpireNode("visitor") },
		"by the clock": func(c *coord.Server) error { return c.SetNodeExpiry("visitor", time.Now().Add(200*time.Millisecond)) },
	} {
		t.Run(name, func(t *testing.T) {
			tn := newTailnet(t)
			ctx := withTimeout(t, patience)
			s, lines := tn.visitor(t, "visitor")
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			if err := tn.coord.ApproveLogin(urlOf(shown(t, ctx, lines)), coord.ApproveOptions{}); err != nil {
				t.Fatal(err)
			}
			before, err := s.Up(ctx)
			if err != nil {
				t.Fatal(err)
			}
			peer := tn.up("peer")
			ln, err := peer.Listen("tcp", ":7")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			echoed := make(chan struct{})
			go func() {
				defer close(echoed)
				if c, err := ln.Accept(); err == nil {
					io.Copy(c, c)
					c.Close()
				}
			}()
			c, err := s.Dial(ctx, "tcp", "peer:7")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { c.Close(); <-echoed }()
			c.SetDeadline(time.Now().Add(patience))
			say := func(word string) {
				t.Helper()
				b := make([]byte, len(word))
				if _, err := io.WriteString(c, word); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(c, b); err != nil || string(b) != word {
					t.Fatalf("%q came back as %q, %v", word, b, err)
				}
			}
			say("before")

			if err := expire(tn.coord); err != nil {
				t.Fatal(err)
			}
			url := urlOf(shown(t, ctx, lines))
			lc, err := s.LocalClient()
			if err != nil {
				t.Fatal(err)
			}
			st, err := lc.StatusWithoutPeers(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if st.BackendState != "NeedsLogin" || st.AuthURL != url {
				t.Errorf("state %s with the URL %q, want NeedsLogin with %q", st.BackendState, st.AuthURL, url)
			}
			_, err = s.Up(withTimeout(t, 50*time.Millisecond))
			wantCode(t, err, tailnode.CodeTimeout, url)
			_, err = s.Dial(withTimeout(t, 50*time.Millisecond), "tcp", "peer:7")
			wantCode(t, err, tailnode.CodeTimeout, url)

			if err := tn.coord.ApproveLogin(url, coord.ApproveOptions{}); err != nil {
				t.Fatal(err)
			}
			after, err := s.Up(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if after.Self.PublicKey == before.Self.PublicKey || after.TailscaleIPs[0] != before.TailscaleIPs[0] || after.AuthURL != "" {
				t.Errorf("after the login: key %v (before %v), address %v (before %v), URL %q", after.Self.PublicKey, before.Self.PublicKey,
					after.TailscaleIPs[0], before.TailscaleIPs[0], after.AuthURL)
			}
			say("after")
		})
	}
}

// TestRejectedLogin refuses one URL. Control servers refuse a URL that has grown old in the same way,
// so the node asks for another instead of giving up.
func TestRejectedLogin(t *testing.T) {
	tn := newTailnet(t)
	ctx := withTimeout(t, patience)
	s, lines := tn.visitor(t, "visitor")
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	first := urlOf(shown(t, ctx, lines))
	if err := tn.coord.RejectLogin(first); err != nil {
		t.Fatal(err)
	}
	second := urlOf(shown(t, ctx, lines))
	if second == first {
		t.Errorf("%s was shown again", first)
	}
	if err := tn.coord.ApproveLogin(second, coord.ApproveOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Up(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestMachineApproval(t *testing.T) {
	tn := &tailnet{t: t, relay: &relay.Server{Addr: "127.0.0.1:0"}}
	if err := tn.relay.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tn.relay.Close() })
	tn.coord = &coord.Server{Relays: []coord.Region{regionOf(tn.relay, 900)}, RequireMachineApproval: true}
	if err := tn.coord.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tn.coord.Close() })
	s := tn.server("newcomer")
	ctx := withTimeout(t, patience)
	lc, err := s.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	until(t, lc, "the node needs approval", func() bool {
		st, err := lc.StatusWithoutPeers(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if st.BackendState == "Running" {
			t.Fatal("running without approval")
		}
		return st.BackendState == "NeedsMachineAuth"
	})
	_, err = s.Up(withTimeout(t, 50*time.Millisecond))
	wantCode(t, err, tailnode.CodeTimeout, "approve")
	if err := tn.coord.ApproveNode("newcomer"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Up(ctx); err != nil {
		t.Fatal(err)
	}
}
