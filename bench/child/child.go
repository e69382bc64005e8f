// Package child is the process that the benchmark measures: one node that obeys lines on its
// standard input. Each side has a main of its own that hands in its Server, and nothing else
// differs, so that what is measured is the node.
package child

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/pprof"
	"time"
)

// Server is the part of a node that is measured; tsnet.Server has these methods but for Up's status, and Direct.
type Server interface {
	Up(ctx context.Context) error
	Listen(network, addr string) (net.Listener, error)
	ListenPacket(network, addr string) (net.PacketConn, error)
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
	TailscaleIPs() (ip4, ip6 netip.Addr)
	// Direct returns where the peer with that address is reached without a relay, "" if it is not.
	Direct(ctx context.Context, peer netip.Addr) (string, error)
	// Knows reports whether the node has a peer with that address in its netmap.
	Knows(ctx context.Context, peer netip.Addr) bool
	Close() error
}

// Config is what the benchmark asks of a node; it comes as JSON in the first argument.
type Config struct {
	Dir, Hostname, ControlURL, AuthKey string
	RelayOnly                          bool   // never take a direct path
	Dial                               string // if not empty, a peer's address: dial it before saying that the node is up
	Account                            bool   // note what the process has before it makes the node, for "close"
	Profile                            string // if not empty, write a CPU profile of all sending there
}

// Command is one line of input. Op is "stats", or one of the functions of ops.go and many.go: "first" (one byte each way, then
// up to Seconds for a direct path), "send" (on so many Streams for so many Seconds), "rtt" (Count round trips in no more than
// Seconds, beside so many Streams), "udp" (datagrams for so many Seconds), "knows" (wait until the netmap has Addr), "conns" (one
// connection after the other on so many Streams at once for so many Seconds), "hold" (open Count connections and keep them), or
// "close" (close the node, which must take no longer than Seconds).
type Command struct {
	Op      string
	Addr    string
	Streams int
	Count   int
	Seconds float64
}

// Reply is one line of output. The first, without a command, says that the node is up.
type Reply struct {
	Err        string  `json:",omitempty"`
	IP         string  `json:",omitempty"`
	Seconds    float64 `json:",omitempty"` // what the command took; "first": until the byte came back
	Direct     float64 `json:",omitempty"` // "first": seconds from the dial to a direct path; 0: it did not come
	Bytes      int64   `json:",omitempty"`
	P50, P99   float64 `json:",omitempty"` // seconds
	Count      int64   `json:",omitempty"` // datagrams that arrived, connections made
	Sent       int64   `json:",omitempty"` // datagrams
	CPU        float64 `json:",omitempty"` // seconds of processor time, user and system, so far
	Goroutines int     `json:",omitempty"`
	Left       *Held   `json:",omitempty"` // "close": what the process has more than before it made the node
}

const (
	port    = "9000" // TCP
	portUDP = "9001"
)

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
	var base Held
	if conf.Account {
		if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil { // the runtime keeps descriptors of its own once it has polled
			ln.Close()
		}
		base = holds()
		began = time.Now()
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
	if conf.Dial != "" {
		if _, err := first(srv, conf.Dial, 0); err != nil {
			fail(err)
		}
	}
	v4, _ := srv.TailscaleIPs()
	pc, err := srv.ListenPacket("udp", net.JoinHostPort(v4.String(), portUDP))
	if err != nil {
		fail(err)
	}
	go countDatagrams(pc)
	out.Encode(Reply{IP: v4.String(), Seconds: took.Seconds(), CPU: cpu(), Goroutines: runtime.NumGoroutine()})
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var cmd Command
		if err := json.Unmarshal(in.Bytes(), &cmd); err != nil {
			fail(err)
		}
		r, err := do(srv, conf, base, cmd)
		if err != nil {
			r.Err = err.Error()
		}
		r.CPU, r.Goroutines = cpu(), runtime.NumGoroutine()
		out.Encode(r)
	}
	srv.Close()
}

func do(srv Server, conf Config, base Held, cmd Command) (Reply, error) {
	d := time.Duration(cmd.Seconds * float64(time.Second))
	switch cmd.Op {
	case "stats":
		return Reply{}, nil
	case "first":
		return first(srv, cmd.Addr, d)
	case "send":
		stop, err := profile(conf.Profile)
		if err != nil {
			return Reply{}, err
		}
		defer stop()
		return send(srv, cmd.Addr, cmd.Streams, d)
	case "rtt":
		return roundTrips(srv, cmd.Addr, cmd.Count, d, cmd.Streams)
	case "udp":
		return datagrams(srv, cmd.Addr, d)
	case "knows":
		return knows(srv, cmd.Addr, d)
	case "conns":
		return connections(srv, cmd.Addr, cmd.Streams, d)
	case "hold":
		return hold(srv, cmd.Addr, cmd.Count, d)
	case "close":
		return closeWithin(srv, d, base), nil
	case "profile": // of a node that only receives
		stop, err := profile(conf.Profile)
		if err == nil {
			time.AfterFunc(d, stop)
		}
		return Reply{}, err
	}
	return Reply{}, fmt.Errorf("unknown command %q", cmd.Op)
}

// profile begins a CPU profile in a file, unless its name is empty.
func profile(name string) (stop func(), err error) {
	if name == "" {
		return func() {}, nil
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		f.Close()
		return nil, err
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
	}, nil
}
