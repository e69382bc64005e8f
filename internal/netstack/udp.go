package netstack

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// packetConn is a UDP socket: net.PacketConn, and net.Conn if it is connected.
type packetConn struct {
	s             *Stack
	ep            tcpip.Endpoint
	wq            *waiter.Queue
	local, remote netip.AddrPort // remote: only if connected
	closed        atomic.Bool

	rd side
	sw tcpip.SliceWriter

	wr  side
	src bytes.Reader
}

// ListenUDP opens a UDP socket on addr, with the addresses and errors of ListenTCP. Each read returns one datagram,
// cut off if the buffer is shorter; datagrams beyond Config.UDPBuffer that nobody reads are dropped. The result also
// has ReadFromAddrPort and WriteToAddrPort.
func (s *Stack) ListenUDP(addr netip.AddrPort) (net.PacketConn, error) {
	c, err := s.openUDP(addr, netip.AddrPort{}, false)
	if err != nil {
		return nil, opError("listen", "udp", netip.AddrPort{}, addr, err)
	}
	return c, nil
}

// ListenUDP6 is ListenUDP on all of the node's IPv6 addresses and no other.
func (s *Stack) ListenUDP6(port uint16) (net.PacketConn, error) {
	addr := netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	c, err := s.openUDP(addr, netip.AddrPort{}, true)
	if err != nil {
		return nil, opError("listen", "udp6", netip.AddrPort{}, addr, err)
	}
	return c, nil
}

// DialUDP opens a UDP socket that sends to dst and receives from it alone. It does not block and sends nothing; the
// result is also a net.PacketConn.
func (s *Stack) DialUDP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	var err error
	if !dst.IsValid() || dst.Addr().IsUnspecified() || dst.Port() == 0 {
		err = errors.New("netstack: not an address to connect to")
	} else if err = ctx.Err(); err == nil {
		var c *packetConn
		if c, err = s.openUDP(netip.AddrPort{}, dst, false); err == nil {
			return c, nil
		}
	}
	return nil, opError("dial", "udp", netip.AddrPort{}, dst, err)
}

func (s *Stack) openUDP(local, remote netip.AddrPort, only6 bool) (*packetConn, error) {
	if s.life.Err() != nil {
		return nil, net.ErrClosed
	}
	family := local.Addr()
	if remote.IsValid() {
		family = remote.Addr()
	}
	wq := new(waiter.Queue)
	ep, terr := s.gv.NewEndpoint(udp.ProtocolNumber, bindProto(family), wq)
	if terr != nil {
		return nil, sysError(terr, false)
	}
	ep.SocketOptions().SetReceiveBufferSize(int64(s.cfg.UDPBuffer), false)
	if remote.IsValid() {
		terr = ep.Connect(fullAddr(remote))
	} else {
		ep.SocketOptions().SetV6Only(only6)
		terr = ep.Bind(fullAddr(local))
	}
	if terr != nil {
		ep.Close()
		return nil, sysError(terr, s.life.Err() != nil)
	}
	c := &packetConn{s: s, ep: ep, wq: wq, remote: remote}
	if remote.IsValid() {
		if a, err := ep.GetLocalAddress(); err == nil {
			c.local = netip.AddrPortFrom(fromGV(a.Addr), a.Port)
		}
	} else {
		c.local = boundAddr(ep, local)
	}
	c.rd.watch(wq, waiter.ReadableEvents)
	c.wr.watch(wq, waiter.WritableEvents)
	if !s.add(c) {
		c.abort()
		return nil, net.ErrClosed
	}
	return c, nil
}

// ReadFromAddrPort reads one datagram and tells who sent it.
func (c *packetConn) ReadFromAddrPort(b []byte) (int, netip.AddrPort, error) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	for {
		if c.closed.Load() {
			return 0, netip.AddrPort{}, c.fail("read", netip.AddrPort{}, net.ErrClosed)
		}
		if c.rd.timedOut() {
			return 0, netip.AddrPort{}, c.fail("read", netip.AddrPort{}, os.ErrDeadlineExceeded)
		}
		c.sw = b
		res, err := c.ep.Read(&c.sw, tcpip.ReadOptions{NeedRemoteAddr: true})
		c.sw = nil
		switch err.(type) {
		case nil:
			return res.Count, netip.AddrPortFrom(fromGV(res.RemoteAddr.Addr), res.RemoteAddr.Port), nil
		case *tcpip.ErrWouldBlock:
			<-c.rd.ready
		default:
			return 0, netip.AddrPort{}, c.fail("read", netip.AddrPort{}, sysError(err, c.closed.Load()))
		}
	}
}

// ReadFrom implements net.PacketConn.
func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.ReadFromAddrPort(b)
	if err != nil {
		return 0, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// Read implements net.Conn.
func (c *packetConn) Read(b []byte) (int, error) {
	n, _, err := c.ReadFromAddrPort(b)
	return n, err
}

// WriteToAddrPort sends b as one datagram to dst; in fragments, if it is longer than the MTU allows.
func (c *packetConn) WriteToAddrPort(b []byte, dst netip.AddrPort) (int, error) {
	if !dst.IsValid() || dst.Port() == 0 {
		return 0, c.fail("write", dst, errors.New("netstack: not an address to send to"))
	}
	if c.remote.IsValid() {
		return 0, c.fail("write", dst, net.ErrWriteToConnected)
	}
	to := fullAddr(netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port()))
	return c.send(b, dst, &to)
}

// WriteTo implements net.PacketConn. addr must be a *net.UDPAddr or have a method AddrPort.
func (c *packetConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	a, ok := addr.(interface{ AddrPort() netip.AddrPort })
	if !ok {
		return 0, c.fail("write", netip.AddrPort{}, errors.New("netstack: not a UDP address"))
	}
	return c.WriteToAddrPort(b, a.AddrPort())
}

// Write implements net.Conn.
func (c *packetConn) Write(b []byte) (int, error) {
	if !c.remote.IsValid() {
		return 0, c.fail("write", c.remote, sysError(&tcpip.ErrDestinationRequired{}, false))
	}
	return c.send(b, c.remote, nil)
}

func (c *packetConn) send(b []byte, dst netip.AddrPort, to *tcpip.FullAddress) (int, error) {
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	for {
		if c.closed.Load() {
			return 0, c.fail("write", dst, net.ErrClosed)
		}
		if c.wr.timedOut() {
			return 0, c.fail("write", dst, os.ErrDeadlineExceeded)
		}
		c.src.Reset(b)
		n, err := c.ep.Write(&c.src, tcpip.WriteOptions{To: to})
		c.src.Reset(nil)
		switch err.(type) {
		case nil:
			return int(n), nil
		case *tcpip.ErrWouldBlock:
			<-c.wr.ready
		default:
			return 0, c.fail("write", dst, sysError(err, c.closed.Load()))
		}
	}
}

// Close implements net.Conn and net.PacketConn.
func (c *packetConn) Close() error {
	if c.closed.Swap(true) {
		return c.fail("close", c.remote, net.ErrClosed)
	}
	c.s.remove(c)
	c.ep.Close()
	c.wq.EventUnregister(&c.rd.entry)
	c.wq.EventUnregister(&c.wr.entry)
	for _, d := range []*side{&c.rd, &c.wr} {
		d.stopTimer()
		d.poke()
	}
	return nil
}

func (c *packetConn) abort() { c.Close() }

// LocalAddr returns a *net.UDPAddr.
func (c *packetConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.local) }

// RemoteAddr returns a *net.UDPAddr, or nil if the socket is not connected.
func (c *packetConn) RemoteAddr() net.Addr {
	if !c.remote.IsValid() {
		return nil
	}
	return net.UDPAddrFromAddrPort(c.remote)
}

// SetDeadline implements net.Conn.
func (c *packetConn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *packetConn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.rd, t) }

// SetWriteDeadline implements net.Conn.
func (c *packetConn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.wr, t) }

func (c *packetConn) setDeadline(d *side, t time.Time) error {
	if c.closed.Load() {
		return c.fail("set", c.remote, net.ErrClosed)
	}
	d.setDeadline(t)
	return nil
}

func (c *packetConn) fail(op string, dst netip.AddrPort, err error) error {
	return opError(op, "udp", c.local, dst, err)
}
