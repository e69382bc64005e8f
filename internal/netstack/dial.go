package netstack

import (
	"context"
	"errors"
	"math"
	"net"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

func fullAddr(ap netip.AddrPort) tcpip.FullAddress {
	fa := tcpip.FullAddress{Port: ap.Port()}
	if a := ap.Addr().Unmap(); a.IsValid() && !a.IsUnspecified() {
		fa.Addr = toGV(a)
	}
	return fa
}

// DialTCP connects to dst, which may be the node itself. It ends with ctx (the error is then ctx.Err(), wrapped), with
// the peer's refusal (ErrRefused), after some two minutes without an answer (ErrTimeout), or with Close
// (net.ErrClosed); a connection attempt that is given up leaves nothing behind. Every error is a *net.OpError. The
// result also has CloseRead, CloseWrite, SetKeepAlive, SetKeepAlivePeriod, SetLinger and SetNoDelay, as *net.TCPConn.
func (s *Stack) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	c, err := s.dialTCP(ctx, dst)
	if err != nil {
		return nil, opError("dial", "tcp", netip.AddrPort{}, dst, err)
	}
	return c, nil
}

func (s *Stack) dialTCP(ctx context.Context, dst netip.AddrPort) (*conn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if !dst.IsValid() || dst.Addr().IsUnspecified() || dst.Port() == 0 {
		return nil, errors.New("netstack: not an address to connect to")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	wq := new(waiter.Queue)
	ep, terr := s.gv.NewEndpoint(tcp.ProtocolNumber, netProto(dst.Addr()), wq)
	if terr != nil {
		return nil, sysError(terr, false)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)

	terr = ep.Connect(fullAddr(dst))
	if _, ok := terr.(*tcpip.ErrConnectStarted); ok {
		select {
		case <-ready:
			terr = ep.LastError()
		case <-ctx.Done():
			ep.Abort()
			return nil, ctx.Err()
		case <-s.life.Done():
			ep.Abort()
			return nil, net.ErrClosed
		}
	}
	if terr != nil {
		ep.Abort()
		return nil, sysError(terr, s.life.Err() != nil)
	}
	c := s.newConn(ep, wq)
	if c == nil {
		return nil, net.ErrClosed
	}
	c.dialled = true
	return c, nil
}

// listener is a TCP listener.
type listener struct {
	s      *Stack
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	addr   netip.AddrPort
	closed atomic.Bool
	done   chan struct{}
}

// ListenTCP listens on addr: one of the node's addresses, 0.0.0.0 for all of its IPv4 addresses, or :: (or the zero
// Addr) for all of either family, present and future. Port 0 picks one that is free. Errors are *net.OpError: ErrInUse,
// ErrNotLocal, net.ErrClosed. It does not block. A connection reset before it is accepted is still returned by Accept,
// and fails when used. Where more come at a time than Config.Backlog, late copies of a handshake's last packet may make a connection
// that nobody has at the other end: a server that waits for what a client sends wants a read deadline, or keep-alive.
func (s *Stack) ListenTCP(addr netip.AddrPort) (net.Listener, error) {
	l, err := s.listenTCP(addr, false)
	if err != nil {
		return nil, opError("listen", "tcp", netip.AddrPort{}, addr, err)
	}
	return l, nil
}

// ListenTCP6 is ListenTCP on all of the node's IPv6 addresses and no other: the port stays free for IPv4.
func (s *Stack) ListenTCP6(port uint16) (net.Listener, error) {
	addr := netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	l, err := s.listenTCP(addr, true)
	if err != nil {
		return nil, opError("listen", "tcp6", netip.AddrPort{}, addr, err)
	}
	return l, nil
}

func (s *Stack) listenTCP(addr netip.AddrPort, only6 bool) (*listener, error) {
	if s.life.Err() != nil {
		return nil, net.ErrClosed
	}
	wq := new(waiter.Queue)
	ep, terr := s.gv.NewEndpoint(tcp.ProtocolNumber, bindProto(addr.Addr()), wq)
	if terr != nil {
		return nil, sysError(terr, false)
	}
	ep.SocketOptions().SetV6Only(only6)
	ep.SocketOptions().SetReuseAddress(true) // connections of a former listener do not hold the port
	if terr = ep.Bind(fullAddr(addr)); terr == nil {
		terr = ep.Listen(s.cfg.Backlog)
	}
	if terr != nil {
		ep.Close()
		return nil, sysError(terr, s.life.Err() != nil)
	}
	// gVisor counts a segment that came to the listener, and is passed on to the connection that its handshake has just
	// made, against the listener for good, and takes no segment with data to one that has used its buffer up: then peers
	// whose handshake ended when the backlog was full wait for ever. So the buffer is one that is not used up, and strays bounds what waits.
	// Those of connections were settled by Listen.
	ep.SocketOptions().SetReceiveBufferSize(math.MaxInt32, false)
	l := &listener{s: s, ep: ep, wq: wq, done: make(chan struct{})}
	l.addr = boundAddr(ep, addr)
	if !s.add(l) {
		l.abort()
		return nil, net.ErrClosed
	}
	return l, nil
}

// bindProto picks the family of a socket bound to a: one for IPv6 also takes IPv4 while it is not bound to an address.
func bindProto(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a = a.Unmap(); a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func boundAddr(ep tcpip.Endpoint, asked netip.AddrPort) netip.AddrPort {
	a := asked.Addr().Unmap()
	if !a.IsValid() {
		a = netip.IPv6Unspecified()
	}
	got, err := ep.GetLocalAddress()
	if err != nil {
		return netip.AddrPortFrom(a, asked.Port())
	}
	return netip.AddrPortFrom(a, got.Port)
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	registered := false
	for {
		if l.closed.Load() {
			return nil, l.fail("accept", net.ErrClosed)
		}
		ep, wq, err := l.ep.Accept(nil)
		switch err.(type) {
		case nil:
			if c := l.s.newConn(ep, wq); c != nil {
				return c, nil
			}
			return nil, l.fail("accept", net.ErrClosed)
		case *tcpip.ErrWouldBlock:
			if !registered { // and look again, for what came in between
				l.wq.EventRegister(&entry)
				defer l.wq.EventUnregister(&entry)
				registered = true
				continue
			}
			select {
			case <-ready:
			case <-l.done:
			}
		default:
			return nil, l.fail("accept", sysError(err, l.closed.Load()))
		}
	}
}

// Close implements net.Listener. It unblocks Accept with net.ErrClosed and resets what was not accepted.
func (l *listener) Close() error {
	if l.closed.Swap(true) {
		return l.fail("close", net.ErrClosed)
	}
	l.s.remove(l)
	l.ep.Close()
	close(l.done)
	return nil
}

func (l *listener) abort() { l.Close() }

// Addr returns a *net.TCPAddr.
func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.addr) }

func (l *listener) fail(op string, err error) error {
	return opError(op, "tcp", netip.AddrPort{}, l.addr, err)
}

// fallbackFunc decides about a connection that no listener takes.
type fallbackFunc func(src, dst netip.AddrPort) (handler func(net.Conn), intercept bool)

// SetFallbackTCP lets f decide about each incoming connection to an address of the node and a port on which nobody
// listens. If f says intercept, the connection is accepted and handler runs with it on a goroutine of its own, and must
// close it; a nil handler, or no intercept, refuses the connection with a reset, as without f. f may block: it
// holds up nothing but its own connection, and at most Config.FallbackInFlight are with it at a time, the rest being
// ignored until the peer tries again. A nil f switches this off.
func (s *Stack) SetFallbackTCP(f func(src, dst netip.AddrPort) (handler func(net.Conn), intercept bool)) {
	if f == nil {
		s.fallback.Store(nil)
		return
	}
	ff := fallbackFunc(f)
	s.fallback.Store(&ff)
	s.fallbackOnce.Do(func() {
		fw := tcp.NewForwarder(s.gv, initialBuffer, s.cfg.FallbackInFlight, s.forward)
		s.gv.SetTransportProtocolHandler(tcp.ProtocolNumber, fw.HandlePacket)
	})
}

// forward runs on a goroutine of its own for each attempt.
func (s *Stack) forward(r *tcp.ForwarderRequest) {
	id := r.ID()
	var handler func(net.Conn)
	if f := s.fallback.Load(); f != nil {
		h, ok := (*f)(
			netip.AddrPortFrom(fromGV(id.RemoteAddress), id.RemotePort),
			netip.AddrPortFrom(fromGV(id.LocalAddress), id.LocalPort))
		if ok {
			handler = h
		}
	}
	if c := s.complete(r, handler != nil); c != nil {
		handler(c)
	}
}

// complete refuses the attempt, or brings it through its handshake.
func (s *Stack) complete(r *tcp.ForwarderRequest, accept bool) *conn {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		r.Complete(false)
		return nil
	}
	s.forwarding.Add(1) // Close waits for it
	s.mu.Unlock()
	defer s.forwarding.Done()

	if !accept {
		r.Complete(true)
		return nil
	}
	wq := new(waiter.Queue)
	ep, err := r.CreateEndpoint(wq)
	r.Complete(err != nil)
	if err != nil {
		return nil
	}
	return s.newConn(ep, wq)
}
