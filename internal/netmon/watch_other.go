//go:build !linux && !darwin && !dragonfly && !freebsd && !netbsd && !openbsd

package netmon

import "errors"

// watch is not there: the network is polled.
func watch(func()) (stop func(), err error) { return nil, errors.ErrUnsupported }
