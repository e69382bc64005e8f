//go:build linux && cgo

// Command cabi is libtailnode-core: the Go half of the C library, for hosts that want the node in their own
// process. Its one export is called once per process. Build it with -buildmode=c-shared or c-archive; see Makefile.
package main

// int tailnode_core_serve(int fd);
import "C"

import (
	"sync/atomic"

	"github.com/tailnode/tailnode/cabi/core"
)

var crossings atomic.Int64

//export tailnode_core_serve
func tailnode_core_serve(fd C.int) C.int {
	crossings.Add(1)
	core.Crossings = crossings.Load
	go core.Serve(int(fd))
	return 0
}

func main() {}
