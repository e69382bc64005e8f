package noise

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// half is a net.Conn that reads from r and writes to w.
type half struct {
	net.Conn
	r io.Reader
	w io.Writer
}

func (h *half) Read(p []byte) (int, error)  { return h.r.Read(p) }
func (h *half) Write(p []byte) (int, error) { return h.w.Write(p) }
func (h *half) Close() error                { return nil }

// sessions returns the two ends of a handshake.
func sessions(t testing.TB) (client, server Session) {
	t.Helper()
	control := key.NewMachine()
	i, err := NewInitiator(key.NewMachine(), control.Public(), 7, key.MachinePrivate{})
	if err != nil {
		t.Fatal(err)
	}
	r := NewResponder(control, key.MachinePrivate{})
	if err := r.Read(i.Message()); err != nil {
		t.Fatal(err)
	}
	resp, server, err := r.Finish()
	if err != nil {
		t.Fatal(err)
	}
	if client, err = i.Finish(resp); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// sealed returns what a client writes for each of msgs, and the server's session.
func sealed(t testing.TB, msgs ...[]byte) ([]byte, Session) {
	c, s := sessions(t)
	var b bytes.Buffer
	w := NewConn(&half{w: &b}, c)
	for _, m := range msgs {
		if _, err := w.Write(m); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes(), s
}

// Every bit of both handshake messages is authenticated.
func TestHandshakeTampering(t *testing.T) {
	control, machine := key.NewMachine(), key.NewMachine()
	i, _ := NewInitiator(machine, control.Public(), 7, key.MachinePrivate{})
	for n := range InitiationSize * 8 {
		m := bytes.Clone(i.Message())
		m[n/8] ^= 1 << (n % 8)
		r := NewResponder(control, key.MachinePrivate{})
		if err := r.Read(m); !errors.Is(err, ErrHandshake) {
			t.Fatalf("initiation with bit %d changed: %v", n, err)
		}
		if _, _, err := r.Finish(); !errors.Is(err, ErrState) {
			t.Fatalf("a failed responder goes on: %v", err)
		}
	}
	r := NewResponder(control, key.MachinePrivate{})
	if err := r.Read(i.Message()); err != nil {
		t.Fatal(err)
	}
	if err := r.Read(i.Message()); !errors.Is(err, ErrState) {
		t.Errorf("a second Read: %v", err)
	}
	r = NewResponder(control, key.MachinePrivate{})
	r.Read(i.Message())
	resp, _, _ := r.Finish()
	for n := range ResponseSize * 8 {
		m := bytes.Clone(resp)
		m[n/8] ^= 1 << (n % 8)
		j := *i
		if _, err := j.Finish(m); !errors.Is(err, ErrHandshake) {
			t.Fatalf("response with bit %d changed: %v", n, err)
		}
		if _, err := j.Finish(resp); !errors.Is(err, ErrState) {
			t.Fatalf("a failed initiator goes on: %v", err)
		}
	}
}

func TestHandshakeKeys(t *testing.T) {
	if _, err := NewInitiator(key.MachinePrivate{}, key.NewMachine().Public(), 1, key.MachinePrivate{}); err == nil {
		t.Error("no machine key is accepted")
	}
	if _, err := NewInitiator(key.NewMachine(), key.MachinePublic{}, 1, key.MachinePrivate{}); err == nil {
		t.Error("no control key is accepted")
	}
	low := key.MachinePublicFromRaw([32]byte{1}) // of order 4
	if _, err := NewInitiator(key.NewMachine(), low, 1, key.MachinePrivate{}); !errors.Is(err, key.ErrLowOrder) {
		t.Errorf("a low-order control key: %v", err)
	}
	i, _ := NewInitiator(key.NewMachine(), key.NewMachine().Public(), 1, key.MachinePrivate{})
	if err := NewResponder(key.NewMachine(), key.MachinePrivate{}).Read(i.Message()); !errors.Is(err, ErrHandshake) {
		t.Errorf("another server's key: %v", err)
	}
	s, _ := sessions(t)
	if out := fmt.Sprintf("%v %+v %#v %s", s, s, s, s); strings.Contains(out, fmt.Sprint(s.Send[0], " ", s.Send[1])) {
		t.Errorf("keys are printed: %s", out)
	}
}

// serve runs Server in the background on one end of a pipe.
func serve(control key.MachinePrivate, init []byte) (net.Conn, func() (*Conn, error)) {
	a, b := net.Pipe()
	type res struct {
		c   *Conn
		err error
	}
	ch := make(chan res, 1)
	go func() {
		c, err := Server(context.Background(), b, control, init)
		if err != nil {
			b.Close()
		}
		ch <- res{c, err}
	}()
	return a, func() (*Conn, error) { r := <-ch; return r.c, r.err }
}

func TestDeferred(t *testing.T) {
	control, machine := key.NewMachine(), key.NewMachine()
	init, finish, err := ClientDeferred(machine, control.Public(), 99)
	if err != nil {
		t.Fatal(err)
	}
	conn, result := serve(control, init)
	c, err := finish(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := result()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Peer() != machine.Public() || s.ProtocolVersion() != 99 {
		t.Error("wrong peer")
	}
	if _, err := finish(t.Context(), conn); err == nil {
		t.Error("a handshake can be finished twice")
	}
}

func TestHandshakeFailures(t *testing.T) {
	t.Run("wrong control key", func(t *testing.T) {
		conn, result := serve(key.NewMachine(), nil)
		_, err := Client(t.Context(), conn, key.NewMachine(), key.NewMachine().Public(), 1)
		var refused *RefusedError
		if !errors.Is(err, ErrHandshake) || !errors.As(err, &refused) {
			t.Errorf("client: %v", err)
		}
		if _, err := result(); !errors.Is(err, ErrHandshake) {
			t.Errorf("server: %v", err)
		}
	})
	for name, answer := range map[string]string{
		"closes": "", "half a header": "\x02", "half a response": "\x02\x00\x30abc", "a record": "\x04\x00\x30", "too long": "\x02\xff\xff",
		"refusal cut short": "\x03\xff\xffbecause", "HTTP": "HTTP/1.1 400 Bad Request\r\n\r\n", "garbage": "\x02\x00\x30" + strings.Repeat("x", 48),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				io.ReadFull(b, make([]byte, InitiationSize))
				io.WriteString(b, answer)
				b.Close()
			}()
			if _, err := Client(t.Context(), a, key.NewMachine(), key.NewMachine().Public(), 1); !errors.Is(err, ErrHandshake) {
				t.Errorf("got %v", err)
			}
			a.Close()
			<-done
		})
	}
	for name, init := range map[string][]byte{"short": make([]byte, 100), "long": make([]byte, 102), "empty": {}, "zeros": make([]byte, 101)} {
		t.Run("initiation "+name, func(t *testing.T) {
			conn, result := serve(key.NewMachine(), init)
			b, _ := io.ReadAll(conn)
			if len(b) < 3 || b[0] != typeError || int(binary.BigEndian.Uint16(b[1:])) != len(b)-3 {
				t.Errorf("the refusal is %q", b)
			}
			if _, err := result(); !errors.Is(err, ErrHandshake) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			defer b.Close()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			go io.Copy(io.Discard, b)
			if _, err := Client(ctx, a, key.NewMachine(), key.NewMachine().Public(), 1); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("client: %v", err)
			}
			if _, err := Server(ctx, b, key.NewMachine(), nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("server: %v", err)
			}
			b.Close()
		})
	})
}

// A successful handshake leaves the connection's deadline alone.
func TestHandshakeContextAfterwards(t *testing.T) {
	control := key.NewMachine()
	conn, result := serve(control, nil)
	ctx, cancel := context.WithCancel(t.Context())
	c, err := Client(ctx, conn, key.NewMachine(), control.Public(), 1)
	if err != nil {
		t.Fatal(err)
	}
	s, _ := result()
	cancel()
	go s.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	c.Close()
	s.Close()
}

func TestRecordFailures(t *testing.T) {
	good, ses := sealed(t, []byte("hello"), []byte("world"))
	first := len(good) / 2
	flip := func(i int) []byte { b := bytes.Clone(good); b[i] ^= 1; return b }
	long := []byte{typeRecord, 0x0f, 0xfe} // 4097 bytes with the header
	tests := []struct {
		name  string
		wire  []byte
		plain string
		is    error
	}{
		{"good", good, "helloworld", nil},
		{"changed", flip(first - 1), "", ErrRecord},
		{"second changed", flip(len(good) - 1), "hello", ErrRecord},
		{"type changed", flip(0), "", ErrRecord},
		{"length changed", flip(2), "", ErrRecord},
		{"first left out", good[first:], "", ErrRecord},
		{"first twice", append(bytes.Clone(good[:first]), good...), "hello", ErrRecord},
		{"too long", append(long, make([]byte, 5000)...), "", ErrRecord},
		{"too short", []byte{typeRecord, 0, 15}, "", ErrRecord},
		{"an error frame", []byte("\x03\x00\x01x"), "", ErrRecord},
		{"cut within a header", good[:first+2], "hello", io.ErrUnexpectedEOF},
		{"cut within a record", good[:len(good)-1], "hello", io.ErrUnexpectedEOF},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := NewConn(&half{r: bytes.NewReader(test.wire)}, ses)
			got, err := io.ReadAll(c)
			if string(got) != test.plain || !errors.Is(err, test.is) {
				t.Errorf("read %q: %v", got, err)
			}
			if _, again := c.Read(make([]byte, 1)); again == nil || test.is != nil && again.Error() != err.Error() {
				t.Errorf("the failure does not last: %v", again)
			}
		})
	}
}

// Records may be empty, split in any way on the way, or come in one piece.
func TestRecordBoundaries(t *testing.T) {
	msgs := [][]byte{bytes.Repeat([]byte("a"), MaxPlaintext), {}, []byte("b"), bytes.Repeat([]byte("c"), 3*MaxPlaintext+5)}
	c, s := sessions(t)
	var wire bytes.Buffer
	w := NewConn(&half{w: &wire}, c)
	for _, m := range msgs {
		if len(m) > 0 {
			w.Write(m)
			continue
		}
		// A peer may send an empty record.
		var nonce [12]byte
		putNonce(&nonce, w.tx.seq)
		wire.Write(w.tx.aead.Seal([]byte{typeRecord, 0, tagSize}, nonce[:], nil, nil))
		w.tx.seq++
	}
	want := bytes.Join(msgs, nil)
	for _, step := range []int{1, 2, 3, 7, 4095, 4096, 4097, 1 << 20} {
		r := NewConn(&half{r: &chunks{bytes.Clone(wire.Bytes()), step}}, s)
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("in steps of %d: %d bytes, %v", step, len(got), err)
		}
		if r.rx.buf != nil {
			t.Errorf("in steps of %d: a buffer is kept", step)
		}
	}
}

// chunks reads in steps.
type chunks struct {
	b    []byte
	step int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.b[:min(c.step, len(c.b))])
	c.b = c.b[n:]
	return n, nil
}

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s := pair(t)
		for range 3 {
			c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
		}
		// A time-out in the middle of a record loses nothing.
		wire, ses := sealed(t, []byte("hello"))
		a, b := net.Pipe()
		r := NewConn(a, ses)
		go b.Write(wire[:10])
		r.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := r.Read(make([]byte, 5)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		go b.Write(wire[10:])
		r.SetReadDeadline(time.Time{})
		got := make([]byte, 5)
		if n, err := r.Read(got); err != nil || string(got[:n]) != "hello" {
			t.Fatal(err)
		}
		a.Close()
		b.Close()
		// A write that fails is final.
		s.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := s.Write(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		s.SetWriteDeadline(time.Time{})
		if _, err := s.Write(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "earlier") {
			t.Fatal(err)
		}
	})
}

func TestClose(t *testing.T) {
	c, s := pair(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("Read succeeded")
			}
		})
		wg.Go(func() {
			if _, err := c.Write(make([]byte, 1)); err == nil {
				t.Error("Write succeeded")
			}
		})
		wg.Go(func() { c.Close() })
	}
	wg.Wait()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := c.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
}

func TestExhausted(t *testing.T) {
	c, s := pair(t)
	c.tx.seq = math.MaxUint64
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrExhausted) {
		t.Error(err)
	}
	s.tx.seq, c.rx.seq = math.MaxUint64-1, math.MaxUint64-1
	go func() { s.Write([]byte("x")); s.Write([]byte("y")); s.Close() }()
	if n, err := c.Read(make([]byte, 9)); n != 1 || err != nil {
		t.Errorf("the last nonce: %d, %v", n, err)
	}
}

func TestConcurrent(t *testing.T) {
	c, s := pair(t)
	const writers, each = 4, 200
	go func() {
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for range each {
					c.Write(bytes.Repeat([]byte{byte('a' + w)}, 10))
				}
			})
		}
		wg.Wait()
		c.Close()
	}()
	got, err := io.ReadAll(s)
	if err != nil || len(got) != writers*each*10 {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	for i := 0; i < len(got); i += 10 {
		if !bytes.Equal(got[i:i+10], bytes.Repeat(got[i:i+1], 10)) {
			t.Fatal("writes are interleaved")
		}
	}
}

func TestEarly(t *testing.T) {
	chal := key.NewChallenge().Public()
	early, err := AppendEarly(nil, &tailcfg.EarlyNoise{NodeKeyChallenge: chal})
	if err != nil {
		t.Fatal(err)
	}
	announce := func(n uint32) []byte { return binary.BigEndian.AppendUint32([]byte(earlyMagic), n) }
	tests := []struct {
		name, wire, rest string
		has              bool
		is               error
	}{
		{"with", string(early) + "rest", "rest", true, nil},
		{"without", "\x00\x00\x12\x04\x00\x00\x00\x00\x00rest", "\x00\x00\x12\x04\x00\x00\x00\x00\x00rest", false, nil},
		{"too long", string(announce(maxEarly + 1)), "", false, ErrEarly},
		{"no JSON", string(announce(1)) + "{", "", false, ErrEarly},
		{"cut", string(early[:20]), "", false, io.ErrUnexpectedEOF},
		{"short", "abc", "", false, nil},
	}
	for _, test := range tests {
		for _, step := range []int{1, 5, 1000} {
			c := NewEarlyConn(&half{r: &chunks{[]byte(test.wire), step}})
			got, err := io.ReadAll(c)
			if string(got) != test.rest || !errors.Is(err, test.is) || (c.Early() != nil) != test.has {
				t.Errorf("%s: %q, %v, %v", test.name, got, c.Early(), err)
			}
			if test.has && c.Early().NodeKeyChallenge != chal {
				t.Error("wrong challenge")
			}
		}
	}
}

func FuzzInitiation(f *testing.F) {
	control := key.PrivateFromRaw[key.Machine]([32]byte{1})
	i, _ := NewInitiator(key.PrivateFromRaw[key.Machine]([32]byte{2}), control.Public(), 119, key.PrivateFromRaw[key.Machine]([32]byte{3}))
	f.Add(i.Message())
	f.Add(make([]byte, InitiationSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewResponder(control, key.MachinePrivate{})
		if r.Read(b) == nil && !bytes.Equal(b, i.Message()) {
			t.Fatal("an initiation that nobody made is accepted")
		}
	})
}

func FuzzResponse(f *testing.F) {
	control, e := key.PrivateFromRaw[key.Machine]([32]byte{1}), key.PrivateFromRaw[key.Machine]([32]byte{3})
	i, _ := NewInitiator(key.PrivateFromRaw[key.Machine]([32]byte{2}), control.Public(), 119, e)
	r := NewResponder(control, key.PrivateFromRaw[key.Machine]([32]byte{4}))
	r.Read(i.Message())
	resp, _, _ := r.Finish()
	f.Add(resp)
	f.Add([]byte("\x03\x00\x05sorry"))
	f.Fuzz(func(t *testing.T, b []byte) {
		j := *i
		_, err := j.Over(context.Background(), &half{r: bytes.NewReader(b)})
		if err == nil && !bytes.HasPrefix(b, resp) {
			t.Fatal("a response that nobody made is accepted")
		}
	})
}

func FuzzRecords(f *testing.F) {
	ses := Session{Send: [32]byte{1}, Recv: [32]byte{1}}
	var wire bytes.Buffer
	w := NewConn(&half{w: &wire}, ses)
	w.Write([]byte("hello"))
	w.Write(bytes.Repeat([]byte("x"), 5000))
	f.Add(wire.Bytes(), 3)
	f.Add([]byte{4, 0xff, 0xff}, 1)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		if step < 1 {
			step = 1
		}
		c := NewEarlyConn(NewConn(&half{r: &chunks{b, step}}, ses))
		got, _ := io.ReadAll(c)
		if len(got) > len(b) {
			t.Fatal("more came out than went in")
		}
	})
}

func FuzzEarly(f *testing.F) {
	e, _ := AppendEarly(nil, &tailcfg.EarlyNoise{})
	f.Add(e, 3)
	f.Add([]byte("\xff\xff\xffTS\xff\xff\xff\xff"), 9)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		io.ReadAll(NewEarlyConn(&half{r: &chunks{b, max(step, 1)}}))
	})
}

func BenchmarkHandshake(b *testing.B) {
	control, machine := key.NewMachine(), key.NewMachine()
	pub := control.Public()
	b.ReportAllocs()
	for b.Loop() {
		i, _ := NewInitiator(machine, pub, 119, key.MachinePrivate{})
		r := NewResponder(control, key.MachinePrivate{})
		r.Read(i.Message())
		resp, _, _ := r.Finish()
		if _, err := i.Finish(resp); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRecords(b *testing.B) {
	c, s := sessions(b)
	var wire bytes.Buffer
	w, r := NewConn(&half{w: &wire}, c), NewConn(&half{r: &wire}, s)
	buf := make([]byte, 16<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		w.Write(buf)
		if _, err := io.ReadFull(r, buf); err != nil {
			b.Fatal(err)
		}
	}
}
