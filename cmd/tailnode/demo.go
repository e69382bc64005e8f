package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

const (
	shutdownTimeout = 3 * time.Second
	demoTimeout     = 60 * time.Second
	demoPings       = 20
)

var demoBytes int64 = 64 << 20 // less in tests

func (a *app) demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "a tailnet of two nodes on this machine, step by step",
		Description: "Starts a coordination server and a relay on loopback, joins two nodes, serves HTTP on one\n" +
			"and fetches it from the other by its name. Everything happens in this process and in memory;\n" +
			"nothing is left behind.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "stay", Usage: "keep it up, and show how to join from another terminal"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "say on standard error what goes on inside"},
			jsonFlag(),
		},
		Action: noArgs(func(ctx context.Context, c *cli.Command) error {
			d := &demo{app: a, quiet: c.Bool("json"), start: time.Now()}
			if c.Bool("verbose") {
				d.log = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelDebug}))
			}
			defer d.close()
			tctx, cancel := context.WithTimeout(ctx, demoTimeout)
			defer cancel()
			if err := d.run(tctx); err != nil {
				return err
			}
			if c.Bool("json") {
				if err := printJSON(a.out, d.result); err != nil {
					return err
				}
			}
			if !c.Bool("stay") {
				return nil
			}
			return d.stay(ctx)
		}),
	}
}

// demo is one run. What it measures is on a machine that does everything at once: both nodes,
// both servers, in one process.
type demo struct {
	*app
	quiet bool
	log   *slog.Logger
	start time.Time

	relay *relay.Server
	coord *coord.Server
	nodes []*tailnode.Server
	stops []func()

	result demoResult
}

// demoResult is what --json prints.
type demoResult struct {
	ControlURL        string
	Server, Client    string // MagicDNS names
	ServerIPs         []string
	UpMillis          float64 // both nodes, from Start
	FirstByteMillis   float64 // the first HTTP answer, from the request
	Path              string
	RoundTripMicros   float64 // median
	ThroughputMbits   float64
	MemoryMiB         float64 // from the operating system, the whole process
	HeapMiB           float64 // in use after collection
	Goroutines        int
	TransferredBytes  int64
	TransferredMillis float64
}

func (d *demo) say(format string, args ...any) {
	if !d.quiet {
		fmt.Fprintf(d.out, "%6.0f ms  %s\n", ms(time.Since(d.start)), fmt.Sprintf(format, args...))
	}
}

func ms(t time.Duration) float64 { return float64(t) / float64(time.Millisecond) }

// close takes everything down, the newest first.
func (d *demo) close() {
	for _, stop := range slices.Backward(d.stops) {
		stop()
	}
}

func (d *demo) run(ctx context.Context) error {
	d.relay = &relay.Server{Addr: "127.0.0.1:0", Logger: d.log}
	if err := d.relay.Start(ctx); err != nil {
		return err
	}
	d.stops = append(d.stops, func() { d.relay.Close() })
	rn := d.relay.Node()
	d.say("relay up: DERP on %s:%d, STUN on port %d", rn.HostName, rn.DERPPort, rn.STUNPort)

	region := coordRegion(d.relay.Region(relayRegion))
	region.Code = "demo"
	d.coord = &coord.Server{Relays: []coord.Region{region}, Logger: d.log}
	if err := d.coord.Start(ctx); err != nil {
		return err
	}
	d.stops = append(d.stops, func() { d.coord.Close() })
	d.result.ControlURL = d.coord.BaseURL()
	d.say("coordination server up at %s", d.coord.BaseURL())

	begin := time.Now()
	web, webStatus, err := d.join(ctx, "web")
	if err != nil {
		return err
	}
	laptop, laptopStatus, err := d.join(ctx, "laptop")
	if err != nil {
		return err
	}
	d.result.UpMillis = ms(time.Since(begin))
	d.result.Server = strings.TrimSuffix(webStatus.Self.DNSName, ".")
	d.result.Client = strings.TrimSuffix(laptopStatus.Self.DNSName, ".")
	for _, ip := range webStatus.TailscaleIPs {
		d.result.ServerIPs = append(d.result.ServerIPs, ip.String())
	}
	if err := d.serve(web); err != nil {
		return err
	}
	if err := d.fetch(ctx, laptop); err != nil {
		return err
	}
	if err := d.measure(ctx, laptop, webStatus); err != nil {
		return err
	}
	d.memory()
	return nil
}

func (d *demo) join(ctx context.Context, name string) (*tailnode.Server, *tailnode.Status, error) {
	key, err := d.coord.CreateAuthKey(coord.AuthKeyOptions{Ephemeral: true})
	if err != nil {
		return nil, nil, err
	}
	s := &tailnode.Server{Hostname: name, Store: tailnode.NewMemoryStore(), ControlURL: d.coord.BaseURL(), AuthKey: key, Ephemeral: true, Logger: d.log}
	d.stops = append(d.stops, func() { s.Close() })
	st, err := s.Up(ctx)
	if err != nil {
		return nil, nil, err
	}
	d.nodes = append(d.nodes, s)
	d.say("node %q joined as %s with %v", name, strings.TrimSuffix(st.Self.DNSName, "."), st.TailscaleIPs)
	return s, st, nil
}

// serve answers HTTP on the node's port 80.
func (d *demo) serve(s *tailnode.Server) error {
	ln, err := s.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	lc, err := s.LocalClient()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		who, err := lc.WhoIs(r.Context(), r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		fmt.Fprintf(w, "Hello, %s (%s)!\n", who.Node.ComputedName, who.UserProfile.LoginName)
	})
	mux.HandleFunc("/bulk", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(demoBytes))
		block := make([]byte, 64<<10)
		for n := int64(0); n < demoBytes; n += int64(len(block)) {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { hs.Serve(ln); close(done) }()
	d.stops = append(d.stops, func() { hs.Close(); <-done })
	return nil
}

func (d *demo) fetch(ctx context.Context, from *tailnode.Server) error {
	hc := from.HTTPClient()
	defer hc.CloseIdleConnections()
	url := "http://" + d.result.Server + "/"
	begin := time.Now()
	body, err := get(ctx, hc, url)
	if err != nil {
		return err
	}
	d.result.FirstByteMillis = ms(time.Since(begin))
	d.say("laptop fetched %s in %.1f ms: %q", url, d.result.FirstByteMillis, strings.TrimSpace(body))
	return nil
}

func get(ctx context.Context, hc *http.Client, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return "", err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answered %s: %s", url, resp.Status, strings.TrimSpace(string(b)))
	}
	return string(b), err
}

func (d *demo) measure(ctx context.Context, from *tailnode.Server, to *tailnode.Status) error {
	lc, err := from.LocalClient()
	if err != nil {
		return err
	}
	var rtts []time.Duration
	var last *tailnode.PingResult
	for range demoPings {
		last, err = lc.Ping(ctx, to.TailscaleIPs[0], tailnode.PingDisco)
		if err != nil {
			return err
		}
		rtts = append(rtts, time.Duration(last.LatencySeconds*float64(time.Second)))
	}
	slices.Sort(rtts)
	d.result.Path = pathText(last)
	d.result.RoundTripMicros = float64(rtts[len(rtts)/2]) / float64(time.Microsecond)
	d.say("path: %s; round trip %.0f µs (median of %d)", d.result.Path, d.result.RoundTripMicros, demoPings)

	hc := from.HTTPClient()
	defer hc.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+d.result.Server+"/bulk", nil)
	if err != nil {
		return err
	}
	begin := time.Now()
	resp, err := hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil {
		return err
	}
	took := time.Since(begin)
	if n != demoBytes {
		return errors.New("the transfer came short")
	}
	d.result.TransferredBytes, d.result.TransferredMillis = n, ms(took)
	d.result.ThroughputMbits = float64(n) * 8 / took.Seconds() / 1e6
	d.say("throughput: %d MiB in %.0f ms, %.0f Mbit/s, encrypted end to end", n>>20, ms(took), d.result.ThroughputMbits)
	return nil
}

func (d *demo) memory() {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	d.result.HeapMiB = float64(m.HeapInuse) / (1 << 20)
	d.result.MemoryMiB = float64(m.Sys-m.HeapReleased) / (1 << 20)
	d.result.Goroutines = runtime.NumGoroutine()
	d.say("memory: %.1f MiB from the system, %.1f MiB of it heap in use, %d goroutines: two nodes, relay and coordination server together",
		d.result.MemoryMiB, d.result.HeapMiB, d.result.Goroutines)
}

// stay keeps everything up and says how to join.
func (d *demo) stay(ctx context.Context) error {
	key, err := d.coord.CreateAuthKey(coord.AuthKeyOptions{Ephemeral: true, Reusable: true})
	if err != nil {
		return err
	}
	fmt.Fprintf(d.out, `
The tailnet stays up until you press Ctrl-C. From another terminal:

  export TS_CONTROL_URL=%s TS_AUTHKEY=%s
  tailnode nc --ephemeral --dir /tmp/demo-node web 80      then type: GET / HTTP/1.0 and two Enters
  tailnode ping --ephemeral --dir /tmp/demo-node web
  tailnode serve --ephemeral --dir /tmp/demo-node .        serves this folder to the tailnet

(Without an installed tailnode: go run ./cmd/tailnode.) The server's URL is %s
`, d.coord.BaseURL(), key, d.coord.BaseURL())
	<-ctx.Done()
	return nil
}
