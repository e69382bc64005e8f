package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

// controlDir returns the folder of the coordination server that the flags name.
func controlDir(c *cli.Command) (string, error) {
	if d := c.String("dir"); d != "" {
		return d, nil
	}
	conf, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("there is no place for the server's database (%w): use --dir", err)
	}
	return filepath.Join(conf, "tailnode-control"), nil
}

func (a *app) controlCommand() *cli.Command {
	return &cli.Command{
		Name:  "control",
		Usage: "run a coordination server, and administer it",
		Description: "tailnode control                     runs the server, on loopback\n" +
			"tailnode control auth-key            makes an auth key while the server runs\n" +
			"tailnode control approve ID          lets in a node that shows a login URL\n\n" +
			"The server is for trying, developing and a few machines of your own. Nodes need a relay\n" +
			"to reach each other: --with-relay runs one here, --relays names those that run elsewhere.",
		Flags: []cli.Flag{ // the first is the commands' too
			&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` of the server's database (default: one below the user's configuration directory)"},
			&cli.StringFlag{Local: true, Name: "addr", Value: "127.0.0.1:8080", Usage: "`ADDRESS` to listen on"},
			&cli.StringFlag{Local: true, Name: "url", Usage: "`URL` by which nodes reach the server, if not the address"},
			&cli.StringFlag{Local: true, Name: "domain", Usage: "`DOMAIN` of the nodes' names", Value: coord.DefaultDomain},
			&cli.StringFlag{Local: true, Name: "with-relay", Usage: "run a relay as well, on this TCP `ADDRESS`, such as 127.0.0.1:0"},
			&cli.StringSliceFlag{Local: true, Name: "relays", Usage: "JSON `FILE` with a region, as \"tailnode relay --json\" prints it; may be repeated"},
			&cli.BoolFlag{Local: true, Name: "approve-machines", Usage: "new nodes wait for \"tailnode control approve-node\""},
			&cli.BoolFlag{Local: true, Name: "verbose", Aliases: []string{"v"}, Usage: "say on standard error what goes on"},
			jsonFlag(),
		},
		Action: a.runControl,
		Commands: []*cli.Command{
			a.authKeyCommand(),
			{
				Name: "auth-keys", Usage: "list the auth keys", Flags: []cli.Flag{jsonFlag()},
				Action: noArgs(a.admin(func(ctx context.Context, c *cli.Command, ad *coord.Admin) error {
					ks, err := ad.ListAuthKeys(ctx)
					if err != nil || c.Bool("json") {
						return cmp.Or(err, printJSON(a.out, ks))
					}
					return table(a, "ID\tUSER\tUSES\tEXPIRES\tKIND", ks, func(k coord.AuthKey) string {
						return fmt.Sprintf("%s\t%s\t%d\t%s\t%s", k.ID, k.User, k.Uses, date(k.Expires), keyKind(k))
					})
				})),
			},
			a.oneArg("revoke", "KEY-ID", "revoke an auth key; its nodes stay", func(ctx context.Context, ad *coord.Admin, id string) error { return ad.RevokeAuthKey(ctx, id) }),
			{
				Name: "nodes", Usage: "list the nodes", Flags: []cli.Flag{jsonFlag()},
				Action: noArgs(a.admin(func(ctx context.Context, c *cli.Command, ad *coord.Admin) error {
					ns, err := ad.Nodes(ctx)
					if err != nil || c.Bool("json") {
						return cmp.Or(err, printJSON(a.out, ns))
					}
					return table(a, "ID\tNAME\tADDRESS\tOWNER\tSTATE", ns, func(n coord.Node) string {
						return fmt.Sprintf("%s\t%s\t%v\t%s\t%s", n.ID, n.Name, n.Addrs, cmp.Or(strings.Join(n.Tags, ","), n.User), nodeState(n))
					})
				})),
			},
			a.oneArg("delete", "NODE", "remove a node", func(ctx context.Context, ad *coord.Admin, id string) error { return ad.DeleteNode(ctx, id) }),
			a.oneArg("expire", "NODE", "make a node log in again", func(ctx context.Context, ad *coord.Admin, id string) error { return ad.ExpireNode(ctx, id) }),
			a.oneArg("approve-node", "NODE", "approve a machine that waits for it", func(ctx context.Context, ad *coord.Admin, id string) error { return ad.ApproveNode(ctx, id) }),
			{
				Name: "logins", Usage: "list the logins that wait for approval", Flags: []cli.Flag{jsonFlag()},
				Action: noArgs(a.admin(func(ctx context.Context, c *cli.Command, ad *coord.Admin) error {
					ls, err := ad.PendingLogins(ctx)
					if err != nil || c.Bool("json") {
						return cmp.Or(err, printJSON(a.out, ls))
					}
					return table(a, "ID\tHOST\tOS\tTAGS\tEXPIRES", ls, func(l coord.Login) string {
						return fmt.Sprintf("%s\t%s\t%s\t%s\t%s", l.ID, l.Hostname, l.OS, cmp.Or(strings.Join(l.RequestTags, ","), "-"), date(l.Expires))
					})
				})),
			},
			a.approveCommand(),
			a.oneArg("reject", "LOGIN", "refuse a login", func(ctx context.Context, ad *coord.Admin, id string) error { return ad.RejectLogin(ctx, id) }),
		},
	}
}

func (a *app) runControl(ctx context.Context, c *cli.Command) error {
	if c.Args().Present() {
		return usagef("control has no command %q; \"tailnode control --help\" lists them", c.Args().First())
	}
	dir, err := controlDir(c)
	if err != nil {
		return err
	}
	s := &coord.Server{
		Dir: dir, Addr: c.String("addr"), URL: c.String("url"), Domain: c.String("domain"),
		RequireMachineApproval: c.Bool("approve-machines"),
	}
	if c.Bool("verbose") {
		s.Logger = slog.New(slog.NewTextHandler(a.err, nil))
	}
	for _, file := range c.StringSlice("relays") {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var r relay.Region
		if err := json.Unmarshal(b, &r); err != nil || r.RegionID == 0 {
			return usagef("%s does not hold a region as \"tailnode relay --json\" prints it", file)
		}
		s.Relays = append(s.Relays, coordRegion(r))
	}
	if addr := c.String("with-relay"); addr != "" {
		rs := &relay.Server{Addr: addr, Dir: filepath.Join(dir, "relay"), Logger: s.Logger}
		if err := rs.Start(ctx); err != nil {
			return err
		}
		defer rs.Close()
		s.Relays = append(s.Relays, coordRegion(rs.Region(relayRegion)))
	}
	if err := s.Start(ctx); err != nil {
		return err
	}
	defer s.Close()
	if c.Bool("json") {
		err = printJSON(a.out, coord.Info{URL: s.BaseURL(), Domain: s.Domain})
	} else {
		_, err = fmt.Fprintf(a.out, "The coordination server is at %s\n\n"+
			"make an auth key:  tailnode control auth-key --dir %s\njoin with it:      tailnode up --control-url %s --auth-key KEY\n", s.BaseURL(), dir, s.BaseURL())
		if len(s.Relays) == 0 {
			fmt.Fprintln(a.err, "warning: there is no relay, and nodes cannot reach each other without: use --with-relay or --relays")
		}
	}
	if err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// relayRegion is the region of a relay that is run here: 900 to 999 are for everybody's own use.
const relayRegion = 900

func coordRegion(r relay.Region) coord.Region {
	out := coord.Region{ID: r.RegionID, Code: r.RegionCode, Name: r.RegionName}
	for _, n := range r.Nodes {
		out.Nodes = append(out.Nodes, coord.Relay{
			Name: n.Name, HostName: n.HostName, IPv4: n.IPv4, IPv6: n.IPv6,
			DERPPort: n.DERPPort, STUNPort: n.STUNPort, CertName: n.CertName,
		})
	}
	return out
}

func (a *app) authKeyCommand() *cli.Command {
	return &cli.Command{
		Name: "auth-key", Usage: "make an auth key and print it, once",
		Flags: []cli.Flag{jsonFlag(),
			&cli.BoolFlag{Name: "reusable", Usage: "for any number of nodes"},
			&cli.BoolFlag{Name: "ephemeral", Usage: "its nodes are removed when they go away"},
			&cli.StringSliceFlag{Name: "tag", Usage: "`tag:NAME` that its nodes get; may be repeated"},
			&cli.StringFlag{Name: "user", Usage: "`USER` whose nodes they are", Value: coord.DefaultUser},
			&cli.DurationFlag{Name: "expiry", Usage: "how long it may be used (`TIME`)", Value: coord.DefaultAuthKeyExpiry},
		},
		Action: noArgs(a.admin(func(ctx context.Context, c *cli.Command, ad *coord.Admin) error {
			k, err := ad.CreateAuthKey(ctx, coord.AuthKeyOptions{
				User: c.String("user"), Reusable: c.Bool("reusable"), Ephemeral: c.Bool("ephemeral"),
				Preauthorized: true, Tags: c.StringSlice("tag"), Expiry: c.Duration("expiry"),
			})
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(a.out, struct{ ID, Key string }{coord.AuthKeyID(k), k})
			}
			_, err = fmt.Fprintln(a.out, k)
			return err
		})),
	}
}

func (a *app) approveCommand() *cli.Command {
	return &cli.Command{
		Name: "approve", Usage: "let in a node that shows a login URL; LOGIN is the URL or its last part", ArgsUsage: "LOGIN",
		Description: "The node gets the tags that --tag names and no others: those that it asks for, which\n" +
			"\"tailnode control logins\" shows, only with --requested-tags.",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "tag", Usage: "`tag:NAME` that the node gets; may be repeated"},
			&cli.BoolFlag{Name: "requested-tags", Usage: "the node gets the tags that it asks for"},
		},
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.NArg() != 1 {
				return usagef("approve takes one argument: LOGIN")
			}
			o := coord.ApproveOptions{Tags: append([]string{}, c.StringSlice("tag")...)} // nil would be what the node asks for
			if c.Bool("requested-tags") {
				if len(o.Tags) > 0 {
					return usagef("--tag and --requested-tags exclude each other")
				}
				o.Tags = nil
			}
			return a.admin(func(ctx context.Context, c *cli.Command, ad *coord.Admin) error {
				login := c.Args().First()
				waiting, err := ad.PendingLogins(ctx) // before: afterwards it is none of them
				if err != nil {
					return err
				}
				if err := ad.ApproveLogin(ctx, login, o); err != nil || o.Tags == nil {
					return err
				}
				for _, l := range waiting {
					refused := slices.DeleteFunc(l.RequestTags, func(tag string) bool { return slices.Contains(o.Tags, tag) })
					if (l.ID == login || l.URL == login) && len(refused) > 0 {
						fmt.Fprintf(a.err, "note: %s asked for %s and did not get that: --requested-tags or --tag grants tags\n", l.Hostname, strings.Join(refused, ","))
					}
				}
				return nil
			})(ctx, c)
		},
	}
}

// admin runs do with the administrator of the running server.
func (a *app) admin(do func(context.Context, *cli.Command, *coord.Admin) error) cli.ActionFunc {
	return func(ctx context.Context, c *cli.Command) error {
		dir, err := controlDir(c)
		if err != nil {
			return err
		}
		ad, err := coord.OpenAdmin(dir)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("no coordination server runs on %s: start it with \"tailnode control\"", dir)
		} else if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		return do(ctx, c, ad)
	}
}

// oneArg is an administrator's command with one argument and no answer.
func (a *app) oneArg(name, arg, usage string, do func(context.Context, *coord.Admin, string) error) *cli.Command {
	return &cli.Command{
		Name: name, Usage: usage, ArgsUsage: arg,
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.NArg() != 1 {
				return usagef("%s takes one argument: %s", name, arg)
			}
			return a.admin(func(ctx context.Context, c *cli.Command, ad *coord.Admin) error {
				return do(ctx, ad, c.Args().First())
			})(ctx, c)
		},
	}
}

// table prints rows under a heading, in columns.
func table[T any](a *app, head string, rows []T, line func(T) string) error {
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, head)
	for _, r := range rows {
		fmt.Fprintln(tw, line(r))
	}
	return tw.Flush()
}

func date(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.Local().Format("2006-01-02 15:04")
}

func keyKind(k coord.AuthKey) string {
	kind := "one-off"
	if k.Reusable {
		kind = "reusable"
	}
	if k.Ephemeral {
		kind += ", ephemeral"
	}
	if len(k.Tags) > 0 {
		kind += ", " + strings.Join(k.Tags, ",")
	}
	if k.Revoked {
		kind += ", revoked"
	}
	return kind
}

func nodeState(n coord.Node) string {
	switch {
	case !n.Approved:
		return "waits for approval"
	case n.Expired:
		return "expired"
	case n.Online:
		return "online"
	case n.LastSeen.IsZero():
		return "never seen"
	}
	return "offline since " + date(n.LastSeen)
}
