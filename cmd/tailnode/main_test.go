package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/urfave/cli/v3"
	"go.uber.org/goleak"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

func TestMain(m *testing.M) {
	for _, name := range []string{"TS_AUTHKEY", "TS_AUTH_KEY", "TS_CONTROL_URL"} {
		os.Unsetenv(name)
	}
	demoBytes = 4 << 20 // as much as the demo moves takes a minute, which it has, on a slow machine with the race detector
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must come.
const patience = time.Minute

// output is what a command prints, readable while it runs.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{} // closed and replaced at each write
}

func newOutput() *output { return &output{more: make(chan struct{})} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.more)
	o.more = make(chan struct{})
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// await blocks until the output holds s, and returns all of it.
func (o *output) await(t *testing.T, s string) string {
	t.Helper()
	deadline := time.After(patience)
	for {
		o.mu.Lock()
		all, more := o.buf.String(), o.more
		o.mu.Unlock()
		if strings.Contains(all, s) {
			return all
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("%q does not come; so far: %s", s, all)
		}
	}
}

// command runs "tailnode args..." to its end.
func command(t *testing.T, in string, args ...string) (code int, out, errs string) {
	t.Helper()
	o, e := newOutput(), newOutput()
	code = run(t.Context(), append([]string{"tailnode"}, args...), strings.NewReader(in), o, e)
	return code, o.String(), e.String()
}

// background runs "tailnode args..." until the test ends or stop is called.
func background(t *testing.T, args ...string) (out *output, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out = newOutput()
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, append([]string{"tailnode"}, args...), strings.NewReader(""), out, out)
	}()
	stop = sync.OnceValue(func() int { cancel(); return <-ended })
	t.Cleanup(func() { stop() })
	return out, stop
}

func TestDemo(t *testing.T) {
	var both sync.WaitGroup // in parallel with itself, and then again
	for range 2 {
		both.Go(func() {
			code, out, errs := command(t, "", "demo")
			if code != 0 || errs != "" {
				t.Errorf("exit code %d, said %q", code, errs)
			}
			for _, want := range []string{"web.tailnode.internal", "100.64.", "Hello, laptop", "path: ", "Mbit/s", "memory: "} {
				if !strings.Contains(out, want) {
					t.Errorf("the output does not hold %q:\n%s", want, out)
				}
			}
		})
	}
	both.Wait()
	code, out, _ := command(t, "", "demo", "--json")
	var r demoResult
	if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || r.ThroughputMbits <= 0 || r.RoundTripMicros <= 0 || r.TransferredBytes != demoBytes {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

// TestStay joins the demo's tailnet with the commands that it prints.
func TestStay(t *testing.T) {
	out, stop := background(t, "demo", "--stay")
	text := out.await(t, "The server's URL is ")
	var url, key string
	if _, err := fmt.Sscanf(text[strings.Index(text, "TS_CONTROL_URL="):], "TS_CONTROL_URL=%s TS_AUTHKEY=%s", &url, &key); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TS_CONTROL_URL", url)
	t.Setenv("TS_AUTHKEY", key)
	dir := filepath.Join(t.TempDir(), "n")
	code, got, errs := command(t, "GET / HTTP/1.0\r\n\r\n", "nc", "--ephemeral", "--dir", dir, "--hostname", "visitor", "web", "80")
	if code != 0 || !strings.Contains(got, "Hello, visitor") {
		t.Errorf("nc: exit code %d, %q, %q", code, got, errs)
	}
	code, got, errs = command(t, "", "ping", "--ephemeral", "--dir", dir, "-c", "2", "--wait", patience.String(), "--until-direct=false", "web")
	if code != 0 || strings.Count(got, "reply from web (100.64.") != 2 {
		t.Errorf("ping: exit code %d, %q, %q", code, got, errs)
	}
	code, got, errs = command(t, "", "ping", "--ephemeral", "--dir", dir, "--wait", patience.String(), "web")
	if code != 0 || !strings.HasSuffix(got, "\n") || !strings.Contains(got[strings.LastIndex(got[:len(got)-1], "\n")+1:], "directly from") {
		t.Errorf("ping until direct: exit code %d, %q, %q", code, got, errs)
	}
	if code := stop(); code != 0 {
		t.Errorf("demo ended with %d", code)
	}
}

// lab is a coordination server and a relay for the commands to join.
func lab(t *testing.T) *coord.Server {
	t.Helper()
	rs := &relay.Server{Addr: "127.0.0.1:0"}
	if err := rs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rs.Close() })
	cs := &coord.Server{Relays: []coord.Region{coordRegion(rs.Region(relayRegion))}}
	if err := cs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cs.Close() })
	key, err := cs.CreateAuthKey(coord.AuthKeyOptions{Reusable: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TS_CONTROL_URL", cs.BaseURL())
	t.Setenv("TS_AUTHKEY", key)
	return cs
}

// TestUp asks a node that one command holds with others.
func TestUp(t *testing.T) {
	lab(t)
	tmp := t.TempDir()
	dirs := []string{filepath.Join(tmp, "a"), filepath.Join(tmp, "b")}
	outA, stopA := background(t, "up", "--dir", dirs[0], "--hostname", "alpha")
	outB, _ := background(t, "up", "--dir", dirs[1], "--hostname", "beta")
	outA.await(t, "Ctrl-C")
	outB.await(t, "Ctrl-C")
	for end := time.Now().Add(patience); ; { // alpha hears of beta a moment after that is up
		_, out, errs := command(t, "", "status", "--dir", dirs[0])
		if strings.Contains(out, "beta") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("alpha does not hear of beta: %s%s", out, errs)
		}
	}

	code, out, errs := command(t, "", "status", "--dir", dirs[0], "--json")
	var st tailnode.Status
	if err := json.Unmarshal([]byte(out), &st); code != 0 || err != nil || st.Self.HostName != "alpha" || st.BackendState != "Running" {
		t.Errorf("status: exit code %d, %v: %s%s", code, err, out, errs)
	}
	code, out, errs = command(t, "", "status", "--dir", dirs[0])
	if code != 0 || !strings.Contains(out, "alpha.tailnode.internal is running") || !strings.Contains(out, "this node, home relay") {
		t.Errorf("status: exit code %d: %s%s", code, out, errs)
	}
	for _, typ := range []string{"disco", "TSMP", "ICMP"} {
		code, out, errs = command(t, "", "ping", "--dir", dirs[0], "--type", typ, "-c", "1", "--wait", patience.String(), "beta")
		if code != 0 || !strings.Contains(out, "reply from beta") {
			t.Errorf("ping %s: exit code %d: %s%s", typ, code, out, errs)
		}
	}
	if code, _, errs = command(t, "", "ping", "--dir", dirs[0], "nobody"); code != exitUnreachable {
		t.Errorf("ping of nobody: exit code %d: %s", code, errs)
	}
	if code, _, errs = command(t, "", "nc", "--dir", dirs[0], "beta", "9"); code != exitUnreachable || !strings.Contains(errs, "refused") {
		t.Errorf("nc to a closed port: exit code %d: %s", code, errs)
	}
	if code := stopA(); code != 0 {
		t.Errorf("up ended with %d: %s", code, outA)
	}
	if _, err := os.Stat(filepath.Join(dirs[0], socketName)); err == nil {
		t.Error("the socket is still there")
	}
}

func TestServe(t *testing.T) {
	lab(t)
	tmp := t.TempDir()
	www := filepath.Join(tmp, "www")
	if err := os.MkdirAll(www, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(www, "hello.txt"), []byte("hello from a folder"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tmp, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../secret", filepath.Join(www, "link")); err != nil {
		t.Fatal(err)
	}
	local, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello from a port") })}
	go hs.Serve(local)
	defer hs.Close()

	folder, _ := background(t, "serve", "--dir", filepath.Join(tmp, "f"), "--hostname", "folder", www)
	port, _ := background(t, "serve", "--dir", filepath.Join(tmp, "p"), "--hostname", "port", "--port", "80", local.Addr().String())
	folder.await(t, "http://folder.tailnode.internal\n")
	port.await(t, "port.tailnode.internal:80")

	s := &tailnode.Server{Hostname: "client", Store: tailnode.NewMemoryStore()}
	defer s.Close()
	hc := s.HTTPClient()
	defer hc.CloseIdleConnections()
	for url, want := range map[string]string{
		"http://folder/hello.txt": "hello from a folder",
		"http://folder/link":      "!secret",
		"http://port/":            "hello from a port",
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		body, err := get(ctx, hc, url)
		cancel()
		if no, ok := strings.CutPrefix(want, "!"); ok {
			if err == nil || strings.Contains(body, no) {
				t.Errorf("%s led out of the folder", url)
			}
		} else if err != nil || body != want {
			t.Errorf("%s: %q, %v", url, body, err)
		}
	}
}

// TestControl administers a server that another command runs.
func TestControl(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	if code, _, errs := command(t, "", "control", "nodes", "--dir", dir); code != exitFailure || !strings.Contains(errs, "tailnode control") {
		t.Errorf("without a server: exit code %d: %s", code, errs)
	}
	out, stop := background(t, "control", "--dir", dir, "--addr", "127.0.0.1:0", "--with-relay", "127.0.0.1:0")
	var url string
	if _, err := fmt.Sscanf(out.await(t, "join with it"), "The coordination server is at %s", &url); err != nil {
		t.Fatal(err)
	}
	code, key, errs := command(t, "", "control", "auth-key", "--dir", dir, "--reusable", "--tag", "tag:web")
	if code != 0 {
		t.Fatalf("auth-key: exit code %d: %s", code, errs)
	}
	node, stopNode := background(t, "up", "--dir", filepath.Join(dir, "n"), "--control-url", url, "--auth-key", strings.TrimSpace(key), "--hostname", "web")
	node.await(t, "Ctrl-C")
	code, list, errs := command(t, "", "control", "--dir", dir, "nodes") // the flag may stand before the command too
	if code != 0 || !strings.Contains(list, "web") || !strings.Contains(list, "tag:web") || !strings.Contains(list, "online") {
		t.Errorf("nodes: exit code %d: %s%s", code, list, errs)
	}
	visitor, _ := background(t, "up", "--dir", filepath.Join(dir, "v"), "--control-url", url, "--hostname", "visitor")
	text := visitor.await(t, "visit: ")
	login := strings.Fields(text[strings.Index(text, "visit: "):])[1]
	if code, _, errs := command(t, "", "control", "approve", "--dir", dir, login); code != 0 {
		t.Errorf("approve: exit code %d: %s", code, errs)
	}
	visitor.await(t, "Ctrl-C")
	if code, _, errs := command(t, "", "control", "delete", "--dir", dir, "visitor"); code != 0 {
		t.Errorf("delete: exit code %d: %s", code, errs)
	}
	for _, sub := range []string{"auth-keys", "logins", "nodes"} {
		code, out, errs := command(t, "", "control", sub, "--dir", dir, "--json")
		if code != 0 || !json.Valid([]byte(out)) {
			t.Errorf("%s --json: exit code %d: %s%s", sub, code, out, errs)
		}
	}
	stopNode()
	stop()
}

// TestApproveTags lets nodes in that ask for a tag. They get what the administrator says, and no more.
func TestApproveTags(t *testing.T) {
	dir := t.TempDir()
	cs := &coord.Server{Dir: dir}
	if err := cs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer cs.Close()
	defer http.DefaultClient.CloseIdleConnections()
	for i, c := range []struct {
		flags []string
		tags  []string
		says  string
	}{
		{nil, nil, "asked for tag:admin and did not get that"},
		{[]string{"--tag", "tag:web", "--tag", "tag:db"}, []string{"tag:web", "tag:db"}, "asked for tag:admin and did not get that"},
		{[]string{"--tag", "tag:admin"}, []string{"tag:admin"}, ""},
		{[]string{"--requested-tags"}, []string{"tag:admin"}, ""},
	} {
		name := fmt.Sprintf("n%d", i)
		node := &tailnode.Server{Hostname: name, ControlURL: cs.BaseURL(), Store: tailnode.NewMemoryStore(), AdvertiseTags: []string{"tag:admin"}}
		urls := newOutput()
		node.UserLogf = func(format string, args ...any) { fmt.Fprintf(urls, format+"\n", args...) }
		if err := node.Start(); err != nil {
			t.Fatal(err)
		}
		text := urls.await(t, cs.BaseURL()+"/register/")
		login := strings.Fields(text[strings.Index(text, cs.BaseURL()+"/register/"):])[0]
		if code, out, errs := command(t, "", "control", "logins", "--dir", dir); code != 0 || !strings.Contains(out, "tag:admin") {
			t.Errorf("logins: exit code %d: %s%s", code, out, errs)
		}
		code, _, errs := command(t, "", append(append([]string{"control", "approve", "--dir", dir}, c.flags...), login)...)
		if code != 0 || c.says == "" && errs != "" || !strings.Contains(errs, c.says) {
			t.Errorf("approve %v: exit code %d, said %q", c.flags, code, errs)
		}
		if n, err := cs.Node(name); err != nil || !slices.Equal(n.Tags, c.tags) {
			t.Errorf("approve %v: tags %v, %v", c.flags, n.Tags, err)
		}
		node.Close()
	}
}

func TestRelay(t *testing.T) {
	out, stop := background(t, "relay", "--addr", "127.0.0.1:0", "--stun-addr", "127.0.0.1:0", "--json")
	text := out.await(t, "}\n")
	var r relay.Region
	if err := json.Unmarshal([]byte(text), &r); err != nil || r.RegionID != relayRegion || len(r.Nodes) != 1 || r.Nodes[0].DERPPort == 0 || r.Nodes[0].CertName == "" {
		t.Errorf("%v: %s", err, text)
	}
	if code := stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestWaits gives up on a node that somebody has to let in first: that is not just a time-out.
func TestWaits(t *testing.T) {
	cs := &coord.Server{RequireMachineApproval: true}
	if err := cs.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer cs.Close()
	key, err := cs.CreateAuthKey(coord.AuthKeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ key, state, says string }{
		{"", "NeedsLogin", "/register/"},
		{key, "NeedsMachineAuth", "approve this machine"},
	} {
		s := &tailnode.Server{Hostname: "n", ControlURL: cs.BaseURL(), AuthKey: c.key, Store: tailnode.NewMemoryStore(), UserLogf: func(string, ...any) {}}
		defer s.Close()
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		lc, err := s.LocalClient()
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.After(patience); ; {
			changed, err := lc.Changed()
			if err != nil {
				t.Fatal(err)
			}
			if st, err := lc.StatusWithoutPeers(t.Context()); err == nil && st.BackendState == c.state {
				break
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("%s does not come", c.state)
			}
		}
		a := &app{in: strings.NewReader(""), out: io.Discard, err: io.Discard}
		cmd := a.upCommand()
		cmd.Action = func(ctx context.Context, cmd *cli.Command) error {
			_, err := a.up(ctx, cmd, s)
			return err
		}
		if err := cmd.Run(t.Context(), []string{"up", "--timeout", "1ms"}); err == nil || exitCode(err) != exitAuth || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.state, err)
		}
	}
}

// failing is a node whose pings fail.
type failing struct {
	joined
	err error
}

func (f failing) Ping(context.Context, netip.Addr, tailnode.PingType) (*tailnode.PingResult, error) {
	return nil, f.err
}

// TestPingErrors: a reply that does not come is counted, any other error ends the command.
func TestPingErrors(t *testing.T) {
	refused := &tailnode.Error{Op: "ping", Code: tailnode.CodeUnreachable, Err: errors.New("no such node")}
	for _, c := range []struct {
		err  error
		code int
		says string
	}{
		{&tailnode.Error{Op: "ping", Code: tailnode.CodeTimeout, Err: context.DeadlineExceeded}, exitTimeout, "no reply"},
		{context.DeadlineExceeded, exitTimeout, "no reply"},
		{fmt.Errorf("the node that runs: %w", io.ErrUnexpectedEOF), exitFailure, "unexpected EOF"},
		{refused, exitUnreachable, "no such node"},
	} {
		a := &app{in: strings.NewReader(""), out: io.Discard, err: io.Discard}
		cmd := a.pingCommand()
		cmd.Action = func(ctx context.Context, cmd *cli.Command) error {
			return a.pings(ctx, cmd, failing{err: c.err}, netip.MustParseAddr("100.64.0.9"))
		}
		if err := cmd.Run(t.Context(), []string{"ping", "-c", "1"}); err == nil || exitCode(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %v", c.err, err)
		}
	}
}

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"help"}, 0, ""},
		{[]string{}, 0, ""},
		{[]string{"--version"}, 0, ""},
		{[]string{"nonsense"}, exitUsage, "nonsense"},
		{[]string{"up", "--nonsense"}, exitUsage, "nonsense"},
		{[]string{"serve"}, exitUsage, "one argument"},
		{[]string{"serve", "no/such/folder"}, exitUsage, "no/such/folder"},
		{[]string{"nc", "x"}, exitUsage, "two arguments"},
		{[]string{"ping"}, exitUsage, "one argument"},
		{[]string{"ping", "--count", "-1", "x"}, exitUsage, "--count"},
		{[]string{"up", "extra"}, exitUsage, `"extra"`},
		{[]string{"status", "extra"}, exitUsage, `"extra"`},
		{[]string{"demo", "extra"}, exitUsage, `"extra"`},
		{[]string{"relay", "extra"}, exitUsage, `"extra"`},
		{[]string{"netcheck", "extra"}, exitUsage, `"extra"`},
		{[]string{"control", "auth-key", "extra"}, exitUsage, `"extra"`},
		{[]string{"control", "auth-keys", "extra"}, exitUsage, `"extra"`},
		{[]string{"control", "nodes", "extra"}, exitUsage, `"extra"`},
		{[]string{"control", "logins", "extra"}, exitUsage, `"extra"`},
		{[]string{"control", "auth-key", "--nonsense"}, exitUsage, "nonsense"},
		{[]string{"control", "approve", "--nonsense"}, exitUsage, "nonsense"},
		{[]string{"relay", "--cert", "x"}, exitUsage, "--key"},
		{[]string{"control", "nonsense"}, exitUsage, "nonsense"},
		{[]string{"control", "approve", "--tag", "tag:x", "--requested-tags", "y"}, exitUsage, "exclude each other"},
		{[]string{"up", "--dir", dir, "--control-url", "ftp://x"}, exitUsage, "ftp://x"},
		{[]string{"up", "--dir", dir, "--relay-server-static-endpoints", "1.2.3.4:5"}, exitUsage, "--relay-server-port"},
		{[]string{"up", "--dir", dir, "--relay-server-port", "0", "--relay-server-static-endpoints", "1.2.3.4"}, exitUsage, "1.2.3.4"},
		{[]string{"up", "--dir", dir, "--relay-server-port", "70000"}, exitUsage, "70000"},
		{[]string{"up", "--dir", dir, "--tag", "web"}, exitUsage, "tag:name"},
		{[]string{"up", "--dir", dir, "--auth-key", "file:/no/such/file"}, exitFailure, "/no/such/file"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			code, out, errs := command(t, "", c.args...)
			if code != c.code || !strings.Contains(errs, c.says) {
				t.Errorf("exit code %d, want %d; said %q, want %q", code, c.code, errs, c.says)
			}
			if c.code == 0 && out == "" {
				t.Error("nothing was printed")
			}
		})
	}
}

// TestTimeout gives up on a server that is not there.
func TestTimeout(t *testing.T) {
	for wait := time.Second / 4; ; wait *= 4 {
		code, _, errs := command(t, "", "up", "--dir", t.TempDir(), "--control-url", "http://127.0.0.1:1", "--timeout", wait.String())
		if strings.Contains(errs, "before control answered") && wait < patience {
			continue // it had not even been tried
		}
		if code != exitTimeout || !strings.Contains(errs, "refused") {
			t.Errorf("exit code %d: %s", code, errs)
		}
		return
	}
}
