package h2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// script is a server that says the same whatever it hears: a net.Conn that reads what was written for it, once the client
// has sent its request, and keeps what the client writes.
type script struct {
	net.Conn // nil
	mu       sync.Mutex
	cond     *sync.Cond
	in       []byte // what the client will read
	out      []byte // what it wrote
	sent     bool   // it has opened a stream
	hold     bool   // do not end when in does
	closed   bool
}

func newScript(in []byte, hold bool) *script {
	s := &script{in: in, hold: hold}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *script) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed && (!s.sent || len(s.in) == 0 && s.hold) {
		s.cond.Wait()
	}
	if s.closed {
		return 0, net.ErrClosed
	}
	if len(s.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.in)
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	s.out = append(s.out, p...)
	for b := s.frames(); len(b) >= frameHeaderSize; b = b[frameHeaderSize+int(b[1])<<8+int(b[2]):] {
		s.sent = s.sent || b[3] == frameHeaders
	}
	s.cond.Broadcast()
	return len(p), nil
}

// frames returns the client's frames.
func (s *script) frames() []byte { return s.out[len(preface):] }

// say lets the server say b now.
func (s *script) say(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.in = append(s.in, b...)
	s.cond.Broadcast()
}

func (s *script) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.cond.Broadcast()
	return nil
}

func (s *script) SetWriteDeadline(time.Time) error { return nil }

// wrote waits until the client has written a frame of that type, and returns its payload.
func (s *script) wrote(typ byte) []byte { return s.wroteN(typ, 1) }

// wroteN is wrote for the frame number nth of that type.
func (s *script) wroteN(typ byte, nth int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		seen := 0
		for b := s.frames(); len(b) >= frameHeaderSize; {
			n := int(b[1])<<8 + int(b[2])
			if b[3] == typ {
				seen++
			}
			if b[3] == typ && seen == nth {
				return bytes.Clone(b[frameHeaderSize : frameHeaderSize+n])
			}
			b = b[frameHeaderSize+n:]
		}
		s.cond.Wait()
	}
}

// fr is a frame.
func fr(typ, flags byte, stream uint32, payload ...byte) []byte {
	return append(appendFrameHeader(nil, len(payload), typ, flags, stream), payload...)
}

func u32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

func setting(id uint16, v uint32) []byte {
	return fr(frameSettings, 0, 0, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), v)...)
}

func head(fields ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		e.WriteField(Field{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

var (
	hello = fr(frameSettings, 0, 0)
	ok    = fr(frameHeaders, flagEndHeaders, 1, head(":status", "200")...)
)

func cat(bs ...[]byte) []byte { return bytes.Join(bs, nil) }

func TestHostileConnection(t *testing.T) {
	bomb := cat(head("a", strings.Repeat("x", 4000)), bytes.Repeat([]byte{0x80 | 62}, 60_000)) // 62: the first of the dynamic table
	for _, test := range []struct {
		name string
		in   []byte
		code Code
	}{
		{"HTTP/1", []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), CodeFrameSize},
		{"no settings", ok, CodeProtocol},
		{"acknowledgement first", fr(frameSettings, flagAck, 0), CodeProtocol},
		{"frame too long", cat(hello, appendFrameHeader(nil, minMaxFrame+1, frameData, 0, 1)), CodeFrameSize},
		{"settings of a stream", cat(hello, fr(frameSettings, 0, 1)), CodeProtocol},
		{"settings cut", cat(hello, fr(frameSettings, 0, 0, 1, 2, 3)), CodeFrameSize},
		{"acknowledgement with settings", cat(hello, fr(frameSettings, flagAck, 0, 0, 1, 0, 0, 0, 0)), CodeFrameSize},
		{"setting: push", cat(hello, setting(settingPush, 1)), CodeProtocol},
		{"setting: window", setting(settingWindow, 1<<31), CodeFlowControl},
		{"setting: frame", setting(settingMaxFrame, 100), CodeProtocol},
		{"window past the end by settings", cat(hello, fr(frameWindowUpdate, 0, 1, u32(maxWindow-defaultWindow)...), setting(settingWindow, defaultWindow+1)), CodeFlowControl},
		{"ping of a stream", cat(hello, fr(framePing, 0, 1, make([]byte, 8)...)), CodeProtocol},
		{"ping too short", cat(hello, fr(framePing, 0, 0, 1)), CodeFrameSize},
		{"push", cat(hello, fr(framePushPromise, flagEndHeaders, 1, 0, 0, 0, 2)), CodeProtocol},
		{"stream 0", cat(hello, fr(frameHeaders, flagEndHeaders, 0, head(":status", "200")...)), CodeProtocol},
		{"stream not opened", cat(hello, fr(frameHeaders, flagEndHeaders, 3, head(":status", "200")...)), CodeProtocol},
		{"the server's own stream", cat(hello, fr(frameData, 0, 2, 1)), CodeProtocol},
		{"reset of a stream not opened", cat(hello, fr(frameReset, 0, 5, u32(8)...)), CodeProtocol},
		{"reset too short", cat(hello, fr(frameReset, 0, 1, 1)), CodeFrameSize},
		{"padding", cat(hello, ok, fr(frameData, flagPadded, 1, 5, 1, 2, 3)), CodeProtocol},
		{"padding of nothing", cat(hello, ok, fr(frameData, flagPadded, 1)), CodeProtocol},
		{"priority cut", cat(hello, fr(frameHeaders, flagEndHeaders|flagPriority, 1, 0, 0, 0)), CodeFrameSize},
		{"block interrupted", cat(hello, fr(frameHeaders, 0, 1, head(":status", "200")...), fr(framePing, 0, 0, make([]byte, 8)...)), CodeProtocol},
		{"block goes on elsewhere", cat(hello, fr(frameHeaders, 0, 1), fr(frameContinuation, flagEndHeaders, 3)), CodeProtocol},
		{"continuation of nothing", cat(hello, ok, fr(frameContinuation, flagEndHeaders, 1)), CodeProtocol},
		{"block without end", cat(hello, fr(frameHeaders, 0, 1), bytes.Repeat(fr(frameContinuation, 0, 1), 1000)), CodeEnhanceYourCalm},
		{"block too long", cat(hello, fr(frameHeaders, 0, 1), bytes.Repeat(fr(frameContinuation, 0, 1, make([]byte, minMaxFrame)...), 5)), CodeEnhanceYourCalm},
		{"compression", cat(hello, fr(frameHeaders, flagEndHeaders, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)), CodeCompression},
		{"string cut", cat(hello, fr(frameHeaders, flagEndHeaders, 1, 0, 5, 'a')), CodeCompression},
		{"window update of nothing", cat(hello, fr(frameWindowUpdate, 0, 0, u32(0)...)), CodeProtocol},
		{"window past the end", cat(hello, fr(frameWindowUpdate, 0, 0, u32(maxWindow)...)), CodeFlowControl},
		{"window update too short", cat(hello, fr(frameWindowUpdate, 0, 0, 1)), CodeFrameSize},
		{"farewell too short", cat(hello, fr(frameGoAway, 0, 0, 1)), CodeFrameSize},
		{"bomb, then more", cat(hello, fr(frameHeaders, 0, 1, bomb[:minMaxFrame]...), fr(frameContinuation, 0, 1, bomb[minMaxFrame:2*minMaxFrame]...),
			fr(frameContinuation, flagEndHeaders, 1, bomb[2*minMaxFrame:3*minMaxFrame]...), fr(frameSettings, 0, 1)), CodeProtocol},
	} {
		t.Run(test.name, func(t *testing.T) {
			nc := newScript(test.in, true)
			c, err := NewConn(nc)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _, err = round(t.Context(), c, post("/", nil))
			if err == nil {
				t.Error("the request went well")
			}
			<-c.done
			if e, ok := errors.AsType[*ConnError](c.Err()); !ok || e.Code != test.code {
				t.Errorf("the connection ended with %v, want code %v", c.Err(), test.code)
			}
			if b := nc.wrote(frameGoAway); Code(binary.BigEndian.Uint32(b[4:])) != test.code {
				t.Errorf("the server was told % x", b)
			}
		})
	}
}

// What a server does wrong on a stream costs the stream alone.
func TestHostileStream(t *testing.T) {
	big := bytes.Repeat(fr(frameData, 0, 1, make([]byte, minMaxFrame)...), streamWindow/minMaxFrame)
	for _, test := range []struct {
		name string
		in   []byte
		code Code
	}{
		{"data first", fr(frameData, 0, 1, 1), CodeProtocol},
		{"no status", fr(frameHeaders, flagEndHeaders, 1, head("a", "b")...), CodeProtocol},
		{"status twice", fr(frameHeaders, flagEndHeaders, 1, head(":status", "200", ":status", "200")...), CodeProtocol},
		{"status late", fr(frameHeaders, flagEndHeaders, 1, head("a", "b", ":status", "200")...), CodeProtocol},
		{"status of letters", fr(frameHeaders, flagEndHeaders, 1, head(":status", "2xx")...), CodeProtocol},
		{"a request's header", fr(frameHeaders, flagEndHeaders, 1, head(":path", "/")...), CodeProtocol},
		{"interim and no more", fr(frameHeaders, flagEndHeaders|flagEndStream, 1, head(":status", "103")...), CodeProtocol},
		{"two headers", cat(ok, ok), CodeProtocol},
		{"trailer without end", cat(ok, fr(frameHeaders, flagEndHeaders, 1, head("a", "b")...)), CodeProtocol},
		{"header too long", fr(frameHeaders, flagEndHeaders, 1, cat(head(":status", "200"), head("a", strings.Repeat("x", 4000)), bytes.Repeat([]byte{0x80 | 62}, 1000))...), CodeProtocol},
		{"more than the window", cat(ok, big, fr(frameData, 0, 1, 1)), CodeFlowControl},
		{"window past the end", cat(ok, fr(frameWindowUpdate, 0, 1, u32(maxWindow)...)), CodeFlowControl},
		{"window update of nothing", cat(ok, fr(frameWindowUpdate, 0, 1, u32(0)...)), CodeProtocol},
	} {
		t.Run(test.name, func(t *testing.T) {
			nc := newScript(cat(hello, test.in, fr(framePing, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)), true)
			c, err := NewConn(nc)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			resp, err := c.RoundTrip(t.Context(), post("/", nil))
			b := nc.wrote(frameReset)
			if got := Code(binary.BigEndian.Uint32(b)); got != test.code {
				t.Errorf("the server was told %v, want %v", got, test.code)
			}
			if err == nil {
				_, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			if err == nil {
				t.Error("the request went well")
			}
			if string(nc.wrote(framePing)) != "\x01\x02\x03\x04\x05\x06\x07\x08" {
				t.Error("a ping after it has another answer")
			}
			if err := c.Err(); err != nil {
				t.Errorf("the connection ended: %v", err)
			}
			idle(t, c)
		})
	}
}

// What comes on a stream that is over is passed over, and the header compression stays in step.
func TestLate(t *testing.T) {
	var hb bytes.Buffer
	e := hpack.NewEncoder(&hb)
	block := func(fields ...string) []byte {
		hb.Reset()
		for i := 0; i < len(fields); i += 2 {
			e.WriteField(Field{Name: fields[i], Value: fields[i+1]})
		}
		return bytes.Clone(hb.Bytes())
	}
	nc := newScript(cat(hello,
		fr(frameHeaders, flagEndHeaders|flagEndStream, 1, block(":status", "204", "x-a", "1")...),
		fr(frameData, 0, 1, 1, 2, 3), fr(frameReset, 0, 1, u32(0)...), fr(frameWindowUpdate, 0, 1, u32(1)...),
		fr(frameHeaders, flagEndHeaders|flagEndStream, 1, block("x-b", "2")...),
		fr(0x63, 0xff, 1, 1, 2, 3), fr(2, 0, 1, 0, 0, 0, 0, 0)), true)
	c, err := NewConn(nc)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if resp, _, err := round(t.Context(), c, post("/", nil)); err != nil || resp.Status != 204 || resp.Get("x-a") != "1" {
		t.Fatal(resp, err)
	}
	errc := make(chan error)
	go func() {
		resp, b, err := round(t.Context(), c, post("/", nil))
		if err == nil && (resp.Status != 200 || resp.Get("x-b") != "2" || string(b) != "abc") {
			err = errors.New("another answer")
		}
		errc <- err
	}()
	nc.wroteN(frameHeaders, 2)
	nc.say(cat(fr(frameHeaders, flagEndHeaders|flagPadded|flagPriority, 3, cat([]byte{2, 0, 0, 0, 0, 0}, block(":status", "200", "x-b", "2"), []byte{0, 0})...),
		fr(frameData, flagPadded|flagEndStream, 3, 3, 'a', 'b', 'c', 0, 0, 0)))
	if err := <-errc; err != nil {
		t.Error(err)
	}
	idle(t, c)
}

// A stream past a farewell's last may be repeated elsewhere.
func TestUnprocessed(t *testing.T) {
	c, err := NewConn(newScript(cat(hello, fr(frameGoAway, 0, 0, cat(u32(0), u32(0), []byte("bye"))...)), true))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := round(t.Context(), c, post("/", nil)); !errors.Is(err, ErrUnprocessed) {
		t.Error(err)
	}
}

// A refused request is repeated, but not for ever.
func TestRefused(t *testing.T) {
	nc := newScript(hello, true)
	c, err := NewConn(nc)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	errc := make(chan error)
	go func() {
		_, _, err := round(t.Context(), c, post("/", nil))
		errc <- err
	}()
	for i := range 1 + maxRepeats {
		nc.wroteN(frameHeaders, i+1)
		nc.say(fr(frameReset, 0, uint32(2*i+1), u32(uint32(CodeRefusedStream))...))
	}
	if err := <-errc; !errors.Is(err, ErrUnprocessed) {
		t.Error(err)
	}
	idle(t, c)
}

func FuzzServer(f *testing.F) {
	f.Add(cat(hello, ok, fr(frameData, flagEndStream, 1, []byte("hello")...)))
	f.Add(cat(setting(settingWindow, 1), ok, fr(frameWindowUpdate, 0, 1, u32(100)...), fr(frameData, flagPadded, 1, 1, 'a', 0), fr(frameHeaders, flagEndHeaders|flagEndStream, 1, head("a", "b")...)))
	f.Add(cat(hello, fr(frameHeaders, 0, 1, head(":status", "200")...), fr(frameContinuation, flagEndHeaders, 1), fr(framePing, 0, 0, make([]byte, 8)...), fr(frameGoAway, 0, 0, make([]byte, 8)...)))
	f.Add(cat(hello, setting(settingMaxStreams, 0), fr(frameReset, 0, 1, u32(7)...)))
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := NewConn(newScript(in, false))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, b, err := round(t.Context(), c, post("/", make([]byte, 100_000)))
		if len(b) > len(in) {
			t.Errorf("%d bytes of body from %d bytes", len(b), len(in))
		}
		if err == nil {
			idle(t, c)
		}
	})
}
