package netmon

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestUsefulAddresses(t *testing.T) {
	in := addrs("192.168.1.5", "127.0.0.1", "::1", "fe80::1", "169.254.3.4", "2001:db8::5", "192.168.1.5",
		"fd7a:115c:a1e0::1", "fd00::1", "0.0.0.0", "224.0.0.1", "10.0.0.1")
	in = append(in, netip.Addr{})
	want := addrs("10.0.0.1", "169.254.3.4", "192.168.1.5", "2001:db8::5", "fd00::1")
	if got := useful(in); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestDiff(t *testing.T) {
	home := State{Addrs: addrs("192.168.1.5"), Default4: netip.MustParseAddr("192.168.1.5")}
	more := State{Addrs: addrs("172.17.0.1", "192.168.1.5"), Default4: home.Default4}
	cafe := State{Addrs: addrs("10.0.0.7"), Default4: netip.MustParseAddr("10.0.0.7")}
	dual := State{Addrs: home.Addrs, Default4: home.Default4, Default6: netip.MustParseAddr("2001:db8::1")}
	for _, tt := range []struct {
		name           string
		old, new       State
		slept          time.Duration
		changed, major bool
	}{
		{"nothing", home, home, 0, false, false},
		{"slept", home, home, time.Hour, true, true},
		{"another interface", home, more, 0, true, false},
		{"another network", home, cafe, 0, true, true},
		{"offline", home, State{}, 0, true, true},
		{"online", State{}, home, 0, true, true},
		{"IPv6 comes", home, dual, 0, true, false},
		{"IPv6 goes", dual, home, 0, true, true},
	} {
		c, changed := diff(tt.old, tt.new, tt.slept)
		if changed != tt.changed || c.Major != tt.major {
			t.Errorf("%s: changed %v, major %v", tt.name, changed, c.Major)
		}
	}
	if slept(DefaultInterval+time.Second, DefaultInterval) != 0 || slept(time.Hour, DefaultInterval) == 0 {
		t.Error("sleep")
	}
}

func TestMonitor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		cur, fail := State{Addrs: addrs("10.0.0.1")}, false
		set := func(s State, f bool) {
			mu.Lock()
			defer mu.Unlock()
			cur, fail = s, f
		}
		changes := make(chan Change, 10)
		m, err := New(Config{
			OnChange: func(c Change) { changes <- c },
			Get: func() (State, error) {
				mu.Lock()
				defer mu.Unlock()
				if fail {
					return State{}, errors.New("no")
				}
				return cur, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		time.Sleep(time.Minute)
		if len(changes) != 0 {
			t.Error("a change where there is none")
		}
		next := State{Addrs: addrs("10.0.0.2")}
		set(next, false)
		start := time.Now()
		if c := <-changes; !c.New.Equal(next) || time.Since(start) > DefaultInterval || c.Slept != 0 {
			t.Errorf("%+v after %v", c, time.Since(start))
		}
		set(State{}, false)
		start = time.Now()
		m.Poke()
		if c := <-changes; c.New.Online() || time.Since(start) != 0 || m.State().Online() {
			t.Errorf("%+v after %v", c, time.Since(start))
		}
		set(next, true)
		time.Sleep(time.Minute)
		if len(changes) != 0 {
			t.Error("a failed look is a change")
		}
		go m.Close()
		m.Close()
		m.Poke()
	})
	if _, err := New(Config{Get: func() (State, error) { return State{}, errors.New("no") }}); err == nil {
		t.Error("no error")
	}
}

func TestGet(t *testing.T) {
	s, err := Get()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSortedFunc(s.Addrs, netip.Addr.Compare) {
		t.Errorf("%v", s.Addrs)
	}
}
