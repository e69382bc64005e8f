package tailnode_test

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/budget"
)

// TestIdleGoroutines counts what a node runs when it has nothing to do. The servers' goroutines in this process are told apart by
// what their stacks say.
func TestIdleGoroutines(t *testing.T) {
	tn := newTailnet(t)
	before := goroutines()
	tn.up("alpha")
	var new []string
	count := func() int {
		new = new[:0]
		for id, stack := range goroutines() {
			if before[id] == "" && !strings.Contains(stack, "tailnode/coord.") && !strings.Contains(stack, "tailnode/relay.") &&
				!strings.Contains(stack, "internal/derp/server.") && !strings.Contains(stack, "net/http.(*conn).serve") &&
				!strings.Contains(stack, "http2serverConn") && !strings.Contains(stack, "http2.(*serverConn)") {
				new = append(new, stack)
			}
		}
		return len(new)
	}
	// What a start has begun ends by itself: look until the number stays the same for a second, and is within the budget.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	n := count()
	for same, end := 0, time.Now().Add(time.Minute); (same < 20 || !budget.Within("goroutines.idle", float64(n))) && time.Now().Before(end); same++ {
		<-tick.C
		if now := count(); now != n {
			n, same = now, 0
		}
	}
	budget.Check(t, "goroutines.idle", float64(n))
	if t.Failed() {
		t.Log(strings.Join(new, "\n\n"))
	}
}

// goroutines returns the stack of each goroutine by its number.
func goroutines() map[string]string {
	b := make([]byte, 1<<20)
	b = b[:runtime.Stack(b, true)]
	all := map[string]string{}
	for _, s := range strings.Split(string(b), "\n\n") {
		if f := strings.Fields(s); len(f) > 1 {
			all[f[1]] = s
		}
	}
	return all
}
