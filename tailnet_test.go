package tailnode_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
)

func TestDialErrors(t *testing.T) {
	tn := newTailnet(t)
	if err := tn.coord.SetFilter(&coord.Filter{Rules: []coord.FilterRule{{Src: []string{"*"}, Dst: []string{"*"}, Ports: []string{"1-99"}}}}); err != nil {
		t.Fatal(err)
	}
	a, b := tn.up("alpha"), tn.up("beta")
	ip4, _ := b.TailscaleIPs()
	for _, c := range []struct {
		network, addr string
		code          tailnode.Code
		words         string
	}{
		{"tcp", ip4.String() + ":81", tailnode.CodeRefused, "refused"},
		{"tcp", ip4.String() + ":100", tailnode.CodeRefused, "access rules"},
		{"tcp", "192.0.2.1:80", tailnode.CodeNotTailnet, "192.0.2.1"},
		{"tcp", "example.com:80", tailnode.CodeNotTailnet, "example.com"},
		{"tcp", "nobody:80", tailnode.CodeNoSuchHost, "nobody"},
		{"tcp", "100.127.3.4:80", tailnode.CodeUnreachable, "100.127.3.4"},
		{"tcp6", ip4.String() + ":80", tailnode.CodeInvalidArgument, "family"},
		{"tcp", "beta", tailnode.CodeInvalidArgument, "port"},
		{"tcp", "beta:0", tailnode.CodeInvalidArgument, "port 0"},
		{"tcp", "beta:nonsense", tailnode.CodeInvalidArgument, "nonsense"},
		{"ip", "beta:80", tailnode.CodeUnsupported, "ip"},
	} {
		t.Run(c.network+" "+c.addr, func(t *testing.T) {
			wait := patience
			if c.code == tailnode.CodeNoSuchHost || c.code == tailnode.CodeUnreachable {
				wait = 100 * time.Millisecond // who is not there yet is waited for as long
			}
			_, err := a.Dial(withTimeout(t, wait), c.network, c.addr)
			wantCode(t, err, c.code, c.words)
		})
	}
}

func TestListenErrors(t *testing.T) {
	tn := newTailnet(t)
	a := tn.up("alpha")
	ln, err := a.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, c := range []struct {
		network, addr string
		code          tailnode.Code
	}{
		{"tcp", ":80", tailnode.CodeAddressInUse},
		{"udp", ":81", tailnode.CodeUnsupported},
		{"tcp", "192.0.2.1:81", tailnode.CodeInvalidArgument},
		{"tcp", "example.com:81", tailnode.CodeInvalidArgument},
		{"tcp", "81", tailnode.CodeInvalidArgument},
	} {
		_, err := a.Listen(c.network, c.addr)
		wantCode(t, err, c.code)
	}
	_, err = a.ListenPacket("tcp", ":82")
	wantCode(t, err, tailnode.CodeUnsupported)
	// One port, a listener for each family; and tsnet's empty network, which is tcp.
	for _, network := range []string{"tcp4", "tcp6"} {
		ln, err := a.Listen(network, ":83")
		if err != nil {
			t.Fatalf("%s: %v", network, err)
		}
		defer ln.Close()
	}
	_, err = a.Listen("", ":83")
	wantCode(t, err, tailnode.CodeAddressInUse)
}

func TestUDP(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	ip4, ip6 := b.TailscaleIPs()
	for _, c := range []struct{ network, listen, dial string }{
		{"udp", ":53", "beta:53"},
		{"udp4", netip.AddrPortFrom(ip4, 54).String(), netip.AddrPortFrom(ip4, 54).String()},
		{"udp6", netip.AddrPortFrom(ip6, 55).String(), netip.AddrPortFrom(ip6, 55).String()},
	} {
		t.Run(c.network, func(t *testing.T) {
			pc, err := b.ListenPacket(c.network, c.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer pc.Close()
			go func() {
				buf := make([]byte, 2000)
				for {
					n, from, err := pc.ReadFrom(buf)
					if err != nil {
						return
					}
					pc.WriteTo(buf[:n], from)
				}
			}()
			conn, err := a.Dial(withTimeout(t, patience), c.network, c.dial)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			buf := make([]byte, 2000)
			for _, size := range []int{1, 100, 1200} {
				// A datagram may be lost: it is sent until its answer comes.
				for ctx := withTimeout(t, patience); ; {
					if _, err := conn.Write(make([]byte, size)); err != nil {
						t.Fatal(err)
					}
					conn.SetReadDeadline(time.Now().Add(time.Second))
					n, err := conn.Read(buf)
					if err == nil && n == size {
						break
					}
					if ctx.Err() != nil {
						t.Fatalf("datagram of %d bytes: got %d, %v", size, n, err)
					}
				}
			}
		})
	}
}

func TestWhoIs(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	const grant = "example.com/cap/test"
	if err := tn.coord.SetFilter(&coord.Filter{
		Rules:  []coord.FilterRule{{Src: []string{"*"}, Dst: []string{"*"}}},
		Grants: []coord.Grant{{Src: []string{"*"}, Dst: []string{"*"}, Caps: map[string][]json.RawMessage{grant: {json.RawMessage(`{"role":"admin"}`)}}}},
	}); err != nil {
		t.Fatal(err)
	}
	lc, err := b.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := a.TailscaleIPs()
	until(t, lc, "beta has the grant", func() bool {
		who, err := lc.WhoIs(t.Context(), ip4.String())
		return err == nil && len(who.CapMap[grant]) > 0
	})
	ln, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := lc.WhoIs(r.Context(), r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		fmt.Fprintf(w, "%s %s %v", who.Node.Name, who.UserProfile.LoginName, who.CapMap[grant])
	})}
	go hs.Serve(ln)
	defer hs.Close()
	hc := a.HTTPClient()
	defer hc.CloseIdleConnections()
	for _, host := range []string{"beta", "beta." + coord.DefaultDomain} {
		resp, err := hc.Get("http://" + host + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := "alpha." + coord.DefaultDomain + `. ` + coord.DefaultUser + ` [{"role":"admin"}]`; err != nil || string(body) != want {
			t.Errorf("got %q, %v, want %q", body, err, want)
		}
	}
	_, err = lc.WhoIs(t.Context(), "100.127.9.9:1")
	wantCode(t, err, tailnode.CodeNotFound)
	_, err = lc.WhoIs(t.Context(), "nonsense")
	wantCode(t, err, tailnode.CodeInvalidArgument)
}

// TestStatusIsACopy changes all answers that hold capabilities, and asks again.
func TestStatusIsACopy(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	const has = "example.com/has"
	if err := tn.coord.SetNodeCaps("beta", map[string][]json.RawMessage{has: {json.RawMessage("1")}}); err != nil {
		t.Fatal(err)
	}
	ip, _ := b.TailscaleIPs()
	lc, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	caps := func() []tailnode.NodeCapMap {
		var out []tailnode.NodeCapMap
		st, err := lc.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range st.Peer {
			out = append(out, p.CapMap)
		}
		who, err := lc.WhoIs(t.Context(), ip.String())
		if err == nil {
			out = append(out, who.Node.CapMap)
		}
		return out
	}
	until(t, lc, "beta has the capability", func() bool {
		cs := caps()
		return len(cs) == 2 && len(cs[0][has]) == 1 && len(cs[1][has]) == 1
	})
	for _, m := range caps() {
		m["mine"] = nil
		m[has][0] = "2"
	}
	for _, m := range caps() {
		if _, ok := m["mine"]; ok || m[has][0] != "1" {
			t.Errorf("the node's own netmap was changed: %v", m)
		}
	}
}

func TestFallbackTCPHandler(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	remove := b.RegisterFallbackTCPHandler(func(src, dst netip.AddrPort) (func(net.Conn), bool) {
		if dst.Port() != 1234 {
			return nil, false
		}
		return func(c net.Conn) {
			fmt.Fprintf(c, "%d", dst.Port())
			c.Close()
		}, true
	})
	c, err := a.Dial(withTimeout(t, patience), "tcp", "beta:1234")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "1234" {
		t.Errorf("got %q, %v", got, err)
	}
	c.Close()
	_, err = a.Dial(withTimeout(t, patience), "tcp", "beta:1235")
	wantCode(t, err, tailnode.CodeRefused)
	remove()
	_, err = a.Dial(withTimeout(t, patience), "tcp", "beta:1234")
	wantCode(t, err, tailnode.CodeRefused)
}

func TestKeyExpiry(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	old, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	before, err := old.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := tn.coord.ExpireNode("alpha"); err != nil {
		t.Fatal(err)
	}
	// The node logs in again by its auth key, with a new node key and the old addresses.
	until(t, old, "alpha has a new key", func() bool {
		st, err := old.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Self.PublicKey != before.Self.PublicKey && st.BackendState == "Running" && st.TailscaleIPs[0] == before.TailscaleIPs[0]
	})
	ln, err := a.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
		}
	}()
	c, err := b.Dial(withTimeout(t, patience), "tcp", "alpha:80")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestPath follows the way to a peer, from none to a direct one.
func TestPath(t *testing.T) {
	tn := newTailnet(t)
	a, b := tn.up("alpha"), tn.up("beta")
	ip, _ := b.TailscaleIPs()
	lc, err := a.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	beta := func() *tailnode.PeerStatus {
		st, err := lc.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range st.Peer {
			return p
		}
		return nil
	}
	if p := beta(); p != nil && p.Path != nil {
		t.Errorf("a path before any traffic: %+v", p.Path)
	}
	ctx := withTimeout(t, patience)
	if _, err := lc.Ping(ctx, ip, tailnode.PingTSMP); err != nil {
		t.Fatal(err)
	}
	p := beta()
	for ; p.Path == nil || p.Path.Endpoint == ""; p = beta() { // pings have one looked for
		if _, err := lc.Ping(ctx, ip, tailnode.PingDisco); err != nil {
			t.Fatal(err)
		}
	}
	if p.Path.Endpoint != p.CurAddr || p.Path.RoundTrip <= 0 || p.Path.Since.IsZero() || p.Path.WhyNotDirect != "" {
		t.Errorf("path %+v, CurAddr %q", p.Path, p.CurAddr)
	}
	if p.RxBytes == 0 || p.TxBytes == 0 || p.LastHandshake.IsZero() || !p.Active {
		t.Errorf("counters: %+v", p)
	}
}
