// Command ours is the measured process with our node in it.
package main

import (
	"context"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/bench/child"
)

type server struct{ *tailnode.Server }

func (s server) Up(ctx context.Context) error {
	_, err := s.Server.Up(ctx)
	return err
}

func main() {
	child.Main(func(c child.Config) child.Server {
		return server{&tailnode.Server{
			Dir: c.Dir, Hostname: c.Hostname, ControlURL: c.ControlURL, AuthKey: c.AuthKey,
			UserLogf: func(string, ...any) {},
		}}
	})
}
