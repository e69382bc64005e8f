package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"testing"

	"github.com/tailnode/tailnode/internal/socks5"
)

// Our own SOCKS5 server lets us through, with the password and not without.
func TestSOCKS(t *testing.T) {
	for name, user := range map[string]*url.Userinfo{"": nil, "user:secret": url.UserPassword("user", "secret"), "user:wrong": url.UserPassword("user", "wrong")} {
		for _, target := range []string{"r.example:443", "192.0.2.1:80", "[2001:db8::1]:65535"} {
			asked := make(chan string, 1)
			end := make(chan net.Conn, 1)
			srv := &socks5.Server{User: "user", Password: "secret", Dial: func(_ context.Context, _, addr string) (net.Conn, error) {
				asked <- addr
				near, far := net.Pipe()
				go io.Copy(far, far)
				end <- far
				return near, nil
			}}
			done := make(chan struct{})
			dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
				if addr != "proxy.example:1080" {
					t.Errorf("dials %s", addr)
				}
				near, far := net.Pipe()
				go func() { defer close(done); srv.Serve(t.Context(), far) }()
				return near, nil
			}
			c, err := Dial(t.Context(), dial, &url.URL{Scheme: "socks5", Host: "proxy.example", User: user}, nil, target)
			if name != "user:secret" {
				if !errors.Is(err, ErrRefused) {
					t.Errorf("%q: %v", name, err)
				}
				<-done
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := <-asked; got != target {
				t.Errorf("asked for %s, want %s", got, target)
			}
			b := make([]byte, 5)
			go c.Write([]byte("hello"))
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
				t.Errorf("%q, %v", b, err)
			}
			c.Close()
			(<-end).Close()
			<-done
		}
	}
}

func FuzzSOCKS(f *testing.F) {
	f.Add([]byte{5, 2, 1, 0, 5, 0, 0, 1, 1, 2, 3, 4, 5, 6})
	f.Add([]byte{5, 2, 1, 0, 5, 0, 0, 3, 2, 'a', 'b', 5, 6})
	f.Add([]byte{5, 2, 1, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		near, far := net.Pipe()
		go func() { io.Copy(io.Discard, far) }()
		go func() { far.Write(in); far.Close() }()
		socks(near, &url.URL{User: url.UserPassword("user", "secret")}, "r.example:443")
		near.Close()
	})
}
