package child

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// A datagram's first byte says what it is.
const (
	udpData  = 'd' // to be counted
	udpQuery = 'q' // asks for the count
	udpSize  = 1200
)

// countDatagrams counts what arrives and answers queries, until pc is closed.
func countDatagrams(pc net.PacketConn) {
	buf := make([]byte, 2048)
	var n uint64
	for {
		k, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		switch {
		case k > 0 && buf[0] == udpData:
			n++
		case k == 9 && buf[0] == udpQuery: // the query's own number goes back with the count
			pc.WriteTo(binary.BigEndian.AppendUint64(append([]byte(nil), buf[:9]...), n), from)
		}
	}
}

// datagrams sends as fast as it can for d. Nothing holds the sender back, so what does not fit somewhere on the way is lost;
// the reply says what was sent and what arrived.
func datagrams(srv Server, addr string, d time.Duration) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d+time.Minute)
	defer cancel()
	c, err := srv.Dial(ctx, "udp", net.JoinHostPort(addr, portUDP))
	if err != nil {
		return Reply{}, err
	}
	defer c.Close()
	var queries uint64
	count := func() (uint64, error) {
		var err error
		for range 20 { // a query or its answer may be lost
			queries++
			q := binary.BigEndian.AppendUint64([]byte{udpQuery}, queries)
			if _, err = c.Write(q); err != nil {
				continue
			}
			buf := make([]byte, 64)
			c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			for {
				var n int
				if n, err = c.Read(buf); err != nil {
					break
				}
				if n == 17 && binary.BigEndian.Uint64(buf[1:]) == queries {
					return binary.BigEndian.Uint64(buf[9:]), nil
				}
			}
		}
		return 0, err
	}
	before, err := count()
	if err != nil {
		return Reply{}, err
	}
	msg := make([]byte, udpSize)
	msg[0] = udpData
	var sent int64
	began := time.Now()
	for i := 0; ; i++ {
		if i%64 == 0 {
			now := time.Now()
			if now.Sub(began) >= d {
				break
			}
			c.SetWriteDeadline(now.Add(50 * time.Millisecond)) // upstream's may wait for ever for room that there is
		}
		if _, err := c.Write(msg); err == nil { // a full queue is an error on one side, and none on the other
			sent++
		} else if errors.Is(err, net.ErrClosed) {
			return Reply{}, err
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			i = -1
		}
	}
	c.SetWriteDeadline(time.Time{})
	took := time.Since(began)
	after, err := count() // comes behind all that is still under way
	if err != nil {
		return Reply{}, err
	}
	return Reply{Count: int64(after - before), Sent: sent, Seconds: took.Seconds()}, nil
}

// connections opens a connection, has a byte echoed and closes it, again and again, on so many goroutines at once.
func connections(srv Server, addr string, atOnce int, d time.Duration) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d+30*time.Second)
	defer cancel()
	began := time.Now()
	var wg sync.WaitGroup
	var n atomic.Int64
	var failed atomic.Pointer[error]
	for range atOnce {
		wg.Go(func() {
			for time.Since(began) < d {
				if err := oneConnection(ctx, srv, addr); err != nil {
					failed.Store(&err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	r := Reply{Count: n.Load(), Seconds: time.Since(began).Seconds()}
	if p := failed.Load(); p != nil {
		return r, *p
	}
	return r, nil
}

func oneConnection(ctx context.Context, srv Server, addr string) error {
	c, err := dial(ctx, srv, addr, opEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	var b [1]byte
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	_, err = io.ReadFull(c, b[:])
	return err
}

// hold opens connections, 16 at a time, on each of which a byte comes back, and leaves them open.
func hold(srv Server, addr string, count int, limit time.Duration) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	began := time.Now()
	var wg sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(count))
	var mu sync.Mutex
	var failed error
	for range 16 {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				c, err := dial(ctx, srv, addr, opHold)
				if err == nil {
					c.SetReadDeadline(time.Now().Add(30 * time.Second))
					_, err = io.ReadFull(c, make([]byte, 1))
				}
				mu.Lock()
				if err != nil {
					failed = err
				} else {
					held = append(held, c)
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return Reply{Count: int64(len(held)), Seconds: time.Since(began).Seconds()}, failed
}

// held are the connections of hold.
var held []net.Conn

// Held is what a process has of things that are to be given back.
type Held struct {
	Goroutines int
	Files      int   // descriptors; 0 where they cannot be counted
	Heap       int64 // bytes of live objects
}

func holds() Held {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	h := Held{Goroutines: runtime.NumGoroutine(), Heap: int64(m.HeapAlloc)}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		h.Files = len(fds)
	}
	return h
}

// closeWithin closes the node and says how long that took, or how long was waited for it in vain, and what the process still has
// of what it did not have before the node.
func closeWithin(srv Server, limit time.Duration, base Held) Reply {
	began := time.Now()
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Close()
	}()
	late := time.NewTimer(limit)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
	}
	r := Reply{Seconds: time.Since(began).Seconds()}
	held = nil
	var now Held
	for range 20 { // our own goroutines that used the node have to be scheduled once to see that it is closed
		time.Sleep(10 * time.Millisecond)
		if now = holds(); now.Goroutines <= base.Goroutines {
			break
		}
	}
	debug.FreeOSMemory() // what the process then still has is what is still referred to, and the runtime's own
	r.Left = &Held{now.Goroutines - base.Goroutines, now.Files - base.Files, now.Heap - base.Heap}
	return r
}
