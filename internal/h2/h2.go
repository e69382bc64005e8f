// Package h2 is a client of HTTP/2 (RFC 9113) on one connection that somebody else opened: control's protocol within
// its Noise channel. It has what that takes, a few requests at a time whose bodies are known and answers that may
// last for days, and nothing else of HTTP: no pools, proxies, redirects, cookies or compression. Header compression
// is golang.org/x/net/http2/hpack.
//
// The server is not trusted: what it can make us hold is bounded by the windows (streamWindow for each stream, connWindow in all)
// and by the limits of header blocks.
//
// Why not net/http: its client cannot be linked in parts, and costs 0.6 MB more (docs/performance.md § Size).
package h2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2/hpack"
)

const (
	// streamWindow is what a server may send on a stream ahead of its reader.
	streamWindow = 1 << 20
	// connWindow is the same for all streams together.
	connWindow = 4 << 20
	// writeTimeout bounds a write; the connection is given up when it runs out.
	writeTimeout = 30 * time.Second
	// maxBatch is how much of a request's body goes into one write.
	maxBatch = 64 << 10
	// maxRepeats bounds how often a refused request is repeated.
	maxRepeats = 3
)

var (
	// ErrClosed reports that the connection was closed on this side.
	ErrClosed = errors.New("h2: closed")
	// ErrUnprocessed is wrapped by the error of a request that the server did not look at: it may be repeated elsewhere.
	ErrUnprocessed = errors.New("h2: the server did not process the request")
	errBodyClosed  = errors.New("h2: read of a closed body")
)

// ConnError ends a connection whose server breaks the protocol.
type ConnError struct {
	Code   Code
	Reason string
}

// Error implements error.
func (e *ConnError) Error() string { return "h2: " + e.Reason + " (" + e.Code.String() + ")" }

// GoAwayError says that the server takes no more requests on this connection.
type GoAwayError struct{ Code Code }

// Error implements error.
func (e *GoAwayError) Error() string { return "h2: the server goes away: " + e.Code.String() }

// ResetError says that the server gave up a stream.
type ResetError struct{ Code Code }

// Error implements error.
func (e *ResetError) Error() string { return "h2: the server reset the stream: " + e.Code.String() }

// Is makes a refused stream an ErrUnprocessed.
func (e *ResetError) Is(err error) bool {
	return err == ErrUnprocessed && e.Code == CodeRefusedStream
}

// Field is a header field; names are in lower case.
type Field = hpack.HeaderField

// Request is what RoundTrip sends. It is not changed, nor kept past RoundTrip.
type Request struct {
	Method, Scheme, Authority, Path string
	Header                          []Field
	Body                            []byte
}

// check keeps what would change its meaning on the way out of a request (RFC 9113 §8.2.1).
func (r *Request) check() error {
	bad := func(s string) bool {
		return strings.ContainsFunc(s, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f })
	}
	if r.Method == "" || !strings.HasPrefix(r.Path, "/") || bad(r.Method) || bad(r.Path) || bad(r.Authority) {
		return fmt.Errorf("h2: no request: %q %q of %q", r.Method, r.Path, r.Authority)
	}
	for _, f := range r.Header {
		if f.Name == "" || f.Name != strings.ToLower(f.Name) || bad(f.Name) || bad(f.Value) {
			return fmt.Errorf("h2: no header field: %q", f.Name)
		}
	}
	return nil
}

// Response is an answer whose header has come. Its Body must be closed.
type Response struct {
	Status int
	Header []Field
	Body   io.ReadCloser
}

// Get returns the first value of the field with that name, in lower case, or "".
func (r *Response) Get(name string) string {
	for _, f := range r.Header {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// Conn is a connection. It is safe for concurrent use, and has one goroutine, which ends with it.
type Conn struct {
	nc   net.Conn
	done chan struct{} // closed when the reading goroutine has ended

	// The writing side: lock is held, by its one token, over a write.
	lock chan struct{}
	enc  *hpack.Encoder
	hbuf bytes.Buffer // what enc writes
	wbuf []byte

	mu         sync.Mutex // guards what follows; after lock; never held over I/O
	err        error      // why no more requests are taken; nil: they are
	streams    map[uint32]*stream
	nextID     uint32
	room       chan struct{} // closed and replaced when another stream may be opened
	maxStreams uint32
	maxFrame   int
	initial    int64 // the window of a new stream for what we send
	send       int64 // window for what we send, on all streams
	recv       int64 // what the server may still send, on all streams
	owed       int64 // what was taken of it and not yet given back

	rx receiver // the reading goroutine's
}

// stream is a request and its answer. Conn.mu guards it.
type stream struct {
	id         uint32
	wake       chan struct{} // has a token when something changed for the goroutine that uses the stream
	send, recv int64         // as Conn's
	owed       int64
	resp       *Response
	buf        []byte // of the answer; what is before off was read
	off        int
	sent       bool  // our end has gone out
	ended      bool  // the server's has come
	err        error // final
}

func (s *stream) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// NewConn begins HTTP/2 on nc, which it owns from here on. It blocks for the first write. The caller must Close the Conn.
func NewConn(nc net.Conn) (*Conn, error) {
	c := &Conn{
		nc: nc, done: make(chan struct{}), lock: make(chan struct{}, 1), room: make(chan struct{}), streams: make(map[uint32]*stream), nextID: 1,
		maxStreams: defaultMaxStreams, maxFrame: minMaxFrame, initial: defaultWindow, send: defaultWindow, recv: connWindow,
	}
	c.enc = hpack.NewEncoder(&c.hbuf)
	c.rx.dec = hpack.NewDecoder(4096, nil)
	c.rx.dec.SetMaxStringLength(maxHeaderListBytes)
	b := append(c.wbuf, preface...)
	settings := [...]struct{ id, v uint32 }{{settingPush, 0}, {settingWindow, streamWindow}, {settingMaxHeaders, maxHeaderListBytes}}
	b = appendFrameHeader(b, 6*len(settings), frameSettings, 0, 0)
	for _, s := range settings {
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, uint16(s.id)), s.v)
	}
	c.wbuf = appendUint32Frame(b, frameWindowUpdate, 0, connWindow-defaultWindow)
	if err := c.flush(); err != nil {
		nc.Close()
		return nil, err
	}
	go c.read()
	return c, nil
}

// Close closes the connection; what is under way fails with ErrClosed. It waits for the goroutine, and is idempotent.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	<-c.done
	return nil
}

// Err returns why the connection takes no more requests, nil if it does. What is under way may still end well.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail ends everything with err, unless it has ended already.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil || !errors.Is(c.err, ErrClosed) && errors.Is(err, ErrClosed) {
		c.err = err
	}
	for id, s := range c.streams {
		delete(c.streams, id)
		if s.err == nil && !s.ended {
			s.err = err
		}
		s.poke()
	}
	c.makeRoom()
	c.mu.Unlock()
	c.nc.Close()
}

// makeRoom wakes those who wait to open a stream. mu is held.
func (c *Conn) makeRoom() {
	close(c.room)
	c.room = make(chan struct{})
}

// acquire takes the writing side, unless ctx ends before.
func (c *Conn) acquire(ctx context.Context) error {
	select {
	case c.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *Conn) release() { <-c.lock }

// flush writes wbuf. The writing side is held.
func (c *Conn) flush() error {
	b := c.wbuf
	c.wbuf = b[:0]
	if cap(b) > keepBuffer {
		c.wbuf = nil
	}
	c.nc.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.nc.Write(b)
	if err != nil {
		err = fmt.Errorf("h2: write: %w", err)
		c.fail(err)
		return err
	}
	c.nc.SetWriteDeadline(time.Time{}) // no timer stays behind
	return nil
}

// control writes what add appends.
func (c *Conn) control(add func(b []byte) []byte) error {
	c.lock <- struct{}{}
	defer c.release()
	c.wbuf = add(c.wbuf)
	return c.flush()
}

// RoundTrip sends req and blocks until the header of its answer has come. When ctx ends, before or while the
// answer's body is read, the request is given up and ctx's cause is the error. A refused request is repeated: one that
// is sent before the server's settings have come may be more than it takes at a time.
func (c *Conn) RoundTrip(ctx context.Context, req *Request) (*Response, error) {
	if err := req.check(); err != nil {
		return nil, err
	}
	for try := 0; ; try++ {
		resp, err := c.roundTrip(ctx, req)
		if r, ok := errors.AsType[*ResetError](err); !ok || r.Code != CodeRefusedStream || try == maxRepeats {
			return resp, err
		}
	}
}

func (c *Conn) roundTrip(ctx context.Context, req *Request) (*Response, error) {
	s, rest, err := c.open(ctx, req)
	if err != nil {
		return nil, err
	}
	b := &body{c: c, s: s}
	b.stop = context.AfterFunc(ctx, func() { c.abort(s, context.Cause(ctx)) })
	resp, err := c.await(ctx, s, rest)
	if err != nil {
		b.Close()
		return nil, err
	}
	resp.Body = b
	return resp, nil
}

// open opens a stream, and sends the header and what the windows allow of the body; it returns the rest.
func (c *Conn) open(ctx context.Context, req *Request) (*stream, []byte, error) {
	for {
		if err := c.acquire(ctx); err != nil {
			return nil, nil, err
		}
		c.mu.Lock()
		if c.err == nil && c.nextID > 1<<31-1 {
			c.err = errors.New("h2: no stream numbers are left")
		}
		if err := c.err; err != nil {
			c.mu.Unlock()
			c.release()
			return nil, nil, fmt.Errorf("%w: %w", ErrUnprocessed, err)
		}
		if uint32(len(c.streams)) < c.maxStreams {
			break // with both locks
		}
		room := c.room
		c.mu.Unlock()
		c.release()
		select {
		case <-room:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
	defer c.release()
	s := &stream{id: c.nextID, wake: make(chan struct{}, 1), send: c.initial, recv: streamWindow}
	c.nextID += 2
	c.streams[s.id] = s
	c.hbuf.Reset()
	for _, f := range [...]Field{{Name: ":method", Value: req.Method}, {Name: ":scheme", Value: req.Scheme}, {Name: ":authority", Value: req.Authority}, {Name: ":path", Value: req.Path}} {
		c.enc.WriteField(f)
	}
	for _, f := range req.Header {
		c.enc.WriteField(f)
	}
	if len(req.Body) > 0 {
		c.enc.WriteField(Field{Name: "content-length", Value: strconv.Itoa(len(req.Body))})
	}
	typ, flags := byte(frameHeaders), byte(0)
	if len(req.Body) == 0 {
		flags, s.sent = flagEndStream, true
	}
	for block := c.hbuf.Bytes(); typ == frameHeaders || len(block) > 0; typ, flags = frameContinuation, 0 {
		n := min(len(block), c.maxFrame)
		if n == len(block) {
			flags |= flagEndHeaders
		}
		c.wbuf = append(appendFrameHeader(c.wbuf, n, typ, flags, s.id), block[:n]...)
		block = block[n:]
	}
	rest := c.appendData(s, req.Body)
	c.mu.Unlock()
	if err := c.flush(); err != nil {
		return nil, nil, err
	}
	return s, rest, nil
}

// appendData appends to wbuf what the windows and maxBatch allow of body. Both locks are held.
func (c *Conn) appendData(s *stream, body []byte) []byte {
	for left := maxBatch; len(body) > 0 && left > 0; {
		n := min(int64(len(body)), s.send, c.send, int64(c.maxFrame), int64(left))
		if n <= 0 {
			break
		}
		s.send -= n
		c.send -= n
		left -= int(n)
		flags := byte(0)
		if int(n) == len(body) {
			flags, s.sent = flagEndStream, true
		}
		c.wbuf = append(appendFrameHeader(c.wbuf, int(n), frameData, flags, s.id), body[:n]...)
		body = body[n:]
	}
	return body
}

// await sends the rest of the body, and waits for the answer. An answer that comes before there is a window for the rest
// makes the rest of no interest (RFC 9113 §8.1).
func (c *Conn) await(ctx context.Context, s *stream, rest []byte) (*Response, error) {
	for {
		c.mu.Lock()
		more := len(rest) > 0 && s.send > 0 && c.send > 0
		resp, err, ended := s.resp, s.err, s.ended
		c.mu.Unlock()
		switch {
		case resp != nil && (ended || !more):
			return resp, nil
		case err != nil:
			return nil, err
		case ended:
			return nil, errors.New("h2: the server ended the stream without an answer")
		case more:
			if err := c.acquire(ctx); err != nil {
				return nil, err
			}
			c.mu.Lock()
			rest = c.appendData(s, rest)
			if s.sent {
				c.retire(s)
			}
			c.mu.Unlock() // what retired is flushed first
			err := c.flush()
			c.release()
			if err != nil {
				return nil, err
			}
			c.mu.Lock()
			c.unlock()
		default:
			<-s.wake
		}
	}
}

// abort ends a stream that has not ended with err; whoever uses it tells the server.
func (c *Conn) abort(s *stream, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.err == nil && !s.ended {
		s.err = err
		c.drop(s)
	}
	s.poke()
}

// drop forgets what came and was not read. mu is held.
func (c *Conn) drop(s *stream) {
	c.owed += int64(len(s.buf) - s.off)
	s.buf, s.off = nil, 0
}

// retire takes a stream that both sides have ended off the table. mu is held.
func (c *Conn) retire(s *stream) {
	if s.sent && s.ended && c.streams[s.id] == s {
		c.remove(s)
	}
}

func (c *Conn) remove(s *stream) {
	delete(c.streams, s.id)
	c.makeRoom()
}

// unlock unlocks mu where a stream may have been removed: a connection that takes no more requests ends with its last.
func (c *Conn) unlock() {
	over := c.err != nil && len(c.streams) == 0
	c.mu.Unlock()
	if over {
		c.nc.Close()
	}
}

// body is an answer's body.
type body struct {
	c    *Conn
	s    *stream
	stop func() bool
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	c, s := b.c, b.s
	if len(p) == 0 {
		return 0, nil
	}
	for {
		c.mu.Lock()
		if n := copy(p, s.buf[s.off:]); n > 0 {
			s.off += n
			if s.off == len(s.buf) {
				s.buf, s.off = s.buf[:0], 0
				if cap(s.buf) > keepBuffer {
					s.buf = nil
				}
			}
			s.owed += int64(n)
			c.owed += int64(n)
			stream, conn := c.credit(s)
			c.mu.Unlock()
			c.giveBack(s.id, stream, conn)
			return n, nil
		}
		err, ended := s.err, s.ended
		c.mu.Unlock()
		switch {
		case err != nil:
			return 0, err
		case ended:
			return 0, io.EOF
		}
		<-s.wake
	}
}

// credit returns how much of the windows is to be given back, if it is enough to be worth a frame. s may be nil. mu is held.
func (c *Conn) credit(s *stream) (stream, conn int64) {
	if s != nil && s.owed >= streamWindow/4 && !s.ended && s.err == nil {
		stream, s.owed = s.owed, 0
		s.recv += stream
	}
	if c.owed >= connWindow/4 {
		conn, c.owed = c.owed, 0
		c.recv += conn
	}
	return stream, conn
}

// giveBack sends what credit returned. A failure is the connection's.
func (c *Conn) giveBack(id uint32, stream, conn int64) {
	if stream == 0 && conn == 0 {
		return
	}
	c.control(func(b []byte) []byte {
		if stream > 0 {
			b = appendUint32Frame(b, frameWindowUpdate, id, uint32(stream))
		}
		if conn > 0 {
			b = appendUint32Frame(b, frameWindowUpdate, 0, uint32(conn))
		}
		return b
	})
}

// Close implements io.Closer: it gives up a stream that has not ended. It may be called while Read runs, which then fails.
func (b *body) Close() error {
	b.stop()
	c, s := b.c, b.s
	c.mu.Lock()
	c.drop(s)
	open := c.streams[s.id] == s
	ended := s.ended
	if s.err == nil {
		s.err = errBodyClosed
	}
	if open {
		c.remove(s)
	}
	_, conn := c.credit(nil)
	c.mu.Unlock() // and what was removed is told first
	s.poke()
	if open {
		code := CodeCancel
		if ended {
			code = CodeNo // only our own end is left out
		}
		c.control(func(b []byte) []byte { return appendUint32Frame(b, frameReset, s.id, uint32(code)) })
	}
	c.giveBack(0, 0, conn)
	c.mu.Lock()
	c.unlock()
	return nil
}
