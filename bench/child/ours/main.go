// Command ours is the measured process with our node in it.
package main

import (
	"context"
	"net/netip"
	"slices"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/internal/datapath"
)

type server struct{ *tailnode.Server }

func (s server) Up(ctx context.Context) error {
	_, err := s.Server.Up(ctx)
	return err
}

func (s server) Direct(ctx context.Context, peer netip.Addr) (string, error) {
	lc, err := s.LocalClient()
	if err != nil {
		return "", err
	}
	st, err := lc.Status(ctx)
	if err != nil {
		return "", err
	}
	for _, p := range st.Peer {
		if slices.Contains(p.TailscaleIPs, peer) {
			return p.CurAddr, nil
		}
	}
	return "", nil
}

func (s server) Knows(ctx context.Context, peer netip.Addr) bool {
	lc, err := s.LocalClient()
	if err != nil {
		return false
	}
	_, err = lc.WhoIs(ctx, peer.String())
	return err == nil
}

func main() {
	child.Main(func(c child.Config) child.Server {
		datapath.ForceRelay.Store(c.RelayOnly)
		return server{&tailnode.Server{
			Dir: c.Dir, Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey,
			UserLogf: func(string, ...any) {},
		}}
	})
}
