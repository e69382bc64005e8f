package node

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"sync"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/state"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestClosePartsBeforeLogout: when an ephemeral node tells control that it leaves, its connections have been ended. Those that end later
// would end for this side alone, for peers drop what comes from a node that control has removed.
func TestClosePartsBeforeLogout(t *testing.T) {
	st := state.NewMemory()
	b, err := json.Marshal(saved{ControlURL: "http://control.test", NodeKey: key.NewNode(), Registered: true})
	if err != nil {
		t.Fatal(err)
	}
	st.WriteState(stateNode, b)
	var n *Node
	var mu sync.Mutex
	closing, open := false, -1 // sockets at the latest dial
	n, err = Start(Config{Store: st, Hostname: "mayfly", ControlURL: "http://control.test", Ephemeral: true,
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			if !closing {
				return nil, errors.New("not yet")
			}
			open = n.Engine().Stack().NumSockets()
			return nil, errors.New("nobody there")
		}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := (*handler)(n).Map(&tailcfg.MapResponse{Node: self()}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Listen(t.Context(), "tcp", ":80"); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	closing = true
	mu.Unlock()
	n.Close()
	if open != 0 {
		t.Errorf("at the logout %d sockets were open, want none (-1: control was not called)", open)
	}
}
