// Command rustpeer runs upstream's node for the tests of the Rust crate (rust/tailnode/tests/tailnet/upstream.rs). It joins the tailnet of
// $TS_CONTROL_URL and $TS_AUTHKEY as "tspeer", serves an echo on TCP port 7, and prints "up". On a line "dial HOST:PORT" it dials, prints
// what it hears until the end, and then answers with its length. It ends with its standard input.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"tailscale.com/envknob"
	"tailscale.com/net/netns"
	"tailscale.com/tsnet"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "rustpeer:", err)
		os.Exit(1)
	}
}

func run() error {
	// Nothing is logged to anyone, and no gateway is asked for a port; everything is on this machine.
	envknob.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	envknob.Setenv("TS_DISABLE_PORTMAPPER", "true")
	netns.SetEnabled(false)
	dir, err := os.MkdirTemp("", "rustpeer")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	discard := func(string, ...any) {}
	s := &tsnet.Server{Dir: dir, Hostname: "tspeer", ControlURL: os.Getenv("TS_CONTROL_URL"), AuthKey: os.Getenv("TS_AUTHKEY"),
		Ephemeral: true, Logf: discard, UserLogf: discard}
	// It is not closed: the process ends, and Close can take its time.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.Up(ctx); err != nil {
		return err
	}
	ln, err := s.Listen("tcp", ":7")
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go echo(c)
		}
	}()
	fmt.Println("up")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		addr, ok := strings.CutPrefix(in.Text(), "dial ")
		if !ok {
			return fmt.Errorf("%q is no request", in.Text())
		}
		if err := dial(ctx, s, addr); err != nil {
			return err
		}
	}
	return in.Err()
}

func echo(c net.Conn) {
	defer c.Close()
	io.Copy(c, c)
}

func dial(ctx context.Context, s *tsnet.Server, addr string) error {
	c, err := s.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSuffix(string(b), "\n"))
	_, err = fmt.Fprintf(c, "heard %d bytes", len(b))
	return err
}
