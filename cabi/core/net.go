//go:build linux

package core

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tailnode/tailnode"
)

func addrOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.AddrPort()
	case *net.UDPAddr:
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// carry makes the host's descriptor for a TCP connection. c is closed if it fails.
func (nd *node) carry(c net.Conn, nonblock bool) (hostEnd, error) {
	host, st, err := newStream(c, nonblock)
	if err != nil {
		c.Close()
		return -1, err
	}
	if !nd.hold(st) {
		host.close()
		st.abort()
		return -1, errClosed
	}
	connections.Add(1)
	st.run(func() { connections.Add(-1); nd.release(st) })
	return host, nil
}

func (nd *node) dial(ctx context.Context, rq *request, rp *reply) (err error) {
	c, err := nd.srv.Dial(ctx, rq.str[0], rq.str[1])
	if err != nil {
		return err
	}
	rp.local, rp.remote = addrOf(c.LocalAddr()), addrOf(c.RemoteAddr())
	nonblock := rq.arg[0]&flagNonblock != 0
	if strings.HasPrefix(rq.str[0], "udp") {
		rp.fd, err = nd.packets(&connected{c}, nonblock)
		return err
	}
	rp.fd, err = nd.carry(c, nonblock)
	return err
}

// awaitAddress waits until the node runs where address has a host, which must be one of the node's addresses: Server.Listen would, but
// not be cancelled. What is wrong with the arguments is for that to say, at once.
func (nd *node) awaitAddress(ctx context.Context, proto, network, address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil
	}
	ip, err := netip.ParseAddr(host)
	if ip = ip.Unmap(); err != nil || ip.IsUnspecified() {
		return nil
	}
	switch family, ok := strings.CutPrefix(network, proto); {
	case !ok && network != "", family == "4" && !ip.Is4(), family == "6" && !ip.Is6(), family != "" && family != "4" && family != "6":
		return nil
	}
	if _, err := net.DefaultResolver.LookupPort(ctx, proto, port); err != nil {
		return nil
	}
	if _, err := nd.srv.Up(ctx); err != nil {
		if e, ok := errors.AsType[*tailnode.Error](err); ok {
			return &tailnode.Error{Op: "listen", Code: e.Code, Err: e.Err}
		}
		return err
	}
	return ctx.Err()
}

// listen makes a listener. Connections wait in its socket, with their addresses, until the host takes them; when the socket is
// full, about 200 later, they wait in the stack.
func (nd *node) listen(ctx context.Context, rq *request, rp *reply) (started func(), err error) {
	if err := nd.awaitAddress(ctx, "tcp", rq.str[0], rq.str[1]); err != nil {
		return nil, err
	}
	ln, err := nd.srv.Listen(rq.str[0], rq.str[1])
	if err != nil {
		return nil, err
	}
	nonblock := rq.arg[0]&flagNonblock != 0
	host, s, err := newPair(unix.SOCK_SEQPACKET, nonblock)
	if err != nil {
		ln.Close()
		return nil, err
	}
	if !nd.hold(s) {
		host.close()
		s.Close()
		ln.Close()
		return nil, errClosed
	}
	rp.fd, rp.local = host, addrOf(ln.Addr())
	go func() {
		defer nd.release(s)
		var wg sync.WaitGroup
		wg.Go(func() {
			s.awaitEnd()
			ln.Close()
		})
		nd.accept(ln, s, nonblock)
		ln.Close()
		s.Close()
		wg.Wait()
	}()
	return nil, nil
}

func (nd *node) accept(ln net.Listener, s *sock, nonblock bool) {
	b := make([]byte, 0, 4+2*addrSize)
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		fd, err := nd.carry(c, nonblock)
		if err != nil {
			continue // no descriptors left: this connection is closed, which is all that can be done for the next
		}
		b = native.AppendUint32(b[:0], acceptedMagic)
		b = appendAddr(b, addrOf(c.RemoteAddr()))
		b = appendAddr(b, addrOf(c.LocalAddr()))
		err = s.send(b, unix.UnixRights(int(fd)), true)
		fd.close()
		if err != nil && err != unix.ETOOMANYREFS {
			return
		}
	}
}

// packetSide is the tailnet's side of a UDP socket.
type packetSide interface {
	// next reads a datagram into b behind room for the head, and returns the message for the host.
	next(b []byte) ([]byte, error)
	// put sends what the host gave. Errors of single datagrams are dropped, as UDP does.
	put(b []byte)
	Close() error
}

// connected has no head.
type connected struct{ net.Conn }

func (c *connected) next(b []byte) ([]byte, error) {
	n, err := c.Read(b)
	return b[:n], err
}

// The stack reports what ICMP said of a datagram before at the next write, and then does not send.
func (c *connected) put(b []byte) {
	if _, err := c.Write(b); aboutOne(err) {
		c.Write(b)
	}
}

// aboutOne reports whether err is what ICMP said of one datagram: the socket goes on.
func aboutOne(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EMSGSIZE)
}

// unconnected has the peer's address in front of each datagram.
type unconnected struct{ net.PacketConn }

func (c *unconnected) next(b []byte) ([]byte, error) {
	if ap, ok := c.PacketConn.(interface {
		ReadFromAddrPort([]byte) (int, netip.AddrPort, error)
	}); ok {
		n, from, err := ap.ReadFromAddrPort(b[addrSize:])
		appendAddr(b[:0], from)
		return b[:addrSize+n], err
	}
	n, from, err := c.ReadFrom(b[addrSize:])
	if err == nil {
		appendAddr(b[:0], addrOf(from))
	}
	return b[:addrSize+n], err
}

func (c *unconnected) put(b []byte) {
	to := parseAddr(b)
	if !to.IsValid() {
		return
	}
	if ap, ok := c.PacketConn.(interface {
		WriteToAddrPort([]byte, netip.AddrPort) (int, error)
	}); ok {
		ap.WriteToAddrPort(b[addrSize:], to)
		return
	}
	c.WriteTo(b[addrSize:], net.UDPAddrFromAddrPort(to))
}

func (nd *node) listenPacket(ctx context.Context, rq *request, rp *reply) error {
	if err := nd.awaitAddress(ctx, "udp", rq.str[0], rq.str[1]); err != nil {
		return err
	}
	pc, err := nd.srv.ListenPacket(rq.str[0], rq.str[1])
	if err != nil {
		return err
	}
	rp.local = addrOf(pc.LocalAddr())
	rp.fd, err = nd.packets(&unconnected{pc}, rq.arg[0]&flagNonblock != 0)
	return err
}

const maxDatagram = 65535

var datagrams = sync.Pool{New: func() any { return new([addrSize + maxDatagram]byte) }}

// packets joins a UDP socket of the tailnet to a socket of the host.
func (nd *node) packets(p packetSide, nonblock bool) (host hostEnd, err error) {
	host, s, err := newPair(unix.SOCK_SEQPACKET, nonblock)
	if err != nil {
		p.Close()
		return -1, err
	}
	s.stampMessages() // before the host has its end
	if !nd.hold(s) {
		host.close()
		s.Close()
		p.Close()
		return -1, errClosed
	}
	var both sync.WaitGroup
	both.Go(func() {
		b := make([]byte, addrSize+maxDatagram)
		for {
			m, err := p.next(b)
			if aboutOne(err) {
				continue
			}
			if err != nil {
				break
			}
			// A full queue drops, as a UDP socket's does.
			if err := s.send(m, nil, false); err != nil && err != unix.EAGAIN {
				break
			}
		}
		s.Close()
	})
	both.Go(func() {
		for s.readable() == nil {
			b := datagrams.Get().(*[addrSize + maxDatagram]byte)
			n, err := s.receive(b[:])
			if err == nil {
				p.put(b[:n])
			}
			datagrams.Put(b)
			if err != nil {
				break
			}
		}
		p.Close()
	})
	go func() {
		both.Wait()
		nd.release(s)
	}()
	return host, nil
}

// Kinds of event and states, as in the header.
const (
	eventState   = 1
	eventNetmap  = 2
	eventAuthURL = 3
	eventText    = 1007
)

var states = map[string]uint32{"Stopped": 0, "Starting": 1, "NeedsLogin": 2, "NeedsMachineAuth": 3, "Running": 4}

// marked is a socket with a message in it that nobody reads, so that the death of this process is a reset for the host, as with streams; its own
// end reads it away.
type marked struct{ *sock }

func (m marked) abort() {
	m.rc.Control(func(fd uintptr) {
		var b [1]byte
		for n := 1; n > 0; {
			n, _, _ = unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
		}
	})
	m.Close()
}

// watch tells the host of changes. There is room for many events in the socket; when it is full, the changes of the time until the host
// reads are told as one.
func (nd *node) watch(lc *tailnode.LocalClient, rq *request, rp *reply) error {
	host, s, err := newPair(unix.SOCK_SEQPACKET, rq.arg[0]&flagNonblock != 0)
	if err != nil {
		return err
	}
	m := marked{s}
	if _, err := unix.SendmsgN(int(host), []byte{0}, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		host.close()
		s.Close()
		return err
	}
	if !nd.hold(m) {
		host.close()
		s.Close()
		return errClosed
	}
	rp.fd = host
	ctx, cancel := context.WithCancel(nd.ctx)
	var both sync.WaitGroup
	both.Go(func() {
		s.awaitEnd()
		cancel()
	})
	go func() {
		both.Wait()
		nd.release(m)
	}()
	both.Go(func() {
		defer m.abort()
		tell := func(kind, state uint32, text string) error {
			if len(text) > eventText {
				text = text[:eventText]
			}
			b := native.AppendUint32(make([]byte, 0, 16+len(text)), kind)
			b = native.AppendUint32(b, state)
			b = native.AppendUint32(b, uint32(len(text)))
			b = native.AppendUint32(b, 0)
			return s.send(append(b, text...), nil, true)
		}
		var state, text, url string
		for first := true; ; first = false {
			changed, err := lc.Changed()
			if err != nil {
				return
			}
			st, err := lc.StatusWithoutPeers(ctx)
			if err != nil {
				return
			}
			n, told := states[st.BackendState], false
			if health := strings.Join(st.Health, "; "); first || st.BackendState != state || health != text {
				state, text, told = st.BackendState, health, true
				if tell(eventState, n, health) != nil {
					return
				}
			}
			if st.AuthURL != url {
				if url, told = st.AuthURL, true; url != "" && tell(eventAuthURL, n, url) != nil {
					return
				}
			}
			if !told && tell(eventNetmap, n, "") != nil {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	})
	return nil
}

var _ io.Closer = (*sock)(nil)
