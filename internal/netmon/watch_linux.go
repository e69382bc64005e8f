package netmon

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// groups are the kernel's announcements that matter: links, addresses and routes (rtnetlink(7)). Neighbours, of which
// there are many more, are not among them.
const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE

// watch listens to the kernel over netlink(7). What a message says is not read: the state of the host is what counts, and one
// look at it stands for a burst of them.
func watch(event func()) (stop func(), err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	f := os.NewFile(uintptr(fd), "netlink") // with the poller, so that Close ends Read
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 4096) // messages that are longer are cut, which is as good
		for {
			_, err := f.Read(b)
			if err != nil && !errors.Is(err, syscall.ENOBUFS) { // ENOBUFS: more than the socket holds
				return
			}
			event()
		}
	})
	return func() { f.Close(); wg.Wait() }, nil
}

// suspended returns how long the host has been suspended since it started: CLOCK_BOOTTIME counts that, and CLOCK_MONOTONIC does not. Nobody
// sets either, so no correction of the wall clock looks like a sleep.
func suspended() time.Duration {
	var boot, mono unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil || unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono) != nil {
		return 0
	}
	return time.Duration(boot.Nano() - mono.Nano())
}
