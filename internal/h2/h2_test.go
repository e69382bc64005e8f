package h2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts net/http's HTTP/2 server, and returns a connection to it.
func serve(t *testing.T, conf *http.HTTP2Config, h http.HandlerFunc) (*Conn, *http.Server) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, Protocols: new(http.Protocols), HTTP2: conf}
	srv.Protocols.SetUnencryptedHTTP2(true)
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	nc, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewConn(nc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		srv.Close()
		wg.Wait()
	})
	return c, srv
}

func post(path string, body []byte) *Request {
	return &Request{Method: "POST", Scheme: "https", Authority: "control.example", Path: path, Header: []Field{{Name: "content-type", Value: "application/json"}}, Body: body}
}

// round makes a request and reads the whole answer.
func round(ctx context.Context, c *Conn, r *Request) (*Response, []byte, error) {
	resp, err := c.RoundTrip(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

// idle fails the test if c still has streams.
func idle(t *testing.T, c *Conn) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.streams) != 0 {
		t.Errorf("%d streams are left", len(c.streams))
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Path", r.Method+" "+r.Host+r.URL.String())
	w.Header().Set("X-Type", r.Header.Get("Content-Type"))
	b, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Trailer", "X-Sum")
	w.Write(b)
	w.Header().Set("X-Sum", "1")
}

// Bodies of all sizes go both ways, past both windows.
func TestEcho(t *testing.T) {
	c, _ := serve(t, &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10, MaxReceiveBufferPerConnection: 64 << 10}, echo)
	for _, n := range []int{0, 1, 1000, minMaxFrame, minMaxFrame + 1, defaultWindow, defaultWindow + 1, 300_000, 6 << 20} {
		body := bytes.Repeat([]byte("0123456789abcdef"), n/16+1)[:n]
		resp, got, err := round(t.Context(), c, post("/a/b?c=d", body))
		if err != nil {
			t.Fatal(n, err)
		}
		if resp.Status != 200 || !bytes.Equal(got, body) || resp.Get("x-path") != "POST control.example/a/b?c=d" || resp.Get("x-type") != "application/json" {
			t.Errorf("%d bytes: got %d of them, %d %v", n, len(got), resp.Status, resp.Header)
		}
	}
	idle(t, c)
}

// Many requests at once get their own answers, also where the server takes few at a time.
func TestConcurrent(t *testing.T) {
	for _, limit := range []int{1, 100} {
		c, _ := serve(t, &http.HTTP2Config{MaxConcurrentStreams: limit}, echo)
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() {
				body := bytes.Repeat(fmt.Append(nil, i, ","), 20_000)
				_, got, err := round(t.Context(), c, post("/", body))
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("request %d: %d bytes, %v", i, len(got), err)
				}
			})
		}
		wg.Wait()
		idle(t, c)
	}
}

func TestLargeHeaders(t *testing.T) {
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Back", r.Header.Get("X-Long"))
		if r.Header.Get("X-More") != "" {
			w.Header().Set("X-Back2", strings.Repeat("y", 70_000))
		}
	})
	r := post("/", nil)
	r.Header = append(r.Header, Field{Name: "x-long", Value: strings.Repeat("ü!", 15_000)})
	resp, _, err := round(t.Context(), c, r)
	if err != nil || resp.Get("x-back") != r.Header[1].Value {
		t.Errorf("a header of 45 KB comes back as %v, %v", resp, err)
	}
	r.Header = append(r.Header, Field{Name: "x-more", Value: "1"})
	if resp, _, err := round(t.Context(), c, r); err == nil {
		t.Errorf("a header past all limits was taken: %d", resp.Status)
	}
}

// A stream that lasts brings what is flushed as it comes, while others come and go, and ends with its context.
func TestStreaming(t *testing.T) {
	say := make(chan string)
	gone := make(chan struct{})
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/map" {
			echo(w, r)
			return
		}
		defer close(gone)
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		for {
			select {
			case s := <-say:
				io.WriteString(w, s)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	resp, err := c.RoundTrip(ctx, post("/map", []byte("{}")))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for i := range 10 {
		s := fmt.Sprint("message ", i)
		say <- s
		b := make([]byte, len(s))
		if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != s {
			t.Fatalf("got %q, %v", b, err)
		}
		if _, got, err := round(t.Context(), c, post("/", []byte(s))); err != nil || string(got) != s {
			t.Fatalf("beside it: %q, %v", got, err)
		}
	}
	enough := errors.New("enough")
	cancel(enough)
	if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, enough) {
		t.Errorf("after the context's end: %v", err)
	}
	resp.Body.Close()
	<-gone
	if _, _, err := round(t.Context(), c, post("/", nil)); err != nil {
		t.Errorf("the connection did not outlive the stream: %v", err)
	}
	idle(t, c)
}

func TestCancelBeforeAnswer(t *testing.T) {
	in := make(chan struct{})
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		in <- struct{}{}
		<-r.Context().Done()
		in <- struct{}{}
	})
	ctx, cancel := context.WithCancel(t.Context())
	errc := make(chan error)
	go func() {
		_, err := c.RoundTrip(ctx, post("/", nil))
		errc <- err
	}()
	<-in
	cancel()
	if err := <-errc; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-in // the server was told
	idle(t, c)
}

// A stalled reader holds up its own stream and no other, and what it left unread is given back.
func TestStalledReader(t *testing.T) {
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			echo(w, r)
			return
		}
		io.Copy(w, io.LimitReader(zeros{}, 8<<20))
	})
	for range 8 { // more than the connection's window in all
		resp, err := c.RoundTrip(t.Context(), post("/flood", nil))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		if _, got, err := round(t.Context(), c, post("/", []byte("x"))); err != nil || string(got) != "x" {
			t.Fatalf("beside it: %q, %v", got, err)
		}
		resp.Body.Close()
		resp.Body.Close()
		if _, err := resp.Body.Read(make([]byte, 1)); err == nil {
			t.Error("a read after Close went well")
		}
	}
	idle(t, c)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestServerAborts(t *testing.T) {
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/late" {
			io.WriteString(w, "some")
			w.(http.Flusher).Flush()
		}
		panic(http.ErrAbortHandler)
	})
	var reset *ResetError
	if _, err := c.RoundTrip(t.Context(), post("/", nil)); !errors.As(err, &reset) {
		t.Errorf("before the answer: %v", err)
	}
	if _, b, err := round(t.Context(), c, post("/late", nil)); !errors.As(err, &reset) {
		t.Errorf("within it: %q, %v", b, err)
	}
	if err := c.Err(); err != nil {
		t.Error(err)
	}
	idle(t, c)
}

// An answer that comes without the server having read the request is taken, and the rest is not sent.
func TestEarlyAnswer(t *testing.T) {
	c, _ := serve(t, &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10}, func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	})
	for range 3 {
		resp, b, err := round(t.Context(), c, post("/", make([]byte, 10<<20)))
		if err != nil || resp.Status != 413 || string(b) != "too large\n" {
			t.Fatalf("got %v %q, %v", resp, b, err)
		}
	}
	idle(t, c)
}

// A server that shuts down finishes what it began, and the connection ends after that.
func TestGoAway(t *testing.T) {
	in, out := make(chan struct{}), make(chan struct{})
	c, srv := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		in <- struct{}{}
		<-out
		io.WriteString(w, "done")
	})
	resp, err := c.RoundTrip(t.Context(), post("/", nil))
	if err != nil {
		t.Fatal(err)
	}
	<-in
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { srv.Shutdown(ctx) })
	for {
		c.mu.Lock()
		err, room := c.err, c.room
		c.mu.Unlock()
		if err != nil {
			break
		}
		<-room // a farewell wakes those who wait for a stream
	}
	var away *GoAwayError
	if _, err := c.RoundTrip(t.Context(), post("/", nil)); !errors.As(err, &away) || !errors.Is(err, ErrUnprocessed) {
		t.Errorf("a new request: %v", err)
	}
	close(out)
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "done" {
		t.Errorf("the old one: %q, %v", b, err)
	}
	resp.Body.Close()
	<-c.done
	cancel()
	wg.Wait()
}

func TestClose(t *testing.T) {
	in := make(chan struct{})
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		in <- struct{}{}
		<-r.Context().Done()
	})
	errc := make(chan error)
	go func() {
		_, err := c.RoundTrip(t.Context(), post("/", nil))
		errc <- err
	}()
	<-in
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { c.Close() })
	}
	wg.Wait()
	if err := <-errc; !errors.Is(err, ErrClosed) {
		t.Errorf("under way: %v", err)
	}
	if _, err := c.RoundTrip(t.Context(), post("/", nil)); !errors.Is(err, ErrClosed) {
		t.Errorf("after: %v", err)
	}
}

func TestBadRequests(t *testing.T) {
	c, _ := serve(t, nil, echo)
	for name, r := range map[string]*Request{
		"no method":    {Path: "/"},
		"no path":      {Method: "GET"},
		"relative":     {Method: "GET", Path: "a"},
		"path":         {Method: "GET", Path: "/a\r\nb"},
		"header name":  {Method: "GET", Path: "/", Header: []Field{{Name: "A"}}},
		"header value": {Method: "GET", Path: "/", Header: []Field{{Name: "a", Value: "b\nc"}}},
	} {
		if _, err := c.RoundTrip(t.Context(), r); err == nil {
			t.Errorf("%s: it was sent", name)
		}
	}
}
