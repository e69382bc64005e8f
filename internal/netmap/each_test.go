package netmap

import (
	"errors"
	"testing"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// lazily returns r with its peers one at a time, each in the place of the one before, and then err.
func lazily(r *tailcfg.MapResponse, err error) *tailcfg.MapResponse {
	c := *r
	c.Peers = nil
	c.EachPeer = func(f func(*tailcfg.Node) error) error {
		var n tailcfg.Node
		for _, p := range r.Peers {
			n = *p
			if err := f(&n); err != nil {
				return err
			}
			n = tailcfg.Node{}
		}
		return err
	}
	return &c
}

// Peers that come one at a time make the same map, as the first response of a stream and of the next one.
func TestEachPeer(t *testing.T) {
	b := NewBuilder()
	if _, c := do(t, b, lazily(full(2, 3, 4), nil)); len(c.Added) != 3 {
		t.Errorf("%+v", c)
	}
	check(t, b.Map())
	b.Restart()
	if _, c := do(t, b, full(2, 3, 4)); !c.Empty() {
		t.Errorf("at once it is another map: %+v", c)
	}
	b.Restart()
	if _, c := do(t, b, lazily(full(2, 4, 5), nil)); len(c.Added) != 1 || len(c.Removed) != 1 || len(c.Changed) != 0 {
		t.Errorf("%+v", c)
	}
	check(t, b.Map())
}

// A response that breaks off among its peers changes nothing.
func TestEachPeerFails(t *testing.T) {
	b, _ := started(t, 2, 3)
	before := b.Map()
	bad := errors.New("bad")
	if m, c, err := b.Apply(lazily(full(4, 5), bad), now); !errors.Is(err, bad) || m != before || b.Map() != before || !c.Empty() {
		t.Errorf("%v %+v", err, c)
	}
}
