//go:build !linux && !windows && !darwin && !dragonfly && !freebsd && !netbsd && !openbsd

package netmon

import "net/netip"

// Other systems do not tell without a library of their own, so ports are not mapped there.
func defaultGateway4() (netip.Addr, error) { return netip.Addr{}, ErrNoGateway }

func defaultGateway6() (netip.Addr, error) { return netip.Addr{}, ErrNoGateway }
