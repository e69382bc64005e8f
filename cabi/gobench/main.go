//go:build linux

// Command gobench measures in Go, without the C library, what test/bench.c measures through it.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailnode/tailnode"
)

func check[T any](v T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, "gobench:", err)
		os.Exit(1)
	}
	return v
}

func up(name string) *tailnode.Server {
	s := &tailnode.Server{Hostname: name, Store: tailnode.NewMemoryStore(), Ephemeral: true, UserLogf: func(string, ...any) {}}
	check(s.Up(context.Background()))
	return s
}

func say(what string, v float64) { fmt.Printf("Go\t%s\t%.2f\n", what, v) }

// cpu is the processor time of this process in seconds.
func cpu() float64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts)
	return float64(ts.Nano()) * 1e-9
}

func memory(dial func(string) net.Conn) {
	var open []net.Conn
	b := make([]byte, 8)
	for _, n := range []int{0, 10, 1000} {
		for len(open) < n {
			c := dial("gopeer:7")
			check(c.Write([]byte("question")))
			check(io.ReadFull(c, b))
			open = append(open, c)
		}
		debug.FreeOSMemory()
		var size, pages int
		check(fmt.Sscan(string(check(os.ReadFile("/proc/self/statm"))), &size, &pages))
		say(fmt.Sprintf("host, %d connections: RSS, MB", n), float64(pages*os.Getpagesize())/1e6)
		say(fmt.Sprintf("host, %d connections: threads", n), float64(len(check(os.ReadDir("/proc/self/task")))))
	}
	for _, c := range open {
		c.Close()
	}
}

func main() {
	total := 512 << 20
	if len(os.Args) > 1 {
		total = check(strconv.Atoi(os.Args[1])) << 20
	}
	a := up("gobencha")
	dial := func(addr string) net.Conn { return check(a.Dial(context.Background(), "tcp", addr)) }
	buf := make([]byte, 256<<10)
	memory(dial)

	c := dial("gopeer:9")
	check(c.Write(buf))
	t, used := time.Now(), cpu()
	for left := total; left > 0; left -= len(buf) {
		check(c.Write(buf))
	}
	c.(interface{ CloseWrite() error }).CloseWrite()
	check(io.ReadFull(c, buf[:8]))
	send, sendCPU := float64(total)*8e-9/time.Since(t).Seconds(), (cpu()-used)*1e9/float64(total)
	c.Close()

	c = dial("gopeer:19")
	t, used = time.Now(), cpu()
	check(c.Write(binary.BigEndian.AppendUint64(nil, uint64(total))))
	got := 0
	for {
		n, err := c.Read(buf)
		got += n
		if err != nil {
			break
		}
	}
	receive, receiveCPU := float64(got)*8e-9/time.Since(t).Seconds(), (cpu()-used)*1e9/float64(got)
	c.Close()

	const rounds = 10000
	rtt := make([]time.Duration, 0, rounds)
	c = dial("gopeer:7")
	for i := -1000; i < rounds; i++ {
		t = time.Now()
		check(c.Write([]byte("x")))
		check(io.ReadFull(c, buf[:1]))
		if i >= 0 {
			rtt = append(rtt, time.Since(t))
		}
	}
	c.Close()
	slices.Sort(rtt)

	b := up("gobenchb")
	ln := check(b.Listen("tcp", ":80"))
	c = dial("gobenchb:80")
	c.Close()
	c = check(ln.Accept())
	c.Close()
	const each = 250
	t, used = time.Now(), cpu()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			one := make([]byte, 1)
			for range each {
				c := dial("gobenchb:80")
				check(c.Read(one))
				c.Close()
			}
		})
	}
	for range 8 * each {
		c := check(ln.Accept())
		check(c.Write([]byte("x")))
		c.Close()
	}
	wg.Wait()
	rate, rateCPU := 8*each/time.Since(t).Seconds(), (cpu()-used)*1e3/(8*each)
	t = time.Now()
	for range 10000 {
		a.TailscaleIPs()
	}
	call := time.Since(t) / 10000
	us := func(d time.Duration) float64 { return float64(d) / 1e3 }
	say("send, Gbit/s", send)
	say("send, CPU seconds per GB", sendCPU)
	say("receive, Gbit/s", receive)
	say("receive, CPU seconds per GB", receiveCPU)
	say("round trip of 1 byte, p50, us", us(rtt[rounds/2]))
	say("round trip of 1 byte, p99, us", us(rtt[rounds*99/100]))
	say("dialled, accepted and closed, 1/s", rate)
	say("dialled, accepted and closed, CPU ms", rateCPU)
	say("a call (the node's addresses), us", us(call))
	a.Close()
	b.Close()
}
