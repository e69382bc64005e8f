package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Over TLS the key fetch's connection becomes the channel, and a certificate that does not
// verify is an error. In real time net/http would not use a connection again that is free only after 50 ms.
func TestTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		ln := newPipes()
		srv := httptest.NewUnstartedServer(http.HandlerFunc(f.serve))
		srv.Listener.Close()
		srv.Listener = ln
		srv.StartTLS()
		defer srv.Close()
		roots := x509.NewCertPool()
		roots.AddCert(srv.Certificate())
		dials := 0
		mk := func(cfg *tls.Config) *Client {
			return f.client(t, func(c *Config) {
				c.ServerURL, c.TLSConfig = "https://example.com:8443", cfg // the certificate's name
				c.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
					dials++
					return ln.dial(ctx)
				}
			})
		}
		c := mk(&tls.Config{RootCAs: roots})
		if _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); err != nil {
			t.Fatal(err)
		}
		if dials != 1 {
			t.Errorf("%d connections, want one", dials)
		}
		c.Close()
		if _, err := mk(nil).Register(t.Context(), &tailcfg.RegisterRequest{}); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("got %v", err)
		}
		f.cut()
	})
}

// Many requests share one connection, beside a stream.
func TestManyRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		c := f.client(t)
		ctx, cancel := context.WithCancel(t.Context())
		streams := make(chan error)
		up := make(chan bool, 1)
		go func() {
			streams <- c.Map(ctx, &tailcfg.MapRequest{}, func(*tailcfg.MapResponse) error { up <- true; return nil })
		}()
		<-up
		errs := make(chan error)
		const n = 200
		for range n {
			go func() { errs <- c.Update(ctx, &tailcfg.MapRequest{}) }()
		}
		for range n {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if f.dials != 1 {
			t.Errorf("%d connections", f.dials)
		}
		cancel()
		if err := <-streams; err == nil {
			t.Error("the stream ended without an error")
		}
	})
}
