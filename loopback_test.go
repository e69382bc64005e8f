package tailnode_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"github.com/tailnode/tailnode"
)

func TestLoopbackProxy(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	ln, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c) // until the half-close comes through
			c.Write([]byte("end"))
			c.Close()
		}
	}()
	addr, cred, _, err := a.Loopback()
	if err != nil {
		t.Fatal(err)
	}
	if again, cred2, _, _ := a.Loopback(); again != addr || cred2 != cred {
		t.Error("a second call gave another answer")
	}
	dial := func(password, target string) (net.Conn, error) {
		d, err := proxy.SOCKS5("tcp", addr, &proxy.Auth{User: "tsnet", Password: password}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return d.Dial("tcp", target)
	}
	c, err := dial(cred, "beta:80")
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "hello")
	c.(interface{ CloseWrite() error }).CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "helloend" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	c.Close()
	for _, x := range []struct{ password, target, words string }{
		{"wrong", "beta:80", "authentication"},
		{cred, "beta:81", "refused"},
		{cred, "192.0.2.1:80", "not allowed"},
	} {
		if _, err := dial(x.password, x.target); err == nil || !strings.Contains(err.Error(), x.words) {
			t.Errorf("%s: %v, want something about %q", x.target, err, x.words)
		}
	}
	// Close ends what is open.
	open, err := dial(cred, "beta:80")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	a.Close()
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a proxied connection outlived the server")
	}
	if _, _, _, err := a.Loopback(); err == nil {
		t.Error("Loopback of a closed server")
	}
}

func TestLoopbackLocalAPI(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	addr, _, cred, err := a.Loopback()
	if err != nil {
		t.Fatal(err)
	}
	ip, _ := b.TailscaleIPs()
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for _, x := range []struct {
		name, method, path, header, password string
		status                               int
		words                                string
	}{
		{"ping", "POST", "ping?type=TSMP&ip=" + ip.String(), "localapi", cred, 200, "LatencySeconds"}, // waits for the peer
		{"status", "GET", "status", "localapi", cred, 200, `"BackendState":"Running"`},
		{"whois", "GET", "whois?addr=" + url.QueryEscape(ip.String()+":1"), "localapi", cred, 200, `"ComputedName":"beta"`},
		{"ping with GET", "GET", "ping?type=TSMP&ip=" + ip.String(), "localapi", cred, 405, ""},
		{"no header", "GET", "status", "", cred, 403, "Sec-Tailscale"},
		{"wrong password", "GET", "status", "localapi", "wrong", 401, ""},
		{"unknown address", "GET", "whois?addr=192.0.2.1", "localapi", cred, 404, ""},
		{"no address", "GET", "whois", "localapi", cred, 400, ""},
		{"unknown path", "GET", "prefs", "localapi", cred, 404, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			req, _ := http.NewRequestWithContext(withTimeout(t, patience), x.method, "http://"+addr+"/localapi/v0/"+x.path, nil)
			if x.header != "" {
				req.Header.Set("Sec-Tailscale", x.header)
			}
			req.SetBasicAuth("", x.password)
			res, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, _ := io.ReadAll(res.Body)
			if res.StatusCode != x.status || !strings.Contains(string(body), x.words) {
				t.Errorf("%s: %s", res.Status, body)
			}
			if x.name == "status" {
				var st tailnode.Status
				if err := json.Unmarshal(body, &st); err != nil || len(st.Peer) != 1 || len(st.Self.TailscaleIPs) != 2 {
					t.Errorf("%v: %s", err, body)
				}
			}
		})
	}
}

// loopback returns what Loopback of a server gives that waits for somebody to log in.
func (tn *tailnet) loopback(t *testing.T) (addr, proxyCred, localAPICred string) {
	t.Helper()
	s, _ := tn.visitor(t, "visitor")
	addr, proxyCred, localAPICred, err := s.Loopback()
	if err != nil {
		t.Fatal(err)
	}
	return addr, proxyCred, localAPICred
}

// loopbackConns is the bound of connections at a time.
const loopbackConns = 1024

// awaitLocalAPI asks for the status until there is a place for who asks.
func awaitLocalAPI(t *testing.T, addr, cred string) {
	t.Helper()
	ctx := withTimeout(t, patience)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+addr+"/localapi/v0/status", nil)
		req.Header.Set("Sec-Tailscale", "localapi")
		req.SetBasicAuth("", cred)
		res, err := client.Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode != 200 {
				t.Fatal(res.Status)
			}
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// TestLoopbackClientsThatLeft has as many SOCKS clients give up waiting as there are places.
func TestLoopbackClientsThatLeft(t *testing.T) {
	addr, cred, local := newTailnet(t).loopback(t)
	hello := "\x05\x01\x02" + "\x01\x05tsnet" + string(rune(len(cred))) + cred
	request := "\x05\x01\x00\x03\x0a100.64.0.9\x00\x50"
	var clients []net.Conn
	for range loopbackConns {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, hello+request)
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	for _, c := range clients {
		c.Close()
	}
	awaitLocalAPI(t, addr, local)
}

// TestLoopbackStrangers has somebody without a credential take every place, and leave.
func TestLoopbackStrangers(t *testing.T) {
	addr, _, local := newTailnet(t).loopback(t)
	ask := func() (net.Conn, error) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		_, err = http.ReadResponse(bufio.NewReader(c), nil)
		return c, err
	}
	var open []net.Conn
	closeAll := func() {
		for _, c := range open {
			c.Close()
		}
	}
	defer closeAll()
	for i := range loopbackConns {
		c, err := ask()
		open = append(open, c)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	c, err := ask()
	c.Close()
	if err == nil {
		// The oldest may have been idle for so long that it was closed.
		open[0].SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := open[0].Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("more than the bound")
		}
	}
	closeAll()
	awaitLocalAPI(t, addr, local)
}
