package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/interop/harness"
)

// ground is the control server and the relay under both nodes of a measurement.
type ground struct {
	relay   harness.Relay
	control harness.Control
}

// newGround starts upstream's coordination test server, with that relay.
func newGround(relay harness.RelayMaker) (*ground, error) {
	r, err := relay(nil)
	if err != nil {
		return nil, err
	}
	control, err := harness.UpstreamControl(r.Info(), nil)
	if err != nil {
		r.Close()
		return nil, err
	}
	return &ground{r, control}, nil
}

func (g *ground) close() {
	g.control.Close()
	g.relay.Close()
}

// proc is a running measured process.
type proc struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Scanner
	errs  strings.Builder
	conf  child.Config
	up    child.Reply
	began time.Time     // just before its start
	spawn time.Duration // from then until it said that it is up
	ended bool
}

// procs are the processes that have been started and not yet reaped, for the account of who uses the processors.
var procs []*proc

// start starts a node of that side; Dir and ControlURL are filled in where they are empty.
func (g *ground) start(s *side, conf child.Config) (*proc, error) {
	if conf.Dir == "" {
		dir, err := os.MkdirTemp("", "bench-node")
		if err != nil {
			return nil, err
		}
		conf.Dir = dir
	}
	conf.ControlURL, conf.AuthKey = g.control.URL(), "tskey-any"
	arg, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	p := &proc{cmd: exec.Command(s.child, string(arg)), conf: conf}
	p.cmd.Stderr = &p.errs
	// The harness sets knobs of upstream's in this process that are not for the measured one.
	p.cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "TS_") })
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(out)
	p.began = time.Now()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	procs = append(procs, p)
	p.up, err = p.reply()
	p.spawn = time.Since(p.began)
	if err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *proc) reply() (child.Reply, error) {
	var r child.Reply
	if !p.out.Scan() {
		return r, fmt.Errorf("the measured process ended: %v %s", p.out.Err(), p.errs.String())
	}
	if err := json.Unmarshal(p.out.Bytes(), &r); err != nil {
		return r, err
	}
	if r.Err != "" {
		return r, fmt.Errorf("the measured process: %s", r.Err)
	}
	return r, nil
}

func (p *proc) do(c child.Command) (child.Reply, error) {
	if err := json.NewEncoder(p.in).Encode(c); err != nil {
		return child.Reply{}, err
	}
	return p.reply()
}

// end ends the process by ending its input, or by force if it does not close its node in time. Its folder stays.
func (p *proc) end() {
	if p.ended {
		return
	}
	p.ended = true
	p.in.Close()
	late := time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
	defer late.Stop()
	p.cmd.Wait()
	procs = slices.DeleteFunc(procs, func(q *proc) bool { return q == p })
}

func (p *proc) stop() {
	p.end()
	os.RemoveAll(p.conf.Dir)
}

// again ends the process and starts it anew as the same node; dial, if not empty, is whom it is to reach before it says that it is up.
func (g *ground) again(s *side, p *proc, dial string) (*proc, error) {
	p.end()
	conf := p.conf
	conf.Dial = dial
	return g.start(s, conf)
}

// directWait is how long a path has to become direct.
const directWait = 10 * time.Second

var errNotDirect = errors.New("the path did not become direct")

// pair starts two nodes, alpha and bravo; bravo has dialled alpha and, unless they are to take the relay, waited for a direct path.
func (g *ground) pair(s *side, relayOnly bool) (a, b *proc, first child.Reply, err error) {
	if a, err = g.start(s, child.Config{Hostname: "alpha", RelayOnly: relayOnly}); err != nil {
		return
	}
	if b, err = g.start(s, child.Config{Hostname: "bravo", RelayOnly: relayOnly}); err != nil {
		a.stop()
		return
	}
	wait := directWait
	if relayOnly {
		wait = time.Second / 2 // in which it must not become direct
	}
	first, err = b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: wait.Seconds()})
	if err == nil && relayOnly != (first.Direct == 0) {
		err = errNotDirect
		if relayOnly {
			err = errors.New("the path became direct and was to stay on the relay")
		}
	}
	if err != nil {
		a.stop()
		b.stop()
	}
	return
}
