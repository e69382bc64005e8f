package coord_test

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"github.com/tailnode/tailnode/coord"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/netns"
	"tailscale.com/net/stun/stuntest"
	"tailscale.com/tsnet"
	"tailscale.com/types/key"
	"tailscale.com/types/nettype"
)

func TestMain(m *testing.M) {
	os.Setenv("TS_NO_LOGS_NO_SUPPORT", "1")
	os.Setenv("TS_DISABLE_PORTMAPPER", "1")
	netns.SetEnabled(false)
	os.Exit(m.Run())
}

// quiet drops upstream's logs unless they are asked for.
func quiet(t *testing.T) func(string, ...any) {
	if os.Getenv("INTEROP_VERBOSE") != "" {
		return t.Logf
	}
	return func(string, ...any) {}
}

// start runs our coordination server with upstream's relay.
func start(t *testing.T, s *coord.Server) *coord.Server {
	t.Helper()
	if s.Relays == nil {
		s.Relays = relays(t)
	}
	if os.Getenv("INTEROP_VERBOSE") != "" {
		s.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// relays runs upstream's DERP and STUN servers on loopback.
func relays(t *testing.T) []coord.Region {
	d := derpserver.New(key.NewNode(), quiet(t))
	hs := httptest.NewUnstartedServer(derpserver.Handler(d))
	hs.Config.TLSNextProto = make(map[string]func(*http.Server, *tls.Conn, http.Handler)) // DERP upgrades HTTP/1.1
	hs.Config.ErrorLog = log.New(io.Discard, "", 0)
	hs.StartTLS()
	stun, stop := stuntest.ServeWithPacketListener(t, nettype.Std{})
	t.Cleanup(func() {
		hs.CloseClientConnections()
		hs.Close()
		d.Close()
		stop()
	})
	return []coord.Region{{ID: 1, Code: "test", Nodes: []coord.Relay{{Name: "t1", HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none",
		DERPPort: hs.Listener.Addr().(*net.TCPAddr).Port, STUNPort: stun.Port, STUNTestIP: "127.0.0.1", InsecureForTests: true}}}}
}

func ctx(t *testing.T) context.Context {
	c, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return c
}

// upstream makes an upstream node, not yet started.
func upstream(t *testing.T, s *coord.Server, host, authKey string) *tsnet.Server {
	n := &tsnet.Server{Dir: t.TempDir(), Hostname: host, AuthKey: authKey, ControlURL: s.BaseURL(), Logf: quiet(t), UserLogf: quiet(t)}
	t.Cleanup(func() { n.Close() })
	return n
}

func authKey(t *testing.T, s *coord.Server, o coord.AuthKeyOptions) string {
	t.Helper()
	k, err := s.CreateAuthKey(o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// serveEcho echoes on a port of n.
func serveEcho(t *testing.T, n *tsnet.Server, port string) {
	t.Helper()
	ln, err := n.Listen("tcp", port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

// echo dials addr from n and checks that what it sends comes back.
func echo(t *testing.T, n *tsnet.Server, addr string) {
	t.Helper()
	c, err := n.Dial(ctx(t), "tcp", addr)
	if err != nil {
		t.Fatalf("dial %s: %v", addr, err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(60 * time.Second))
	const msg = "hello over the tailnet"
	if _, err := io.WriteString(c, msg); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(msg))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != msg {
		t.Fatalf("echo = %q, %v", b, err)
	}
}

func ip4(t *testing.T, n *tsnet.Server) string {
	v4, _ := n.TailscaleIPs()
	return v4.String()
}

func hostPort(ip, port string) string { return net.JoinHostPort(ip, port) }
