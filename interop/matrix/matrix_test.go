package matrix

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

type part[T any] struct {
	name string
	make T
}

type controlPart struct {
	name        string
	make        harness.ControlMaker
	interactive harness.ControlMaker // the same server, demanding a login by URL from its start
	online      bool                 // peers' online state is told
}

var (
	nodes    = []part[harness.NodeMaker]{{"ours", harness.OurNode}, {"upstream", harness.UpstreamNode}}
	relays   = []part[harness.RelayMaker]{{"relay", harness.OurRelay}, {"derpserver", harness.UpstreamRelay}}
	controls = []controlPart{
		{name: "coord", make: harness.OurControl, interactive: harness.OurControl, online: true},
		{name: "testcontrol", make: harness.UpstreamControl, interactive: harness.UpstreamControlInteractive},
	}
)

// cell is one combination of parts.
type cell struct {
	a, b    part[harness.NodeMaker]
	control controlPart
	relay   part[harness.RelayMaker]
}

// eachCell runs f for every combination.
func eachCell(t *testing.T, f func(t *testing.T, c cell)) {
	for _, a := range nodes {
		for _, b := range nodes {
			for _, control := range controls {
				for _, relay := range relays {
					name := strings.Join([]string{a.name, b.name, control.name, relay.name}, "/")
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						f(t, cell{a, b, control, relay})
					})
				}
			}
		}
	}
}

// env is a running cell: two nodes that see each other.
type env struct {
	cell
	relay   harness.Relay
	control harness.Control
	a, b    *node
}

// node is a harness.Node that can be made again from its Dir.
type node struct {
	harness.Node
	name string
	kind harness.NodeMaker
	conf harness.NodeConfig
}

// newEnv starts the servers of a cell and makes its two nodes, without starting those.
func newEnv(t *testing.T, c cell, control harness.ControlMaker) *env {
	t.Helper()
	e := &env{cell: c}
	var err error
	if e.relay, err = c.relay.make(logf(t, "relay")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.relay.Close() })
	if e.control, err = control(e.relay.Info(), logf(t, "control")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.control.Close() })
	e.a = e.newNode(t, c.a.make, "alpha", false)
	e.b = e.newNode(t, c.b.make, "bravo", false)
	return e
}

func (e *env) newNode(t *testing.T, kind harness.NodeMaker, name string, ephemeral bool) *node {
	t.Helper()
	authKey, err := e.control.AuthKey(ephemeral)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{name: name, kind: kind, conf: harness.NodeConfig{
		Hostname: name, Dir: t.TempDir(), ControlURL: e.control.URL(), AuthKey: authKey, Ephemeral: ephemeral,
		Logf: logf(t, name),
	}}
	n.remake(t)
	t.Cleanup(func() { n.Close() })
	return n
}

// remake makes the node anew from the same Dir, after Close.
func (n *node) remake(t *testing.T) {
	t.Helper()
	var err error
	if n.Node, err = n.kind(n.conf); err != nil {
		t.Fatal(err)
	}
}

// up brings nodes up at the same time and waits until each sees all others.
func (e *env) up(t *testing.T, ctx context.Context, nodes ...*node) {
	t.Helper()
	errs := make(chan error, len(nodes))
	for _, n := range nodes {
		go func() {
			began := time.Now()
			err := n.Up(ctx)
			t.Logf("%s: Up took %v", n.name, time.Since(began).Round(time.Millisecond))
			if err != nil {
				err = fmt.Errorf("%s: Up: %w", n.name, err)
			}
			errs <- err
		}()
	}
	for range nodes {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		for _, other := range nodes {
			if n != other {
				n.sees(t, ctx, other.name, true)
			}
		}
	}
}

// sees waits until the node's own view has a peer, or has it no more.
func (n *node) sees(t *testing.T, ctx context.Context, peer string, want bool) {
	t.Helper()
	err := harness.Until(ctx, fmt.Sprintf("%s to see %s: %v", n.name, peer, want), func() (bool, error) {
		st, err := n.Status(ctx)
		if err != nil {
			return false, err
		}
		_, have := st.Peers[peer]
		return have == want, nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (n *node) status(t *testing.T, ctx context.Context) harness.Status {
	t.Helper()
	st, err := n.Status(ctx)
	if err != nil {
		t.Fatalf("%s: Status: %v", n.name, err)
	}
	return st
}

// logf returns a logger that is silent unless INTEROP_VERBOSE is set, and silent in any case once
// the test is over: upstream's goroutines outlive their Close.
func logf(t *testing.T, who string) func(string, ...any) {
	if os.Getenv("INTEROP_VERBOSE") == "" {
		return nil
	}
	var mu sync.Mutex
	over := false
	t.Cleanup(func() { mu.Lock(); over = true; mu.Unlock() })
	return func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if !over {
			t.Logf(who+": "+format, args...)
		}
	}
}

func size() int {
	if testing.Short() {
		return 4 << 20
	}
	return 64 << 20
}

// TestMatrix is one tailnet per cell, through which the checks go in order; each leaves both nodes
// running and in sight of each other.
func TestMatrix(t *testing.T) {
	eachCell(t, func(t *testing.T, c cell) {
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
		defer cancel()
		e := newEnv(t, c, c.control.make)
		e.up(t, ctx, e.a, e.b)
		for _, check := range []struct {
			name string
			f    func(*testing.T, context.Context, *env)
		}{
			{"TCP", checkTCP},
			{"UDP", checkUDP},
			{"Names", checkNames},
			{"WhoIs", checkWhoIs},
			{"Bulk", checkBulk},
			{"RelayRestart", checkRelayRestart},
			{"Return", checkReturn},
			{"ControlRestart", checkControlRestart},
			{"Ephemeral", checkEphemeral},
			{"Filter", checkFilter},
		} {
			began := time.Now()
			if !t.Run(check.name, func(t *testing.T) { check.f(t, ctx, e) }) {
				return // what follows would fail for the same reason
			}
			t.Logf("%s took %v", check.name, time.Since(began).Round(time.Millisecond))
		}
	})
}

// TestLogin is the life of a node key: interactive login, expiry, and login again as the same node.
func TestLogin(t *testing.T) {
	eachCell(t, func(t *testing.T, c cell) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		checkLogin(t, ctx, newEnv(t, c, c.control.interactive))
	})
}
