package node

import (
	"net/netip"

	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// setEndpoints takes where this node may be reached directly. It runs on the data path's goroutine.
func (n *Node) setEndpoints(eps []path.Endpoint) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.eps = eps
	if n.hasSess {
		n.tellEndpoints()
	}
}

// startEndpoints tells the session, which has just been made, what was found before it.
func (n *Node) startEndpoints() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hasSess = true
	n.tellEndpoints()
}

// tellEndpoints tells control. n.mu is held; the session does not block.
func (n *Node) tellEndpoints() {
	addrs := make([]netip.AddrPort, len(n.eps))
	types := make([]tailcfg.EndpointType, len(n.eps))
	for i, e := range n.eps {
		addrs[i], types[i] = e.Addr, e.Type
	}
	n.sess.SetEndpoints(addrs, types)
	n.ports.Want(wantPortMap(n.eps))
	n.holes.Want(wantPinhole(n.eps))
}

// wantsPort reports whether a port on the router is of use, and a hole in its firewall.
func (n *Node) wantsPort() (port, hole bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return wantPortMap(n.eps), wantPinhole(n.eps)
}

// linkChanged follows the host's network. It runs on the monitor's goroutine.
func (n *Node) linkChanged(major bool) {
	n.mu.Lock()
	started := n.hasSess
	n.mu.Unlock()
	if started && major {
		n.ports.NetworkChanged()
		n.holes.NetworkChanged()
		n.sess.Nudge()
		n.kickHome()
	}
}
