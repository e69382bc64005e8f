package noise

import (
	"context"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"golang.org/x/crypto/chacha20poly1305"
)

const (
	// MaxFrame is the longest frame on the wire, header included.
	MaxFrame = 4096
	// MaxPlaintext is what one record carries.
	MaxPlaintext = MaxFrame - headerSize - tagSize
)

var (
	// ErrRecord is wrapped by the error of a Read that met a frame which is not a record, is
	// too long, or does not authenticate. The Conn reads nothing more after it.
	ErrRecord = errors.New("noise: bad record")
	// ErrExhausted reports that all 2^64-1 nonces of a direction are used up.
	ErrExhausted = errors.New("noise: no nonces left")
)

// RefusedError is the server's own account of why it refused a handshake. It travels
// unauthenticated, so it is a hint to show and nothing to act on.
type RefusedError struct{ Text string }

// Error implements error.
func (e *RefusedError) Error() string { return fmt.Sprintf("noise: the server refused: %q", e.Text) }

// maxRefusal bounds the refusal text that a client reads.
const maxRefusal = 1024

// Conn is a net.Conn over a Noise channel. Read and Write may run at the same time and from
// several goroutines. Deadlines are the underlying connection's. A Read that times out may be
// tried again; a Write that fails is final for writing, since the peer's nonce no longer agrees.
type Conn struct {
	conn   net.Conn
	ses    Session // keys wiped
	closed atomic.Bool
	rx     reader
	tx     writer
}

// reader is the receiving direction. While nothing is buffered it waits with a buffer of
// three bytes, so that an idle Conn holds no record buffer.
type reader struct {
	mu     sync.Mutex
	aead   cipher.AEAD
	seq    uint64
	hdr    [headerSize]byte
	buf    *[MaxFrame]byte // nil while empty
	r, w   int             // buf[r:w] is ciphertext not yet opened
	plain  []byte          // opened and not yet read; lies in buf before r
	err    error
	nonceB [chacha20poly1305.NonceSize]byte
}

type writer struct {
	mu     sync.Mutex
	aead   cipher.AEAD
	seq    uint64
	err    error
	nonceB [chacha20poly1305.NonceSize]byte
}

var frames = sync.Pool{New: func() any { return new([MaxFrame]byte) }}

// NewConn returns the channel of a completed handshake over conn, which it owns from here on.
func NewConn(conn net.Conn, s Session) *Conn {
	c := &Conn{conn: conn, ses: s}
	c.tx.aead, c.rx.aead = newAEAD(s.Send), newAEAD(s.Recv)
	c.ses.Send, c.ses.Recv = [32]byte{}, [32]byte{}
	return c
}

// Peer returns the peer's machine key: on a client the control server's.
func (c *Conn) Peer() key.MachinePublic { return c.ses.Peer }

// ProtocolVersion returns the version that the client announced.
func (c *Conn) ProtocolVersion() int { return int(c.ses.Version) }

// HandshakeHash returns a value that only the two ends of this very channel know.
func (c *Conn) HandshakeHash() [32]byte { return c.ses.Hash }

// putNonce writes the nonce of record seq: four zero bytes, then seq. Big-endian is control's
// own choice; Noise §12.1 says little-endian for ChaChaPoly.
func putNonce(b *[chacha20poly1305.NonceSize]byte, seq uint64) {
	binary.BigEndian.PutUint64(b[4:], seq)
}

// Read reads plaintext. It returns io.EOF when the peer closed between records, and
// io.ErrUnexpectedEOF when it closed within one.
func (c *Conn) Read(p []byte) (int, error) {
	r := &c.rx
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if c.closed.Load() {
			return 0, fmt.Errorf("noise: read: %w", net.ErrClosed)
		}
		if len(r.plain) > 0 || len(p) == 0 {
			n := copy(p, r.plain)
			r.plain = r.plain[n:]
			return n, nil
		}
		if r.err != nil {
			return 0, r.err
		}
		if err := r.record(c.conn); err != nil {
			return 0, err
		}
	}
}

// record opens the next record into r.plain, which stays empty for an empty record.
func (r *reader) record(conn io.Reader) error {
	r.plain = nil
	if r.r > 0 {
		if r.r == r.w {
			frames.Put(r.buf)
			r.buf, r.r, r.w = nil, 0, 0
		} else if r.w-r.r < headerSize || r.w-r.r < r.frameLen() {
			r.w = copy(r.buf[:], r.buf[r.r:r.w])
			r.r = 0
		}
	}
	if err := r.fill(conn, headerSize); err != nil {
		return err
	}
	n := r.frameLen()
	switch {
	case r.buf[r.r] != typeRecord:
		return r.fail(fmt.Errorf("%w: type %d, want %d", ErrRecord, r.buf[r.r], typeRecord))
	case n > MaxFrame:
		return r.fail(fmt.Errorf("%w: frame of %d bytes, at most %d are allowed", ErrRecord, n, MaxFrame))
	case n < headerSize+tagSize:
		return r.fail(fmt.Errorf("%w: frame of %d bytes is too short", ErrRecord, n))
	}
	if err := r.fill(conn, n); err != nil {
		return err
	}
	if r.seq == math.MaxUint64 {
		return r.fail(ErrExhausted)
	}
	putNonce(&r.nonceB, r.seq)
	box := r.buf[r.r+headerSize : r.r+n]
	plain, err := r.aead.Open(box[:0], r.nonceB[:], box, nil)
	if err != nil {
		return r.fail(fmt.Errorf("%w: it does not authenticate", ErrRecord))
	}
	r.seq++
	r.r += n
	r.plain = plain
	return nil
}

func (r *reader) frameLen() int {
	return headerSize + int(binary.BigEndian.Uint16(r.buf[r.r+1:]))
}

// fail makes err final.
func (r *reader) fail(err error) error {
	r.err = err
	if r.buf != nil {
		frames.Put(r.buf)
		r.buf, r.r, r.w = nil, 0, 0
	}
	return err
}

// fill reads until n bytes are buffered from r.r on. What was read stays when it fails, so
// that a Read after a time-out goes on from there.
func (r *reader) fill(conn io.Reader, n int) error {
	for r.w-r.r < n {
		var m int
		var err error
		if r.buf == nil {
			if m, err = conn.Read(r.hdr[:]); m > 0 {
				r.buf = frames.Get().(*[MaxFrame]byte)
				copy(r.buf[:], r.hdr[:m])
			}
		} else {
			m, err = conn.Read(r.buf[r.w:])
		}
		r.w += m
		if err != nil && r.w-r.r < n {
			if err == io.EOF {
				if r.w-r.r > 0 {
					err = io.ErrUnexpectedEOF
				}
				return r.fail(err)
			}
			return err
		}
	}
	return nil
}

// Write seals p into as many records as it takes and writes them. An error is final.
func (c *Conn) Write(p []byte) (int, error) {
	w := &c.tx
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.closed.Load() {
		return 0, fmt.Errorf("noise: write: %w", net.ErrClosed)
	}
	if w.err != nil {
		return 0, fmt.Errorf("noise: an earlier write failed: %w", w.err)
	}
	if len(p) == 0 {
		return 0, nil
	}
	buf := frames.Get().(*[MaxFrame]byte)
	defer frames.Put(buf)
	sent := 0
	for len(p) > 0 {
		n := min(len(p), MaxPlaintext)
		if w.seq == math.MaxUint64 {
			w.err = ErrExhausted
			return sent, w.err
		}
		buf[0] = typeRecord
		binary.BigEndian.PutUint16(buf[1:], uint16(n+tagSize))
		putNonce(&w.nonceB, w.seq)
		frame := w.aead.Seal(buf[:headerSize], w.nonceB[:], p[:n], nil)
		w.seq++
		if _, err := c.conn.Write(frame); err != nil {
			w.err = err
			return sent, err
		}
		sent += n
		p = p[n:]
	}
	return sent, nil
}

// Close closes the underlying connection, which ends pending reads and writes. It is
// idempotent and safe at any time.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	return c.conn.Close()
}

// LocalAddr returns the underlying connection's local address.
func (c *Conn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr returns the underlying connection's remote address.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.conn.SetDeadline(t) }

// SetReadDeadline sets the deadline of pending and future reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetWriteDeadline sets the deadline of writes; one that passes in the middle of a Write
// makes the Conn unusable for writing.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.conn.SetWriteDeadline(t) }

// Client runs the client's side over conn and returns the channel, which owns conn. It blocks
// until the server answered or ctx ends. On error the caller still owns conn, which is
// of no further use but to be closed.
func Client(ctx context.Context, conn net.Conn, machine key.MachinePrivate, control key.MachinePublic, version uint16) (*Conn, error) {
	init, finish, err := ClientDeferred(machine, control, version)
	if err != nil {
		return nil, err
	}
	if err := under(ctx, conn, func() error { _, err := conn.Write(init); return err }); err != nil {
		return nil, fmt.Errorf("noise: sending the initiation: %w", err)
	}
	return finish(ctx, conn)
}

// ClientDeferred is Client for a handshake message that travels by another way than conn, in
// the header of the HTTP request that opens the channel. finish is called once, with the
// connection on which the server's answer comes; for the rest it is as Client.
func ClientDeferred(machine key.MachinePrivate, control key.MachinePublic, version uint16) (init []byte, finish func(context.Context, net.Conn) (*Conn, error), err error) {
	i, err := NewInitiator(machine, control, version, key.MachinePrivate{})
	if err != nil {
		return nil, nil, err
	}
	return i.Message(), i.Over, nil
}

// Over reads the server's answer from conn and completes the handshake. It blocks until
// then or until ctx ends.
func (i *Initiator) Over(ctx context.Context, conn net.Conn) (*Conn, error) {
	if i.done {
		return nil, ErrState
	}
	var ses Session
	err := under(ctx, conn, func() error {
		var resp [ResponseSize]byte
		if _, err := io.ReadFull(conn, resp[:headerSize]); err != nil {
			return fmt.Errorf("%w: reading the response: %w", ErrHandshake, err)
		}
		n := int(binary.BigEndian.Uint16(resp[1:]))
		switch resp[0] {
		case typeResponse:
			if n != ResponseSize-headerSize {
				return fmt.Errorf("%w: response of %d bytes", ErrHandshake, n)
			}
		case typeError:
			text := make([]byte, min(n, maxRefusal))
			m, _ := io.ReadFull(conn, text)
			return fmt.Errorf("%w: %w", ErrHandshake, &RefusedError{string(text[:m])})
		default:
			return fmt.Errorf("%w: the answer has type %d, want %d", ErrHandshake, resp[0], typeResponse)
		}
		if _, err := io.ReadFull(conn, resp[headerSize:]); err != nil {
			return fmt.Errorf("%w: reading the response: %w", ErrHandshake, err)
		}
		var err error
		ses, err = i.Finish(resp[:])
		return err
	})
	if err != nil {
		return nil, err
	}
	return NewConn(conn, ses), nil
}

// Server runs the server's side over conn and returns the channel, which owns conn. init is
// the client's initiation if it came by another way; nil means that it comes on conn. It
// blocks until the answer is written or ctx ends. On error the caller still owns conn.
func Server(ctx context.Context, conn net.Conn, control key.MachinePrivate, init []byte) (*Conn, error) {
	var ses Session
	err := under(ctx, conn, func() error {
		if init == nil {
			init = make([]byte, InitiationSize)
			if _, err := io.ReadFull(conn, init); err != nil {
				return fmt.Errorf("%w: reading the initiation: %w", ErrHandshake, err)
			}
		}
		r := NewResponder(control, key.MachinePrivate{})
		if err := r.Read(init); err != nil {
			// A fixed text: nothing of what the client sent goes back to it.
			conn.Write(appendRefusal(nil, "handshake does not fit this server's key"))
			return err
		}
		resp, s, err := r.Finish()
		if err != nil {
			return err
		}
		ses = s
		if _, err := conn.Write(resp); err != nil {
			return fmt.Errorf("noise: sending the response: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return NewConn(conn, ses), nil
}

// appendRefusal appends an error frame.
func appendRefusal(b []byte, text string) []byte {
	b = append(b, typeError)
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

// under runs f, which does I/O on conn, and makes that I/O fail when ctx ends. The
// connection's deadline is left alone unless ctx ends.
func under(ctx context.Context, conn net.Conn, f func() error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("noise: handshake: %w", context.Cause(ctx))
	}
	set := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(time.Unix(1, 0))
		close(set)
	})
	err := f()
	if !stop() {
		<-set
		return fmt.Errorf("noise: handshake: %w", context.Cause(ctx))
	}
	return err
}
