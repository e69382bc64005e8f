//go:build linux && cgo

// Command cabi is libtailnode-core: the Go half of the C library, for hosts that want the node in their own
// process. Its one export is called once per process. Build it with -buildmode=c-shared or c-archive; see Makefile.
package main

// void tailnode_core_give_back_signals(void);
// void tailnode_core_give_back_limits(void);
// void *tailnode_core_ends(void);
import "C"

import (
	"sync/atomic"

	"github.com/tailnode/tailnode/cabi/core"
)

var crossings atomic.Int64

// Package syscall has changed them, and has been initialised before.
func init() { C.tailnode_core_give_back_limits() }

//export tailnode_core_serve
func tailnode_core_serve(fd C.int) C.int {
	if crossings.Add(1) == 1 {
		C.tailnode_core_give_back_signals()
		core.UseEnds((*core.Ends)(C.tailnode_core_ends()))
	}
	core.Crossings = crossings.Load
	go core.Serve(int(fd))
	return 0
}

func main() {}
