//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package netmon

import (
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/net/route"
)

func defaultGateway4() (netip.Addr, error) { return defaultGateway(syscall.AF_INET, netip.Addr.Is4) }

func defaultGateway6() (netip.Addr, error) { return defaultGateway(syscall.AF_INET6, netip.Addr.Is6) }

// defaultGateway returns the gateway of the default route of a family, which is reports of an address.
func defaultGateway(family int, is func(netip.Addr) bool) (netip.Addr, error) {
	rib, err := route.FetchRIB(family, route.RIBTypeRoute, 0)
	if err != nil {
		return netip.Addr{}, err
	}
	msgs, err := route.ParseRIB(route.RIBTypeRoute, rib)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, m := range msgs {
		rm, ok := m.(*route.RouteMessage)
		if !ok || rm.Flags&syscall.RTF_UP == 0 || rm.Flags&syscall.RTF_GATEWAY == 0 || rm.Flags&scoped != 0 || len(rm.Addrs) < 2 {
			continue
		}
		dst, gw := addrOf(rm.Addrs[syscall.RTAX_DST]), addrOf(rm.Addrs[syscall.RTAX_GATEWAY])
		if !is(dst) || !is(gw) || !dst.IsUnspecified() {
			continue
		}
		if len(rm.Addrs) > syscall.RTAX_NETMASK {
			if mask := addrOf(rm.Addrs[syscall.RTAX_NETMASK]); is(mask) && !mask.IsUnspecified() {
				continue // 0.0.0.0/1 of some VPN
			}
		}
		return gw, nil
	}
	return netip.Addr{}, ErrNoGateway
}

// addrOf returns the address in a route's message, with its zone where it is of a link; the zero Addr if there is none.
func addrOf(a route.Addr) netip.Addr {
	switch a := a.(type) {
	case *route.Inet4Addr:
		return netip.AddrFrom4(a.IP)
	case *route.Inet6Addr:
		ip := netip.AddrFrom16(a.IP)
		if ip.IsLinkLocalUnicast() {
			ip = ip.WithZone(strconv.Itoa(a.ZoneID))
		}
		return ip
	}
	return netip.Addr{}
}
