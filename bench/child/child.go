// Package child is the process that the benchmark measures: one node that obeys lines on its
// standard input. Each side has a main of its own that hands in its Server, and nothing else
// differs, so that what is measured is the node.
package child

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Server is the part of a node that is measured; tsnet.Server has these methods but for Up's status.
type Server interface {
	Up(ctx context.Context) error
	Listen(network, addr string) (net.Listener, error)
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
	TailscaleIPs() (ip4, ip6 netip.Addr)
	Close() error
}

// Config is what the benchmark asks of a node; it comes as JSON in the first argument.
type Config struct {
	Dir, Hostname, ControlURL, AuthKey string
}

// Command is one line of input. Op is "dial" (one connection, one byte each way), "send" or "cpu".
type Command struct {
	Op      string
	Addr    string
	Streams int
	Seconds float64
}

// Reply is one line of output. The first, without a command, says that the node is up.
type Reply struct {
	Err     string  `json:",omitempty"`
	IP      string  `json:",omitempty"`
	Seconds float64 `json:",omitempty"`
	Bytes   int64   `json:",omitempty"`
	CPU     float64 `json:",omitempty"` // seconds of processor time, user and system, so far
}

const port = "9000"

// Main runs the process until its input ends.
func Main(make func(Config) Server) {
	began := time.Now()
	out := json.NewEncoder(os.Stdout)
	fail := func(err error) {
		out.Encode(Reply{Err: err.Error()})
		os.Exit(1)
	}
	var conf Config
	if err := json.Unmarshal([]byte(os.Args[1]), &conf); err != nil {
		fail(err)
	}
	srv := make(conf)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := srv.Up(ctx); err != nil {
		fail(err)
	}
	took := time.Since(began)
	ln, err := srv.Listen("tcp", ":"+port)
	if err != nil {
		fail(err)
	}
	go serve(ln)
	v4, _ := srv.TailscaleIPs()
	out.Encode(Reply{IP: v4.String(), Seconds: took.Seconds(), CPU: cpu()})
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var cmd Command
		if err := json.Unmarshal(in.Bytes(), &cmd); err != nil {
			fail(err)
		}
		var r Reply
		var err error
		switch cmd.Op {
		case "cpu":
		case "dial":
			r, err = send(srv, cmd.Addr, 1, 0)
		case "send":
			r, err = send(srv, cmd.Addr, cmd.Streams, time.Duration(cmd.Seconds*float64(time.Second)))
		default:
			err = fmt.Errorf("unknown command %q", cmd.Op)
		}
		if err != nil {
			r.Err = err.Error()
		}
		r.CPU = cpu()
		out.Encode(r)
	}
	srv.Close()
}

// serve counts what each connection brings, and answers with the count when it ends.
func serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 128<<10)
			var n uint64
			for {
				k, err := c.Read(buf)
				n += uint64(k)
				if err != nil {
					break
				}
			}
			c.Write(binary.BigEndian.AppendUint64(nil, n))
		}()
	}
}

// send writes on some connections at a time for d, and counts the bytes that arrived.
func send(srv Server, addr string, streams int, d time.Duration) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d+time.Minute)
	defer cancel()
	conns := make([]net.Conn, streams)
	for i := range conns {
		c, err := srv.Dial(ctx, "tcp", net.JoinHostPort(addr, port))
		if err != nil {
			return Reply{}, err
		}
		defer c.Close()
		conns[i] = c
	}
	began := time.Now()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var total int64
	var first error
	for _, c := range conns {
		wg.Go(func() {
			n, err := stream(c, began.Add(d))
			mu.Lock()
			defer mu.Unlock()
			total += n
			if first == nil {
				first = err
			}
		})
	}
	wg.Wait()
	return Reply{Bytes: total, Seconds: time.Since(began).Seconds()}, first
}

func stream(c net.Conn, end time.Time) (int64, error) {
	buf := make([]byte, 128<<10)
	for {
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
		if !time.Now().Before(end) {
			break
		}
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return 0, err
	}
	var n [8]byte
	if _, err := io.ReadFull(c, n[:]); err != nil {
		return 0, err
	}
	return int64(binary.BigEndian.Uint64(n[:])), nil
}
