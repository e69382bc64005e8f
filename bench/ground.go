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
	"sync"
	"time"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/interop/harness"
)

// ground is the control server and the relay under the nodes of a round.
type ground struct {
	r     *round
	relay harness.Relay
	url   string
	big   *bigControl // where the netmap is to be large
	stop  func()
}

// newGround starts upstream's coordination test server, with that relay.
func (r *round) newGround(relay harness.RelayMaker) (*ground, error) {
	rl, err := relay(nil)
	if err != nil {
		return nil, err
	}
	control, err := harness.UpstreamControl(rl.Info(), nil)
	if err != nil {
		rl.Close()
		return nil, err
	}
	return &ground{r: r, relay: rl, url: control.URL(), stop: func() { control.Close() }}, nil
}

// newBigGround starts a control server that tells each node of so many peers that do not exist besides those that do.
func (r *round) newBigGround(peers int) (*ground, error) {
	rl, err := harness.UpstreamRelay(nil)
	if err != nil {
		return nil, err
	}
	big, err := newBigControl(rl.Info(), peers)
	if err != nil {
		rl.Close()
		return nil, err
	}
	return &ground{r: r, relay: rl, url: big.url, big: big, stop: big.close}, nil
}

func (g *ground) close() {
	g.stop()
	g.relay.Close()
}

// proc is a running measured process.
type proc struct {
	r     *round
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Scanner
	errs  tail
	conf  child.Config
	up    child.Reply
	began time.Time     // just before its start
	spawn time.Duration // from then until it said that it is up
	ended bool
}

// tail keeps the last of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if n := len(t.b) - 2048; n > 0 {
		t.b = t.b[n:]
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

var errLate = errors.New("the time for this round is over")

// start starts a node of that side; conf's Dir and what comes from the ground are filled in.
func (g *ground) start(s *side, conf child.Config) (*proc, error) {
	if conf.Dir == "" {
		dir, err := os.MkdirTemp("", "bench-node")
		if err != nil {
			return nil, err
		}
		conf.Dir = dir
	}
	conf.ControlURL, conf.AuthKey = g.url, "tskey-any"
	arg, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	p := &proc{r: g.r, cmd: exec.Command(s.child, string(arg)), conf: conf}
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
	if err := g.r.started(p); err != nil {
		return nil, err
	}
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
		why := "the measured process ended"
		if e := strings.TrimSpace(p.errs.String()); e != "" {
			why += ": " + e
		}
		return r, errors.New(why)
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
	p.r.ended(p)
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

// way is how packets are to go between two nodes.
type way uint8

const (
	direct    way = iota // wait for a direct path
	relayOnly            // forbid one, and look
	anyWay               // do not look
)

// pair starts two nodes, alpha and bravo; bravo has dialled alpha, and the path is as it is to be.
func (g *ground) pair(s *side, w way) (a, b *proc, first child.Reply, err error) {
	conf := child.Config{RelayOnly: w == relayOnly}
	conf.Hostname = "alpha"
	if a, err = g.start(s, conf); err != nil {
		return
	}
	conf.Hostname = "bravo"
	if b, err = g.start(s, conf); err != nil {
		a.stop()
		return
	}
	wait := map[way]time.Duration{direct: directWait, relayOnly: time.Second / 2}[w]
	first, err = b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: wait.Seconds()})
	switch {
	case err != nil:
	case w == direct && first.Direct == 0:
		err = errNotDirect
	case w == relayOnly && first.Direct != 0:
		err = errors.New("the path became direct and was to stay on the relay")
	}
	if err != nil {
		a.stop()
		b.stop()
	}
	return
}

// stillDirect says whether the path has been direct to the end.
func stillDirect(a, b *proc) error {
	r, err := b.do(child.Command{Op: "first", Addr: a.up.IP, Seconds: 0.2})
	if err == nil && r.Direct == 0 {
		err = errNotDirect
	}
	return err
}
