package derp

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// BufConn stands between TLS (or the frames themselves) and a stream socket so that one
// system call moves many TLS records: reads take what the socket has, writes can be held
// back until a batch is complete. Like the buffers above it, its own are large only while
// there is much to move.
//
// Reading follows net.Conn's rules for one reader; writing, Cork and Flush may be called
// from any goroutine.
type BufConn struct {
	net.Conn

	// BeforeRead, if not nil, is called by Read before each read of the socket, which may block. Set it
	// before the first Read, or between two on the reading goroutine.
	BeforeRead func()

	made     time.Time
	lastRead atomic.Int64 // nanoseconds after made, by the monotonic clock: the other may be set
	small    [2 << 10]byte
	big      *bigBuf
	buf      []byte // unread

	mu     sync.Mutex
	corked bool
	out    *bigBuf
	n      int
	err    error
}

// NewBufConn returns a BufConn on nc, which it owns from now on.
func NewBufConn(nc net.Conn) *BufConn { return &BufConn{Conn: nc, made: time.Now()} }

// LastRead returns when the socket last yielded something; the zero time if it never did.
func (c *BufConn) LastRead() time.Time {
	if n := c.lastRead.Load(); n != 0 {
		return c.made.Add(time.Duration(n))
	}
	return time.Time{}
}

// Read implements net.Conn.
func (c *BufConn) Read(p []byte) (int, error) {
	if len(c.buf) == 0 {
		if c.BeforeRead != nil {
			c.BeforeRead()
		}
		// A read that fills the small buffer says that more is waiting: take that with
		// a large one. The large one is given back before a read that may wait long.
		into := c.small[:]
		if c.big != nil {
			into = c.big[:]
		}
		n, err := c.Conn.Read(into)
		if n > 0 {
			c.lastRead.Store(max(1, int64(time.Since(c.made))))
		}
		c.buf = into[:n]
		if err != nil && n == 0 {
			c.release()
			return 0, err
		}
	}
	n := copy(p, c.buf)
	if c.buf = c.buf[n:]; len(c.buf) == 0 {
		switch {
		case c.big != nil:
			c.release()
		case cap(c.buf) == 0: // the small one was full
			c.big = bigPool.Get().(*bigBuf)
		}
	}
	return n, nil
}

func (c *BufConn) release() {
	if c.big != nil {
		bigPool.Put(c.big)
		c.big = nil
	}
	c.buf = nil
}

// Cork holds further writes back until Flush, or until a buffer is full.
func (c *BufConn) Cork() {
	c.mu.Lock()
	c.corked = true
	c.mu.Unlock()
}

// Flush writes what Cork held back. It returns the first error of any held back write.
func (c *BufConn) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.corked = false
	err := c.flushLocked()
	if c.out != nil {
		bigPool.Put(c.out)
		c.out = nil
	}
	return err
}

func (c *BufConn) flushLocked() error {
	if c.n > 0 && c.err == nil {
		_, c.err = c.Conn.Write(c.out[:c.n])
	}
	c.n = 0
	return c.err
}

// Write implements net.Conn.
func (c *BufConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	if !c.corked {
		var n int
		n, c.err = c.Conn.Write(p)
		return n, c.err
	}
	if c.out == nil {
		c.out = bigPool.Get().(*bigBuf)
	}
	if c.n+len(p) > len(c.out) {
		if err := c.flushLocked(); err != nil {
			return 0, err
		}
	}
	if len(p) > len(c.out) {
		var n int
		n, c.err = c.Conn.Write(p)
		return n, c.err
	}
	c.n += copy(c.out[c.n:], p)
	return len(p), nil
}
