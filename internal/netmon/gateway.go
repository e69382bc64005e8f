package netmon

import (
	"errors"
	"net"
	"net/netip"
)

// ErrNoGateway reports a host without a default gateway that can be found out.
var ErrNoGateway = errors.New("netmon: no default gateway")

// Gateway is the router by which a host reaches the Internet.
type Gateway struct {
	Gateway netip.Addr
	Self    netip.Addr // the host's own address on that network
}

// DefaultGateway asks the system for the default gateway. It sends nothing, and returns [ErrNoGateway] if there is none that is
// a router of a private network: nobody else maps ports.
func DefaultGateway() (Gateway, error) {
	gw, err := defaultGateway4()
	if err != nil {
		return Gateway{}, err
	}
	if !gw.Is4() || !gw.IsPrivate() && !gw.IsLinkLocalUnicast() {
		return Gateway{}, ErrNoGateway
	}
	self := sourceFor("udp4", net.JoinHostPort(gw.String(), "9"))
	if !self.IsValid() || self == gw {
		return Gateway{}, ErrNoGateway
	}
	return Gateway{gw, self}, nil
}

// DefaultGateway6 is DefaultGateway for IPv6. The gateway's address has a zone if it is link-local, as most are.
func DefaultGateway6() (Gateway, error) {
	gw, err := defaultGateway6()
	if err != nil {
		return Gateway{}, err
	}
	if !gw.Is6() || !gw.IsLinkLocalUnicast() && !gw.IsPrivate() {
		return Gateway{}, ErrNoGateway
	}
	self := sourceFor("udp6", "[2001:db8::1]:9") // that to the gateway itself would be link-local
	if !self.Is6() || self == gw {
		return Gateway{}, ErrNoGateway
	}
	return Gateway{gw, self}, nil
}
