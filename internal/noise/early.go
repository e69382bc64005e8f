package noise

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// The early payload is what a server may send on a new channel ahead of HTTP/2. Its header is
// as long as an HTTP/2 frame header and begins with bytes that no such frame has, so that
// one read of nine bytes tells which of the two comes (docs/protocol/control.md § Early payload).
const (
	earlyMagic      = "\xff\xff\xffTS"
	earlyHeaderSize = len(earlyMagic) + 4 // and a big-endian length
	maxEarly        = 64 << 10
)

// ErrEarly is wrapped by the error of an early payload that is too long or no JSON.
var ErrEarly = errors.New("noise: bad early payload")

// AppendEarly appends the early payload that carries e, for a server to send first.
func AppendEarly(b []byte, e *tailcfg.EarlyNoise) ([]byte, error) {
	j, err := json.Marshal(e)
	if err != nil {
		return b, fmt.Errorf("noise: early payload: %w", err)
	}
	b = append(b, earlyMagic...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(j)))
	return append(b, j...), nil
}

// WriteEarly writes the early payload that carries e to a new channel of a server.
func WriteEarly(w io.Writer, e *tailcfg.EarlyNoise) error {
	b, err := AppendEarly(nil, e)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// EarlyConn is the client's side of a channel on which an early payload may come first. It
// takes the payload out of what Read returns. Reads must not run at the same time; for the
// rest it is as the Conn beneath.
type EarlyConn struct {
	net.Conn
	early atomic.Pointer[tailcfg.EarlyNoise]
	past  bool // the header was read
	hdr   [earlyHeaderSize]byte
	n     int    // bytes of hdr read so far
	rest  []byte // of hdr, where it was no early payload
	body  []byte // of an early payload, as it comes in
	m     int
	err   error
}

// NewEarlyConn returns c without the early payload.
func NewEarlyConn(c net.Conn) *EarlyConn { return &EarlyConn{Conn: c} }

// Early returns the early payload, or nil if none came yet. It does not block.
func (c *EarlyConn) Early() *tailcfg.EarlyNoise { return c.early.Load() }

// Read is as the Conn's, past the early payload.
func (c *EarlyConn) Read(p []byte) (int, error) {
	if !c.past {
		if c.err == nil {
			if err := c.strip(); err != nil {
				if t, ok := errors.AsType[net.Error](err); !ok || !t.Timeout() {
					c.err = err
				}
				return 0, err
			}
		}
		if c.err != nil {
			return 0, c.err
		}
	}
	if len(c.rest) > 0 {
		n := copy(p, c.rest)
		c.rest = c.rest[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// strip reads the header and the payload. It may be called again after a time-out.
func (c *EarlyConn) strip() error {
	for c.n < earlyHeaderSize {
		n, err := c.Conn.Read(c.hdr[c.n:])
		c.n += n
		if err != nil && c.n < earlyHeaderSize {
			return err
		}
	}
	if string(c.hdr[:len(earlyMagic)]) != earlyMagic {
		c.past, c.rest = true, c.hdr[:]
		return nil
	}
	if c.body == nil {
		size := binary.BigEndian.Uint32(c.hdr[len(earlyMagic):])
		if size > maxEarly {
			return fmt.Errorf("%w: %d bytes announced, at most %d are allowed", ErrEarly, size, maxEarly)
		}
		c.body = make([]byte, size)
	}
	for c.m < len(c.body) {
		n, err := c.Conn.Read(c.body[c.m:])
		c.m += n
		if err != nil && c.m < len(c.body) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	var e tailcfg.EarlyNoise
	if err := json.Unmarshal(c.body, &e); err != nil {
		return fmt.Errorf("%w: %w", ErrEarly, err)
	}
	c.body = nil
	c.early.Store(&e)
	c.past = true
	return nil
}
