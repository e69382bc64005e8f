package node

import (
	"net/netip"
	"slices"

	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/portmap"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// startPortMap makes the client that asks the router for a port. It sends nothing before
// wantPortMap says that a mapping is of use.
func (n *Node) startPortMap() {
	n.ports = portmap.New(portmap.Config{
		LocalPort: func() uint16 { p4, _ := n.engine.UDPPorts(); return p4 },
		Changed:   n.portMapped,
		Disabled:  n.cfg.NoPortMap,
		Logger:    n.log,
	})
}

// portMapped takes the mapping that there is now, or that there is none. It runs on the client's goroutine.
func (n *Node) portMapped() {
	var eps []path.Endpoint
	addr, ok := n.ports.Mapping()
	if ok {
		eps = append(eps, path.Endpoint{Addr: addr, Type: tailcfg.EndpointPortmapped})
	}
	n.engine.SetMapped(eps)
	n.mu.Lock()
	if n.host.NetInfo != nil {
		ni := *n.host.NetInfo // the old one is with the session
		ni.HavePortMap = ok
		n.host.NetInfo = &ni
	}
	host := n.host
	n.mu.Unlock()
	n.sess.SetHostinfo(&host)
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

var carrierNAT = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

func public(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.IsPrivate() && !carrierNAT.Contains(a)
}
