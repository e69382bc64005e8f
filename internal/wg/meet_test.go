package wg

import (
	"strings"
	"testing"
	"time"
)

// TestMeeting reads as conversations: at some millisecond something happens, and an initiation goes or does not.
// After each step the machine is asked when it wants to be called next; jitter may add a quarter to that.
func TestMeeting(t *testing.T) {
	type step struct {
		at   int // ms
		what string
		send bool // an initiation goes
		next int  // ms at which something is due, of the least jitter; -1: never
	}
	tests := []struct {
		name    string
		session bool
		steps   []step
	}{
		{"nothing is heard", false, []step{
			{0, "want", true, 250}, {10, "want", false, 250}, {313, "due", true, 813}, {938, "due", true, 1938},
			{2188, "due", true, 4188}, {4688, "due", true, 8688}, {9688, "due", true, 14688}, {15021, "due", true, 20021},
		}},
		{"given up", false, []step{
			{0, "want", true, 250}, {90_000, "due", false, -1}, {90_001, "alive", false, -1}, {90_002, "want", true, 90_502},
		}},
		{"not there, and then it is", false, []step{
			{0, "want", true, 250}, {1, "gone", false, 26}, {2, "gone", false, 26}, {26, "due", true, 276}, {27, "gone", false, 77},
			{77, "due", true, 327}, {78, "gone", false, 178}, {178, "due", true, 428}, {180, "done", false, -1},
		}},
		{"not there for long", false, []step{
			{0, "want", true, 250}, {1, "gone", false, 26}, {26, "due", true, 276}, {27, "gone", false, 77}, {77, "due", true, 327},
			{78, "gone", false, 178}, {178, "due", true, 428}, {179, "gone", false, 379}, {379, "due", true, 629}, {380, "gone", false, 780},
			{780, "due", true, 1030}, {781, "gone", false, 1581}, {1581, "due", true, 1831}, {1582, "gone", false, 3182},
			{3182, "due", true, 3432}, {3183, "gone", false, 6383}, {6383, "due", true, 6633}, {6634, "gone", false, 11634},
		}},
		{"it shows itself", false, []step{
			{0, "want", true, 250}, {1, "gone", false, 26}, {3, "alive", true, 253}, {4, "alive", false, 253}, {30, "alive", true, 280},
		}},
		{"one that is lost, and then replaced, counts once", false, []step{
			{0, "want", true, 250}, {313, "due", true, 813}, {314, "gone", false, 339}, {320, "alive", true, 820},
		}},
		{"it shows itself and is far", false, []step{
			{0, "want", true, 250}, {100, "alive far", false, 250}, {150, "alive far", true, 400},
		}},
		{"no way to send", false, []step{
			{0, "want", true, 250}, {0, "failed", false, 250}, {1, "alive", true, 251},
		}},
		{"it is there and we want nothing", false, []step{{0, "alive", false, -1}, {1, "gone", false, -1}, {2, "failed", false, -1}}},
		{"it looks for us", false, []step{
			{0, "wanted", false, 150}, {10, "wanted", false, 150}, {150, "due", true, 400},
		}},
		{"it looks for us and has found us", false, []step{{0, "wanted", false, 150}, {10, "done", false, -1}}},
		{"we look for each other", false, []step{
			{0, "want", true, 250}, {1, "wanted", false, 250}, {2, "alive", false, 250}, {30, "alive", true, 280},
		}},
		{"it looks for us and we begin", false, []step{{0, "wanted", false, 150}, {10, "want", true, 260}}},
		{"renewal with a session", true, []step{
			{0, "want", true, 5000}, {1, "gone", false, 5000}, {100, "alive", false, 5000}, {101, "wanted", false, 5000}, {5334, "due", true, 10334},
		}},
		{"started anew", false, []step{
			{0, "want", true, 250}, {313, "due", true, 813}, {314, "renew", false, 813}, {315, "want", true, 565},
		}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			const ms = int64(time.Millisecond)
			tm := defaultTiming
			tm.jitter = 0
			var m meeting
			for i, s := range tc.steps {
				now := int64(s.at)*ms + 1
				send, ready := false, false
				switch s.what {
				case "want":
					send = m.want(&tm, now)
				case "due":
					ready, _ = m.due(&tm, now, tc.session)
					send = ready && m.ready(now)
				case "alive":
					send = m.alive(&tm, now, 0, tc.session)
				case "alive far":
					send = m.alive(&tm, now, 50*ms, tc.session)
				case "gone":
					m.gone(&tm, now, tc.session)
				case "failed":
					m.failed(tc.session)
				case "wanted":
					m.wanted(&tm, now, tc.session)
				case "renew":
					m.renew()
				case "done":
					m.done()
				default:
					t.Fatal(s.what)
				}
				if send {
					m.sent(&tm, now, tc.session)
				}
				next := -1
				if at := m.at(); at != never {
					next = int((at - 1) / ms)
				}
				if send != s.send || next != s.next {
					t.Fatalf("step %d, %+v: sent %v, next %d", i, s, send, next)
				}
			}
		})
	}
}

func TestBackoffIsBounded(t *testing.T) {
	for n := range 100 {
		if w := backoff(int64(25*time.Millisecond), n, int64(5*time.Second)); w <= 0 || w > int64(5*time.Second) {
			t.Errorf("%d: %v", n, time.Duration(w))
		}
	}
}

// TestGone has the relay say that nobody is there.
func TestGone(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		l.set(func() { l.down = true })
		a.send(1)
		a.peer.Gone()
		l.set(func() { l.down = false })
		began := time.Now()
		for b.count(1, 1) == 0 {
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(began); took > 100*time.Millisecond { // virtual time
			t.Errorf("the packet came after %v", took)
		}
	})
}

// TestWanted has a peer look for us whose own initiation is lost.
func TestWanted(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		l.set(func() { l.down = true })
		a.send(1)
		l.set(func() { l.down = false })
		b.peer.Wanted()
		b.peer.Wanted()
		began := time.Now()
		for b.count(1, 1) == 0 {
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(began); took > 200*time.Millisecond {
			t.Errorf("the packet came after %v", took)
		}
		if b.dev.Stats().Handshakes+a.dev.Stats().Handshakes != 1 {
			t.Error("more than one handshake")
		}
	})
}

// TestRenew has a peer start anew, without a session, and what was sent to its last life come to the new one.
func TestRenew(t *testing.T) {
	inBubble(t, func(t *testing.T, l *lossy) {
		a, b := l.ends[0], l.ends[1]
		a.send(1)
		settle()
		a.send(2)
		b.send(1)
		settle()
		b.peer.mu.Lock()
		b.peer.dropSessions()
		b.peer.mu.Unlock()
		a.send(3)
		settle()
		if b.count(3, 3) != 0 {
			t.Fatal("it has a session")
		}
		a.peer.Renew()
		settle()
		a.send(4)
		settle()
		if b.count(2, 2) != 1 || b.count(3, 3) != 1 || b.count(4, 4) != 1 {
			t.Errorf("want the unanswered packet once more, and no other: %d %d %d", b.count(2, 2), b.count(3, 3), b.count(4, 4))
		}
		time.Sleep(time.Minute)
		a.peer.sendMu.Lock()
		defer a.peer.sendMu.Unlock()
		if a.peer.kept.buf != nil {
			t.Error("the room for what was sent last is not given back")
		}
	})
}

func TestIsSYN(t *testing.T) {
	v4 := func(ihl, proto, flags byte) []byte {
		b := make([]byte, int(ihl)*4+20)
		b[0], b[9], b[int(ihl)*4+13] = 0x40|ihl, proto, flags
		return b
	}
	v6 := func(next, flags byte) []byte {
		b := make([]byte, 60)
		b[0], b[6], b[53] = 0x60, next, flags
		return b
	}
	for _, tc := range []struct {
		b    []byte
		want bool
	}{
		{v4(5, 6, 0x02), true}, {v4(5, 6, 0xc2), true}, {v4(6, 6, 0x02), true}, {v6(6, 0x02), true},
		{v4(5, 6, 0x12), false}, {v4(5, 6, 0x10), false}, {v4(5, 17, 0x02), false}, {v6(17, 0x02), false}, {v6(6, 0x12), false},
		{v4(5, 6, 0x02)[:39], false}, {v6(6, 2)[:59], false}, {v4(15, 6, 0x02)[:70], false}, {nil, false}, {make([]byte, 60), false},
	} {
		if isSYN(tc.b) != tc.want {
			t.Errorf("%x: %v", tc.b, !tc.want)
		}
	}
}

func TestKept(t *testing.T) {
	const ms = int64(time.Millisecond)
	keep := func(k *kept, now, heard int64, p ...string) {
		for _, b := range p {
			if k.wants(now, heard) {
				k.add([]byte(b), now)
			}
		}
	}
	read := func(s Source) string {
		var out []string
		var b [2 * keptBytes]byte
		for n := s.Next(b[:]); n > 0; n = s.Next(b[:]) {
			out = append(out, string(b[:n]))
		}
		return strings.Join(out, " ")
	}
	many := strings.Fields(strings.Repeat("x ", 20))
	for _, tc := range []struct {
		name string
		do   func(k *kept)
		want string // taken at 100 ms, the peer last heard at 10 ms
	}{
		{"nothing", func(k *kept) {}, ""},
		{"in order", func(k *kept) { keep(k, 50*ms, 10*ms, "a", "bb", "c") }, "a bb c"},
		{"data flows", func(k *kept) { keep(k, 12*ms, 10*ms, "a") }, ""},
		{"answered since", func(k *kept) { keep(k, 8*ms, 1*ms, "a") }, ""},
		{"answered, and then more", func(k *kept) { keep(k, 8*ms, 1*ms, "a"); keep(k, 50*ms, 10*ms, "b") }, "b"},
		{"the first few", func(k *kept) { keep(k, 50*ms, 10*ms, many...) }, strings.Join(many[:keptPackets], " ")},
		{"few bytes", func(k *kept) { keep(k, 50*ms, 10*ms, strings.Repeat("y", keptBytes), "z") }, strings.Repeat("y", keptBytes)},
		{"too large", func(k *kept) { keep(k, 50*ms, 10*ms, strings.Repeat("y", keptBytes+1), "z") }, "z"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var k kept
			tc.do(&k)
			if got := read(k.take(100*ms, 10*ms)); got != tc.want {
				t.Errorf("%.40q, want %.40q", got, tc.want)
			}
			if k.buf != nil || k.len != 0 {
				t.Error("kept although taken")
			}
		})
	}
	var k kept
	keep(&k, 50*ms, 10*ms, "a")
	if got := read(k.take(50*ms+keptFor+1, 10*ms)); got != "" {
		t.Errorf("too old: %q", got)
	}
	keep(&k, 50*ms, 10*ms, many...)
	if k.wants(51*ms, 10*ms) || !k.wants(51*ms+keptFor, 10*ms) {
		t.Error("what is too old leaves no room for what is new")
	}
	if at := k.tidy(60 * ms); k.buf != nil && at == never {
		t.Error("never tidied")
	}
	for now := 51*ms + keptFor; k.buf != nil; now += keptFor {
		if k.tidy(now) == never && k.buf != nil {
			t.Fatal("kept for good")
		}
	}
}
