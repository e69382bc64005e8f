//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package netmon

import (
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/net/route"
)

func defaultGateway4() (netip.Addr, error) {
	rib, err := route.FetchRIB(syscall.AF_INET, route.RIBTypeRoute, 0)
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
		dst, ok1 := rm.Addrs[syscall.RTAX_DST].(*route.Inet4Addr)
		gw, ok2 := rm.Addrs[syscall.RTAX_GATEWAY].(*route.Inet4Addr)
		if !ok1 || !ok2 || dst.IP != [4]byte{} {
			continue
		}
		if len(rm.Addrs) > syscall.RTAX_NETMASK {
			if mask, ok := rm.Addrs[syscall.RTAX_NETMASK].(*route.Inet4Addr); ok && mask.IP != [4]byte{} {
				continue // 0.0.0.0/1 of some VPN
			}
		}
		return netip.AddrFrom4(gw.IP), nil
	}
	return netip.Addr{}, ErrNoGateway
}

func defaultGateway6() (netip.Addr, error) {
	rib, err := route.FetchRIB(syscall.AF_INET6, route.RIBTypeRoute, 0)
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
		dst, ok1 := rm.Addrs[syscall.RTAX_DST].(*route.Inet6Addr)
		gw, ok2 := rm.Addrs[syscall.RTAX_GATEWAY].(*route.Inet6Addr)
		if !ok1 || !ok2 || dst.IP != [16]byte{} {
			continue
		}
		if len(rm.Addrs) > syscall.RTAX_NETMASK {
			if mask, ok := rm.Addrs[syscall.RTAX_NETMASK].(*route.Inet6Addr); ok && mask.IP != [16]byte{} {
				continue
			}
		}
		a := netip.AddrFrom16(gw.IP)
		if a.IsLinkLocalUnicast() {
			a = a.WithZone(strconv.Itoa(gw.ZoneID))
		}
		return a, nil
	}
	return netip.Addr{}, ErrNoGateway
}
