package wg

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

func TestRate(t *testing.T) {
	var r rate
	now := int64(time.Hour)
	allowed := 0
	for range 100 {
		if r.allow(now, int64(time.Second), 5) {
			allowed++
		}
	}
	if allowed != 5 {
		t.Errorf("burst of %d, want 5", allowed)
	}
	for i := range 10 {
		now += int64(time.Second)
		if !r.allow(now, int64(time.Second), 5) || r.allow(now, int64(time.Second), 5) {
			t.Errorf("second %d: want one", i)
		}
	}
}

// flood sends n messages through the gate over one second and counts what is done with them.
func flood(g *gate, start int64, n int, src func(i int) []byte, proved bool) (c [3]int) {
	for i := range n {
		now := start + int64(i)*int64(time.Second)/int64(n)
		c[g.admit(now, func() []byte { return src(i) }, func() bool { return proved })]++
	}
	return c
}

func TestGate(t *testing.T) {
	one := func(int) []byte { return []byte("one") }
	many := func(i int) []byte {
		b, _ := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).MarshalBinary()
		return b
	}
	t.Run("calm", func(t *testing.T) {
		var g gate
		if c := flood(&g, 1, 100, many, false); c[work] != 100 {
			t.Errorf("%v", c)
		}
	})
	t.Run("flood without cookies", func(t *testing.T) {
		var g gate
		for s := range int64(5) {
			c := flood(&g, 1+s*int64(time.Second), 100_000, many, false)
			if most := freeBurst + 100; c[work] > most {
				t.Errorf("second %d: %d worked on, want %d at most", s, c[work], most)
			}
			if c[giveCookie] > 1000+cookieBurst {
				t.Errorf("second %d: %d cookies", s, c[giveCookie])
			}
		}
		if c := flood(&g, int64(time.Minute), 50, many, false); c[work] != 50 {
			t.Errorf("after the flood: %v", c)
		}
		if g.sources != nil {
			t.Error("buckets kept after the load")
		}
	})
	t.Run("flood with cookies from one source", func(t *testing.T) {
		var g gate
		flood(&g, 1, 1000, many, false)
		if c := flood(&g, 1+int64(time.Second)/2, 10_000, one, true); c[work] > freeBurst+20+sourceBurst {
			t.Errorf("%v", c)
		}
	})
	t.Run("flood with cookies from everywhere", func(t *testing.T) {
		var g gate
		flood(&g, 1, 1000, many, false)
		if c := flood(&g, 1+int64(time.Second)/2, 100_000, many, true); c[work] > freeBurst+500+provedBurst {
			t.Errorf("%v", c)
		}
	})
	t.Run("an honest source in a flood", func(t *testing.T) {
		var g gate
		flood(&g, 1, 10_000, many, false)
		now := int64(time.Second) / 2
		if v := g.admit(now, func() []byte { return []byte("honest") }, func() bool { return true }); v != work {
			t.Errorf("verdict %v", v)
		}
	})
}

func TestCookies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDevice(t, nil)
		id := d.id.Load()
		refresh := defaultTiming.cookieRefresh
		msg := make([]byte, sizeInitiation)
		mac1 := putMACs(msg, &id.pub, nil)
		if !id.checkMAC1(msg) {
			t.Fatal("mac1")
		}
		var c cookieMaker
		src := []byte("192.0.2.1:1")
		now := int64(time.Hour)
		var out [sizeCookie]byte
		c.reply(&out, id, msg, src, now, refresh)
		cookie, err := openCookie(&out, &id.pub, &mac1)
		if err != nil {
			t.Fatal(err)
		}
		putMACs(msg, &id.pub, &cookie)
		for _, tc := range []struct {
			name string
			src  string
			at   time.Duration
			want bool
		}{
			{"at once", "192.0.2.1:1", 0, true},
			{"another port", "192.0.2.1:2", 0, false},
			{"another address", "192.0.2.2:1", 0, false},
			{"as long as it is used", "192.0.2.1:1", 119 * time.Second, true},
			{"after its secret changed", "192.0.2.1:1", 121 * time.Second, true},
			{"after two changes", "192.0.2.1:1", 242 * time.Second, false},
		} {
			if got := c.checkMAC2(msg, []byte(tc.src), now+int64(tc.at), refresh); got != tc.want {
				t.Errorf("%s: %v", tc.name, got)
			}
		}
		for i := range out {
			bad := out
			bad[i] ^= 1
			if _, err := openCookie(&bad, &id.pub, &mac1); (err == nil) != (i < 8) {
				t.Errorf("byte %d changed: %v", i, err)
			}
		}
		other := mac1
		other[0] ^= 1
		if _, err := openCookie(&out, &id.pub, &other); err == nil {
			t.Error("a reply to another message was taken")
		}
	})
}

func TestStamps(t *testing.T) {
	var s stamper
	last := timestamp{}
	for range 100 {
		ts := s.next()
		if !ts.after(last) {
			t.Fatalf("%x is not after %x", ts, last)
		}
		last = ts
	}
	s.last = s.last.Add(24 * time.Hour) // the wall clock was set back
	if ts := s.next(); !ts.after(stampOf(time.Now().Add(23 * time.Hour))) {
		t.Errorf("%x went back", ts)
	}
	if got := stampOf(time.Unix(1, 0x1ffffff)); got != (timestamp{0x40, 0, 0, 0, 0, 0, 0, 11, 1, 0, 0, 0}) {
		t.Errorf("%x", got)
	}
}
