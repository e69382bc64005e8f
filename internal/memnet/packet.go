package memnet

import (
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// queueBytes is the room of a socket's receive queue, as on a common system; beyond it datagrams are lost.
const queueBytes = 208 << 10

type datagram struct {
	src netip.AddrPort
	b   []byte
}

// PacketConn is a datagram socket. It implements net.PacketConn.
type PacketConn struct {
	n    *Network
	addr netip.AddrPort

	mu    sync.Mutex
	queue []datagram
	bytes int
	wake  chan struct{} // has room for one: something came

	read deadline
	once sync.Once
	done chan struct{}
}

// ListenPacket opens a socket on "udp", "udp4" or "udp6".
func (h *Host) ListenPacket(network, address string) (*PacketConn, error) {
	ap, err := h.local(network, address)
	if err != nil {
		return nil, opError("listen", network, ap, err)
	}
	n := h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	ap, err = n.port(ap, func(c netip.AddrPort) bool { return n.packets[c] != nil })
	if err != nil {
		return nil, opError("listen", network, ap, err)
	}
	c := &PacketConn{n: n, addr: ap, wake: make(chan struct{}, 1), done: make(chan struct{})}
	n.packets[ap] = c
	return c, nil
}

// LocalAddrPort returns the socket's address.
func (c *PacketConn) LocalAddrPort() netip.AddrPort { return c.addr }

// LocalAddr returns the socket's address.
func (c *PacketConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.addr) }

// WriteToUDPAddrPort sends a datagram. It never blocks.
func (c *PacketConn) WriteToUDPAddrPort(b []byte, dst netip.AddrPort) (int, error) {
	if isClosed(c.done) {
		return 0, opError("write", "udp", dst, net.ErrClosed)
	}
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if dst.Addr().Is4() != c.addr.Addr().Is4() {
		return 0, opError("write", "udp", dst, syscall.ENETUNREACH)
	}
	n := c.n
	src, out := c.addr, true
	n.mu.Lock()
	if n.router != nil {
		src, out = n.router.Out(src, dst)
	}
	l := n.link(c.addr, dst, true)
	lost := !out || l.Down || n.rnd.Float64() < l.Loss || l.MTU > 0 && len(b) > l.MTU
	copies := 1
	if n.rnd.Float64() < l.Duplicate {
		copies = 2
	}
	var delays [2]time.Duration
	for i := range copies {
		d := l.Latency
		if l.Jitter > 0 {
			d += time.Duration(n.rnd.Int64N(int64(l.Jitter)))
		}
		if n.rnd.Float64() < l.Reorder {
			d += max(l.Latency, time.Millisecond)
		}
		delays[i] = d
	}
	n.mu.Unlock()
	if lost {
		return len(b), nil
	}
	d := datagram{src, append([]byte(nil), b...)}
	for i := range copies {
		if delays[i] == 0 {
			n.deliver(dst, d)
		} else {
			time.AfterFunc(delays[i], func() { n.deliver(dst, d) })
		}
	}
	return len(b), nil
}

func (n *Network) deliver(dst netip.AddrPort, d datagram) {
	n.mu.Lock()
	in := true
	if n.router != nil {
		dst, in = n.router.In(d.src, dst)
	}
	c := n.packets[dst]
	n.mu.Unlock()
	if c == nil || !in {
		return
	}
	c.mu.Lock()
	if c.bytes+len(d.b) <= queueBytes {
		c.queue = append(c.queue, d)
		c.bytes += len(d.b)
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// ReadFromUDPAddrPort waits for a datagram, the read deadline or Close. What is longer than b is cut.
func (c *PacketConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	for {
		passed := c.read.passed()
		switch {
		case isClosed(c.done):
			return 0, netip.AddrPort{}, opError("read", "udp", c.addr, net.ErrClosed)
		case isClosed(passed):
			return 0, netip.AddrPort{}, opError("read", "udp", c.addr, errTimeout)
		}
		c.mu.Lock()
		if len(c.queue) > 0 {
			d := c.queue[0]
			c.queue[0] = datagram{}
			c.queue = c.queue[1:]
			c.bytes -= len(d.b)
			more := len(c.queue) > 0
			c.mu.Unlock()
			if more { // another reader may wait
				select {
				case c.wake <- struct{}{}:
				default:
				}
			}
			return copy(b, d.b), d.src, nil
		}
		c.mu.Unlock()
		select {
		case <-c.wake:
		case <-passed:
		case <-c.done:
		}
	}
}

// ReadFrom is ReadFromUDPAddrPort with a *net.UDPAddr.
func (c *PacketConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, src, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		return n, nil, err
	}
	return n, net.UDPAddrFromAddrPort(src), nil
}

// WriteTo is WriteToUDPAddrPort for a net.Addr.
func (c *PacketConn) WriteTo(b []byte, to net.Addr) (int, error) {
	a, ok := to.(interface{ AddrPort() netip.AddrPort })
	if !ok {
		return 0, opError("write", "udp", c.addr, syscall.EINVAL)
	}
	return c.WriteToUDPAddrPort(b, a.AddrPort())
}

// Close frees the address and ends reads.
func (c *PacketConn) Close() error {
	c.once.Do(func() {
		c.n.mu.Lock()
		delete(c.n.packets, c.addr)
		c.n.mu.Unlock()
		close(c.done)
		c.read.stop()
	})
	return nil
}

// SetDeadline sets the read deadline; writes never block.
func (c *PacketConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetReadDeadline ends reads, also those under way, at t.
func (c *PacketConn) SetReadDeadline(t time.Time) error { c.read.set(t); return nil }

// SetWriteDeadline does nothing.
func (c *PacketConn) SetWriteDeadline(time.Time) error { return nil }
