package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scripted is a proxy that reads a request's head and gives an answer; then it echoes.
func scripted(t *testing.T, answer string, head chan<- string) func(context.Context, string, string) (net.Conn, error) {
	return func(_ context.Context, network, addr string) (net.Conn, error) {
		if network != "tcp" || addr != "proxy.example:3128" {
			t.Errorf("dials %s %s", network, addr)
		}
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			br := bufio.NewReader(far)
			var b strings.Builder
			for !strings.HasSuffix(b.String(), "\r\n\r\n") {
				c, err := br.ReadByte()
				if err != nil {
					return
				}
				b.WriteByte(c)
			}
			head <- b.String()
			if _, err := io.WriteString(far, answer); err != nil {
				return
			}
			io.Copy(far, br)
		}()
		return near, nil
	}
}

func TestDial(t *testing.T) {
	for _, tt := range []struct {
		name, proxy, answer string
		target              string
		head                string // what the request has
		err                 string // what the error has
	}{
		{"lets through", "http://proxy.example:3128", "HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n", "r.example:443",
			"CONNECT r.example:443 HTTP/1.1\r\nHost: r.example:443\r\n", ""},
		{"with a password", "http://user:secret@proxy.example:3128", "HTTP/1.0 200 OK\r\n\r\n", "r.example:443",
			"Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n", ""},
		{"wants a password", "http://user:secret@proxy.example:3128", "HTTP/1.1 407 Who are you\r\n\r\n", "r.example:443", "CONNECT", "407 Who"},
		{"is something else", "http://proxy.example:3128", "SSH-2.0-x\r\n\r\n", "r.example:443", "CONNECT", "does not speak HTTP"},
		{"is endless", "http://proxy.example:3128", "HTTP/1.1 200 " + strings.Repeat("x", 1<<14), "r.example:443", "CONNECT", "endless"},
		{"hangs up", "http://proxy.example:3128", "HTTP/1.1 200 OK\r\n", "r.example:443", "CONNECT", "no answer"},
		{"of another kind", "socks5://proxy.example:3128", "", "r.example:443", "", "socks5"},
		{"target splits the request", "http://proxy.example:3128", "", "r.example:443\r\nX: y", "", "not a host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := url.Parse(tt.proxy)
			if err != nil {
				t.Fatal(err)
			}
			head := make(chan string, 1)
			dial := scripted(t, tt.answer, head)
			if tt.name == "hangs up" {
				whole := dial
				dial = func(ctx context.Context, n, a string) (net.Conn, error) {
					c, err := whole(ctx, n, a)
					return &shortConn{Conn: c, left: len(tt.answer)}, err
				}
			}
			c, err := Dial(t.Context(), dial, p, nil, tt.target)
			if tt.head != "" && !strings.Contains(<-head, tt.head) {
				t.Errorf("the request is not as it should be")
			}
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "secret") {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, "ping")
			b := make([]byte, 4)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

// shortConn ends after so many bytes.
type shortConn struct {
	net.Conn
	left int
}

func (c *shortConn) Read(b []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

func TestDialIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	head := make(chan string, 1)
	silent := func(ctx context.Context, n, a string) (net.Conn, error) { return scripted(t, "", head)(ctx, n, a) }
	p, _ := url.Parse("http://proxy.example:3128")
	go func() { <-head; cancel() }()
	if _, err := Dial(ctx, silent, p, nil, "r.example:443"); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestDialOverTLS(t *testing.T) {
	hs := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "CONNECT" || r.Host != "r.example:443" {
			t.Errorf("%s %s", r.Method, r.Host)
		}
		w.WriteHeader(http.StatusForbidden)
	}))
	defer hs.Close()
	roots := x509.NewCertPool()
	roots.AddCert(hs.Certificate())
	p, _ := url.Parse(hs.URL)
	var d net.Dialer
	if _, err := Dial(t.Context(), d.DialContext, p, roots, "r.example:443"); !errors.Is(err, ErrRefused) {
		t.Errorf("error %v", err)
	}
	if _, err := Dial(t.Context(), d.DialContext, p, x509.NewCertPool(), "r.example:443"); err == nil || errors.Is(err, ErrRefused) {
		t.Errorf("a proxy with a foreign certificate: %v", err)
	} else if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok {
		t.Errorf("error %v", err)
	}
}

func TestFor(t *testing.T) {
	var asked string
	f := Func(func(u *url.URL) (*url.URL, error) {
		asked = u.String()
		return nil, errors.New("password in here")
	})
	for _, tt := range []struct {
		host  string
		plain bool
		want  string
	}{
		{"r.example", false, "https://r.example/"},
		{"r.example", true, "http://r.example/"},
		{"2001:db8::1", false, "https://[2001:db8::1]/"},
	} {
		if _, err := f.For(tt.host, tt.plain); asked != tt.want || err == nil || strings.Contains(err.Error(), "password") {
			t.Errorf("asked %q, want %q; %v", asked, tt.want, err)
		}
	}
	if p, err := Func(nil).For("127.0.0.1", false); p != nil || err != nil {
		t.Errorf("a proxy for loopback: %v %v", p, err)
	}
	if p, err := Func(None).For("r.example", false); p != nil || err != nil {
		t.Errorf("%v %v", p, err)
	}
}
