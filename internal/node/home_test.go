package node

import (
	"testing"
	"time"
)

func TestNextCheck(t *testing.T) {
	if d := nextCheck(0); d != homeInterval {
		t.Errorf("%v", d)
	}
	last, inAnHour, at := time.Duration(0), 0, time.Duration(0)
	for mute := 1; mute < 100; mute++ {
		d := nextCheck(mute)
		if d < last || d < firstRetry || d > homeInterval {
			t.Fatalf("%v after %v", d, last)
		}
		if at += d; at < time.Hour {
			inAnHour++
		}
		last = d
	}
	if inAnHour > 12 {
		t.Errorf("%d checks in the first hour of a network without UDP", inAnHour)
	}
}
