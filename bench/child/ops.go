package child

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// The first byte of a connection says what is to be done with it.
const (
	opEcho = 'e' // send everything back
	opSink = 's' // count, and answer with the count when no more comes
	opHold = 'h' // nothing
)

func serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var op [1]byte
			if _, err := io.ReadFull(c, op[:]); err != nil {
				return
			}
			switch op[0] {
			case opEcho:
				echo(c, 2048)
			case opSink:
				c.Write(binary.BigEndian.AppendUint64(nil, uint64(drain(c))))
			case opHold:
				c.Write(op[:])
				c.Read(op[:])
			}
		}()
	}
}

func echo(c net.Conn, size int) {
	buf := make([]byte, size)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func drain(c net.Conn) (n int64) {
	buf := make([]byte, 128<<10)
	for {
		k, err := c.Read(buf)
		n += int64(k)
		if err != nil {
			return n
		}
	}
}

func dial(ctx context.Context, srv Server, addr string, op byte) (net.Conn, error) {
	c, err := srv.Dial(ctx, "tcp", net.JoinHostPort(addr, port))
	if err != nil {
		return nil, err
	}
	if _, err := c.Write([]byte{op}); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// first takes the time from a dial until a byte has come back, and then keeps a little traffic going until the node says that the
// path is direct, for no longer than wait.
func first(srv Server, addr string, wait time.Duration) (r Reply, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait+30*time.Second)
	defer cancel()
	began := time.Now()
	c, err := dial(ctx, srv, addr, opEcho)
	if err != nil {
		return r, err
	}
	defer c.Close()
	c.SetDeadline(began.Add(wait + 30*time.Second))
	msg := make([]byte, 1)
	if _, err := c.Write(msg); err != nil {
		return r, err
	}
	if _, err := io.ReadFull(c, msg); err != nil {
		return r, err
	}
	r.Seconds = time.Since(began).Seconds()
	if wait == 0 {
		return r, nil
	}
	go io.Copy(io.Discard, c)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	peer, err := netip.ParseAddr(addr)
	if err != nil {
		return r, err
	}
	for i := 0; time.Since(began) < wait; i++ {
		direct, err := srv.Direct(ctx, peer)
		if err != nil {
			return r, err
		}
		if direct != "" {
			r.Direct = time.Since(began).Seconds()
			break
		}
		if i%5 == 0 {
			if _, err := c.Write(msg); err != nil {
				return r, err
			}
		}
		<-tick.C
	}
	return r, nil
}

// send writes on some connections at a time for d, and counts the bytes that arrived.
func send(srv Server, addr string, streams int, d time.Duration) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d+time.Minute)
	defer cancel()
	conns := make([]net.Conn, streams)
	for i := range conns {
		c, err := dial(ctx, srv, addr, opSink)
		if err != nil {
			return Reply{}, err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(d + time.Minute))
		conns[i] = c
	}
	began := time.Now()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var total int64
	var failed error
	for _, c := range conns {
		wg.Go(func() {
			n, err := stream(c, began.Add(d))
			mu.Lock()
			defer mu.Unlock()
			total += n
			if failed == nil {
				failed = err
			}
		})
	}
	wg.Wait()
	return Reply{Bytes: total, Seconds: time.Since(began).Seconds()}, failed
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

// roundTrips sends a small message and waits for its echo, again and again on one connection, while as many other connections as
// load says send as fast as they can. It ends after limit with as many as there were.
func roundTrips(srv Server, addr string, count int, limit time.Duration, load int) (r Reply, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit+time.Minute)
	defer cancel()
	end := time.Now().Add(limit)
	if load > 0 {
		var wg sync.WaitGroup
		defer wg.Wait()
		stop := make(chan struct{})
		defer close(stop)
		for range load {
			c, err := dial(ctx, srv, addr, opSink)
			if err != nil {
				return r, err
			}
			wg.Go(func() {
				defer c.Close()
				buf := make([]byte, 128<<10)
				for time.Now().Before(end.Add(10 * time.Second)) {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			})
		}
	}
	c, err := dial(ctx, srv, addr, opEcho)
	if err != nil {
		return r, err
	}
	defer c.Close()
	c.SetDeadline(end.Add(30 * time.Second))
	msg := make([]byte, 32)
	took := make([]time.Duration, 0, count)
	warmBy := time.Now().Add(limit / 10)
	for i := 0; len(took) < count && (len(took) == 0 || time.Now().Before(end)); i++ {
		began := time.Now()
		if _, err := c.Write(msg); err != nil {
			return r, err
		}
		if _, err := io.ReadFull(c, msg); err != nil {
			return r, err
		}
		if i >= 100 || began.After(warmBy) { // the first ones warm both nodes
			took = append(took, time.Since(began))
		}
	}
	slices.Sort(took)
	n := len(took)
	return Reply{P50: took[n/2].Seconds(), P99: took[n*99/100].Seconds(), Count: int64(n)}, nil
}

// knows waits until the node has a peer with that address.
func knows(srv Server, addr string, limit time.Duration) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	peer, err := netip.ParseAddr(addr)
	if err != nil {
		return Reply{}, err
	}
	tick := time.NewTicker(500 * time.Microsecond)
	defer tick.Stop()
	for !srv.Knows(ctx, peer) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return Reply{}, errors.New("the node never heard of that peer")
		}
	}
	return Reply{}, nil
}
