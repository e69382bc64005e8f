package derp

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// bigLen holds the longest frame, and four full TLS records.
const bigLen = 68 << 10

type bigBuf [bigLen]byte

var bigPool = sync.Pool{New: func() any { return new(bigBuf) }}

// Reader reads frames. It returns each payload where it lies in its buffer, so nothing is
// copied or allocated per frame. Between bursts it holds a small buffer; a large one is
// borrowed while a frame or a backlog needs it. It is not safe for concurrent use.
type Reader struct {
	src   io.Reader
	small []byte
	big   *bigBuf // nil: buf is small
	buf   []byte
	r, w  int // buf[r:w] is unread
}

// NewReader returns a Reader of src whose resting buffer has the given size (at least 512
// bytes). pre is read before anything of src; it is copied.
func NewReader(src io.Reader, size int, pre []byte) *Reader {
	rd := &Reader{src: src, small: make([]byte, max(size, 512))}
	rd.buf = rd.small
	if len(pre) > len(rd.buf) {
		if len(pre) <= bigLen {
			rd.grow()
		} else {
			rd.buf = make([]byte, len(pre))
		}
	}
	rd.w = copy(rd.buf, pre)
	return rd
}

// Next returns the next frame, blocking in the source's Read when none is buffered. The
// payload may be modified, and is valid until the next call. Frames of unknown types too
// long for a known one are skipped. Errors: the source's; io.EOF only between frames;
// [ErrTooLarge].
func (rd *Reader) Next() (t FrameType, payload []byte, err error) {
	for {
		if err := rd.need(HeaderLen); err != nil {
			return 0, nil, err
		}
		t = FrameType(rd.buf[rd.r])
		n := binary.BigEndian.Uint32(rd.buf[rd.r+1:])
		if n > MaxPayload {
			if t.known() || n > maxSkip {
				return t, nil, fmt.Errorf("%w: %v of %d bytes", ErrTooLarge, t, n)
			}
			if err := rd.skip(HeaderLen + int(n)); err != nil {
				return t, nil, err
			}
			continue
		}
		if err := rd.need(HeaderLen + int(n)); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return t, nil, err
		}
		payload = rd.buf[rd.r+HeaderLen : rd.r+HeaderLen+int(n) : rd.r+HeaderLen+int(n)]
		rd.r += HeaderLen + int(n)
		return t, payload, nil
	}
}

// Buffered reports whether a whole further frame is in the buffer, so that Next will not block.
func (rd *Reader) Buffered() bool {
	have := rd.w - rd.r
	return have >= HeaderLen && uint64(have) >= HeaderLen+uint64(binary.BigEndian.Uint32(rd.buf[rd.r+1:]))
}

// Release gives the borrowed buffer back. The Reader and its payloads must not be used afterwards.
func (rd *Reader) Release() {
	rd.shrink()
	rd.r, rd.w = 0, 0
}

func (rd *Reader) grow() {
	b := bigPool.Get().(*bigBuf)
	rd.w = copy(b[:], rd.buf[rd.r:rd.w])
	rd.r, rd.big, rd.buf = 0, b, b[:]
}

func (rd *Reader) shrink() {
	if rd.big != nil {
		bigPool.Put(rd.big)
		rd.big = nil
	}
	rd.buf = rd.small
}

// need fills the buffer until n bytes are unread in it.
func (rd *Reader) need(n int) error {
	for rd.w-rd.r < n {
		full := rd.w == len(rd.buf)
		switch {
		case rd.r == rd.w: // empty: wait with the small buffer
			rd.r, rd.w = 0, 0
			rd.shrink()
			if n > len(rd.buf) {
				rd.grow()
			}
		case rd.big == nil && (full || n > len(rd.buf)): // a backlog, or a long frame
			rd.grow()
		case full || rd.r+n > len(rd.buf):
			rd.w = copy(rd.buf, rd.buf[rd.r:rd.w])
			rd.r = 0
		}
		if err := rd.fill(); err != nil {
			if err == io.EOF && rd.w > rd.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

func (rd *Reader) fill() error {
	for range 100 {
		n, err := rd.src.Read(rd.buf[rd.w:])
		rd.w += n
		if n > 0 {
			return nil // an error that came along comes again
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

// skip discards n bytes, buffered or still to come.
func (rd *Reader) skip(n int) error {
	for {
		have := min(n, rd.w-rd.r)
		rd.r += have
		if n -= have; n == 0 {
			return nil
		}
		rd.r, rd.w = 0, 0
		if err := rd.fill(); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
}
