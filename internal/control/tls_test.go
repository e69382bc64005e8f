package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Over TLS the key fetch's connection becomes the channel, and a certificate that does not
// verify is an error.
func TestTLS(t *testing.T) {
	f := newFake(t)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(f.serve))
	srv.Config.ErrorLog = nil
	srv.StartTLS()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	var dials atomic.Int32
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}
	mk := func(cfg *tls.Config) *Client {
		c, err := New(Config{ServerURL: srv.URL, MachineKey: key.NewMachine(), Dial: dial, TLSConfig: cfg})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	c := mk(&tls.Config{RootCAs: roots})
	if _, err := c.Register(t.Context(), &tailcfg.RegisterRequest{}); err != nil {
		t.Fatal(err)
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections, want one", n)
	}
	c.Close()
	if _, err := mk(nil).Register(t.Context(), &tailcfg.RegisterRequest{}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got %v", err)
	}
	f.cut()
}

// Many requests share one connection, beside a stream.
func TestManyRequests(t *testing.T) {
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
}
