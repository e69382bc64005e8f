//go:build linux

// Command tailnode-helper runs nodes for a program that uses the C library in isolated mode. The library starts it; it
// ends when the program closes its node, or ends itself. It is not for the command line.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/tailnode/tailnode/cabi/core"
)

func main() {
	// What ends the host's session is for the host to act on: its end of the socket closes when it does.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGPIPE)
	if err := core.ServeInherited(3); err != nil {
		fmt.Fprintln(os.Stderr, "tailnode-helper:", err)
		os.Exit(1)
	}
}
