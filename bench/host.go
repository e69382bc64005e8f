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

// cpuTimes returns what all processors have been busy since the system's start, and what of it went to this process, the measured
// ones, and all that have ended.
func cpuTimes() (busy, own time.Duration) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	for i, f := range strings.Fields(line) {
		// cpu user nice system idle iowait irq softirq steal guest guest_nice; the last two are in the first
		if i >= 1 && i <= 8 && i != 4 && i != 5 {
			n, _ := strconv.ParseInt(f, 10, 64)
			busy += time.Duration(n) * tick
		}
	}
	own = time.Duration((child.CPU() + child.EndedCPU()) * float64(time.Second))
	for _, p := range procs {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		if f := strings.Fields(rest); len(f) > 12 {
			u, _ := strconv.ParseInt(f[11], 10, 64)
			s, _ := strconv.ParseInt(f[12], 10, 64)
			own += time.Duration(u+s) * tick
		}
	}
	return busy, own
}

// account is the beginning of a span of time over which others' use of the processors is told.
type account struct {
	at        time.Time
	busy, own time.Duration
}

func newAccount() account {
	busy, own := cpuTimes()
	return account{time.Now(), busy, own}
}

// others returns how many processors, on average, were busy with anything but the benchmark since a was made. Time that the kernel
// spends on our packets outside of our processes counts as others', so that this is an upper bound.
func (a account) others() float64 {
	busy, own := cpuTimes()
	return max(0, float64(busy-a.busy-(own-a.own))/float64(time.Since(a.at)))
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
		if a.others() < 0.25 {
			break
		}
	}
	*p -= patience(time.Since(began))
}
