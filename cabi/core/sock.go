//go:build linux

package core

import (
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sock is one end of a Unix socket pair. A goroutine that waits for it occupies no thread.
type sock struct {
	f     *os.File
	rc    syscall.RawConn
	fd    int
	gone  atomic.Bool
	stamp []byte // room for the time of a message, nil where messages have none
}

func newSock(fd int) (*sock, error) {
	unix.CloseOnExec(fd)
	ends.note(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		hostEnd(fd).close()
		return nil, os.NewSyscallError("fcntl", err)
	}
	s := &sock{f: os.NewFile(uintptr(fd), "socket"), fd: fd}
	rc, err := s.f.SyscallConn()
	if err != nil {
		s.Close()
		return nil, err
	}
	s.rc = rc
	return s, nil
}

// newPair returns both ends of a new pair: the host's, as a plain descriptor, and ours.
func newPair(typ int, nonblock bool) (host hostEnd, s *sock, err error) {
	ends.enter()
	fds, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		ends.note(fds[0])
		ends.note(fds[1])
	}
	ends.leave()
	if err != nil {
		return -1, nil, os.NewSyscallError("socketpair", err)
	}
	host = hostEnd(fds[0])
	if !nonblock {
		if err := unix.SetNonblock(fds[0], false); err != nil {
			host.close()
			hostEnd(fds[1]).close()
			return -1, nil, os.NewSyscallError("fcntl", err)
		}
	}
	s, err = newSock(fds[1])
	if err != nil {
		host.close()
		return -1, nil, err
	}
	return host, s, nil
}

// Close wakes every goroutine that waits for s.
func (s *sock) Close() error {
	if s.gone.Swap(true) { // its number may be another's by now
		return os.ErrClosed
	}
	ends.enter()
	defer ends.leave()
	ends.forget(s.fd)
	return s.f.Close() // returns when it is closed
}

// abort is Close.
func (s *sock) abort() { s.Close() }

func (s *sock) shutdown(how int) {
	s.rc.Control(func(fd uintptr) { unix.Shutdown(int(fd), how) })
}

// send sends one message, or the bytes of b on a stream, with rights (from unix.UnixRights) on the first. Where wait is false it
// returns EAGAIN instead of waiting for room.
func (s *sock) send(b, rights []byte, wait bool) error {
	for first := true; first || len(b) > 0; first = false {
		var n int
		var err error
		werr := s.rc.Write(func(fd uintptr) bool {
			for {
				n, err = unix.SendmsgN(int(fd), b, rights, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				if err != unix.EINTR {
					break
				}
			}
			return err != unix.EAGAIN || !wait
		})
		if werr != nil {
			return werr
		}
		if err != nil {
			return err
		}
		b, rights = b[n:], nil
	}
	return nil
}

// Write sends all of b on a stream.
func (s *sock) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if err := s.send(b, nil, true); err != nil {
		return 0, err
	}
	return len(b), nil
}

// awaitEnd blocks until the other end is shut down or closed, or s is closed.
func (s *sock) awaitEnd() {
	s.rc.Read(func(fd uintptr) bool { return events(fd)&unix.POLLHUP != 0 })
}

// stampMessages makes an empty message of the other end's different from its end: what receive gets then has a time with it.
func (s *sock) stampMessages() {
	s.rc.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMP, 1) == nil {
			s.stamp = make([]byte, unix.CmsgSpace(int(unsafe.Sizeof(unix.Timeval{})))) // and no room for descriptors
		}
	})
}

// receive reads one message of a SOCK_SEQPACKET socket, for one goroutine; descriptors that it carries are dropped. io.EOF: the other end is closed.
func (s *sock) receive(b []byte) (n int, err error) {
	werr := s.rc.Read(func(fd uintptr) bool {
		var oobn int
		for {
			n, oobn, _, _, err = unix.Recvmsg(int(fd), b, s.stamp, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if err != unix.EINTR {
				break
			}
		}
		// With messages that are stamped the end is known. Without, an empty message before it is taken for it.
		if err == nil && n == 0 && oobn == 0 && events(fd)&(unix.POLLRDHUP|unix.POLLHUP) != 0 {
			err = io.EOF
		}
		return err != unix.EAGAIN
	})
	if werr != nil {
		return 0, werr
	}
	return n, err
}

// peek waits for a message of a SOCK_SEQPACKET socket and returns its first bytes and what it carries; the message stays. short: there
// is no room in this process for a descriptor that it carries.
func (s *sock) peek(b, oob []byte) (n int, fds []int, short bool, err error) {
	var oobn, flags int
	werr := s.rc.Read(func(fd uintptr) bool {
		for {
			n, oobn, flags, _, err = unix.Recvmsg(int(fd), b, oob, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if err != unix.EINTR {
				break
			}
		}
		return err != unix.EAGAIN
	})
	if werr != nil {
		return 0, nil, false, werr
	}
	if err != nil {
		return 0, nil, false, err
	}
	return n, rightsOf(oob[:oobn]), flags&unix.MSG_CTRUNC != 0, nil
}

// readable blocks until there is something to read, or the end.
func (s *sock) readable() error {
	return s.rc.Read(func(fd uintptr) bool { return events(fd)&(unix.POLLIN|unix.POLLRDHUP|unix.POLLHUP) != 0 })
}

// events returns what poll says of fd now.
func events(fd uintptr) int16 {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	for {
		_, err := unix.Poll(p[:], 0)
		if err != unix.EINTR {
			return p[0].Revents
		}
	}
}

// queued returns how many bytes wait to be read.
func queued(fd uintptr) int {
	var n int32
	unix.Syscall(unix.SYS_IOCTL, fd, unix.TIOCINQ, uintptr(unsafe.Pointer(&n)))
	return int(n)
}

// rightsOf closes nothing and returns the descriptors of a control message.
func rightsOf(oob []byte) []int {
	if len(oob) == 0 {
		return nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var fds []int
	for i := range msgs {
		if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}
