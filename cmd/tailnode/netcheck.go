package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/internal/netcheck"
	"github.com/tailnode/tailnode/internal/portmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// defaultControl is where a map of relays is had from without a node.
const defaultControl = "https://controlplane.tailscale.com"

func (a *app) netcheckCommand() *cli.Command {
	return &cli.Command{
		Name:  "netcheck",
		Usage: "tell what this network is like, and how far the relays are",
		Description: "Measures the relays of the node that another tailnode process holds in --dir, or joins for a moment if\n" +
			"there is a node in it that does not run. Without a node it joins nothing: it takes the relays of --derp-map,\n" +
			"or those that the control server makes public.",
		Flags: nodeFlags(jsonFlag(),
			&cli.StringFlag{Name: "derp-map", Usage: "measure the relays of this `FILE` or URL of a DERP map (JSON)"},
			&cli.BoolFlag{Name: "no-port-map", Usage: "do not ask the router whether it maps ports"},
			&cli.DurationFlag{Name: "wait", Value: netcheck.DefaultFullTimeout, Usage: "`TIME` to wait for answers"}),
		Action: noArgs(a.netcheck),
	}
}

func (a *app) netcheck(ctx context.Context, c *cli.Command) error {
	raw, source, n, release, err := a.relayMap(ctx, c)
	defer release()
	if err != nil {
		return err
	}
	var dm tailcfg.DERPMap
	if err := json.Unmarshal(raw, &dm); err != nil {
		return fmt.Errorf("the DERP map of %s is not understood: %w", source, err)
	}
	if !c.Bool("json") {
		fmt.Fprintf(a.err, "Measuring the relays of %s …\n", source)
	}
	done := a.progress("measuring", func() string { return "" })
	r, err := a.runNetcheck(ctx, c, n, &dm)
	done()
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(a.out, r)
	}
	return a.printNetcheck(r, &dm)
}

// runNetcheck has n check its network, or, if that is nil, checks it with sockets of its own.
func (a *app) runNetcheck(ctx context.Context, c *cli.Command, n joined, dm *tailcfg.DERPMap) (*netcheck.Report, error) {
	if n != nil {
		raw, err := n.Netcheck(ctx, tailnode.NetcheckOptions{Timeout: c.Duration("wait"), NoPortMap: c.Bool("no-port-map")})
		if err != nil {
			return nil, err
		}
		r := new(netcheck.Report)
		return r, json.Unmarshal(raw, r)
	}
	cfg := netcheck.Config{Map: dm, Full: true, Timeout: c.Duration("wait")}
	if !c.Bool("no-port-map") {
		pm := portmap.New(portmap.Config{LocalPort: func() uint16 { return 0 }}) // probed, and never asked for a mapping
		defer pm.Close()
		cfg.PortMap = func(ctx context.Context) (netcheck.PortMapping, error) {
			r, err := pm.Probe(ctx)
			return netcheck.PortMapping(r), err
		}
	}
	return netcheck.Run(ctx, cfg)
}

// relayMap returns the JSON of a DERP map, and whose it is: n, if that is a node. release lets go of it, and is never nil.
func (a *app) relayMap(ctx context.Context, c *cli.Command) (raw []byte, source string, n joined, release func(), err error) {
	release = func() {}
	if where := c.String("derp-map"); where != "" {
		if strings.HasPrefix(where, "http://") || strings.HasPrefix(where, "https://") {
			raw, err = fetchMap(ctx, where)
		} else {
			raw, err = os.ReadFile(where)
		}
		return raw, where, nil, release, err
	}
	dir, err := stateDir(c)
	if err != nil {
		return nil, "", nil, release, err
	}
	r := newRemoteNode(filepath.Join(dir, socketName))
	if raw, err := r.DERPMap(ctx); err == nil {
		return raw, "the node that runs", r, r.close, nil
	}
	r.close()
	files, _ := os.ReadDir(dir)
	if len(files) == 0 && c.String("auth-key") == "" { // no node
		control := strings.TrimSuffix(cmp.Or(c.String("control-url"), defaultControl), "/")
		raw, err := fetchMap(ctx, control+"/derpmap/default")
		if err != nil {
			return nil, "", nil, release, fmt.Errorf("there is no node in %s, and no public map of relays (%w): use --derp-map, or join with \"tailnode up\" first", dir, err)
		}
		return raw, control, nil, release, nil
	}
	n, release, err = a.attach(ctx, c)
	if err != nil {
		return nil, "", nil, func() {}, err
	}
	raw, err = n.DERPMap(ctx)
	return raw, "this node", n, release, err
}

func fetchMap(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return nil, err
	}
	defer http.DefaultClient.CloseIdleConnections()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 4<<20))
}

func yesNo(b tailcfg.OptBool, yes, no string) string {
	switch v, ok := b.Get(); {
	case !ok:
		return "not known"
	case v:
		return yes
	}
	return no
}

func (a *app) printNetcheck(r *netcheck.Report, dm *tailcfg.DERPMap) error {
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	row := func(what, value string) { fmt.Fprintf(tw, "%s:\t%s\n", what, value) }
	row("UDP", yesNo(tailcfg.Bool(r.UDP), "works", "does not get through: every connection goes over a relay"))
	family := func(ok bool, ap netip.AddrPort) string {
		if !ok {
			return "no"
		}
		return "yes, " + ap.String()
	}
	row("IPv4", family(r.IPv4, r.GlobalV4))
	row("IPv6", family(r.IPv6, r.GlobalV6))
	row("Mapping varies by destination", yesNo(r.MappingVaries, "yes: direct paths are harder to find", "no"))
	row("Hairpin", yesNo(r.Hairpin, "yes", "no"))
	var protocols []string
	for _, p := range []struct {
		name string
		has  tailcfg.OptBool
	}{{"PCP", r.PCP}, {"NAT-PMP", r.PMP}, {"UPnP", r.UPnP}} {
		if v, _ := p.has.Get(); v {
			protocols = append(protocols, p.name)
		}
	}
	ports := strings.Join(protocols, ", ")
	if _, ok := r.PCP.Get(); !ok {
		ports = "not known"
	}
	row("Port mapping", cmp.Or(ports, "none"))
	if r.UDP {
		row("Captive portal", "no")
	} else {
		row("Captive portal", yesNo(r.CaptivePortal, "yes: log in with a browser first", "no"))
	}
	home := "none answers"
	if len(r.Latency) > 0 {
		home = regionName(dm, r.Home)
	}
	row("Nearest relay", home)
	if err := tw.Flush(); err != nil || len(r.Latency) == 0 {
		return err
	}
	ids := make([]int, 0, len(r.Latency))
	for id := range r.Latency {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(i, j int) int { return cmp.Or(cmp.Compare(r.Latency[i], r.Latency[j]), cmp.Compare(i, j)) })
	fmt.Fprintln(tw, "Relays:")
	for _, id := range ids {
		var how []string
		for _, m := range []struct {
			name string
			d    map[int]time.Duration
		}{{"IPv4", r.LatencyV4}, {"IPv6", r.LatencyV6}, {"HTTPS", r.LatencyHTTPS}} {
			if d, ok := m.d[id]; ok {
				how = append(how, fmt.Sprintf("%s %s", m.name, milli(d)))
			}
		}
		fmt.Fprintf(tw, "  %s\t%s\t%s\n", regionName(dm, id), milli(r.Latency[id]), strings.Join(how, ", "))
	}
	return tw.Flush()
}

func milli(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

func regionName(dm *tailcfg.DERPMap, id int) string {
	for _, r := range dm.Regions {
		if r == nil || r.RegionID != id {
			continue
		}
		if r.RegionName != "" && r.RegionName != r.RegionCode {
			return fmt.Sprintf("%s (%s)", cmp.Or(r.RegionCode, fmt.Sprint(id)), r.RegionName)
		}
		return cmp.Or(r.RegionCode, fmt.Sprint(id))
	}
	return fmt.Sprint(id)
}
