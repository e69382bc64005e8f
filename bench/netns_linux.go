package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// inNamespace is set in the process that runs in the namespace.
const inNamespace = "TAILNODE_BENCH_NAMESPACE"

// isolate runs this program again in a network namespace of its own, so that neither the host's links nor its settings matter,
// and returns true when that has ended. It returns false in the namespace, and where none can be made.
func isolate(congestion string) (done bool, err error) {
	if os.Getenv(inNamespace) != "" {
		return false, setUp(congestion)
	}
	exe, err := os.Executable()
	if err != nil {
		return false, nil
	}
	// Making one is tried first with a program that does nothing: without privilege it fails here.
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	try := exec.Command("ip", "link", "show", "lo")
	try.SysProcAttr = attr
	if err := try.Run(); err != nil {
		progress("no network namespace (%v): measuring on the host's network", err)
		return false, nil
	}
	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(max(1, exit.ExitCode()))
	}
	return true, err
}

// setUp gives the namespace loopback, and one address with a default route so that nodes believe that they are online.
func setUp(congestion string) error {
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", "eth0", "type", "veth", "peer", "name", "far0"},
		{"link", "set", "far0", "up"},
		{"addr", "add", "198.18.0.2/24", "dev", "eth0"},
		{"link", "set", "eth0", "up"},
		{"route", "add", "default", "via", "198.18.0.1"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	for _, c := range strings.Split(congestion, ",") {
		// Without the host's leave a namespace may choose only some: see tcp_allowed_congestion_control in tcp(7).
		if os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte(c), 0) == nil {
			return nil
		}
	}
	return nil
}

func namespaced() bool { return os.Getenv(inNamespace) != "" }
