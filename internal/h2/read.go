package h2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// read is the reading goroutine.
func (c *Conn) read() {
	defer close(c.done)
	err := c.frames()
	if e, ok := errors.AsType[*ConnError](err); ok {
		c.tell(e.Code)
	} else {
		err = fmt.Errorf("h2: read: %w", err)
	}
	c.fail(err)
}

// tell sends the code of a connection error, if that can be done at once.
func (c *Conn) tell(code Code) {
	select {
	case c.lock <- struct{}{}:
	default:
		return
	}
	defer c.release()
	b := appendFrameHeader(nil, 8, frameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, 0) // the server opened no streams
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	c.nc.SetWriteDeadline(time.Now().Add(time.Second))
	c.nc.Write(b)
}

// frames reads frames until it fails.
func (c *Conn) frames() error {
	for first := true; ; first = false {
		f, err := c.rx.next(c.nc)
		if err != nil {
			return err
		}
		if first && (f.typ != frameSettings || f.has(flagAck)) { // RFC 9113 §3.4
			return &ConnError{CodeProtocol, "this is not an HTTP/2 server"}
		}
		if c.rx.stream != 0 && (f.typ != frameContinuation || f.stream != c.rx.stream) {
			return &ConnError{CodeProtocol, "a header block is interrupted"}
		}
		if err := c.take(&f); err != nil {
			return err
		}
	}
}

func (c *Conn) take(f *frame) error {
	switch f.typ {
	case frameData:
		return c.data(f)
	case frameHeaders:
		return c.headers(f)
	case frameContinuation:
		if c.rx.stream == 0 {
			return &ConnError{CodeProtocol, "a continuation of nothing"}
		}
		return c.block(f)
	case frameReset:
		return c.reset(f)
	case frameSettings:
		return c.settings(f)
	case framePushPromise:
		return &ConnError{CodeProtocol, "a push promise, which was refused beforehand"}
	case framePing:
		return c.ping(f)
	case frameGoAway:
		return c.goAway(f)
	case frameWindowUpdate:
		return c.windowUpdate(f)
	}
	return nil // priorities, and what is not known (RFC 9113 §4.1)
}

// lookup returns a stream, nil for one that is over. A stream that never was is an error. mu is held.
func (c *Conn) lookup(id uint32) (*stream, error) {
	if id == 0 || id%2 == 0 || id >= c.nextID {
		return nil, &ConnError{CodeProtocol, "a frame for a stream that was not opened"}
	}
	return c.streams[id], nil
}

func (c *Conn) data(f *frame) error {
	whole := int64(len(f.payload)) // padding counts (RFC 9113 §6.9)
	if err := f.unpad(); err != nil {
		return err
	}
	c.mu.Lock()
	s, err := c.lookup(f.stream)
	if err == nil && c.recv < whole {
		err = &ConnError{CodeFlowControl, "more data than the connection's window"}
	}
	if err != nil {
		c.mu.Unlock()
		return err
	}
	c.recv -= whole
	if s == nil || s.ended || s.err != nil || s.resp == nil || s.recv < whole {
		c.owed += whole
		_, conn := c.credit(nil)
		var code Code
		switch {
		case s == nil || s.err != nil: // it crossed our reset
		case s.ended:
			code = CodeStreamClosed
		case s.resp == nil:
			code = CodeProtocol
		default:
			code = CodeFlowControl
		}
		if code != 0 {
			c.broken(s, code)
		}
		c.mu.Unlock()
		c.giveBack(0, 0, conn)
		if code != 0 {
			c.sendReset(f.stream, code)
		}
		return nil
	}
	s.recv -= whole
	padding := whole - int64(len(f.payload))
	s.owed += padding
	c.owed += padding
	s.buf = append(s.buf, f.payload...)
	if f.has(flagEndStream) {
		s.ended = true
		c.retire(s)
	}
	stream, conn := c.credit(s)
	c.unlock()
	s.poke()
	c.giveBack(s.id, stream, conn)
	return nil
}

// broken ends a stream on which the server broke the protocol. mu is held.
func (c *Conn) broken(s *stream, code Code) {
	if s.err == nil {
		s.err = fmt.Errorf("h2: the server broke the protocol on this stream: %v", code)
	}
	c.drop(s)
	if c.streams[s.id] == s {
		c.remove(s)
	}
	s.poke()
}

// sendReset sends a reset of a stream that was removed. A failure is the connection's.
func (c *Conn) sendReset(id uint32, code Code) {
	c.control(func(b []byte) []byte { return appendUint32Frame(b, frameReset, id, uint32(code)) })
	c.mu.Lock()
	c.unlock()
}

func (c *Conn) headers(f *frame) error {
	c.mu.Lock()
	_, err := c.lookup(f.stream)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if err := f.unpad(); err != nil {
		return err
	}
	if f.has(flagPriority) {
		if len(f.payload) < 5 {
			return &ConnError{CodeFrameSize, "a header frame too short"}
		}
		f.payload = f.payload[5:]
	}
	c.rx.stream, c.rx.end, c.rx.frames = f.stream, f.has(flagEndStream), 0
	c.rx.block = c.rx.block[:0]
	return c.block(f)
}

// block adds a frame to the header block, and takes the block when it is whole.
func (c *Conn) block(f *frame) error {
	rx := &c.rx
	rx.frames++
	if len(rx.block)+len(f.payload) > maxHeaderBlock || rx.frames > maxContinuation {
		return &ConnError{CodeEnhanceYourCalm, "a header block too long"}
	}
	rx.block = append(rx.block, f.payload...)
	if !f.has(flagEndHeaders) {
		return nil
	}
	id := rx.stream
	rx.stream = 0
	resp, err := rx.decode()
	if cap(rx.block) > keepBuffer {
		rx.block = nil
	}
	if _, ok := errors.AsType[*ConnError](err); ok {
		return err
	}
	return c.answer(id, resp, err)
}

// decode decodes the header block. An error that is no *ConnError is the stream's alone. Without a :status the
// response has status 0: it is a trailer.
func (rx *receiver) decode() (*Response, error) {
	r := new(Response)
	size := 0
	var bad error
	rx.dec.SetEmitEnabled(true)
	rx.dec.SetEmitFunc(func(f Field) {
		if size += len(f.Name) + len(f.Value) + 32; size > maxHeaderListBytes { // RFC 9113 §6.5.2
			bad = errors.New("h2: the answer's header is too long")
			rx.dec.SetEmitEnabled(false)
			return
		}
		switch {
		case f.Name == "" || f.Name[0] != ':':
			r.Header = append(r.Header, f)
		case f.Name != ":status" || r.Status != 0 || len(r.Header) > 0:
			bad = fmt.Errorf("h2: the answer's header has %q where it may not be", f.Name)
		default:
			n, err := strconv.Atoi(f.Value)
			if err != nil || len(f.Value) != 3 || n < 100 {
				bad = fmt.Errorf("h2: the answer's status is %q", f.Value)
			}
			r.Status = n
		}
	})
	_, err := rx.dec.Write(rx.block)
	if err == nil {
		err = rx.dec.Close()
	}
	if err != nil {
		return nil, &ConnError{CodeCompression, "a header block that cannot be decoded"}
	}
	return r, bad
}

// answer takes a header, or a trailer, of which only that it came matters.
func (c *Conn) answer(id uint32, resp *Response, err error) error {
	end := c.rx.end
	c.mu.Lock()
	s := c.streams[id]
	if s == nil || s.err != nil {
		c.mu.Unlock()
		return nil
	}
	if err == nil {
		switch {
		case s.ended:
			err = errors.New("h2: a header after the end of the stream")
		case s.resp != nil && (resp.Status != 0 || !end):
			err = errors.New("h2: a second header")
		case s.resp == nil && resp.Status == 0:
			err = errors.New("h2: an answer without a status")
		case s.resp == nil && resp.Status < 200 && end:
			err = errors.New("h2: no final answer")
		}
	}
	if err != nil {
		s.err = err
		c.broken(s, CodeProtocol)
		c.mu.Unlock()
		c.sendReset(id, CodeProtocol)
		return nil
	}
	defer c.unlock()
	if s.resp == nil && resp.Status >= 200 { // RFC 9113 §8.1: others are ahead of the final one
		s.resp = resp
	}
	if end {
		s.ended = true
		c.retire(s)
	}
	s.poke()
	return nil
}

func (c *Conn) reset(f *frame) error {
	if len(f.payload) != 4 {
		return &ConnError{CodeFrameSize, "a reset of a wrong length"}
	}
	code := Code(binary.BigEndian.Uint32(f.payload))
	c.mu.Lock()
	defer c.unlock()
	s, err := c.lookup(f.stream)
	if err != nil || s == nil {
		return err
	}
	if !s.ended { // else it says only that the rest of the request is not wanted
		if s.err == nil {
			s.err = &ResetError{code} // after what came before it is read
		}
	}
	c.remove(s)
	s.poke()
	return nil
}

func (c *Conn) settings(f *frame) error {
	if f.stream != 0 {
		return &ConnError{CodeProtocol, "settings of a stream"}
	}
	if f.has(flagAck) && len(f.payload) > 0 || len(f.payload)%6 != 0 {
		return &ConnError{CodeFrameSize, "settings of a wrong length"}
	}
	if f.has(flagAck) {
		return nil
	}
	c.lock <- struct{}{} // the encoder's, too
	defer c.release()
	c.mu.Lock()
	for b := f.payload; len(b) > 0; b = b[6:] {
		if err := c.setting(binary.BigEndian.Uint16(b), binary.BigEndian.Uint32(b[2:])); err != nil {
			c.mu.Unlock()
			return err
		}
	}
	c.mu.Unlock()
	c.wbuf = appendFrameHeader(c.wbuf, 0, frameSettings, flagAck, 0)
	return c.flush()
}

// setting applies one setting (RFC 9113 §6.5.2). Both locks are held.
func (c *Conn) setting(id uint16, v uint32) error {
	switch id {
	case settingTableSize:
		c.enc.SetMaxDynamicTableSizeLimit(v)
		c.enc.SetMaxDynamicTableSize(min(v, 4096))
	case settingPush:
		if v != 0 {
			return &ConnError{CodeProtocol, "a server that wants pushes"}
		}
	case settingMaxStreams:
		c.maxStreams = v
		c.makeRoom()
	case settingWindow:
		if v > maxWindow {
			return &ConnError{CodeFlowControl, "a window too large"}
		}
		delta := int64(v) - c.initial
		c.initial = int64(v)
		for _, s := range c.streams {
			if s.send += delta; s.send > maxWindow {
				return &ConnError{CodeFlowControl, "a window too large"}
			}
			s.poke()
		}
	case settingMaxFrame:
		if v < minMaxFrame || v > 1<<24-1 {
			return &ConnError{CodeProtocol, "a frame size out of range"}
		}
		c.maxFrame = int(v)
	}
	return nil
}

func (c *Conn) ping(f *frame) error {
	if f.stream != 0 {
		return &ConnError{CodeProtocol, "a ping of a stream"}
	}
	if len(f.payload) != 8 {
		return &ConnError{CodeFrameSize, "a ping of a wrong length"}
	}
	if f.has(flagAck) {
		return nil
	}
	return c.control(func(b []byte) []byte {
		return append(appendFrameHeader(b, 8, framePing, flagAck, 0), f.payload...)
	})
}

func (c *Conn) goAway(f *frame) error {
	if f.stream != 0 {
		return &ConnError{CodeProtocol, "a farewell of a stream"}
	}
	if len(f.payload) < 8 {
		return &ConnError{CodeFrameSize, "a farewell of a wrong length"}
	}
	last := binary.BigEndian.Uint32(f.payload) &^ (1 << 31)
	e := &GoAwayError{Code(binary.BigEndian.Uint32(f.payload[4:]))}
	c.mu.Lock()
	defer c.unlock()
	if c.err == nil {
		c.err = e
	}
	for id, s := range c.streams {
		if id > last {
			if s.err == nil {
				s.err = fmt.Errorf("%w: %w", ErrUnprocessed, e)
			}
			c.drop(s)
			delete(c.streams, id)
			s.poke()
		}
	}
	c.makeRoom()
	return nil
}

func (c *Conn) windowUpdate(f *frame) error {
	if len(f.payload) != 4 {
		return &ConnError{CodeFrameSize, "a window update of a wrong length"}
	}
	n := int64(binary.BigEndian.Uint32(f.payload) &^ (1 << 31))
	c.mu.Lock()
	if f.stream == 0 {
		defer c.mu.Unlock()
		if n == 0 {
			return &ConnError{CodeProtocol, "a window update of nothing"}
		}
		if c.send += n; c.send > maxWindow {
			return &ConnError{CodeFlowControl, "a window too large"}
		}
		for _, s := range c.streams {
			s.poke()
		}
		return nil
	}
	s, err := c.lookup(f.stream)
	if err != nil || s == nil {
		c.mu.Unlock()
		return err
	}
	if s.send += n; n == 0 || s.send > maxWindow {
		code := CodeFlowControl
		if n == 0 {
			code = CodeProtocol
		}
		c.broken(s, code)
		c.mu.Unlock()
		c.sendReset(f.stream, code)
		return nil
	}
	c.mu.Unlock()
	s.poke()
	return nil
}
