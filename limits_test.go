package tailnode_test

import (
	"bytes"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/tailnode/tailnode"
)

func TestLimitsAreChecked(t *testing.T) {
	for _, c := range []struct {
		limits tailnode.Limits
		want   string
	}{
		{tailnode.Limits{TCPMemory: 65535}, "Limits.TCPMemory is 65535; it must be within 65536 and 1073741824, or 0 for its default"},
		{tailnode.Limits{TCPMemory: 1<<30 + 1}, "Limits.TCPMemory is 1073741825"},
		{tailnode.Limits{ConnMemory: -1}, "Limits.ConnMemory is -1"},
		{tailnode.Limits{UDPMemory: 1}, "Limits.UDPMemory is 1"},
		{tailnode.Limits{HandshakeMemory: 1}, "Limits.HandshakeMemory is 1"},
		{tailnode.Limits{Backlog: -1}, "Limits.Backlog is -1"},
		{tailnode.Limits{Workers: 1025}, "Limits.Workers is 1025"},
	} {
		s := &tailnode.Server{Hostname: "limits", Store: tailnode.NewMemoryStore(), ControlURL: "http://127.0.0.1:1", Limits: c.limits}
		wantCode(t, s.Start(), tailnode.CodeInvalidArgument, c.want)
		s.Close()
	}
}

// TestLeastLimits moves data both ways between two nodes that may hold next to nothing.
func TestLeastLimits(t *testing.T) {
	tn := newTailnet(t)
	least := tailnode.Limits{TCPMemory: 64 << 10, ConnMemory: 128 << 10, UDPMemory: 4 << 10, HandshakeMemory: 64 << 10, Backlog: 1, Workers: 1, KeepMemory: true}
	node := func(name string) *tailnode.Server {
		s := &tailnode.Server{Hostname: name, Store: tailnode.NewMemoryStore(), ControlURL: tn.coord.BaseURL(), AuthKey: tn.authKey(), Limits: least}
		t.Cleanup(func() { s.Close() })
		if _, err := s.Up(withTimeout(t, 3*time.Minute)); err != nil {
			t.Fatal(err)
		}
		return s
	}
	a, b := node("a"), node("b")
	ln, err := a.Listen("tcp", ":7")
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
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	data := bytes.Repeat([]byte("data"), 256<<10)
	done := make(chan error)
	errNothing := errors.New("the end came before all data")
	echoed := func() error {
		c, err := b.Dial(withTimeout(t, 3*time.Minute), "tcp", "a:7")
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Minute))
		go func() {
			c.Write(data)
			c.(interface{ CloseWrite() error }).CloseWrite()
		}()
		got, err := io.ReadAll(c)
		switch {
		case err == nil && len(got) == 0:
			return errNothing
		case err == nil && !bytes.Equal(got, data):
			return io.ErrUnexpectedEOF
		}
		return err
	}
	for range 3 {
		go func() {
			err := echoed()
			// With a backlog of 1, and a machine that takes seconds to accept, a connection may be reset before it has begun; the Write may have
			// been told.
			for tries := 1; (errors.Is(err, syscall.ECONNRESET) || err == errNothing) && tries < 5; tries++ {
				err = echoed()
			}
			done <- err
		}()
	}
	for range 3 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
