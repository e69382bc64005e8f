package netstack

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

// side is what one direction of a socket waits with: one goroutine at a time (the holder of mu) sleeps on ready, and is
// poked by the stack's events, by the deadline, and by Close.
type side struct {
	mu    sync.Mutex // held across a whole Read or Write
	ready chan struct{}
	entry waiter.Entry

	dmu     sync.Mutex
	at      time.Time // deadline; zero: none
	expired bool
	timer   *time.Timer
}

// watch registers for the stack's events. It must be called once, before the first wait.
func (d *side) watch(wq *waiter.Queue, mask waiter.EventMask) {
	d.ready = make(chan struct{}, 1)
	d.entry.Init(waiter.ChannelNotifier(d.ready), mask|waiter.EventHUp|waiter.EventErr)
	wq.EventRegister(&d.entry)
}

func (d *side) poke() {
	select {
	case d.ready <- struct{}{}:
	default:
	}
}

func (d *side) timedOut() bool {
	d.dmu.Lock()
	defer d.dmu.Unlock()
	return d.expired
}

// setDeadline lets operations, also one under way, fail from t on; zero means never.
func (d *side) setDeadline(t time.Time) {
	d.dmu.Lock()
	defer d.dmu.Unlock()
	d.at, d.expired = t, false
	if t.IsZero() {
		if d.timer != nil {
			d.timer.Stop()
		}
		return
	}
	wait := time.Until(t)
	switch {
	case wait <= 0:
		if d.timer != nil {
			d.timer.Stop()
		}
		d.expired = true
		d.poke()
	case d.timer == nil:
		d.timer = time.AfterFunc(wait, d.fire)
	default:
		d.timer.Reset(wait)
	}
}

// fire runs when the timer does, which may be just after the deadline was moved. A deadline without a monotonic reading may then be ahead again,
// for the clock may have been set back.
func (d *side) fire() {
	d.dmu.Lock()
	d.expired = false
	if !d.at.IsZero() {
		wait := time.Until(d.at)
		if d.expired = wait <= 0; !d.expired {
			d.timer.Reset(wait)
		}
	}
	late := d.expired
	d.dmu.Unlock()
	if late {
		d.poke()
	}
}

func (d *side) stopTimer() {
	d.dmu.Lock()
	d.at = time.Time{} // for fire
	if d.timer != nil {
		d.timer.Stop()
	}
	d.dmu.Unlock()
}

// conn is a TCP connection: net.Conn with CloseRead, CloseWrite and the options of *net.TCPConn.
type conn struct {
	s             *Stack
	ep            tcpip.Endpoint
	wq            *waiter.Queue
	local, remote netip.AddrPort
	key           flowKey
	closed        atomic.Bool

	rd     side
	sw     tcpip.SliceWriter // argument of ep.Read, here so that it is not allocated each time
	copied int               // read since the stack was told
	rgrow  grower

	wr side

	sm       sync.Mutex    // held across each ep.Write, never while waiting; guards the following
	src      *bytes.Reader // argument of ep.Write, which keeps it: no part of conn, or the endpoint in TIME-WAIT would hold all of that
	written  int           // since wgrow was told
	wgrow    grower
	buf      *[gatherMax + smallWrite]byte
	pend     []byte // of buf: gathered and not yet passed to the stack
	tight    bool   // the stack did not have room for everything
	failed   bool   // nothing more can be sent
	lastSend time.Time
	again    bool // and before that less than burst earlier

	waiting atomic.Bool // buf is not nil
	reading atomic.Bool // the application waits for something to read
	dialled bool
}

// moderateEvery is how many bytes are read, or written, before the size of the buffer is reconsidered: it takes locks
// and the time, and who moves little needs no larger window.
const moderateEvery = 16 << 10

// newConn makes an established endpoint a connection of s. If the Stack is closed, the endpoint is reset and the
// result nil.
func (s *Stack) newConn(ep tcpip.Endpoint, wq *waiter.Queue) *conn {
	c := &conn{s: s, ep: ep, wq: wq, src: new(bytes.Reader)}
	if a, err := ep.GetLocalAddress(); err == nil {
		c.local = netip.AddrPortFrom(fromGV(a.Addr), a.Port)
	}
	if a, err := ep.GetRemoteAddress(); err == nil {
		c.remote = netip.AddrPortFrom(fromGV(a.Addr), a.Port)
	}
	c.key = keyFor(flow{c.local, c.remote})
	c.rgrow = grower{b: &s.budget, ep: ep, recv: true}
	c.wgrow = grower{b: &s.budget, ep: ep}
	c.rd.watch(wq, waiter.ReadableEvents)
	c.wr.watch(wq, waiter.WritableEvents)
	if !s.add(c) {
		c.abort()
		return nil
	}
	return c
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	for {
		n, err := c.tryRead(b)
		if err != errWouldBlock {
			return n, err
		}
		c.wait()
	}
}

var errWouldBlock = errors.New("netstack: would block")

// tryRead reads what is there, with rd.mu held. On errWouldBlock there is nothing yet, and rd.ready tells when to try
// again.
func (c *conn) tryRead(b []byte) (int, error) {
	if c.closed.Load() {
		return 0, c.fail("read", net.ErrClosed)
	}
	if c.rd.timedOut() {
		return 0, c.fail("read", os.ErrDeadlineExceeded)
	}
	if len(b) == 0 {
		return 0, nil
	}
	c.sw = b
	res, err := c.ep.Read(&c.sw, tcpip.ReadOptions{})
	c.sw = nil
	switch err.(type) {
	case nil:
		c.moderate(res.Count)
		return res.Count, nil
	case *tcpip.ErrWouldBlock:
		return 0, errWouldBlock
	case *tcpip.ErrClosedForReceive:
		if c.closed.Load() {
			return 0, c.fail("read", net.ErrClosed)
		}
		return 0, io.EOF
	}
	return 0, c.fail("read", sysError(err, c.closed.Load()))
}

// wait waits until there may be something to read. What the peer may be waiting for goes first.
func (c *conn) wait() {
	c.flush()
	c.s.link.acks.release(&c.key)
	c.reading.Store(true)
	<-c.rd.ready
	c.reading.Store(false)
}

// moderate notes that n more bytes were read.
func (c *conn) moderate(n int) {
	if c.copied += n; c.copied >= moderateEvery {
		c.rgrow.received(c.copied)
		c.copied = 0
	}
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	done := 0
	for {
		if c.closed.Load() {
			return done, c.fail("write", net.ErrClosed)
		}
		if c.wr.timedOut() {
			return done, c.fail("write", os.ErrDeadlineExceeded)
		}
		if done == len(b) {
			return done, nil
		}
		if done == 0 && c.gather(b) {
			return len(b), nil
		}
		n, err := c.push(b[done:min(len(b), done+c.s.piece)])
		done += n
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			<-c.wr.ready
		default:
			return done, c.fail("write", sysError(err, c.closed.Load()))
		}
	}
}

var copyBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// WriteTo implements io.WriterTo, so that io.Copy from a connection that is silent holds no buffer. What is read is
// copied before w gets it: lent from the stack, it would let a slow w hold up the connection.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		n, err := c.passOn(w)
		total += int64(n)
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// passOn waits for data and writes it to w.
func (c *conn) passOn(w io.Writer) (int, error) {
	c.rd.mu.Lock()
	var n int
	var err error
	var b *[64 << 10]byte
	for {
		b = copyBuffers.Get().(*[64 << 10]byte)
		if n, err = c.tryRead(b[:]); err != errWouldBlock {
			break
		}
		copyBuffers.Put(b)
		c.wait()
	}
	c.rd.mu.Unlock()
	defer copyBuffers.Put(b)
	if err != nil {
		return 0, err
	}
	k, err := w.Write(b[:n])
	if err == nil && k < n {
		err = io.ErrShortWrite
	}
	if k < 0 || k > n {
		return 0, errors.New("netstack: invalid count from Write")
	}
	return k, err
}

// Close implements net.Conn. What was written is still sent, for a minute after the peer's latest sign of life.
func (c *conn) Close() error {
	if !c.finish() {
		return c.fail("close", net.ErrClosed)
	}
	c.sm.Lock()
	c.flushLocked()
	c.failed = true
	c.sm.Unlock()
	orphan := tcpip.TCPUserTimeoutOption(orphanTTL)
	c.ep.SetSockOpt(&orphan)
	c.ep.Close()
	c.wake()
	return nil
}

// abort closes the connection with a reset.
func (c *conn) abort() {
	if c.finish() {
		c.ep.Abort()
		c.wake()
		c.flush() // fails, and gives the buffer back
	}
}

func (c *conn) finish() bool {
	if c.closed.Swap(true) {
		return false
	}
	c.s.remove(c)
	c.s.link.windows.forget(flow{c.local, c.remote})
	c.rgrow.release()
	c.wgrow.release()
	return true
}

func (c *conn) wake() {
	c.wq.EventUnregister(&c.rd.entry)
	c.wq.EventUnregister(&c.wr.entry)
	c.rd.stopTimer()
	c.wr.stopTimer()
	c.rd.poke()
	c.wr.poke()
}

// CloseWrite ends the stream towards the peer, which reads io.EOF after the last byte. Reading goes on.
func (c *conn) CloseWrite() error { return c.shutdown(tcpip.ShutdownWrite) }

// CloseRead lets this and later Reads return io.EOF once what has arrived is read. Writing goes on.
func (c *conn) CloseRead() error { return c.shutdown(tcpip.ShutdownRead) }

func (c *conn) shutdown(how tcpip.ShutdownFlags) error {
	if c.closed.Load() {
		return c.fail("close", net.ErrClosed)
	}
	if how&tcpip.ShutdownWrite != 0 {
		c.sm.Lock()
		c.flushLocked()
		c.failed = true
		c.sm.Unlock()
	}
	if err := c.ep.Shutdown(how); err != nil {
		return c.fail("close", sysError(err, c.closed.Load()))
	}
	return nil
}

// LocalAddr returns a *net.TCPAddr.
func (c *conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr returns a *net.TCPAddr.
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.rd, t) }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.wr, t) }

func (c *conn) setDeadline(d *side, t time.Time) error {
	if c.closed.Load() {
		return c.fail("set", net.ErrClosed)
	}
	d.setDeadline(t)
	return nil
}

// SetNoDelay switches Nagle's algorithm; it is off (true) at first, as for *net.TCPConn.
func (c *conn) SetNoDelay(noDelay bool) error {
	c.ep.SocketOptions().SetDelayOption(!noDelay)
	return nil
}

// SetKeepAlive switches keep-alive probes. They are off at first: in a tailnet they would keep tunnels and radios
// awake for every idle connection.
func (c *conn) SetKeepAlive(on bool) error {
	c.ep.SocketOptions().SetKeepAlive(on)
	return nil
}

// SetKeepAlivePeriod sets the idle time before the first probe, and between probes.
func (c *conn) SetKeepAlivePeriod(d time.Duration) error {
	idle, interval := tcpip.KeepaliveIdleOption(d), tcpip.KeepaliveIntervalOption(d)
	if err := c.ep.SetSockOpt(&idle); err != nil {
		return c.fail("set", sysError(err, c.closed.Load()))
	}
	if err := c.ep.SetSockOpt(&interval); err != nil {
		return c.fail("set", sysError(err, c.closed.Load()))
	}
	return nil
}

// SetLinger with 0 makes Close discard what is unsent and reset the connection; any other value leaves Close as it is,
// sending in the background.
func (c *conn) SetLinger(sec int) error {
	c.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: sec == 0})
	return nil
}

func (c *conn) fail(op string, err error) error {
	return opError(op, "tcp", c.local, c.remote, err)
}
