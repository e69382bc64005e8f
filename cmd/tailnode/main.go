// Command tailnode tries out and exposes things on a tailnet with an embedded node: no
// daemon, no interface, no root. "tailnode help" lists what it does.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode"
)

// The exit codes, which "tailnode help" lists.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitAuth        = 3 // control refused the node, or it has to log in
	exitTimeout     = 4 // nothing answered in time
	exitUnreachable = 5 // no such node, or it refused the connection
	exitState       = 6 // the state directory is locked or damaged
)

const exitHelp = `EXIT CODES:
   0 success    1 failure    2 wrong usage    3 refused by control, or login needed
   4 no answer in time    5 no such node, or it refused    6 state locked or damaged`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// app is what a command has to work with; tests give it their own.
type app struct {
	in       io.Reader
	out, err io.Writer
}

func run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	a := &app{in, out, errw}
	root := &cli.Command{
		Name:      "tailnode",
		Usage:     "a node of a tailnet in one program: no daemon, no root",
		Version:   tailnode.Version,
		Writer:    out,
		ErrWriter: errw,
		Description: "Start with \"tailnode demo\", which needs nothing and shows everything.\n" +
			"Then join a tailnet of your own with \"tailnode up\" or \"tailnode serve 8080\".\n\n" + exitHelp,
		ExitErrHandler:  func(context.Context, *cli.Command, error) {},
		OnUsageError:    func(_ context.Context, _ *cli.Command, err error, _ bool) error { return usageError{err} },
		HideHelpCommand: false,
		Suggest:         true,
		Commands: []*cli.Command{
			a.demoCommand(), a.upCommand(), a.serveCommand(), a.ncCommand(),
			a.statusCommand(), a.pingCommand(), a.netcheckCommand(), a.controlCommand(), a.relayCommand(),
		},
		Action: func(_ context.Context, c *cli.Command) error {
			if c.Args().Present() {
				return usagef("there is no command %q; \"tailnode help\" lists them", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	root.Walk(func(c *cli.Command) error { c.OnUsageError = root.OnUsageError; return nil }) // it is not inherited
	err := root.Run(ctx, args)
	if err == nil {
		return 0
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return 0 // the user ended it
	}
	fmt.Fprintln(errw, "tailnode:", text(err))
	return exitCode(err)
}

type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// noArgs is do for a command without arguments.
func noArgs(do cli.ActionFunc) cli.ActionFunc {
	return func(ctx context.Context, c *cli.Command) error {
		if c.Args().Present() {
			return usagef("%s takes no argument, and %q is one", c.Name, c.Args().First())
		}
		return do(ctx, c)
	}
}

// text is the error without the library's own prefix, which the command's name stands for.
func text(err error) string {
	if e, ok := errors.AsType[*tailnode.Error](err); ok && e == err {
		return e.Op + ": " + e.Err.Error()
	}
	return err.Error()
}

func exitCode(err error) int {
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	e, ok := errors.AsType[*tailnode.Error](err)
	if !ok {
		return exitFailure
	}
	switch e.Code {
	case tailnode.CodeInvalidArgument, tailnode.CodeUnsupported:
		return exitUsage
	case tailnode.CodeAuthRefused, tailnode.CodeNeedsLogin, tailnode.CodeNeedsApproval, tailnode.CodeKeyExpired:
		return exitAuth
	case tailnode.CodeTimeout, tailnode.CodeControlUnreachable:
		return exitTimeout
	case tailnode.CodeNotTailnet, tailnode.CodeNoSuchHost, tailnode.CodeUnreachable, tailnode.CodeRefused, tailnode.CodeNotFound:
		return exitUnreachable
	case tailnode.CodeStateCorrupt, tailnode.CodeStateLocked, tailnode.CodeStateIO:
		return exitState
	}
	return exitFailure
}
