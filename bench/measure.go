package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
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

func newGround() (*ground, error) {
	relay, err := harness.UpstreamRelay(nil)
	if err != nil {
		return nil, err
	}
	control, err := harness.UpstreamControl(relay.Info(), nil)
	if err != nil {
		relay.Close()
		return nil, err
	}
	return &ground{relay, control}, nil
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
	dir   string
	up    child.Reply
	spawn time.Duration // from before its start until it said that it is up
}

func (g *ground) start(s *side, name string) (*proc, error) {
	dir, err := os.MkdirTemp("", "bench-node")
	if err != nil {
		return nil, err
	}
	conf, err := json.Marshal(child.Config{Dir: dir, Hostname: name, ControlURL: g.control.URL(), AuthKey: "tskey-any"})
	if err != nil {
		return nil, err
	}
	p := &proc{cmd: exec.Command(s.child, string(conf)), dir: dir}
	p.cmd.Stderr = &p.errs
	p.cmd.Env = os.Environ()
	for k, v := range harness.UpstreamKnobs {
		p.cmd.Env = append(p.cmd.Env, k+"="+v)
	}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(out)
	began := time.Now()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	p.up, err = p.reply()
	p.spawn = time.Since(began)
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

// stop ends the process by ending its input, or by force if it does not close its node in time.
func (p *proc) stop() {
	p.in.Close()
	late := time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
	defer late.Stop()
	p.cmd.Wait()
	os.RemoveAll(p.dir)
}

func measureUp(s *side, rep *report) error {
	g, err := newGround()
	if err != nil {
		return err
	}
	defer g.close()
	p, err := g.start(s, "solo")
	if err != nil {
		return err
	}
	defer p.stop()
	rep.add("process start to Up returned", "ms", true, s.name, p.spawn.Seconds()*1e3)
	rep.add("main to Up returned", "ms", true, s.name, p.up.Seconds*1e3)
	return nil
}

// pair starts two nodes that have exchanged a byte, so that each knows the other.
func (g *ground) pair(s *side) (a, b *proc, first time.Duration, err error) {
	if a, err = g.start(s, "alpha"); err != nil {
		return nil, nil, 0, err
	}
	if b, err = g.start(s, "bravo"); err != nil {
		a.stop()
		return nil, nil, 0, err
	}
	r, err := b.do(child.Command{Op: "dial", Addr: a.up.IP})
	if err != nil {
		a.stop()
		b.stop()
		return nil, nil, 0, err
	}
	return a, b, time.Duration(r.Seconds * float64(time.Second)), nil
}

func measureIdle(s *side, rep *report, idle time.Duration) error {
	g, err := newGround()
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	before, err := a.do(child.Command{Op: "cpu"})
	if err != nil {
		return err
	}
	time.Sleep(idle) // what is measured is the passing of time
	rss, err := residentMB(a.cmd.Process.Pid)
	if err != nil {
		return err
	}
	after, err := a.do(child.Command{Op: "cpu"})
	if err != nil {
		return err
	}
	rep.add(fmt.Sprintf("resident memory after %v idle, one peer", idle), "MB", true, s.name, rss)
	rep.add("processor time while idle", "ms/s", true, s.name, (after.CPU-before.CPU)*1e3/idle.Seconds())
	return nil
}

// residentMB asks ps, which is on every system that this runs on.
func residentMB(pid int) (float64, error) {
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
		for line := range strings.Lines(string(b)) {
			if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				return kilobytes(strings.TrimSuffix(strings.TrimSpace(kb), " kB"))
			}
		}
	}
	out, err := command("ps", "-o", "rss=", "-p", strconv.Itoa(pid))
	if err != nil {
		return 0, err
	}
	return kilobytes(out)
}

func kilobytes(s string) (float64, error) {
	kb, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	return kb * 1024 / 1e6, err
}

func measureSpeed(s *side, rep *report, d time.Duration) error {
	g, err := newGround()
	if err != nil {
		return err
	}
	defer g.close()
	a, b, _, err := g.pair(s)
	if err != nil {
		return err
	}
	defer a.stop()
	defer b.stop()
	for _, streams := range []int{1, 8} {
		var before, after [2]child.Reply
		for i, p := range []*proc{a, b} {
			if before[i], err = p.do(child.Command{Op: "cpu"}); err != nil {
				return err
			}
		}
		relay := child.CPU()
		r, err := b.do(child.Command{Op: "send", Addr: a.up.IP, Streams: streams, Seconds: d.Seconds()})
		if err != nil {
			return err
		}
		relay = child.CPU() - relay
		for i, p := range []*proc{a, b} {
			if after[i], err = p.do(child.Command{Op: "cpu"}); err != nil {
				return err
			}
		}
		gb := float64(r.Bytes) / 1e9
		name := fmt.Sprintf("relayed TCP, %d stream", streams)
		if streams > 1 {
			name += "s"
		}
		rep.add(name, "Mbit/s", false, s.name, gb*8e3/r.Seconds)
		rep.add(name+": both nodes' processor time", "s/GB", true, s.name, (after[0].CPU+after[1].CPU-before[0].CPU-before[1].CPU)/gb)
		rep.add(name+": relay's processor time", "s/GB", true, s.name, relay/gb)
		rss, err := residentMB(a.cmd.Process.Pid)
		if err != nil {
			return err
		}
		rep.add(name+": receiver's resident memory after it", "MB", true, s.name, rss)
	}
	return nil
}
