package flush

import (
	"slices"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAfterClose(t *testing.T) {
	var f Flusher[*int]
	f.Close()
	if f.Add(nil) {
		t.Error("queued although closed")
	}
	f.Close()
}

// TestOrder: what was added before Close is flushed, in order.
func TestOrder(t *testing.T) {
	var got []int
	f := Flusher[int]{Flush: func(x int) { got = append(got, x) }}
	want := make([]int, 1000)
	for i := range want {
		want[i] = i
		if !f.Add(i) {
			t.Fatal("refused")
		}
	}
	f.Close()
	if !slices.Equal(got, want) {
		t.Errorf("flushed %v", got)
	}
}
