package control

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	// maxFrame bounds a frame of the map stream as it comes over the wire. A map of 10,000
	// peers is about 2 MB there.
	maxFrame = 32 << 20
	// maxMap bounds the frame after decompression.
	maxMap = 96 << 20
	// keepBuffer is the largest buffer that a stream keeps between frames.
	keepBuffer = 64 << 10
	// watchdog is the silence after which a stream is given up. Servers send a keep-alive
	// every minute.
	watchdog = 2 * time.Minute
	// updateTimeout bounds a non-streaming request.
	updateTimeout = 30 * time.Second
)

// Map runs one map stream: it sends req with Stream, KeepAlive and Compress set, and calls on
// for every frame, keep-alives included, on the caller's goroutine. The response belongs to on.
// Map returns when on returns an error, with that error; when ctx ends; or when the stream
// ends or fails, with an error in every case. A refusal by HTTP status is as for Register, but an
// *HTTPError always.
func (c *Client) Map(ctx context.Context, req *tailcfg.MapRequest, on func(*tailcfg.MapResponse) error) error {
	const path = "/machine/map"
	r := *req
	r.Stream, r.KeepAlive, r.Compress = true, true, "zstd"
	if r.Version == 0 {
		r.Version = c.cfg.Version
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	dog := time.AfterFunc(watchdog, func() {
		cancel(fmt.Errorf("%w: nothing for %v on the map stream", ErrSilent, watchdog))
	})
	defer dog.Stop()

	resp, err := c.post(ctx, path, &r, r.NodeKey)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return httpError(path, resp, time.Now())
	}
	dec := newFrames(&watched{resp.Body, dog})
	defer dec.close()
	for {
		dog.Reset(watchdog)
		m, err := dec.next()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return fmt.Errorf("control: map stream: %w", err)
		}
		dog.Stop() // what on takes is not the server's silence
		if err := on(m); err != nil {
			return err
		}
	}
}

// watched puts the watchdog off with everything that comes.
type watched struct {
	r   io.Reader
	dog *time.Timer
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if n > 0 {
		w.dog.Reset(watchdog)
	}
	return n, err
}

// Update tells the server of the node's Hostinfo, endpoints and disco key without touching its
// map stream: req goes with Stream unset and OmitPeers set. It blocks until the server
// answered or ctx ends, at most 30 seconds; a connection that let it wait so long is closed.
func (c *Client) Update(ctx context.Context, req *tailcfg.MapRequest) error {
	const path = "/machine/map"
	r := *req
	r.Stream, r.OmitPeers, r.KeepAlive, r.Compress = false, true, true, "zstd"
	if r.Version == 0 {
		r.Version = c.cfg.Version
	}
	return c.bounded(ctx, updateTimeout, func(ctx context.Context) error {
		resp, err := c.post(ctx, path, &r, r.NodeKey)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return httpError(path, resp, time.Now())
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxReply)); err != nil {
			return fmt.Errorf("control: %s: reading the answer: %w", path, err)
		}
		return nil
	})
}

// errNoAnswer is the cause with which bounded ends a request.
var errNoAnswer = errors.New("no answer in time")

// bounded runs f for at most d. If that runs out, the connection is taken for dead.
func (c *Client) bounded(ctx context.Context, d time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errNoAnswer)
	defer cancel()
	err := f(ctx)
	if err != nil && context.Cause(ctx) == errNoAnswer {
		c.Drop()
	}
	return err
}

// frames reads the map stream: each frame is a little-endian length of four bytes, then so
// many bytes of zstd-compressed JSON (docs/protocol/control.md § Map stream).
type frames struct {
	r     io.Reader
	dec   *zstd.Decoder
	in    []byte // the frame
	out   []byte // decompressed
	alive []byte // the compressed form of the last bare keep-alive
}

func newFrames(r io.Reader) *frames { return &frames{r: r} }

func (f *frames) close() {
	if f.dec != nil {
		f.dec.Close()
		f.dec = nil
	}
}

// next reads and decodes the next frame. io.EOF means that the stream ended between frames.
func (f *frames) next() (*tailcfg.MapResponse, error) {
	var hdr [4]byte
	if _, err := io.ReadFull(f.r, hdr[:]); err != nil {
		if err == io.EOF {
			return nil, fmt.Errorf("the server ended it: %w", err)
		}
		return nil, err
	}
	n := int64(binary.LittleEndian.Uint32(hdr[:]))
	if n > maxFrame {
		return nil, fmt.Errorf("%w: a map response of %d bytes, at most %d are allowed", ErrTooLarge, n, maxFrame)
	}
	if err := f.fill(int(n)); err != nil {
		return nil, err
	}
	defer f.shrink()
	if len(f.alive) > 0 && bytes.Equal(f.in, f.alive) {
		return &tailcfg.MapResponse{KeepAlive: true}, nil
	}
	return f.decode(f.in)
}

// fill reads n bytes into f.in. The buffer grows with what has come, not with what was announced.
func (f *frames) fill(n int) error {
	const step = 256 << 10
	f.in = f.in[:0]
	for len(f.in) < n {
		m := min(n-len(f.in), max(step, len(f.in)))
		at := len(f.in)
		if cap(f.in)-at < m {
			grown := make([]byte, at, at+m)
			copy(grown, f.in)
			f.in = grown
		}
		f.in = f.in[:at+m]
		if _, err := io.ReadFull(f.r, f.in[at:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("within a map response of %d bytes: %w", n, err)
		}
	}
	return nil
}

// decode decompresses and decodes one frame.
func (f *frames) decode(b []byte) (*tailcfg.MapResponse, error) {
	if f.dec == nil {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(maxMap))
		if err != nil {
			return nil, fmt.Errorf("control: zstd: %w", err)
		}
		f.dec = d
	}
	out, err := f.dec.DecodeAll(b, f.out[:0])
	f.out = out
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) || errors.Is(err, zstd.ErrWindowSizeExceeded) {
		return nil, fmt.Errorf("%w: a map response that unpacks to more than %d bytes", ErrTooLarge, maxMap)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadMap, err)
	}
	m, err := decodeMap(out, largeMap)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadMap, err)
	}
	if m.KeepAlive && string(out) == `{"KeepAlive":true}` {
		f.alive = append(f.alive[:0], b...)
	}
	return m, nil
}

// shrink gives large buffers back: between two frames a stream is idle for minutes.
func (f *frames) shrink() {
	if cap(f.in) > keepBuffer {
		f.in = nil
	}
	if cap(f.out) > keepBuffer { // the response may refer to it
		f.out = nil
		f.close()
	}
}
