package udp

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// setup finds out what the kernel can do.
func (c *conn) setup(cfg *Config) {
	rc, err := c.udp.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		// Beyond the system's limit only with CAP_NET_ADMIN.
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bufferSize)
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, bufferSize)
		if cfg.Plain {
			return
		}
		// A call of none says whether there is such a call: Linux 3.0, but a sandbox may forbid it.
		_, _, errno := syscall.Syscall6(unix.SYS_SENDMMSG, fd, 0, 0, unix.MSG_DONTWAIT, 0, 0)
		c.raw, c.many = rc, errno != unix.ENOSYS && errno != unix.EPERM
		if cfg.NoOffload {
			return
		}
		// A kernel without UDP_SEGMENT would ignore the control message and send one huge datagram.
		_, err := unix.GetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT)
		c.gso.Store(err == nil)
		c.gro = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1) == nil
	})
}

// linkMTU returns the MTU of the path to dst as the kernel knows it, 0 if it does not: it is asked through a socket of the
// moment, for only one that is connected has a path.
func linkMTU(dst netip.AddrPort) int {
	family, level, opt := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU
	var to unix.Sockaddr
	if a := dst.Addr(); a.Is4() {
		to = &unix.SockaddrInet4{Port: int(dst.Port()), Addr: a.As4()}
	} else {
		family, level, opt = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU
		zone, _ := strconv.Atoi(a.Zone())
		to = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: a.As16(), ZoneId: uint32(zone)}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if unix.Connect(fd, to) != nil {
		return 0
	}
	n, err := unix.GetsockoptInt(fd, level, opt)
	if err != nil {
		return 0
	}
	return n
}

// gsoFailed reports whether err may be the fault of UDP_SEGMENT. EIO is what a device without checksum
// offload gives, always, and a route through IPsec; the others depend on the path's MTU.
func (c *conn) gsoFailed(err error, dst netip.Addr) bool {
	switch {
	case errors.Is(err, unix.EIO):
		c.spare(dst)
		return true
	case errors.Is(err, unix.ENOPROTOOPT):
		c.gso.Store(false)
		return true
	}
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EMSGSIZE)
}

// cmsgSpace is the room for one control message of up to 4 bytes.
const cmsgSpace = (unix.SizeofCmsghdr + 4 + 7) &^ 7

var cmsgs = sync.Pool{New: func() any { return new([cmsgSpace]byte) }}

// writeGSO sends b as datagrams of seg bytes with one system call.
func (c *conn) writeGSO(dst netip.AddrPort, b []byte, seg int) error {
	oob := cmsgs.Get().(*[cmsgSpace]byte)
	h := (*unix.Cmsghdr)(unsafe.Pointer(oob))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(oob[unix.CmsgLen(0):], uint16(seg))
	_, _, err := c.udp.WriteMsgUDPAddrPort(b, oob[:unix.CmsgSpace(2)], dst)
	cmsgs.Put(oob)
	return err
}

// groSize is the most that the kernel coalesces.
const groSize = 1 << 16

var groBuffers = sync.Pool{New: func() any { return new([groSize]byte) }}

// reader receives with UDP_GRO. It has a buffer only from the moment that there is something to receive until there
// is nothing more.
type reader struct {
	buf  *[groSize]byte
	name name
	iov  unix.Iovec
	hdr  unix.Msghdr
	oob  [64]byte
	n    int
	err  error
}

// poll is called with the descriptor when it may be readable; false waits until it is.
func (r *reader) poll(fd uintptr) bool {
	if r.buf == nil {
		r.buf = groBuffers.Get().(*[groSize]byte)
	}
	for {
		r.iov.Base = &r.buf[0]
		r.iov.SetLen(len(r.buf))
		r.hdr = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&r.name.sa)), Namelen: unix.SizeofSockaddrInet6,
			Iov: &r.iov, Control: &r.oob[0]}
		r.hdr.SetIovlen(1)
		r.hdr.SetControllen(len(r.oob))
		n, _, errno := syscall.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&r.hdr)), unix.MSG_DONTWAIT)
		switch errno {
		case 0:
			r.n, r.err = int(n), nil
			return true
		case unix.EINTR:
		case unix.EAGAIN:
			r.idle()
			return false
		default:
			r.n, r.err = 0, errno
			return true
		}
	}
}

func (r *reader) idle() {
	groBuffers.Put(r.buf)
	r.buf, r.iov.Base = nil, nil
}

// segment returns the size of the coalesced datagrams, the whole length if there is one.
func (r *reader) segment() int {
	if n := segmentOf(r.oob[:min(int(r.hdr.Controllen), len(r.oob))]); n > 0 && n < r.n {
		return n
	}
	return r.n
}

// segmentOf reads the UDP_GRO control message, 0 without one.
func segmentOf(oob []byte) int {
	for len(oob) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		n := int(h.Len)
		if n < unix.SizeofCmsghdr || n > len(oob) {
			return 0
		}
		if data := oob[unix.CmsgLen(0):n]; h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(data) >= 4 {
			return int(int32(binary.NativeEndian.Uint32(data)))
		}
		n = unix.CmsgSpace(n - unix.CmsgLen(0))
		if n > len(oob) {
			return 0
		}
		oob = oob[n:]
	}
	return 0
}

func (s *Sockets) receiveGRO(i int, c *conn) {
	rc, err := c.udp.SyscallConn()
	if err != nil {
		return
	}
	r := new(reader)
	poll := r.poll
	var bad failures
	for {
		err := rc.Read(poll)
		if err == nil {
			err = r.err
		} else if r.buf != nil {
			r.idle()
		}
		if err != nil {
			if !bad.again(err) {
				return
			}
			continue
		}
		bad = 0
		if r.n > 0 {
			s.recv(i, r.name.addr(), r.buf[:r.n], r.segment())
		}
	}
}
