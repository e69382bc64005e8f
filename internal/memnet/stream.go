package memnet

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// bufferBytes is how much one direction of a stream holds before its writer waits.
const bufferBytes = 256 << 10

// half is one direction of a stream.
type half struct {
	latency time.Duration

	mu     sync.Mutex
	chunks []chunk
	bytes  int
	eof    time.Time // when the end arrives; zero: not ended
	reset  bool      // the reader has gone, or the writer without ending properly
	change chan struct{}
}

type chunk struct {
	at time.Time // when it arrives
	b  []byte
}

// signal wakes everyone who waits. h is locked.
func (h *half) signal() {
	close(h.change)
	h.change = make(chan struct{})
}

// Conn is one end of a stream. It implements net.Conn and has CloseWrite.
type Conn struct {
	local, remote netip.AddrPort
	in, out       *half
	read, write   deadline
	once          sync.Once
	done          chan struct{}
}

// Pipe returns the two ends of a stream with a one-way latency and no network.
func Pipe(latency time.Duration) (*Conn, *Conn) {
	loop := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 1)
	return pipe(loop, loop, latency, latency)
}

func pipe(a, b netip.AddrPort, there, back time.Duration) (*Conn, *Conn) {
	ab := &half{latency: there, change: make(chan struct{})}
	ba := &half{latency: back, change: make(chan struct{})}
	return &Conn{local: a, remote: b, in: ba, out: ab, done: make(chan struct{})},
		&Conn{local: b, remote: a, in: ab, out: ba, done: make(chan struct{})}
}

func (c *Conn) err(op string, err error) error { return opError(op, "tcp", c.remote, err) }

// Read waits for bytes, the end, the deadline or Close.
func (c *Conn) Read(b []byte) (int, error) {
	h := c.in
	for {
		passed := c.read.passed()
		if isClosed(c.done) {
			return 0, c.err("read", net.ErrClosed)
		}
		if isClosed(passed) {
			return 0, c.err("read", errTimeout)
		}
		if len(b) == 0 {
			return 0, nil
		}
		now := time.Now()
		var wait time.Duration // 0: until something changes
		h.mu.Lock()
		switch {
		case len(h.chunks) > 0 && !h.chunks[0].at.After(now):
			n := 0
			for n < len(b) && len(h.chunks) > 0 && !h.chunks[0].at.After(now) {
				ch := &h.chunks[0]
				k := copy(b[n:], ch.b)
				n += k
				ch.b = ch.b[k:]
				if len(ch.b) == 0 {
					h.chunks[0] = chunk{}
					h.chunks = h.chunks[1:]
				}
			}
			h.bytes -= n
			h.signal()
			h.mu.Unlock()
			return n, nil
		case len(h.chunks) > 0:
			wait = h.chunks[0].at.Sub(now)
		case h.reset:
			h.mu.Unlock()
			return 0, c.err("read", syscall.ECONNRESET)
		case !h.eof.IsZero() && !h.eof.After(now):
			h.mu.Unlock()
			return 0, io.EOF
		case !h.eof.IsZero():
			wait = h.eof.Sub(now)
		}
		change := h.change
		h.mu.Unlock()
		var timer *time.Timer
		var arrive <-chan time.Time
		if wait > 0 {
			timer = time.NewTimer(wait)
			arrive = timer.C
		}
		select {
		case <-arrive:
		case <-change:
		case <-passed:
		case <-c.done:
		}
		if timer != nil {
			timer.Stop()
		}
	}
}

// Write waits for room, the deadline or Close.
func (c *Conn) Write(b []byte) (int, error) {
	h := c.out
	n := 0
	for {
		passed := c.write.passed()
		if isClosed(c.done) {
			return n, c.err("write", net.ErrClosed)
		}
		if isClosed(passed) {
			return n, c.err("write", errTimeout)
		}
		h.mu.Lock()
		if h.reset || !h.eof.IsZero() {
			h.mu.Unlock()
			return n, c.err("write", syscall.EPIPE)
		}
		if k := min(bufferBytes-h.bytes, len(b)-n); k > 0 {
			h.chunks = append(h.chunks, chunk{time.Now().Add(h.latency), append([]byte(nil), b[n:n+k]...)})
			h.bytes += k
			n += k
			h.signal()
		}
		change := h.change
		h.mu.Unlock()
		if n == len(b) {
			return n, nil
		}
		select {
		case <-change:
		case <-passed:
		case <-c.done:
		}
	}
}

// CloseWrite ends the stream towards the other side; reading goes on.
func (c *Conn) CloseWrite() error {
	h := c.out
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.eof.IsZero() {
		h.eof = time.Now().Add(h.latency)
		h.signal()
	}
	return nil
}

// Close ends both directions: the other side reads what was written and then the end; its writes fail.
func (c *Conn) Close() error {
	c.once.Do(func() {
		c.CloseWrite()
		c.in.mu.Lock()
		c.in.reset = true
		c.in.chunks, c.in.bytes = nil, 0
		c.in.signal()
		c.in.mu.Unlock()
		close(c.done)
		c.read.stop()
		c.write.stop()
	})
	return nil
}

// Reset breaks the stream at both ends at once, as a lost relay or a NAT's RST does.
func (c *Conn) Reset() {
	for _, h := range []*half{c.in, c.out} {
		h.mu.Lock()
		h.reset = true
		h.chunks, h.bytes = nil, 0
		h.signal()
		h.mu.Unlock()
	}
}

// LocalAddr returns this end's address.
func (c *Conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr returns the other end's address.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { c.read.set(t); c.write.set(t); return nil }

// SetReadDeadline ends reads, also those under way, at t.
func (c *Conn) SetReadDeadline(t time.Time) error { c.read.set(t); return nil }

// SetWriteDeadline ends writes, also those under way, at t.
func (c *Conn) SetWriteDeadline(t time.Time) error { c.write.set(t); return nil }
