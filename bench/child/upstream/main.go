// Command upstream is the measured process with upstream's node in it.
package main

import (
	"context"
	"net/netip"
	"slices"

	"tailscale.com/envknob"
	"tailscale.com/net/netns"
	"tailscale.com/tsnet"

	"github.com/tailnode/tailnode/bench/child"
)

type server struct{ *tsnet.Server }

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
	netns.SetEnabled(false) // everything is on this machine
	child.Main(func(c child.Config) child.Server {
		// Nothing is logged to anyone, and no gateway is asked for a port.
		envknob.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
		envknob.Setenv("TS_DISABLE_PORTMAPPER", "true")
		if c.RelayOnly {
			envknob.Setenv("TS_DEBUG_NEVER_DIRECT_UDP", "true")
		}
		return server{&tsnet.Server{
			Dir: c.Dir, Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey,
			UserLogf: func(string, ...any) {},
		}}
	})
}
