package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode"
)

func (a *app) upCommand() *cli.Command {
	return &cli.Command{
		Name:  "up",
		Usage: "join a tailnet and stay, until interrupted",
		Description: "Joins, prints the status, and stays. In another terminal \"tailnode status\", \"tailnode ping\"\n" +
			"and \"tailnode nc\" with the same --dir use the node that stays.",
		Flags: nodeFlags(jsonFlag(),
			&cli.Uint16Flag{Name: "relay-server-port", Usage: "relay for other nodes (a peer relay) on this UDP `PORT`; 0 lets the system choose"},
			&cli.StringSliceFlag{Name: "relay-server-static-endpoints", Usage: "`ADDRESS:PORT` at which that relay can be reached beside what it finds out; may be repeated"}),
		Action: noArgs(func(ctx context.Context, c *cli.Command) error {
			s, err := a.newServer(c)
			if err != nil {
				return err
			}
			if err := peerRelay(c, s); err != nil {
				return err
			}
			defer s.Close()
			st, err := a.up(ctx, c, s)
			if err != nil {
				return err
			}
			defer a.answer(s)()
			if err := a.printStatus(c, st); err != nil {
				return err
			}
			fmt.Fprintln(a.err, "The node stays until you press Ctrl-C.")
			<-ctx.Done()
			return nil
		}),
	}
}

// peerRelay makes s a peer relay if the flags say so.
func peerRelay(c *cli.Command, s *tailnode.Server) error {
	if !c.IsSet("relay-server-port") {
		if c.IsSet("relay-server-static-endpoints") {
			return usagef("--relay-server-static-endpoints needs --relay-server-port")
		}
		return nil
	}
	s.RelayServerPort = new(c.Uint16("relay-server-port"))
	for _, e := range c.StringSlice("relay-server-static-endpoints") {
		ap, err := netip.ParseAddrPort(e)
		if err != nil || ap.Port() == 0 {
			return usagef("%q is not an address with a port", e)
		}
		s.RelayServerStaticEndpoints = append(s.RelayServerStaticEndpoints, ap)
	}
	return nil
}

func (a *app) serveCommand() *cli.Command {
	return &cli.Command{
		Name:      "serve",
		Usage:     "expose a local TCP port or a folder on the tailnet",
		ArgsUsage: "PORT | HOST:PORT | FOLDER",
		Description: "tailnode serve 8080              forwards the node's port 8080 to this machine's\n" +
			"tailnode serve --port 80 8080    forwards the node's port 80 to this machine's 8080\n" +
			"tailnode serve ./public          serves the folder by HTTP on port 80",
		Flags: nodeFlags(&cli.Uint16Flag{Name: "port", Aliases: []string{"p"}, Usage: "`PORT` on the tailnet (default: the same as the target's; 80 for a folder)"}),
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.NArg() != 1 {
				return usagef("serve takes one argument: a port, a host:port, or a folder")
			}
			target, folder, port, err := serveTarget(c.Args().First())
			if err != nil {
				return err
			}
			port = cmp.Or(c.Uint16("port"), port)
			s, err := a.newServer(c)
			if err != nil {
				return err
			}
			defer s.Close()
			ln, err := s.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			st, err := a.up(ctx, c, s)
			if err != nil {
				return err
			}
			defer a.answer(s)()
			name := strings.TrimSuffix(st.Self.DNSName, ".")
			if folder {
				fmt.Fprintf(a.out, "%s is at http://%s\n", target, strings.TrimSuffix(net.JoinHostPort(name, strconv.Itoa(int(port))), ":80"))
				return serveFolder(ctx, ln, target)
			}
			fmt.Fprintf(a.out, "%s is at %s, and at %v\n", target, net.JoinHostPort(name, strconv.Itoa(int(port))), st.TailscaleIPs)
			return a.forward(ctx, ln, target)
		},
	}
}

// serveTarget tells what is to be served: a folder, or a local address.
func serveTarget(arg string) (target string, folder bool, port uint16, err error) {
	if n, err := strconv.ParseUint(arg, 10, 16); err == nil && n > 0 {
		return net.JoinHostPort("127.0.0.1", arg), false, uint16(n), nil
	}
	if fi, err := os.Stat(arg); err == nil {
		if !fi.IsDir() {
			return "", false, 0, usagef("%s is a file; serve takes a folder or a port", arg)
		}
		return arg, true, 80, nil
	}
	if _, p, err := net.SplitHostPort(arg); err == nil {
		if n, err := strconv.ParseUint(p, 10, 16); err == nil && n > 0 {
			return arg, false, uint16(n), nil
		}
	}
	return "", false, 0, usagef("%q is neither a port, nor a host:port, nor a folder that exists", arg)
}

func serveFolder(ctx context.Context, ln net.Listener, dir string) error {
	root, err := os.OpenRoot(dir) // symbolic links do not lead out of it
	if err != nil {
		return err
	}
	defer root.Close()
	hs := &http.Server{Handler: http.FileServerFS(root.FS()), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	stop := context.AfterFunc(ctx, func() { hs.Close() })
	defer stop()
	err = hs.Serve(ln)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// forward hands each connection of ln to a connection to target, until ctx ends.
func (a *app) forward(ctx context.Context, ln net.Listener, target string) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		wg.Go(func() {
			defer conn.Close()
			d := net.Dialer{Timeout: 10 * time.Second}
			local, err := d.DialContext(ctx, "tcp", target)
			if err != nil {
				fmt.Fprintf(a.err, "%v wanted %s: %v\n", conn.RemoteAddr(), target, err)
				return
			}
			defer local.Close()
			end := context.AfterFunc(ctx, func() { conn.Close(); local.Close() })
			defer end()
			splice(local, conn)
		})
	}
}

func (a *app) ncCommand() *cli.Command {
	return &cli.Command{
		Name:      "nc",
		Usage:     "connect standard input and output to a port on the tailnet",
		ArgsUsage: "HOST PORT",
		Flags:     nodeFlags(&cli.BoolFlag{Name: "udp", Aliases: []string{"u"}, Usage: "use UDP instead of TCP"}),
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.NArg() != 2 {
				return usagef("nc takes two arguments, a host and a port")
			}
			n, release, err := a.attach(ctx, c)
			if err != nil {
				return err
			}
			defer release()
			network := "tcp"
			if c.Bool("udp") {
				network = "udp"
			}
			conn, err := n.Dial(ctx, network, net.JoinHostPort(c.Args().Get(0), c.Args().Get(1)))
			if err != nil {
				return err
			}
			defer conn.Close()
			end := context.AfterFunc(ctx, func() { conn.Close() })
			defer end()
			go func() { // ends with its input, or with the process: a read of a terminal cannot be interrupted
				if _, err := io.Copy(conn, a.in); err == nil && network == "tcp" {
					closeWrite(conn)
				}
			}()
			_, err = io.Copy(a.out, conn)
			if ctx.Err() != nil {
				return nil
			}
			return err
		},
	}
}

func (a *app) statusCommand() *cli.Command {
	return &cli.Command{
		Name:        "status",
		Usage:       "show this node and its tailnet",
		Description: "Asks the node that another tailnode process holds in --dir, or joins for a moment.",
		Flags:       nodeFlags(jsonFlag()),
		Action: noArgs(func(ctx context.Context, c *cli.Command) error {
			n, release, err := a.attach(ctx, c)
			if err != nil {
				return err
			}
			defer release()
			st, err := n.Status(ctx)
			if err != nil {
				return err
			}
			return a.printStatus(c, st)
		}),
	}
}

func (a *app) printStatus(c *cli.Command, st *tailnode.Status) error {
	if c.Bool("json") {
		return printJSON(a.out, st)
	}
	fmt.Fprintf(a.out, "%s is %s", strings.TrimSuffix(cmp.Or(st.Self.DNSName, st.Self.HostName), "."), strings.ToLower(st.BackendState))
	if st.CurrentTailnet != nil {
		fmt.Fprintf(a.out, " on %s", st.CurrentTailnet.Name)
	}
	fmt.Fprintln(a.out)
	for _, h := range st.Health {
		fmt.Fprintf(a.out, "  warning: %s\n", h)
	}
	if st.AuthURL != "" {
		fmt.Fprintf(a.out, "  to log in, visit %s\n", st.AuthURL)
	}
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	row := func(p *tailnode.PeerStatus, state string) {
		var ip string
		if len(p.TailscaleIPs) > 0 {
			ip = p.TailscaleIPs[0].String()
		}
		owner := strings.Join(p.Tags, ",")
		if owner == "" {
			owner = st.User[p.UserID].LoginName
		}
		name, _, _ := strings.Cut(p.DNSName, ".")
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", ip, cmp.Or(name, p.HostName), cmp.Or(owner, "-"), cmp.Or(p.OS, "-"), state)
	}
	row(st.Self, "this node, home relay "+cmp.Or(st.Self.Relay, "none"))
	peers := make([]*tailnode.PeerStatus, 0, len(st.Peer))
	for _, p := range st.Peer {
		peers = append(peers, p)
	}
	slices.SortFunc(peers, func(p, q *tailnode.PeerStatus) int { return cmp.Compare(p.DNSName, q.DNSName) })
	for _, p := range peers {
		row(p, peerState(p))
	}
	return tw.Flush()
}

// peerState puts the way to a peer in a few words.
func peerState(p *tailnode.PeerStatus) string {
	var s string
	switch {
	case p.Expired:
		return "expired"
	case !p.Online && !p.LastSeen.IsZero():
		return "offline, last seen " + p.LastSeen.Local().Format("2006-01-02 15:04")
	case !p.Online:
		return "offline"
	case p.Path == nil || !p.Active && p.CurAddr == "" && p.PeerRelay == "":
		return "idle"
	case p.CurAddr != "":
		s = "direct " + p.CurAddr
	case p.PeerRelay != "":
		s = "peer relay " + p.PeerRelay
	default:
		s = "relay " + cmp.Or(p.Path.Region, p.Relay)
	}
	if p.Path.RoundTrip > 0 {
		s += " in " + p.Path.RoundTrip.Round(10*time.Microsecond).String()
	}
	if !p.Path.Since.IsZero() {
		s += " for " + time.Since(p.Path.Since).Round(time.Second).String()
	}
	s += fmt.Sprintf(", sent %s, received %s", bytesText(p.TxBytes), bytesText(p.RxBytes))
	if p.Path.WhyNotDirect != "" {
		s += "; not direct: " + p.Path.WhyNotDirect
	}
	return s
}

func bytesText(n int64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1000, 0
	for f >= 1000 && i < len(units)-1 {
		f, i = f/1000, i+1
	}
	return fmt.Sprintf("%.1f %cB", f, units[i])
}

func (a *app) pingCommand() *cli.Command {
	return &cli.Command{
		Name:      "ping",
		Usage:     "measure the round trip to a node, and show the path of each reply",
		ArgsUsage: "NAME | ADDRESS",
		Flags: nodeFlags(jsonFlag(),
			&cli.IntFlag{Name: "count", Aliases: []string{"c"}, Value: 10, Usage: "how `MANY` at the most; 0: until interrupted"},
			&cli.BoolFlag{Name: "until-direct", Value: true, Usage: "stop at the first reply that came directly (disco)"},
			&cli.StringFlag{Name: "type", Value: string(tailnode.PingDisco), Usage: "`KIND` of ping: disco, TSMP or ICMP"},
			&cli.DurationFlag{Name: "wait", Value: 5 * time.Second, Usage: "`TIME` to wait for each reply"}),
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.NArg() != 1 {
				return usagef("ping takes one argument, a node's name or address")
			}
			if c.Int("count") < 0 {
				return usagef("--count cannot be below 0")
			}
			n, release, err := a.attach(ctx, c)
			if err != nil {
				return err
			}
			defer release()
			ip, err := findNode(ctx, n, c.Args().First())
			if err != nil {
				return err
			}
			return a.pings(ctx, c, n, ip)
		},
	}
}

// findNode returns an address of the node that is meant.
func findNode(ctx context.Context, n joined, what string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(what); err == nil {
		return ip, nil
	}
	st, err := n.Status(ctx)
	if err != nil {
		return netip.Addr{}, err
	}
	want := strings.ToLower(strings.TrimSuffix(what, "."))
	for _, p := range append([]*tailnode.PeerStatus{st.Self}, peersOf(st)...) {
		full := strings.ToLower(strings.TrimSuffix(p.DNSName, "."))
		short, _, _ := strings.Cut(full, ".")
		if (want == full || want == short) && len(p.TailscaleIPs) > 0 {
			return p.TailscaleIPs[0], nil
		}
	}
	return netip.Addr{}, &tailnode.Error{Op: "ping", Code: tailnode.CodeNoSuchHost, Err: fmt.Errorf("no node of the tailnet is called %s", what)}
}

func peersOf(st *tailnode.Status) (ps []*tailnode.PeerStatus) {
	for _, p := range st.Peer {
		ps = append(ps, p)
	}
	return ps
}

func (a *app) pings(ctx context.Context, c *cli.Command, n joined, ip netip.Addr) error {
	typ := tailnode.PingType(c.String("type"))
	untilDirect := c.Bool("until-direct") && typ == tailnode.PingDisco
	var last error
	got, direct := 0, false
	next := time.NewTicker(time.Second)
	defer next.Stop()
	for i := 0; c.Int("count") == 0 || i < c.Int("count"); i++ {
		if i > 0 {
			select {
			case <-next.C:
			case <-ctx.Done():
				return nil
			}
		}
		pctx, cancel := context.WithTimeout(ctx, c.Duration("wait"))
		r, err := n.Ping(pctx, ip, typ)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			e, ok := errors.AsType[*tailnode.Error](err)
			if timeout := ok && e.Code == tailnode.CodeTimeout || !ok && errors.Is(err, context.DeadlineExceeded); !timeout {
				return err
			}
			last = &tailnode.Error{Op: "ping", Code: tailnode.CodeTimeout, Err: fmt.Errorf("no reply from %v within %v", ip, c.Duration("wait"))}
			fmt.Fprintln(a.err, text(last))
			continue
		}
		got++
		direct = direct || r.Endpoint != ""
		if c.Bool("json") {
			if err := printJSON(a.out, r); err != nil {
				return err
			}
		} else {
			rtt := time.Duration(r.LatencySeconds * float64(time.Second)).Round(10 * time.Microsecond)
			fmt.Fprintf(a.out, "reply from %s (%s) %s in %v\n", r.NodeName, r.IP, pathText(r), rtt)
		}
		if r.IsLocalIP || untilDirect && direct {
			return nil
		}
	}
	if got > 0 && untilDirect && !direct {
		a.whyRelayed(ctx, n, ip)
	}
	if got == 0 {
		return last
	}
	return nil
}

// whyRelayed says why there is no direct path.
func (a *app) whyRelayed(ctx context.Context, n joined, ip netip.Addr) {
	st, err := n.Status(ctx)
	if err != nil {
		return
	}
	for _, p := range st.Peer {
		if slices.Contains(p.TailscaleIPs, ip) && p.Path != nil && p.Path.WhyNotDirect != "" {
			fmt.Fprintf(a.err, "not direct: %s\n", p.Path.WhyNotDirect)
		}
	}
}

func pathText(r *tailnode.PingResult) string {
	switch {
	case r.IsLocalIP:
		return "which is this node"
	case r.Endpoint != "":
		return "directly from " + r.Endpoint
	case r.PeerRelay != "":
		return "by peer relay " + r.PeerRelay
	case r.DERPRegionID != 0:
		return "by relay " + r.DERPRegionCode
	}
	return "over the tunnel"
}
