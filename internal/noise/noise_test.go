package noise

import (
	"bytes"
	"context"
	"io"
	"net"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns the two ends of a channel over net.Pipe.
func pair(t testing.TB) (client, server *Conn) {
	t.Helper()
	a, b := net.Pipe()
	machine, control := key.NewMachine(), key.NewMachine()
	type res struct {
		c   *Conn
		err error
	}
	ch := make(chan res, 1)
	go func() {
		c, err := Server(context.Background(), b, control, nil)
		ch <- res{c, err}
	}()
	c, err := Client(context.Background(), a, machine, control.Public(), 42)
	if err != nil {
		t.Fatal(err)
	}
	s := <-ch
	if s.err != nil {
		t.Fatal(s.err)
	}
	if s.c.Peer() != machine.Public() || c.Peer() != control.Public() {
		t.Fatal("wrong peers")
	}
	if s.c.ProtocolVersion() != 42 || c.HandshakeHash() != s.c.HandshakeHash() {
		t.Fatal("the ends disagree")
	}
	t.Cleanup(func() { c.Close(); s.c.Close() })
	return c, s.c
}

func TestRoundTrip(t *testing.T) {
	c, s := pair(t)
	big := bytes.Repeat([]byte("0123456789"), 3000)
	for _, msg := range [][]byte{[]byte("x"), big[:MaxPlaintext], big[:MaxPlaintext+1], big} {
		for _, d := range []struct{ from, to *Conn }{{c, s}, {s, c}} {
			go d.from.Write(msg)
			got := make([]byte, len(msg))
			if _, err := io.ReadFull(d.to, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, msg) {
				t.Fatal("changed on the way")
			}
		}
	}
}
