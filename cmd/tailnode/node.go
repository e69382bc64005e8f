package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode"
)

// nodeFlags are the flags of every command that may join a tailnet.
func nodeFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` of the node's identity (default: one below the user's configuration directory)"},
		&cli.StringFlag{Name: "hostname", Aliases: []string{"n"}, Usage: "`NAME` to ask for on the tailnet (default: the host's name)"},
		&cli.StringFlag{Name: "control-url", Usage: "`URL` of the coordination server (default: Tailscale's)", Sources: cli.EnvVars("TS_CONTROL_URL")},
		&cli.StringFlag{Name: "auth-key", Usage: "`KEY` to join with; \"file:PATH\" reads it from a file; without one, a URL to visit is shown", Sources: cli.EnvVars("TS_AUTHKEY", "TS_AUTH_KEY")},
		&cli.BoolFlag{Name: "ephemeral", Usage: "leave the tailnet at the end"},
		&cli.StringSliceFlag{Name: "tag", Usage: "`tag:NAME` to ask for; may be repeated"},
		&cli.DurationFlag{Name: "timeout", Usage: "give up joining after this `TIME` (default: never)"},
		&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "say on standard error what goes on inside"},
	}, more...)
}

func jsonFlag() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON", Local: true} }

// stateDir returns the directory that the flags name.
func stateDir(c *cli.Command) (string, error) {
	if d := c.String("dir"); d != "" {
		return d, nil
	}
	conf, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("there is no place for the node's identity (%w): use --dir", err)
	}
	return filepath.Join(conf, "tailnode"), nil
}

// newServer returns the server that the flags describe.
func (a *app) newServer(c *cli.Command) (*tailnode.Server, error) {
	dir, err := stateDir(c)
	if err != nil {
		return nil, err
	}
	host, _ := os.Hostname()
	authKey := c.String("auth-key")
	if file, ok := strings.CutPrefix(authKey, "file:"); ok {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("auth key: %w", err)
		}
		authKey = strings.TrimSpace(string(b))
	}
	s := &tailnode.Server{
		Dir:           dir,
		Hostname:      cmp.Or(c.String("hostname"), host),
		ControlURL:    c.String("control-url"),
		AuthKey:       authKey,
		Ephemeral:     c.Bool("ephemeral"),
		AdvertiseTags: c.StringSlice("tag"),
		UserLogf:      func(format string, args ...any) { fmt.Fprintf(a.err, format+"\n", args...) },
	}
	if c.Bool("verbose") {
		s.Logger = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return s, nil
}

// up brings s onto the tailnet, showing that it is being waited for.
func (a *app) up(ctx context.Context, c *cli.Command, s *tailnode.Server) (*tailnode.Status, error) {
	whole := ctx
	if d := c.Duration("timeout"); d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	defer a.progress("joining the tailnet", func() string {
		lc, err := s.LocalClient()
		if err != nil {
			return ""
		}
		st, err := lc.StatusWithoutPeers(ctx)
		if err != nil || len(st.Health) == 0 {
			return ""
		}
		return st.Health[len(st.Health)-1]
	})()
	st, err := s.Up(ctx)
	if e, ok := errors.AsType[*tailnode.Error](err); ok && e.Code == tailnode.CodeTimeout {
		err = &tailnode.Error{Op: e.Op, Code: missing(whole, s), Err: e.Err}
	}
	return st, err
}

// missing is the code for what s waits for that did not join in time.
func missing(ctx context.Context, s *tailnode.Server) tailnode.Code {
	if lc, err := s.LocalClient(); err == nil {
		if st, err := lc.StatusWithoutPeers(ctx); err == nil {
			switch st.BackendState {
			case "NeedsLogin":
				return tailnode.CodeNeedsLogin
			case "NeedsMachineAuth":
				return tailnode.CodeNeedsApproval
			}
		}
	}
	return tailnode.CodeTimeout
}

// progress says every few seconds on standard error what is being waited for, until the
// function that it returns is called. What takes less than that goes without saying.
func (a *app) progress(what string, detail func() string) (done func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	start := time.Now()
	go func() {
		defer close(stopped)
		tick := time.NewTicker(3 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				line := fmt.Sprintf("%s … %.0f s", what, time.Since(start).Seconds())
				if d := detail(); d != "" {
					line += ": " + d
				}
				fmt.Fprintln(a.err, line)
			}
		}
	}()
	return func() { close(stop); <-stopped }
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
