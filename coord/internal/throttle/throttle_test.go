package throttle

import (
	"net/netip"
	"testing"
	"time"
)

func TestLimiter(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	l := New()
	a, same, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff:2"), netip.MustParseAddr("2001:db8:0:1::1")
	for range Burst {
		l.Failed(a, now)
	}
	if d := l.Blocked(same, now); d != 0 {
		t.Errorf("after the burst: %v", d)
	}
	l.Failed(a, now)
	if d := l.Blocked(same, now); d != period {
		t.Errorf("one more: %v", d)
	}
	if d := l.Blocked(other, now); d != 0 {
		t.Errorf("another network pays for it: %v", d)
	}
	if d := l.Blocked(a, now.Add(period)); d != 0 {
		t.Errorf("a period later: %v", d)
	}
}

// However many senders are refused, few are remembered.
func TestBounded(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	l := New()
	for i := range 3 * maxDebtors {
		l.Failed(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	if len(l.from) > maxDebtors {
		t.Errorf("%d senders are remembered", len(l.from))
	}
}
