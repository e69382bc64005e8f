//go:build !linux

package udp

import "net/netip"

func (c *conn) setup(bool) {}

func (c *conn) gsoFailed(error) bool { return true }

func (c *conn) writeGSO(netip.AddrPort, []byte, int) error { return nil }

func (s *Sockets) receiveGRO(int, *conn) {}
