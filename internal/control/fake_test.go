package control

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pipes is a listener of in-memory connections, which work within synctest.
type pipes struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func newPipes() *pipes { return &pipes{ch: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.ch:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(ctx context.Context) (net.Conn, error) {
	a, b := bufPipe()
	select {
	case p.ch <- b:
		return a, nil
	case <-p.done:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fake is a control server whose answers the test gives. It serves on in-memory connections.
type fake struct {
	t *testing.T
	// What to answer. Set before the first request, or under mu.
	mu       sync.Mutex
	key      key.MachinePrivate // of the handshake
	announce key.MachinePublic  // zero: key's
	outer    http.HandlerFunc   // instead of /key and /ts2021, if set
	early    bool
	register func(*tailcfg.RegisterRequest) any // a *RegisterResponse, or an int as status
	mapFn    func(*stream)
	update   func(*tailcfg.MapRequest) int
	inner    http.HandlerFunc // for other paths

	dials   int
	keys    int // fetches
	regs    []*tailcfg.RegisterRequest
	updates []*tailcfg.MapRequest

	ln    *pipes
	srv   *http.Server
	conns map[*noise.Conn]bool
	wg    sync.WaitGroup
}

// stream is one map stream at the server.
type stream struct {
	ctx context.Context
	req *tailcfg.MapRequest
	w   http.ResponseWriter
}

func (s *stream) raw(b []byte) {
	s.w.Write(b)
	s.w.(http.Flusher).Flush()
}

func (s *stream) send(m *tailcfg.MapResponse) {
	j, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	s.raw(frame(compress(j)))
}

func frame(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func compress(b []byte) []byte {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err)
	}
	defer e.Close()
	return e.EncodeAll(b, nil)
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t, key: key.NewMachine(), ln: newPipes(), conns: map[*noise.Conn]bool{}}
	f.register = func(*tailcfg.RegisterRequest) any { return &tailcfg.RegisterResponse{MachineAuthorized: true} }
	f.mapFn = func(s *stream) {
		s.send(&tailcfg.MapResponse{Node: &tailcfg.Node{ID: 1, Key: s.req.NodeKey, MachineAuthorized: true}})
		<-s.ctx.Done()
	}
	f.update = func(*tailcfg.MapRequest) int { return 200 }
	f.srv = &http.Server{Handler: http.HandlerFunc(f.serve)}
	f.wg.Go(func() { f.srv.Serve(f.ln) })
	t.Cleanup(f.close)
	return f
}

func (f *fake) close() {
	f.srv.Close()
	f.ln.Close()
	f.cut()
	f.wg.Wait()
}

// cut closes all Noise connections.
func (f *fake) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
}

func (f *fake) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	f.mu.Lock()
	f.dials++
	f.mu.Unlock()
	return f.ln.dial(ctx)
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	outer, priv, announce, early := f.outer, f.key, f.announce, f.early
	f.mu.Unlock()
	switch {
	case outer != nil:
		outer(w, r)
	case r.URL.Path == "/key":
		f.mu.Lock()
		f.keys++
		f.mu.Unlock()
		if announce.IsZero() {
			announce = priv.Public()
		}
		json.NewEncoder(w).Encode(&tailcfg.PublicKeyResponse{PublicKey: announce})
	case r.URL.Path == "/ts2021":
		init, err := base64.StdEncoding.DecodeString(r.Header.Get(handshakeHeader))
		if err != nil || r.Method != "POST" {
			http.Error(w, "bad upgrade", 400)
			return
		}
		w.Header().Set("Upgrade", r.Header.Get("Upgrade"))
		w.Header().Set("Connection", "upgrade")
		w.WriteHeader(101)
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			f.t.Error(err)
			return
		}
		nc, err := noise.Server(context.Background(), c, priv, init)
		if err != nil {
			c.Close()
			return
		}
		f.mu.Lock()
		f.conns[nc] = true
		f.mu.Unlock()
		if early {
			noise.WriteEarly(nc, &tailcfg.EarlyNoise{NodeKeyChallenge: key.NewChallenge().Public()})
		}
		one := &oneConn{c: nc, done: make(chan struct{})}
		inner := &http.Server{Handler: http.HandlerFunc(f.serveInner), Protocols: new(http.Protocols)}
		inner.Protocols.SetUnencryptedHTTP2(true)
		inner.ConnState = func(c net.Conn, s http.ConnState) {
			if s == http.StateClosed {
				one.Close()
			}
		}
		inner.Serve(one)
		nc.Close()
		inner.Close()
		f.mu.Lock()
		delete(f.conns, nc)
		f.mu.Unlock()
	default:
		http.NotFound(w, r)
	}
}

func (f *fake) serveInner(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	register, mapFn, update, inner := f.register, f.mapFn, f.update, f.inner
	f.mu.Unlock()
	switch r.URL.Path {
	case "/machine/register":
		var req tailcfg.RegisterRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			http.Error(w, err.Error(), 400) // the client went away
			return
		}
		f.mu.Lock()
		f.regs = append(f.regs, &req)
		f.mu.Unlock()
		switch a := register(&req).(type) {
		case int:
			w.Header().Set("Retry-After", "7")
			http.Error(w, "status by test", a)
		case string:
			w.Write([]byte(a))
		case func(http.ResponseWriter, *http.Request):
			a(w, r)
		default:
			json.NewEncoder(w).Encode(a)
		}
	case "/machine/map":
		var req tailcfg.MapRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
			http.Error(w, err.Error(), 400) // the client went away
			return
		}
		if !req.Stream {
			f.mu.Lock()
			f.updates = append(f.updates, &req)
			f.mu.Unlock()
			w.WriteHeader(update(&req))
			return
		}
		mapFn(&stream{r.Context(), &req, w})
	default:
		if inner == nil {
			http.NotFound(w, r)
			return
		}
		inner(w, r)
	}
}

// oneConn is a listener of one connection, which ends when that is closed.
type oneConn struct {
	c    net.Conn
	once sync.Once
	done chan struct{}
	got  bool
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.got {
		l.got = true
		return l.c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneConn) Addr() net.Addr { return l.c.LocalAddr() }

func (f *fake) client(t *testing.T, edit ...func(*Config)) *Client {
	cfg := Config{ServerURL: "http://control.test:8080", MachineKey: key.NewMachine(), Dial: f.dial}
	for _, e := range edit {
		e(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}
