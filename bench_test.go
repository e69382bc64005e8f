package tailnode_test

import (
	"io"
	"testing"

	"github.com/tailnode/tailnode"
)

// BenchmarkUp is a node's whole life against a local control server: Start, Up, Close.
func BenchmarkUp(b *testing.B) {
	tn := newTailnet(b)
	key := tn.authKey()
	b.ReportAllocs()
	for b.Loop() {
		s := &tailnode.Server{Hostname: "bench", Store: tailnode.NewMemoryStore(), ControlURL: tn.coord.BaseURL(), AuthKey: key, Ephemeral: true}
		if _, err := s.Up(b.Context()); err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}

// BenchmarkTCP moves data one way between two nodes, the relay and both ends in this process.
func BenchmarkTCP(b *testing.B) {
	tn := newTailnet(b)
	from, to := tn.up("from"), tn.up("to")
	ln, err := to.Listen("tcp", ":80")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	done := make(chan int64, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		n, _ := io.Copy(io.Discard, c)
		c.Close()
		done <- n
	}()
	c, err := from.Dial(withTimeout(b, patience), "tcp", "to:80")
	if err != nil {
		b.Fatal(err)
	}
	block := make([]byte, 256<<10)
	b.SetBytes(int64(len(block)))
	b.ReportAllocs()
	var sent int64
	for b.Loop() {
		n, err := c.Write(block)
		if err != nil {
			b.Fatal(err)
		}
		sent += int64(n)
	}
	c.Close()
	if got := <-done; got != sent {
		b.Fatalf("sent %d bytes, received %d", sent, got)
	}
}
