package tailnode

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestLoopbackHTTPTimeouts has clients of the LocalAPI's server that say no more.
func TestLoopbackHTTPTimeouts(t *testing.T) {
	for _, c := range []struct{ name, said string }{
		{"idle", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"within the header", "GET / HTTP/1.1\r\nHost:"},
		{"within the body", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nx"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				api := &handOver{conns: make(chan net.Conn), addr: &net.TCPAddr{}, done: ctx.Done()}
				hs := httpServer(localAPI{nil, "credential"})
				served := make(chan struct{})
				go func() { defer close(served); hs.Serve(api) }()
				client, server := net.Pipe()
				defer client.Close()
				api.give(server)
				began := time.Now()
				go io.WriteString(client, c.said)
				ended := make(chan struct{})
				go func() { defer close(ended); io.Copy(io.Discard, client) }()
				select {
				case <-ended:
				case <-time.After(time.Hour):
					t.Error("still open")
				}
				if d := time.Since(began); d > time.Minute+time.Second {
					t.Errorf("closed after %v", d)
				}
				cancel() // first, as Close waits for Accept
				hs.Close()
				<-served
				<-ended
			})
		})
	}
}

// TestLoopbackCloseIsNow has clients that say nothing, or no more, while it is closed. They came after one that could not be accepted.
func TestLoopbackCloseIsNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l loopback
		conns := make(chan net.Conn)
		ln := &pipes{handOver{conns: conns, addr: &net.TCPAddr{}}, make(chan struct{})}
		ln.handOver.done = ln.closed
		l.serveOn(ln, &Server{})
		conns <- nil
		for _, said := range []string{"", "\x05", "GET / HTTP/1.1\r\n"} {
			client, server := net.Pipe()
			defer client.Close()
			conns <- server
			if said != "" {
				go io.WriteString(client, said)
			}
		}
		synctest.Wait()
		began := time.Now()
		l.close()
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v", d)
		}
	})
}

// pipes is a listener of connections in memory; nil stands for one that finds no descriptor.
type pipes struct {
	handOver
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	c, err := p.handOver.Accept()
	if c == nil && err == nil {
		err = syscall.EMFILE
	}
	return c, err
}

func (p *pipes) Close() error { close(p.closed); return nil }

// TestLoopbackLongRequest has a request of somebody with the credential take longer than ReadTimeout.
func TestLoopbackLongRequest(t *testing.T) {
	s := &Server{Hostname: "lost", Store: NewMemoryStore(), ControlURL: "http://127.0.0.1:1"}
	defer s.Close()
	hs := httptest.NewUnstartedServer(nil)
	hs.Config = httpServer(localAPI{s, "credential"})
	hs.Config.ReadTimeout = 50 * time.Millisecond
	hs.Start()
	defer hs.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", hs.URL+"/localapi/v0/whois?addr=100.64.0.1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Sec-Tailscale", "localapi")
	req.SetBasicAuth("", "credential")
	res, err := hs.Client().Do(req)
	if err == nil {
		res.Body.Close()
		t.Errorf("%s before the client had enough", res.Status)
	}
}
