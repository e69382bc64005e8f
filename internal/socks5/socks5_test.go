package socks5

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// talk gives what the server says to in, and what it dialled.
func talk(in []byte) (out []byte, dialled string) {
	client, server := net.Pipe()
	s := &Server{User: "u", Password: "pw", Dial: func(_ context.Context, _, addr string) (net.Conn, error) {
		dialled = addr
		return nil, errors.New("no")
	}, Code: func(error) byte { return HostUnreachable }}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(context.Background(), server) }()
	got := make(chan []byte)
	go func() { b, _ := io.ReadAll(client); got <- b }()
	client.Write(in)
	<-done // and its end of the pipe is closed
	return <-got, dialled
}

const login = "\x05\x01\x02" + "\x01\x01u\x02pw"

func TestConversation(t *testing.T) {
	for _, c := range []struct{ name, in, out, dialled string }{
		{"name", login + "\x05\x01\x00\x03\x04beta\x00\x50", "\x05\x02\x01\x00\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00", "beta:80"},
		{"v4", login + "\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb", "\x05\x02\x01\x00\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00", "192.0.2.1:443"},
		{"v6", login + "\x05\x01\x00\x04\xfd\x7a\x11\x5c\xa1\xe0\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x16", "\x05\x02\x01\x00\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00", "[fd7a:115c:a1e0::1]:22"},
		{"bind", login + "\x05\x02\x00\x01\xc0\x00\x02\x01\x01\xbb", "\x05\x02\x01\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00", ""},
		{"no name", login + "\x05\x01\x00\x03\x04be]a\x00\x50", "\x05\x02\x01\x00\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00", ""},
		{"no such address type", login + "\x05\x01\x00\x09", "\x05\x02\x01\x00\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00", ""},
		{"no password offered", "\x05\x01\x00", "\x05\xff", ""},
		{"wrong password", "\x05\x01\x02\x01\x01u\x02px", "\x05\x02\x01\x01", ""},
		{"version 4", "\x04\x01", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, dialled := talk([]byte(c.in))
			if string(out) != c.out || dialled != c.dialled {
				t.Errorf("said %x and dialled %q, want %x and %q", out, dialled, c.out, c.dialled)
			}
		})
	}
}

const (
	request = "\x05\x01\x00\x03\x04beta\x00\x50"
	welcome = "\x05\x02\x01\x00" // to login
)

// dialling serves a client that has made its request, and returns when Dial is under way, with its context.
func dialling(t *testing.T, s *Server) (client net.Conn, dial context.Context, served <-chan error) {
	client, server := net.Pipe()
	ctxs := make(chan context.Context, 1)
	answer := s.Dial
	s.User, s.Password = "u", "pw"
	s.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctxs <- ctx
		return answer(ctx, network, addr)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(t.Context(), server) }()
	go client.Write([]byte(login + request))
	if _, err := io.ReadFull(client, make([]byte, len(welcome))); err != nil {
		t.Fatal(err)
	}
	return client, <-ctxs, done
}

func nobody(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func TestClientLeavesDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, dial, served := dialling(t, &Server{Dial: nobody})
		began := time.Now()
		client.Close()
		if err := <-served; !errors.Is(err, errGone) || time.Since(began) != 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if dial.Err() == nil {
			t.Error("the dial was not ended")
		}
	})
}

func TestDialLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, dial, served := dialling(t, &Server{Dial: nobody})
		defer client.Close()
		if _, ok := dial.Deadline(); ok {
			t.Error("a deadline, with which an unknown name is waited for as long")
		}
		began := time.Now()
		var b [10]byte
		if _, err := io.ReadFull(client, b[:]); err != nil || b[1] != GeneralFailure || time.Since(began) != dialTimeout {
			t.Errorf("reply %x, %v, after %v", b, err, time.Since(began))
		}
		if err := <-served; !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestEarlyData sends before the reply.
func TestEarlyData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		connect := make(chan struct{})
		client, _, served := dialling(t, &Server{Dial: func(context.Context, string, string) (net.Conn, error) {
			<-connect
			return near, nil
		}})
		go client.Write([]byte("hello"))
		synctest.Wait()
		close(connect)
		var reply [10]byte
		if _, err := io.ReadFull(client, reply[:]); err != nil || reply[1] != Succeeded {
			t.Fatalf("reply %x, %v", reply, err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(far, b); err != nil || string(b) != "hello" {
			t.Errorf("got %q, %v", b, err)
		}
		client.Close()
		far.Close()
		<-served
	})
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte("\x05\x01\x00\x03\x04beta\x00\x50"))
	f.Add([]byte("\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb"))
	f.Add([]byte("\x05\x01\x00\x04"))
	f.Fuzz(func(t *testing.T, b []byte) {
		addr, code, err := readRequest(bytes.NewReader(b))
		if err != nil && addr != "" || err == nil && code != 0 {
			t.Fatalf("%q, %d, %v", addr, code, err)
		}
		if err == nil {
			if _, _, err := net.SplitHostPort(addr); err != nil {
				t.Fatal(err)
			}
		}
	})
}
