// Command upstream is the measured process with upstream's node in it.
package main

import (
	"context"

	"tailscale.com/net/netns"
	"tailscale.com/tsnet"

	"github.com/tailnode/tailnode/bench/child"
)

type server struct{ *tsnet.Server }

func (s server) Up(ctx context.Context) error {
	_, err := s.Server.Up(ctx)
	return err
}

func main() {
	netns.SetEnabled(false) // everything is on loopback
	child.Main(func(c child.Config) child.Server {
		return server{&tsnet.Server{
			Dir: c.Dir, Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey,
			UserLogf: func(string, ...any) {},
		}}
	})
}
