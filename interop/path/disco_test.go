package path

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	ttailcfg "tailscale.com/tailcfg"
	"tailscale.com/tsnet"

	"github.com/tailnode/tailnode/internal/node"
	"github.com/tailnode/tailnode/interop/harness"
)

// logged keeps what upstream logs.
type logged struct {
	mu    sync.Mutex
	lines []string
}

func (l *logged) logf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *logged) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if strings.Contains(line, s) {
			return true
		}
	}
	return false
}

// TestDiscoKeyOfUpstream: control is away when upstream's node takes another disco key. What it then says through the tunnel is
// all that we learn of that, and upstream takes what we say.
func TestDiscoKeyOfUpstream(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	tn := newTailnet(t)
	log := new(logged)
	theirs := &tsnet.Server{Dir: t.TempDir(), Hostname: "theirs", ControlURL: tn.control.URL(), AuthKey: tn.authKey(), Logf: log.logf, UserLogf: log.logf}
	t.Cleanup(func() { theirs.Close() })
	if _, err := theirs.Up(ctx); err != nil {
		t.Fatal(err)
	}
	us, _ := tn.ours(ctx, "ours")
	theirIP, _ := theirs.TailscaleIPs()
	lc, err := theirs.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := us.Await(ctx, func(st node.Status) (bool, error) {
		p := st.Netmap.Route(theirIP)
		return p != nil && p.HomeDERP != 0 && len(p.Endpoints) > 0, nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := us.Ping(ctx, theirIP, "disco"); err != nil {
		t.Fatal(err)
	}
	if _, err := us.Ping(ctx, theirIP, "TSMP"); err != nil {
		t.Fatal(err)
	}
	if err := harness.Until(ctx, "upstream to take our advertisement", func() (bool, error) {
		return log.has("got TSMP disco key advertisement"), nil
	}); err != nil {
		t.Error(err)
	}

	if err := tn.control.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := lc.DebugAction(ctx, "rotate-disco-key"); err != nil {
		t.Fatal(err)
	}
	short, stop := context.WithTimeout(ctx, 2*time.Second)
	_, err = us.Ping(short, theirIP, "disco")
	stop()
	if err == nil {
		t.Error("a ping to the old key is answered")
	}
	if r, err := lc.Ping(ctx, ourIP(us), ttailcfg.PingTSMP); err != nil || r.Err != "" {
		t.Fatal(err, r)
	}
	if _, err := us.Ping(ctx, theirIP, "disco"); err != nil {
		t.Errorf("after upstream has told its key: %v", err)
	}
}
