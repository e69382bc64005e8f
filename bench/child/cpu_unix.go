//go:build unix

package child

import "syscall"

// cpu returns the processor time that this process has used, in seconds.
func cpu() float64 { return usage(syscall.RUSAGE_SELF) }

// CPU is cpu for the benchmark's own process, in which the relay runs.
func CPU() float64 { return cpu() }

// EndedCPU is what this process's children have used that have ended and been waited for.
func EndedCPU() float64 { return usage(syscall.RUSAGE_CHILDREN) }

func usage(who int) float64 {
	var u syscall.Rusage
	if syscall.Getrusage(who, &u) != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
