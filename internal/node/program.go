package node

import (
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
)

// ProgramName returns the name for a node of the program exe, a path or its last element.
func ProgramName(exe string) string {
	return strings.TrimSuffix(strings.ToLower(filepath.Base(exe)), ".exe")
}

var noEnv atomic.Bool

// HideEnvironment makes Getenv return nothing from now on. The C library's core calls it: its client looks at the host's environment when a
// node is made, while this process's copy may hold what the host has taken away, or does not want to be looked at (secure_getenv).
func HideEnvironment() { noEnv.Store(true) }

// Getenv is os.Getenv for what a node takes from the environment.
func Getenv(name string) string {
	if noEnv.Load() {
		return ""
	}
	return os.Getenv(name)
}
