package node

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// What gives memory back after a large map runs once at a time, and ends with the node.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n Node
		n.ctx, n.cancel = context.WithCancel(context.Background())
		began := time.Now()
		n.settle()
		n.settle()
		n.wg.Wait()
		if d := time.Since(began); d != settleAfter || n.settling.Load() {
			t.Errorf("it took %v; under way: %v", d, n.settling.Load())
		}
		n.settle()
		synctest.Wait()
		n.cancel()
		n.wg.Wait()
		if d := time.Since(began); d != settleAfter {
			t.Errorf("it did not end with the node but %v after the first began", d)
		}
	})
}
