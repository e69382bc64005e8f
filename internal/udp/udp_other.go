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

func (c *conn) setup(*Config) {}

func (c *conn) gsoFailed(error, netip.Addr) bool { return true }

func (c *conn) writeGSO(netip.AddrPort, []byte, int) error { return nil }

func (c *conn) writeMany(netip.AddrPort, []byte, int) (int, error) { return 0, nil }

func (s *Sockets) receiveGRO(int, *conn) {}

func (s *Sockets) receiveMany(int, *conn) {}
