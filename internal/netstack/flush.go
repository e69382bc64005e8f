package netstack

import (
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// Small writes in a burst are gathered. Carried through to the socket one by one they would cost a packet each: the
// stack, the seal and the system call. So a small write goes straight out only if the connection has sent nothing for
// burst, or one packet: a header and a body are no burst, and waking the flusher for the second would cost more than that; otherwise
// it joins those that wait, which leave when there are gatherMax bytes of them, when the application
// begins to wait for an answer (Read), closes, or writes something larger, and at the latest when the flusher's
// goroutine gets to run, which is microseconds later. Nothing waits for an acknowledgement, as it would with Nagle's
// algorithm.
const (
	burst      = 30 * time.Microsecond
	smallWrite = 4 << 10
	gatherMax  = 16 << 10
)

// gather keeps b for later, or reports that it should be sent now.
func (c *conn) gather(b []byte) bool {
	if len(b) > smallWrite {
		return false
	}
	c.sm.Lock()
	defer c.sm.Unlock()
	if c.failed || c.tight {
		return false
	}
	if len(c.pend) == 0 {
		switch first := c.lastSend.IsZero(); {
		case first && c.dialled && !c.reading.Load():
			// A greeting in more than one piece, most likely, or a request, after which the application reads.
		case first || time.Since(c.lastSend) >= burst:
			c.again = false
			return false
		case !c.again:
			c.again = true
			return false
		}
	}
	if c.buf == nil {
		c.waiting.Store(true) // before the flusher looks
		if !c.s.flusher.Add(c) {
			c.waiting.Store(false)
			return false
		}
		c.buf = gatherBuffers.Get().(*[gatherMax + smallWrite]byte)
		c.pend = c.buf[:0]
	}
	c.pend = append(c.pend, b...)
	if len(c.pend) >= gatherMax {
		c.flushLocked()
		c.wgrow.sent()
	}
	return true
}

var gatherBuffers = sync.Pool{New: func() any { return new([gatherMax + smallWrite]byte) }}

// flush sends what was gathered.
func (c *conn) flush() {
	if c.waiting.Load() {
		c.sm.Lock()
		c.flushLocked()
		c.sm.Unlock()
	}
}

// flushLocked passes what was gathered to the stack. Write has returned, and Close may follow, so the stack has to take
// it all: if its send buffer is full, the buffer is stretched for the moment. That happens once, for then tight keeps
// the connection from gathering until a Write has found room in the regular way.
func (c *conn) flushLocked() {
	if c.buf == nil {
		return
	}
	n, err := c.pushLocked(c.pend)
	if noRoom(err) || err == nil && n < len(c.pend) {
		size := c.wgrow.stretch()
		var more int
		more, err = c.pushLocked(c.pend[n:])
		c.wgrow.relax(size)
		c.tight = true
		if n += more; noRoom(err) || err == nil && n < len(c.pend) {
			c.ep.Abort() // cannot be, and if it were, the peer must not get a stream with a hole
			err = &tcpip.ErrAborted{}
		}
	}
	if err != nil {
		c.failed = true // the next Write meets the same error
	}
	gatherBuffers.Put(c.buf)
	c.buf, c.pend = nil, nil
	c.waiting.Store(false)
}

func noRoom(err tcpip.Error) bool {
	_, yes := err.(*tcpip.ErrWouldBlock)
	return yes
}

// push passes b to the stack, as much as it takes, after what was gathered. It does not block.
func (c *conn) push(b []byte) (int, tcpip.Error) {
	c.sm.Lock()
	defer c.sm.Unlock()
	c.flushLocked()
	n, err := c.pushLocked(b)
	c.tight = err != nil || n < len(b)
	if c.written += n; c.written >= moderateEvery {
		c.written = 0
		c.wgrow.sent()
	}
	return n, err
}

func (c *conn) pushLocked(b []byte) (int, tcpip.Error) {
	c.src.Reset(b)
	n, err := c.ep.Write(c.src, tcpip.WriteOptions{})
	c.src.Reset(nil)
	c.lastSend = time.Now()
	return int(n), err
}
