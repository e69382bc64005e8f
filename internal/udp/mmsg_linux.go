package udp

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where the kernel or a device cannot do segmentation, sendmmsg(2) and recvmmsg(2) still move many datagrams with one
// call: what is left to save is the way through the network stack, once for each.

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// name is a socket address of either family.
type name struct {
	sa  unix.RawSockaddrInet6 // has room for the IPv4 form
	len uint32
}

func portBytes(p *uint16) []byte { return (*[2]byte)(unsafe.Pointer(p))[:] }

// set makes n the address ap.
func (n *name) set(ap netip.AddrPort) {
	if a := ap.Addr(); a.Is4() {
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&n.sa))
		*sa = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.As4()}
		binary.BigEndian.PutUint16(portBytes(&sa.Port), ap.Port())
		n.len = unix.SizeofSockaddrInet4
	} else {
		zone, _ := strconv.Atoi(a.Zone())
		n.sa = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: a.As16(), Scope_id: uint32(zone)}
		binary.BigEndian.PutUint16(portBytes(&n.sa.Port), ap.Port())
		n.len = unix.SizeofSockaddrInet6
	}
}

// addr returns the address that the kernel has filled in.
func (n *name) addr() netip.AddrPort {
	if n.sa.Family == unix.AF_INET {
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&n.sa))
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), binary.BigEndian.Uint16(portBytes(&sa.Port)))
	}
	a := netip.AddrFrom16(n.sa.Addr)
	if n.sa.Scope_id != 0 && a.IsLinkLocalUnicast() {
		a = a.WithZone(strconv.Itoa(int(n.sa.Scope_id)))
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(portBytes(&n.sa.Port)))
}

// mmsgWriter sends datagrams to one address with as few calls as they take.
type mmsgWriter struct {
	to   name
	msgs [maxSegments]mmsghdr
	iovs [maxSegments]unix.Iovec
	poll func(fd uintptr) bool // bound once, so that it is not allocated for each batch

	count, done int
	err         error
}

var mmsgWriters = sync.Pool{New: func() any {
	w := new(mmsgWriter)
	w.poll = w.write
	return w
}}

// write is called when the socket may be writable; false waits until it is.
func (w *mmsgWriter) write(fd uintptr) bool {
	for w.done < w.count {
		n, _, errno := syscall.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&w.msgs[w.done])), uintptr(w.count-w.done),
			unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			w.done += int(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			w.err = errno
			return true
		}
	}
	return true
}

// writeMany sends b as datagrams of seg bytes. It returns how many bytes it has sent.
func (c *conn) writeMany(dst netip.AddrPort, b []byte, seg int) (sent int, err error) {
	w := mmsgWriters.Get().(*mmsgWriter)
	w.to.set(dst)
	for sent < len(b) && err == nil {
		w.count, w.done, w.err = 0, 0, nil
		for at := sent; at < len(b) && w.count < maxSegments; w.count++ {
			n := min(seg, len(b)-at)
			v, m := &w.iovs[w.count], &w.msgs[w.count]
			v.Base = &b[at]
			v.SetLen(n)
			m.hdr = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&w.to.sa)), Namelen: w.to.len, Iov: v}
			m.hdr.SetIovlen(1)
			at += n
		}
		if err = c.raw.Write(w.poll); err == nil {
			err = w.err
		}
		sent = min(sent+w.done*seg, len(b))
	}
	for i := range w.iovs {
		w.iovs[i].Base = nil // b is the caller's
	}
	mmsgWriters.Put(w)
	return sent, err
}

// slots is how many datagrams the room of one coalesced batch holds.
const slots = groSize / plainSize

// mmsgReader receives several datagrams with one call. Like reader it has a buffer only while there is something to receive.
type mmsgReader struct {
	buf   *[groSize]byte
	msgs  [slots]mmsghdr
	iovs  [slots]unix.Iovec
	names [slots]name
	n     int
	err   error
}

func (r *mmsgReader) poll(fd uintptr) bool {
	if r.buf == nil {
		r.buf = groBuffers.Get().(*[groSize]byte)
	}
	for i := range r.msgs {
		r.iovs[i].Base = &r.buf[i*plainSize]
		r.iovs[i].SetLen(plainSize)
		r.msgs[i].hdr = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&r.names[i].sa)), Namelen: unix.SizeofSockaddrInet6, Iov: &r.iovs[i]}
		r.msgs[i].hdr.SetIovlen(1)
	}
	for {
		n, _, errno := syscall.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.msgs)), slots, unix.MSG_DONTWAIT, 0, 0)
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

func (r *mmsgReader) idle() {
	groBuffers.Put(r.buf)
	r.buf = nil
	for i := range r.iovs {
		r.iovs[i].Base = nil
	}
}

// deliver passes on what was received, where datagrams of one source and size as a batch: they are moved together, for
// what is handed over at once is worked on at once.
func (r *mmsgReader) deliver(i int, recv Recv) {
	for k := 0; k < r.n; {
		src, seg := r.names[k].addr(), int(r.msgs[k].n)
		start := k * plainSize
		end := start + seg
		for k++; k < r.n; k++ {
			n := int(r.msgs[k].n)
			if n == 0 || n > seg || r.names[k].addr() != src {
				break
			}
			end += copy(r.buf[end:], r.buf[k*plainSize:k*plainSize+n])
			if n < seg { // the last of a batch
				k++
				break
			}
		}
		if seg > 0 {
			recv(i, src, r.buf[start:end], seg)
		}
	}
}

// receiveMany serves a socket without UDP_GRO.
func (s *Sockets) receiveMany(i int, c *conn) {
	r := new(mmsgReader)
	poll := r.poll
	var bad failures
	for {
		err := c.raw.Read(poll)
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
		r.deliver(i, s.recv)
	}
}
