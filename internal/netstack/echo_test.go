package netstack

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestFullBothWays fills both directions of a connection while one end does not read until it has written. Without
// smallWindows about one connection in a hundred hangs for good (TestSmallWindow has the reason).
func TestFullBothWays(t *testing.T) {
	const size = 16 << 20
	for _, tt := range []struct {
		name   string
		rounds int
		serve  func(c net.Conn)
	}{
		{"writes all before it reads", 10, func(c net.Conn) {
			if pour(c, size) == nil {
				io.CopyN(io.Discard, c, size)
			}
		}},
		{"echo", 20, func(c net.Conn) { io.Copy(c, c) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rounds := tt.rounds
			if testing.Short() {
				rounds = 3
			}
			p := newPair(t, nil)
			ln, err := p.b.ListenTCP(netip.AddrPortFrom(netip.IPv6Unspecified(), 7))
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan struct{})
			go func() {
				defer close(served)
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					c.SetDeadline(time.Now().Add(5 * time.Minute)) // a hang is for good: this is to report it
					tt.serve(c)
					c.Close()
				}
			}()
			defer func() { ln.Close(); <-served }()
			for i := range rounds {
				c, err := p.a.DialTCP(t.Context(), netip.AddrPortFrom(b4, 7))
				if err != nil {
					t.Fatal(err)
				}
				c.SetDeadline(time.Now().Add(5 * time.Minute))
				got := make(chan error, 1)
				go func() {
					_, err := io.CopyN(io.Discard, c, size)
					got <- err
				}()
				if err := pour(c, size); err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				if err := <-got; err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				c.Close()
			}
		})
	}
}

// pour writes n bytes to c, in pieces whose length is no multiple of any window's unit.
func pour(c net.Conn, n int) error {
	block := make([]byte, 65521)
	for n > 0 {
		k, err := c.Write(block[:min(n, len(block))])
		if n -= k; err != nil {
			return err
		}
	}
	return nil
}
