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
	dual6 := func(def string) State {
		return State{Addrs: addrs("2001:db8::1", "2001:db8::2"), Default6: netip.MustParseAddr(def), DefaultInterface: "eth0"}
	}
	wired := State{Addrs: home.Addrs, Default4: home.Default4, DefaultInterface: "eth0"}
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
		{"another IPv6 address, the old one stays", dual6("2001:db8::1"), dual6("2001:db8::2"), 0, true, false},
		{"another interface has the way out", wired, State{Addrs: wired.Addrs, Default4: wired.Default4, DefaultInterface: "wlan0"}, 0, true, true},
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

// fake is a network that tells of changes.
type fake struct {
	mu        sync.Mutex
	cur       State
	looks     int
	asleep    time.Duration
	event     func()
	stopped   bool
	changes   chan Change
	watchFail bool
	getFails  int // so many times
}

func (f *fake) monitor(t *testing.T) *Monitor {
	f.changes = make(chan Change, 100)
	m, err := New(Config{
		OnChange: func(c Change) { f.changes <- c },
		Get: func() (State, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.looks++
			if f.getFails > 0 {
				f.getFails--
				return State{}, errors.New("not now")
			}
			return f.cur, nil
		},
		Watch: func(event func()) (func(), error) {
			if f.watchFail {
				return nil, errors.New("denied")
			}
			f.event = event
			return func() { f.stopped = true }, nil
		},
		suspended: func() time.Duration {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.asleep
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (f *fake) set(s State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cur = s
}

func (f *fake) took() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.looks
	f.looks = 0
	return n
}

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := State{Addrs: addrs("10.0.0.1")}, State{Addrs: addrs("10.0.0.2")}
		f := &fake{cur: a}
		m := f.monitor(t)
		defer m.Close()
		time.Sleep(10*time.Minute + time.Second)
		if n := f.took(); n != 11 {
			t.Errorf("%d looks in ten quiet minutes", n)
		}
		f.set(b)
		start := time.Now()
		f.event()
		if c := <-f.changes; time.Since(start) != settle || !c.New.Equal(b) {
			t.Errorf("after %v: %+v", time.Since(start), c)
		}
		// A storm: ten seconds of an event each millisecond.
		f.took()
		for i := range 10000 {
			if i == 9000 {
				f.set(a)
			}
			f.event()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(2 * gap) // the last of it is not missed
		if n := f.took(); n > 12 || len(f.changes) != 1 {
			t.Errorf("%d looks and %d changes in a storm", n, len(f.changes))
		}
		m.Close()
		if !f.stopped {
			t.Error("still watching")
		}
	})
}

func TestEventsDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{cur: State{Addrs: addrs("10.0.0.1")}, watchFail: true}
		m := f.monitor(t)
		defer m.Close()
		f.set(State{})
		start := time.Now()
		if <-f.changes; time.Since(start) != DefaultInterval {
			t.Errorf("after %v", time.Since(start))
		}
	})
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{cur: State{Addrs: addrs("10.0.0.1")}}
		m := f.monitor(t)
		defer m.Close()
		nod := func(d time.Duration) { f.mu.Lock(); f.asleep += d; f.mu.Unlock() }
		start := time.Now()
		nod(time.Hour)
		if c := <-f.changes; c.Slept != time.Hour || !c.Major || time.Since(start) > DefaultInterval {
			t.Errorf("%+v after %v", c, time.Since(start))
		}
		nod(time.Minute)
		start = time.Now()
		f.event() // as links come up again
		if c := <-f.changes; c.Slept != time.Minute || time.Since(start) != 0 {
			t.Errorf("%+v after %v", c, time.Since(start))
		}
		for range 100 { // a clock that runs fast
			nod(time.Second)
			time.Sleep(DefaultInterval)
		}
		if len(f.changes) > 0 {
			t.Errorf("slept %v", (<-f.changes).Slept)
		}
	})
}

// TestSleepWhileTheSystemIsMute: a host that wakes up may not say at once what its network is. That it has slept is told nevertheless.
func TestSleepWhileTheSystemIsMute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{cur: State{Addrs: addrs("10.0.0.1")}}
		m := f.monitor(t)
		defer m.Close()
		f.mu.Lock()
		f.asleep, f.getFails = time.Hour, 3
		f.mu.Unlock()
		start := time.Now()
		if c := <-f.changes; c.Slept != time.Hour || !c.Major || time.Since(start) > DefaultInterval+3*gap {
			t.Errorf("%+v after %v", c, time.Since(start))
		}
		time.Sleep(time.Hour)
		if len(f.changes) > 0 {
			t.Errorf("told again: %+v", <-f.changes)
		}
	})
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
