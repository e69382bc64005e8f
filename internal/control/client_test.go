package control

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestRegisterAndMap(t *testing.T) {
	for _, early := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.early = early
			c := f.client(t)
			node := key.NewNode()
			resp, err := c.Register(t.Context(), &tailcfg.RegisterRequest{NodeKey: node.Public(), Hostinfo: &tailcfg.Hostinfo{Hostname: "h"}})
			if err != nil {
				t.Fatal(err)
			}
			if !resp.MachineAuthorized {
				t.Error("the answer was lost")
			}
			stop := errors.New("stop")
			err = c.Map(t.Context(), &tailcfg.MapRequest{NodeKey: node.Public()}, func(m *tailcfg.MapResponse) error {
				if m.Node == nil || m.Node.Key != node.Public() {
					t.Error("wrong map")
				}
				return stop
			})
			if err != stop {
				t.Fatal(err)
			}
			if err := c.Update(t.Context(), &tailcfg.MapRequest{NodeKey: node.Public()}); err != nil {
				t.Fatal(err)
			}
			if f.dials != 1 || f.keys != 1 {
				t.Errorf("%d connections and %d key fetches, want one of each", f.dials, f.keys)
			}
			c.Close()
			if _, err := c.Register(context.Background(), &tailcfg.RegisterRequest{NodeKey: node.Public()}); !errors.Is(err, ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		})
	}
}
