//go:build unix

package child

import "syscall"

// cpu returns the processor time that this process has used, in seconds.
func cpu() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// CPU is cpu for the benchmark's own process, in which the relay runs.
func CPU() float64 { return cpu() }
