//go:build !linux

package udp

import (
	"net"
	"net/netip"
)

// linkMTU returns the MTU of the interface by which the system would send to dst, 0 if it cannot be found out.
func linkMTU(dst netip.AddrPort) int {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(dst)) // sends nothing
	if err != nil {
		return 0
	}
	local := c.LocalAddr().(*net.UDPAddr).IP
	c.Close()
	ifs, err := net.Interfaces()
	if err != nil {
		return 0
	}
	for _, f := range ifs {
		addrs, _ := f.Addrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.Equal(local) {
				return f.MTU
			}
		}
	}
	return 0
}

func (c *conn) setup(bool) {}

func (c *conn) gsoFailed(error) bool { return true }

func (c *conn) writeGSO(netip.AddrPort, []byte, int) error { return nil }

func (s *Sockets) receiveGRO(int, *conn) {}
