//go:build !linux

package udp

import "errors"

var errIO = errors.New("input/output error")
