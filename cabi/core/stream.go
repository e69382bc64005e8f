//go:build linux

package core

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// tcpConn is what a stream needs of the tailnet's side.
type tcpConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
	SetLinger(sec int) error
}

// A stream joins a TCP connection of the tailnet to a Unix stream socket, two goroutines and no thread.
//
// A Unix socket has no reset of its own, but for one: if an end is closed while there are bytes in it that nobody
// has read, the other end gets ECONNRESET. So one byte is always left unread on our end: a mark that is put there before the
// host gets its end, and from then on the last byte that the host wrote, which is forwarded (MSG_PEEK) and read
// together with the next ones. A clean end reads it away first; everything else, the death of this
// process as well, is a reset for the host and never an end of file.
type stream struct {
	s     *sock
	c     tcpConn
	reset bool // under mu
	mu    sync.Mutex
	moves atomic.Int32 // directions that are still carried
	done  func()
	werr  error // of the socket, in toHost
}

// pieceSize is how much is read from the host at once. Buffers are only held while there is something in them.
const pieceSize = 128 << 10

var pieces = sync.Pool{New: func() any { return new([pieceSize]byte) }}

// newStream makes the socket for c. Its owner calls run or abort. On error c is not touched.
func newStream(c net.Conn, nonblock bool) (host hostEnd, st *stream, err error) {
	tc, ok := c.(tcpConn)
	if !ok {
		return -1, nil, errors.New("core: not a TCP connection")
	}
	host, s, err := newPair(unix.SOCK_STREAM, nonblock)
	if err != nil {
		return -1, nil, err
	}
	if _, err := unix.SendmsgN(int(host), []byte{0}, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		host.close()
		s.Close()
		return -1, nil, err
	}
	return host, &stream{s: s, c: tc}, nil
}

// run starts to carry. done is called when all is over.
func (st *stream) run(done func()) {
	st.done = done
	st.moves.Store(2)
	go st.fromHost()
	go st.toHost()
}

// over is called by each direction at its end.
func (st *stream) over() {
	if st.moves.Add(-1) == 0 {
		st.end()
		st.done()
	}
}

// end closes both sides when nothing moves any more.
func (st *stream) end() {
	st.mu.Lock()
	clean := !st.reset
	st.mu.Unlock()
	if clean {
		st.s.rc.Control(func(fd uintptr) {
			var b [1]byte
			unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
		})
	}
	st.s.Close()
	st.c.Close()
}

// abort resets both sides.
func (st *stream) abort() {
	st.mu.Lock()
	st.reset = true
	st.mu.Unlock()
	st.c.SetLinger(0)
	st.c.Close()
	st.s.Close()
}

// Write is for WriteTo: it keeps errors of the socket apart from those of the connection.
func (st *stream) Write(b []byte) (int, error) {
	n, err := st.s.Write(b)
	if err != nil {
		st.werr = err
	}
	return n, err
}

func (st *stream) toHost() {
	defer st.over()
	_, err := io.Copy(st, st.c) // the stack's WriteTo: from its buffers
	switch {
	case st.werr != nil: // the host closed: what it wrote before still goes out
		st.c.CloseRead()
	case err != nil:
		st.abort()
	default:
		st.s.shutdown(unix.SHUT_WR)
	}
}

func (st *stream) fromHost() {
	defer st.over()
	for {
		n, hostReset, err := st.await()
		if err != nil {
			return // aborted
		}
		if hostReset {
			st.abort()
			return
		}
		if n <= 1 {
			break
		}
		buf := pieces.Get().(*[pieceSize]byte)
		m := st.read(buf[:], n)
		if m > 0 {
			_, err = st.c.Write(buf[1 : 1+m])
		}
		pieces.Put(buf)
		if err != nil {
			st.abort()
			return
		}
	}
	if st.c.CloseWrite() != nil {
		st.abort()
		return
	}
	// The host's half is over; when the whole is, nobody reads any more what the peer sends.
	st.s.awaitEnd()
	st.c.CloseRead()
}

// await blocks until there is more than the mark to read (n > 1) or the host's half has ended (n <= 1). hostReset:
// the host closed its end without reading all that was in it.
func (st *stream) await() (n int, hostReset bool, err error) {
	err = st.s.rc.Read(func(fd uintptr) bool {
		if n = queued(fd); n > 1 {
			return true
		}
		ev := events(fd)
		if ev&(unix.POLLRDHUP|unix.POLLHUP) == 0 {
			return false
		}
		n = queued(fd) // the last bytes may have come in between
		hostReset = n <= 1 && ev&unix.POLLERR != 0
		return true
	})
	return n, hostReset, err
}

// read takes the n bytes that are queued, of which the first is the mark, and leaves the last one as the new mark. buf[1:1+m] is what
// is new.
func (st *stream) read(buf []byte, n int) (m int) {
	take := min(n, len(buf)) - 1
	st.s.rc.Read(func(fd uintptr) bool {
		got, _, err := unix.Recvfrom(int(fd), buf[:take], unix.MSG_DONTWAIT)
		if err != nil || got <= 0 {
			return true
		}
		m = got - 1
		if k, _, err := unix.Recvfrom(int(fd), buf[got:got+1], unix.MSG_DONTWAIT|unix.MSG_PEEK); err == nil && k == 1 {
			m = got
		}
		return true
	})
	return m
}
