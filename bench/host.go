package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/tailnode/tailnode/bench/child"
)

// What follows reads Linux's /proc; elsewhere its answers are zero, and the table leaves them out.

// tick is the unit of processor time in /proc, USER_HZ, which is 100 on every architecture that Go runs on.
const tick = time.Second / 100

// procStatus returns a field of /proc/PID/status, without its unit.
func procStatus(pid int, field string) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			f, _ := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return f
		}
	}
	return 0
}

// residentMB and peakMB return what a process has, and most ever had since resetPeak, in memory.
func residentMB(p *proc) float64 { return procStatus(p.cmd.Process.Pid, "VmRSS") * 1024 / 1e6 }
func peakMB(p *proc) float64     { return procStatus(p.cmd.Process.Pid, "VmHWM") * 1024 / 1e6 }

func resetPeak(p *proc) {
	os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0)
}

// usage is what all processors have been busy with since the system's start.
type usage struct {
	busy time.Duration // in all
	own  time.Duration // this process and its descendants, those that have ended included
	each map[int]process
}

type process struct {
	name   string
	parent int
	cpu    time.Duration
}

// processors reads the usage. own counts this process, what runs below it, and all of those that have ended.
func processors() (u usage) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return u
	}
	line, _, _ := strings.Cut(string(b), "\n")
	for i, f := range strings.Fields(line) {
		// cpu user nice system idle iowait irq softirq steal guest guest_nice; the last two are in the first
		if i >= 1 && i <= 8 && i != 4 && i != 5 {
			u.busy += ticks(f)
		}
	}
	u.each = map[int]process{}
	dirs, _ := os.ReadDir("/proc")
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// pid (name) state parent ... the 14th and 15th are user and system time; a name may have spaces and brackets
		from, to := strings.IndexByte(string(b), '('), strings.LastIndexByte(string(b), ')')
		f := strings.Fields(string(b)[to+1:])
		if from < 0 || len(f) < 13 {
			continue
		}
		parent, _ := strconv.Atoi(f[1])
		u.each[pid] = process{string(b[from+1 : to]), parent, ticks(f[11]) + ticks(f[12])}
	}
	u.own = time.Duration((child.CPU() + child.EndedCPU()) * float64(time.Second))
	self := os.Getpid()
	for pid, p := range u.each {
		if pid != self && u.below(pid, self) {
			u.own += p.cpu
		}
	}
	return u
}

func ticks(s string) time.Duration {
	n, _ := strconv.ParseInt(s, 10, 64)
	return time.Duration(n) * tick
}

// below reports whether pid is root or one of its descendants.
func (u usage) below(pid, root int) bool {
	for range 64 {
		if pid == root {
			return true
		}
		p, ok := u.each[pid]
		if !ok || p.parent == 0 {
			return false
		}
		pid = p.parent
	}
	return false
}

// account is the beginning of a span of time over which others' use of the processors is told.
type account struct {
	at time.Time
	usage
}

func newAccount() account { return account{time.Now(), processors()} }

// others returns how many processors, on average, were busy with anything but the benchmark since a was made, and who they were, with
// their processor time in seconds, as far as they are there now. Time that the kernel spends on our packets outside of our
// processes counts as others', so that the number is an upper bound.
func (a account) others() (float64, map[string]float64) {
	now := processors()
	who := map[string]float64{}
	self := os.Getpid()
	for pid, p := range now.each {
		was := a.each[pid] // zero if it is new
		if was.name != p.name {
			was.cpu = 0
		}
		if d := p.cpu - was.cpu; d > 0 && !now.below(pid, self) {
			who[p.name] += d.Seconds()
		}
	}
	return max(0, float64(now.busy-a.busy-(now.own-a.own))/float64(time.Since(a.at))), who
}

// processor is the processors' name.
func processor() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown processor"
}

// loadAverage is the number of runnable processes over the last minute.
func loadAverage() float64 {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	f, _ := strconv.ParseFloat(strings.Fields(string(b))[0], 64)
	return f
}

func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// patience is what is left of the time to be spent in waiting for quiet moments.
type patience time.Duration

// wait waits until others use less than a quarter of one processor, for no longer than limit, and than what is left in all.
func (p *patience) wait(limit time.Duration) {
	began := time.Now()
	limit = min(limit, time.Duration(*p))
	for time.Since(began) < limit {
		a := newAccount()
		time.Sleep(250 * time.Millisecond) // what is measured is what happens in a length of time
		if others, _ := a.others(); others < 0.25 {
			break
		}
	}
	*p -= patience(time.Since(began))
}
