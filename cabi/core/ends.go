//go:build linux

package core

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Ends notes this process's descriptors, for the child of a fork to close: see cabi/fork.c, whose memory it is.
type Ends struct {
	users, top uint32
	bits       [1 << 15]uint32
}

const forking = 0x40000000

var ends *Ends // nil in a helper, which does not fork

// UseEnds is called before the first Serve.
func UseEnds(e *Ends) { ends = e }

// enter holds off a fork until leave, so that every descriptor that the child has is noted, and none that is not ours any more.
func (e *Ends) enter() {
	if e == nil {
		return
	}
	for atomic.AddUint32(&e.users, 1)&forking != 0 {
		e.leave()
		time.Sleep(50 * time.Microsecond)
	}
}

func (e *Ends) leave() {
	if e != nil {
		atomic.AddUint32(&e.users, ^uint32(0))
	}
}

func (e *Ends) note(fd int) {
	w := fd / 32
	if e == nil || w >= len(e.bits) {
		return
	}
	atomic.OrUint32(&e.bits[w], 1<<(fd%32))
	for {
		top := atomic.LoadUint32(&e.top)
		if top > uint32(w) || atomic.CompareAndSwapUint32(&e.top, top, uint32(w)+1) {
			return
		}
	}
}

// forget comes before the descriptor is closed, and may be another's.
func (e *Ends) forget(fd int) {
	if w := fd / 32; e != nil && w < len(e.bits) {
		atomic.AndUint32(&e.bits[w], ^uint32(1<<(fd%32)))
	}
}

func (h hostEnd) close() {
	ends.enter()
	defer ends.leave()
	ends.forget(int(h))
	unix.Close(int(h))
}
