//go:build !linux

package netmon

import "time"

var started = time.Now()

// suspended returns by how much the wall clock has got ahead of the monotonic one, which stands still while the host sleeps. (A clock
// that is set ahead looks the same, and costs no more than a sleep does.)
func suspended() time.Duration {
	now := time.Now()
	return now.Round(0).Sub(started.Round(0)) - now.Sub(started)
}
