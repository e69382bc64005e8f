package netmon

import (
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/windows"
)

func defaultGateway4() (netip.Addr, error) { return gatewayOf(windows.AF_INET) }

func defaultGateway6() (netip.Addr, error) { return gatewayOf(windows.AF_INET6) }

func gatewayOf(family uint32) (netip.Addr, error) {
	const flags = windows.GAA_FLAG_INCLUDE_GATEWAYS | windows.GAA_FLAG_SKIP_ANYCAST | windows.GAA_FLAG_SKIP_MULTICAST | windows.GAA_FLAG_SKIP_DNS_SERVER
	size := uint32(15 << 10) // what the documentation recommends
	for range 3 {
		b := make([]byte, size)
		a := (*windows.IpAdapterAddresses)(unsafe.Pointer(&b[0]))
		err := windows.GetAdaptersAddresses(family, flags, 0, a, &size)
		if err == windows.ERROR_BUFFER_OVERFLOW {
			continue
		}
		if err != nil {
			return netip.Addr{}, err
		}
		var best netip.Addr
		least := ^uint32(0)
		for ; a != nil; a = a.Next {
			metric := a.Ipv4Metric
			if family == windows.AF_INET6 {
				metric = a.Ipv6Metric
			}
			if a.OperStatus != windows.IfOperStatusUp || metric >= least {
				continue
			}
			for g := a.FirstGatewayAddress; g != nil; g = g.Next {
				ip, ok := netip.AddrFromSlice(g.Address.IP())
				if ip = ip.Unmap(); !ok || ip.Is4() != (family == windows.AF_INET) {
					continue
				}
				if ip.Is6() && ip.IsLinkLocalUnicast() {
					ip = ip.WithZone(strconv.Itoa(int(a.Ipv6IfIndex)))
				}
				least, best = metric, ip
			}
		}
		if best.IsValid() {
			return best, nil
		}
		return netip.Addr{}, ErrNoGateway
	}
	return netip.Addr{}, ErrNoGateway
}
