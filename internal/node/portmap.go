package node

import (
	"net/netip"
	"slices"

	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/portmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// startPortMap makes the clients that ask the router for a port of its own and for a hole in its IPv6 firewall. They send nothing before
// wantPortMap and wantPinhole say that it is of use.
func (n *Node) startPortMap() {
	n.ports = portmap.New(portmap.Config{
		LocalPort: func() uint16 { p4, _ := n.engine.UDPPorts(); return p4 },
		Changed:   n.portMapped,
		Disabled:  n.cfg.NoPortMap,
		Logger:    n.log,
	})
	n.holes = portmap.New(portmap.Config{
		LocalPort: func() uint16 { _, p6 := n.engine.UDPPorts(); return p6 },
		Changed:   n.portMapped,
		Disabled:  n.cfg.NoPortMap,
		IPv6:      true,
		Logger:    n.log,
	})
}

// portMapped takes the mappings that there are now. It runs on the clients' goroutines.
func (n *Node) portMapped() {
	n.mapMu.Lock() // for the whole: what is told last is what is so
	defer n.mapMu.Unlock()
	var eps []path.Endpoint
	addr, ok := n.ports.Mapping()
	if ok {
		eps = append(eps, path.Endpoint{Addr: addr, Type: tailcfg.EndpointPortmapped})
	}
	hole, holed := n.holes.Mapping()
	n.mu.Lock()
	// Most often the hole is at the very address that it leads to.
	if holed && !slices.ContainsFunc(n.eps, func(e path.Endpoint) bool {
		return e.Addr == hole && e.Type != tailcfg.EndpointPortmapped
	}) {
		eps = append(eps, path.Endpoint{Addr: hole, Type: tailcfg.EndpointPortmapped})
	}
	if n.host.NetInfo != nil && n.host.NetInfo.HavePortMap != ok {
		ni := *n.host.NetInfo // the old one is with the session
		ni.HavePortMap = ok
		n.host.NetInfo = &ni
		host := n.host
		n.sess.SetHostinfo(&host)
	}
	n.mu.Unlock()
	n.engine.SetMapped(eps)
}

// wantPortMap reports whether a port on the router would be of use: a STUN server has seen this
// node at a public IPv4 address that is not its own, so there is a NAT between.
func wantPortMap(eps []path.Endpoint) bool {
	return slices.ContainsFunc(eps, func(e path.Endpoint) bool {
		a := e.Addr.Addr()
		return e.Type == tailcfg.EndpointSTUN && a.Is4() && public(a) &&
			!slices.ContainsFunc(eps, func(l path.Endpoint) bool {
				return l.Type == tailcfg.EndpointLocal && l.Addr.Addr() == a
			})
	})
}

// wantPinhole reports whether a hole in the router's IPv6 firewall would be of use: a STUN server has seen this node at a public
// IPv6 address. Whether there is a firewall only trying would show.
func wantPinhole(eps []path.Endpoint) bool {
	return slices.ContainsFunc(eps, func(e path.Endpoint) bool {
		a := e.Addr.Addr()
		return e.Type == tailcfg.EndpointSTUN && a.Is6() && public(a)
	})
}

var carrierNAT = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

func public(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.IsPrivate() && !carrierNAT.Contains(a)
}
