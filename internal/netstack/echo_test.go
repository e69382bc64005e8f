package netstack

import (
	"io"
	"net/netip"
	"testing"
	"time"
)

// TestFullBothWays has both directions of a connection full for long, with an end that reads no
// more than it can write: what awaitRoom is for. Without it, about one connection in a hundred hangs for good.
func TestFullBothWays(t *testing.T) {
	rounds := 40
	if testing.Short() {
		rounds = 5
	}
	const size = 32 << 20
	p := newPair(t, nil)
	ln, err := p.b.ListenTCP(netip.AddrPortFrom(netip.IPv6Unspecified(), 7))
	if err != nil {
		t.Fatal(err)
	}
	echoes := make(chan struct{})
	go func() {
		defer close(echoes)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	defer func() { ln.Close(); <-echoes }()
	block := make([]byte, 64<<10)
	for i := range rounds {
		c, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(b4, 7))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(time.Minute)) // a hang is for good: this is to report it
		got := make(chan error, 1)
		go func() {
			_, err := io.CopyN(io.Discard, c, size)
			got <- err
		}()
		for n := 0; n < size; n += len(block) {
			if _, err := c.Write(block); err != nil {
				c.Close()
				t.Fatalf("connection %d, after %d bytes: %v", i, n, err)
			}
		}
		if err := <-got; err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.Close()
	}
}
