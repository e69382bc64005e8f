package datapath

import (
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/filter"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/netmon"
	"github.com/tailnode/tailnode/internal/peerrelay"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// PeerRelay has the node relay for others.
type PeerRelay struct {
	Port   uint16           // UDP port, 0 for one that the system chooses
	Static []netip.AddrPort // where it can be reached beside what it finds out
}

// peerRelays is what the Engine has for peer relays: its own, if it is to be one, and which others it may use.
type peerRelays struct {
	e    *Engine
	conf *PeerRelay // nil: it is none

	mu     sync.Mutex        // guards what follows
	srv    *peerrelay.Server // nil: not running
	closed bool
	stun   []netip.AddrPort

	// The rest is guarded by Engine.mu.
	targets map[key.NodePublic]struct{} // peers that are relays for us
	use     bool                        // this node may use any
	self    bool                        // its own too
}

// Allocate implements path.PeerRelay.
func (r *peerRelays) Allocate(from, other key.DiscoPublic, answer func(disco.RelayEndpoint)) {
	r.mu.Lock()
	srv := r.srv
	r.mu.Unlock()
	if srv != nil {
		srv.Allocate(from, other, answer)
	}
}

// Allows implements path.PeerRelay: it asks the filter in force.
func (r *peerRelays) Allows(pub key.NodePublic) bool {
	m := r.e.netmap.Load()
	n := m.PeerByKey(pub)
	return n != nil && !m.Expired(n, now()) && hasPeerCap(r.e.filter.Load(), n, m.Self, tailcfg.PeerCapabilityRelay)
}

// hasPeerCap reports whether src has the capability at dst, between their first addresses of one family.
func hasPeerCap(f *filter.Filter, src, dst *netmap.Node, c tailcfg.PeerCapability) bool {
	if src.UnsignedPeerAPIOnly {
		return false // the tailnet's lock does not vouch for it
	}
	for _, s := range src.Addresses {
		for _, d := range dst.Addresses {
			if s.IsSingleIP() && d.IsSingleIP() && s.Addr().BitLen() == d.Addr().BitLen() {
				return f.Granted(s.Addr(), d.Addr(), c)
			}
		}
	}
	return false
}

// update brings the node's own relay, and its list of others, in line with m. Engine.mu is held.
func (r *peerRelays) update(m *netmap.Map, ch netmap.Change, all bool) {
	e := r.e
	if e.direct == nil {
		return
	}
	if all || ch.Self {
		r.run(r.conf != nil && !m.Self.HasCap(tailcfg.NodeAttrDisableRelayServer))
	}
	f := e.filter.Load()
	use, targets := !m.Self.HasCap(tailcfg.NodeAttrDisableRelayClient), r.targets
	switch granted := f.Grants(tailcfg.PeerCapabilityRelayTarget); {
	case !use || !granted:
		targets = nil
	case all || ch.Filter || ch.Self:
		targets = map[key.NodePublic]struct{}{}
		for n := range m.All() {
			if hasPeerCap(f, n, m.Self, tailcfg.PeerCapabilityRelayTarget) {
				targets[n.Key] = struct{}{}
			}
		}
	case len(ch.Added)+len(ch.Changed)+len(ch.Removed) > 0:
		targets = maps.Clone(targets)
		if targets == nil {
			targets = map[key.NodePublic]struct{}{}
		}
		for _, n := range ch.Removed {
			delete(targets, n.Key)
		}
		for _, n := range slices.Concat(ch.Changed, ch.Added) {
			if hasPeerCap(f, n, m.Self, tailcfg.PeerCapabilityRelayTarget) {
				targets[n.Key] = struct{}{}
			} else {
				delete(targets, n.Key)
			}
		}
	}
	self := use && r.conf != nil && hasPeerCap(f, m.Self, m.Self, tailcfg.PeerCapabilityRelayTarget)
	if !all && use == r.use && self == r.self && maps.Equal(targets, r.targets) {
		return
	}
	r.use, r.self, r.targets = use, self, targets
	r.tell(e.trans.Load())
}

// tell tells t which relays there are. Engine.mu is held.
func (r *peerRelays) tell(t *transport) {
	t.paths.SetPeerRelays(r.use, r.self, slices.Collect(maps.Keys(r.targets)))
}

// run starts or stops the node's own relay.
func (r *peerRelays) run(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !on && r.srv != nil:
		r.srv.Close()
		r.srv = nil
	case on && r.srv == nil && !r.closed:
		srv, err := peerrelay.Open(peerrelay.Config{Port: r.conf.Port, Static: r.conf.Static, Logger: r.e.log})
		if err != nil {
			r.e.log.Warn("no peer relay", "err", err)
			return
		}
		if d := r.e.direct; d.mon != nil {
			srv.SetLocal(d.mon.State().Addrs)
		}
		srv.SetSTUN(r.stun)
		r.srv = srv
	}
}

// setSTUN names the STUN servers.
func (r *peerRelays) setSTUN(servers []netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stun = servers
	if r.srv != nil {
		r.srv.SetSTUN(servers)
	}
}

// linkChanged follows the host's network.
func (r *peerRelays) linkChanged(c netmon.Change) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.srv == nil {
		return
	}
	if c.Major {
		if err := r.srv.Rebind(); err != nil {
			r.e.log.Warn("peer relay after a change of the network", "err", err)
		}
	}
	r.srv.SetLocal(c.New.Addrs)
}

func (r *peerRelays) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.srv != nil {
		r.srv.Close()
		r.srv = nil
	}
}

// PeerRelayPorts returns the ports of the peer relay that this node is, 0 for a family without one.
func (e *Engine) PeerRelayPorts() (v4, v6 uint16) {
	e.peerRelays.mu.Lock()
	defer e.peerRelays.mu.Unlock()
	if e.peerRelays.srv == nil {
		return 0, 0
	}
	return e.peerRelays.srv.Ports()
}
