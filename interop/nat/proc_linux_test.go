package nat

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// proc is a child process in a namespace.
type proc struct {
	who   string // "ours", "upstream" or "server"
	name  string
	host  string // namespace, without the lab's prefix
	site  *site
	up    upResult
	moved bool // see move
	way   int  // the network by which the host left eth0, see reroute

	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan struct{} // closed when its output has ended

	mu      sync.Mutex
	nextID  int
	waiting map[int]chan reply
}

// startChild runs this test binary again in a namespace; it is gone when t ends.
func startChild(t testing.TB, ns, who string, env ...string) *proc {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &proc{who: who, cmd: exec.Command("ip", "netns", "exec", ns, exe), done: make(chan struct{}), waiting: map[int]chan reply{}}
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); !strings.HasSuffix(strings.ToLower(name), "_proxy") { // there is none in here
			p.cmd.Env = append(p.cmd.Env, e)
		}
	}
	p.cmd.Env = append(append(p.cmd.Env, childEnv+"="+who), env...)
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.read(out)
	t.Cleanup(p.close)
	return p
}

func (p *proc) read(out io.Reader) {
	defer close(p.done)
	in := bufio.NewScanner(out)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r reply
		if json.Unmarshal(in.Bytes(), &r) != nil {
			fmt.Fprintf(os.Stderr, "%s: %s\n", p.name, in.Bytes()) // a panic, say
			continue
		}
		p.mu.Lock()
		c := p.waiting[r.ID]
		delete(p.waiting, r.ID)
		p.mu.Unlock()
		if c != nil {
			c <- r
		}
	}
}

// signal sends a signal to the child itself: ip(8) has become it.
func (p *proc) signal(s os.Signal) { p.cmd.Process.Signal(s) }

// close ends the child: it leaves by itself when its input ends, and is killed if it does not.
func (p *proc) close() {
	p.in.Close()
	kill := time.AfterFunc(time.Minute, func() { p.cmd.Process.Kill() })
	defer kill.Stop()
	<-p.done
	p.cmd.Wait()
}

var errChild = errors.New("the child process has ended")

// call has the child do something. result may be nil.
func (p *proc) call(ctx context.Context, op string, args, result any) error {
	raw, err := json.Marshal(args)
	if err != nil {
		return err
	}
	c := make(chan reply, 1)
	p.mu.Lock()
	p.nextID++
	r := request{p.nextID, op, raw}
	p.waiting[r.ID] = c
	line, _ := json.Marshal(r)
	_, err = p.in.Write(append(line, '\n'))
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s %s: %w", p.name, op, err)
	}
	select {
	case a := <-c:
		switch {
		case a.Err != "":
			return fmt.Errorf("%s %s: %s", p.name, op, a.Err)
		case result == nil:
			return nil
		}
		return json.Unmarshal(a.Result, result)
	case <-p.done:
		return fmt.Errorf("%s %s: %w", p.name, op, errChild)
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", p.name, op, context.Cause(ctx))
	}
}

func (p *proc) path(ctx context.Context, peer *proc) (r peerPath, err error) {
	return r, p.call(ctx, "path", peer.up.IP4, &r)
}
