//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package netmon

import (
	"os"
	"sync"
	"syscall"
)

// watch listens on a routing socket, route(4). What a message says is not read, as on Linux.
func watch(event func()) (stop func(), err error) {
	syscall.ForkLock.RLock()
	fd, err := syscall.Socket(syscall.AF_ROUTE, syscall.SOCK_RAW, syscall.AF_UNSPEC)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, os.NewSyscallError("setnonblock", err)
	}
	f := os.NewFile(uintptr(fd), "route") // with the poller, so that Close ends Read
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 4096)
		for {
			if _, err := f.Read(b); err != nil {
				return
			}
			event()
		}
	})
	return func() { f.Close(); wg.Wait() }, nil
}
