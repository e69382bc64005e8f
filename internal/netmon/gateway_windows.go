package netmon

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/windows"
)

func defaultGateway4() (netip.Addr, error) {
	const flags = windows.GAA_FLAG_INCLUDE_GATEWAYS | windows.GAA_FLAG_SKIP_ANYCAST | windows.GAA_FLAG_SKIP_MULTICAST | windows.GAA_FLAG_SKIP_DNS_SERVER
	size := uint32(15 << 10) // what the documentation recommends
	for range 3 {
		b := make([]byte, size)
		a := (*windows.IpAdapterAddresses)(unsafe.Pointer(&b[0]))
		err := windows.GetAdaptersAddresses(windows.AF_INET, flags, 0, a, &size)
		if err == windows.ERROR_BUFFER_OVERFLOW {
			continue
		}
		if err != nil {
			return netip.Addr{}, err
		}
		var best netip.Addr
		least := ^uint32(0)
		for ; a != nil; a = a.Next {
			if a.OperStatus != windows.IfOperStatusUp || a.Ipv4Metric >= least {
				continue
			}
			for g := a.FirstGatewayAddress; g != nil; g = g.Next {
				if ip, ok := netip.AddrFromSlice(g.Address.IP()); ok && ip.Unmap().Is4() {
					least, best = a.Ipv4Metric, ip.Unmap()
				}
			}
		}
		if best.IsValid() {
			return best, nil
		}
		return netip.Addr{}, ErrNoGateway
	}
	return netip.Addr{}, ErrNoGateway
}
