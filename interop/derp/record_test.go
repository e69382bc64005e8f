package derp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"

	upderp "tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	upkey "tailscale.com/types/key"
)

var update = flag.Bool("update", false, "record upstream's flow anew into testdata/vectors/derp-flow.json")

// tap records what is read from a connection.
type tap struct {
	net.Conn
	mu  sync.Mutex
	got bytes.Buffer
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	c.got.Write(p[:n])
	c.mu.Unlock()
	return n, err
}

// TestRecordUpstreamFlow has upstream's client and relay talk, and writes down what each sent, for
// internal/derp/client and internal/derp/server to replay. Keys are fixed, so that the boxes open.
func TestRecordUpstreamFlow(t *testing.T) {
	if !*update {
		t.Skip("records with -update only")
	}
	priv := func(b byte) (k upkey.NodePrivate) {
		if err := k.UnmarshalText(fmt.Appendf(nil, "privkey:%x", bytes.Repeat([]byte{b}, 32))); err != nil {
			t.Fatal(err)
		}
		return k
	}
	s := derpserver.New(priv(0x11), t.Logf)
	defer s.Close()
	connect := func(k upkey.NodePrivate, opts ...upderp.ClientOpt) (c *upderp.Client, near, far *tap) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		n, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		f, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		near, far = &tap{Conn: n}, &tap{Conn: f}
		go s.Accept(context.Background(), far, bufio.NewReadWriter(bufio.NewReader(far), bufio.NewWriter(far)), "192.0.2.1:1")
		c, err = upderp.NewClient(k, near, bufio.NewReadWriter(bufio.NewReader(near), bufio.NewWriter(near)), t.Logf, opts...)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Recv(); err != nil { // server info
			t.Fatal(err)
		}
		return c, near, far
	}
	recv := func(c *upderp.Client) {
		t.Helper()
		if _, err := c.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	a, near, far := connect(priv(0x22), upderp.CanAckPings(true))
	b, bnear, _ := connect(priv(0x33))
	disco := append([]byte("TS💬"), bytes.Repeat([]byte{7}, 100)...)
	for _, err := range []error{
		a.NotePreferred(true),
		a.SendPing([8]byte{1, 2, 3, 4, 5, 6, 7, 8}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	recv(a) // pong
	a.Send(priv(0x44).Public(), disco)
	recv(a) // peer gone: not here
	a.Send(priv(0x33).Public(), []byte("from the client"))
	recv(b)
	b.Send(priv(0x22).Public(), []byte("to the client"))
	recv(a)
	bnear.Close()
	recv(a) // peer gone: disconnected
	near.Close()
	flow := map[string]string{
		"comment": "a session of upstream v1.102.5 with itself: what its client and its relay sent. Keys are 32 times 11 (relay), 22 (client), " +
			"33 (peer) and 44 (stranger), clamped. The client notes its home, pings, sends a disco message to the stranger and \"from the client\" to the peer; " +
			"the relay answers, delivers \"to the client\", and says that the peer left.",
	}
	for { // the relay has read all that the client wrote: b has had the last of it
		far.mu.Lock()
		n := far.got.Len()
		far.mu.Unlock()
		if n > 300 {
			break
		}
	}
	near.mu.Lock()
	defer near.mu.Unlock()
	far.mu.Lock()
	defer far.mu.Unlock()
	flow["client_to_server"] = hex.EncodeToString(far.got.Bytes())
	flow["server_to_client"] = hex.EncodeToString(near.got.Bytes())
	text, _ := json.MarshalIndent(flow, "", "  ")
	if err := os.WriteFile("../../testdata/vectors/derp-flow.json", append(text, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}
