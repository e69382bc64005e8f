package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode/relay"
)

func (a *app) relayCommand() *cli.Command {
	return &cli.Command{
		Name:  "relay",
		Usage: "run a relay (DERP and STUN)",
		Description: "Without a certificate the relay makes one of its own, which nodes accept because the map\n" +
			"pins it. \"tailnode relay --json\" prints the region for \"tailnode control --relays FILE\",\n" +
			"and for the DERP map of any other coordination server.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "addr", Value: ":8443", Usage: "TCP `ADDRESS` for DERP over HTTPS"},
			&cli.StringFlag{Name: "stun-addr", Usage: "UDP `ADDRESS` for STUN; \"none\" for no STUN (default: the same host, port 3478)"},
			&cli.StringFlag{Name: "hostname", Usage: "`NAME` or address by which nodes reach the relay"},
			&cli.StringFlag{Name: "cert", Usage: "certificate `FILE` (PEM)"},
			&cli.StringFlag{Name: "key", Usage: "private key `FILE` of the certificate (PEM)"},
			&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` that keeps the relay's key and own certificate over restarts"},
			&cli.IntFlag{Name: "region", Value: relayRegion, Usage: "`NUMBER` of the region in the map"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "say on standard error what goes on"},
			jsonFlag(),
		},
		Action: noArgs(func(ctx context.Context, c *cli.Command) error {
			if (c.String("cert") == "") != (c.String("key") == "") {
				return usagef("--cert and --key go together")
			}
			rs := &relay.Server{
				Addr: c.String("addr"), STUNAddr: c.String("stun-addr"), Hostname: c.String("hostname"),
				CertFile: c.String("cert"), KeyFile: c.String("key"), Dir: c.String("dir"),
			}
			if c.Bool("verbose") {
				rs.Logger = slog.New(slog.NewTextHandler(a.err, nil))
			}
			if err := rs.Start(ctx); err != nil {
				return err
			}
			defer rs.Close()
			region := rs.Region(c.Int("region"))
			if c.Bool("json") {
				if err := printJSON(a.out, region); err != nil {
					return err
				}
			} else {
				n := rs.Node()
				fmt.Fprintf(a.out, "The relay is at %s, DERP port %d, STUN port %d\n", n.HostName, n.DERPPort, n.STUNPort)
			}
			<-ctx.Done()
			ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
			defer cancel()
			return rs.Shutdown(ctx)
		}),
	}
}
