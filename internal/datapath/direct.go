package datapath

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/netmon"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"github.com/tailnode/tailnode/internal/udp"
)

// ForceRelay is for tests alone: Engines that are made while it is set use relays only.
var ForceRelay atomic.Bool

// direct is what the Engine has for direct paths. It outlives transports.
type direct struct {
	socks *udp.Sockets
	mon   *netmon.Monitor
	kick  chan struct{} // capacity 1: look at the STUN servers again
	stop  context.CancelFunc
	done  chan struct{}

	mapped []path.Endpoint // guarded by Engine.mu
}

// openDirect opens the sockets; without any the node uses relays.
func (e *Engine) openDirect() {
	if e.cfg.RelayOnly || ForceRelay.Load() {
		return
	}
	socks, err := udp.Open(udp.Config{Port: e.cfg.Port, Logger: e.log})
	if err != nil {
		e.log.Warn("no direct paths", "err", err)
		return
	}
	e.direct = &direct{socks: socks, kick: make(chan struct{}, 1), done: make(chan struct{})}
}

// startDirect begins to receive. The transport is there.
func (e *Engine) startDirect() {
	d := e.direct
	if d == nil {
		return
	}
	d.socks.Start(func(socket int, src netip.AddrPort, b []byte, seg int) {
		e.trans.Load().paths.FromUDP(socket, src, b, seg)
	})
	mon, err := netmon.New(netmon.Config{OnChange: e.linkChanged, Logger: e.log})
	if err != nil {
		e.log.Warn("the host's network cannot be watched", "err", err)
	}
	d.mon = mon
	e.setLocal(e.trans.Load())
	ctx, cancel := context.WithCancel(context.Background())
	d.stop = cancel
	go e.followSTUN(ctx)
}

func (d *direct) close() {
	d.stop()
	if d.mon != nil {
		d.mon.Close()
	}
	<-d.done
	d.socks.Close()
}

// setLocal tells t what its own addresses are.
func (e *Engine) setLocal(t *transport) {
	if d := e.direct; d != nil && d.mon != nil {
		t.paths.SetLocal(d.mon.State().Addrs)
	}
}

// UDPPorts returns the local ports of the sockets for direct paths, 0 for a family without one.
func (e *Engine) UDPPorts() (v4, v6 uint16) {
	if e.direct == nil {
		return 0, 0
	}
	return e.direct.socks.Ports()
}

// SetMapped names endpoints that lead to this node's sockets by other means than the Engine finds out, such as port mappings on the
// router. They replace those named before. It does not block; eps is kept.
func (e *Engine) SetMapped(eps []path.Endpoint) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || e.direct == nil {
		return
	}
	e.direct.mapped = eps
	e.trans.Load().paths.SetMapped(eps)
}

// linkChanged runs on the monitor's goroutine.
func (e *Engine) linkChanged(c netmon.Change) {
	if c.Major {
		if err := e.direct.socks.Rebind(); err != nil {
			e.log.Warn("sockets after a change of the network", "err", err)
		}
	}
	t := e.trans.Load()
	t.paths.SetLocal(c.New.Addrs)
	e.peerRelays.linkChanged(c)
	if c.Major {
		t.paths.NetworkChanged()
		t.relays.Rebind()
	}
	if f := e.cfg.LinkChanged; f != nil {
		f(c.Major)
	}
}

// kickSTUN has the STUN servers looked at again.
func (e *Engine) kickSTUN() {
	if e.direct != nil {
		select {
		case e.direct.kick <- struct{}{}:
		default:
		}
	}
}

const (
	// stunRegions is how many regions' STUN servers are used: two tell whether a NAT's mapping depends on the destination.
	stunRegions = 3
	// lookupTimeout bounds the look-up of a relay's name.
	lookupTimeout = 3 * time.Second
)

// followSTUN keeps the path manager's list of STUN servers in line with the relay map and the home region.
func (e *Engine) followSTUN(ctx context.Context) {
	defer close(e.direct.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.direct.kick:
		}
		m := e.netmap.Load()
		if m == nil || m.DERPMap == nil {
			continue
		}
		servers := stunServers(m.DERPMap, e.Home(), func(name string) []netip.Addr {
			ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
			defer cancel()
			addrs, _ := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
			return addrs
		})
		e.trans.Load().paths.SetSTUN(servers)
		e.peerRelays.setSTUN(servers)
	}
}

// stunServers picks STUN servers: those of the home region, then of others, those of both families of each.
func stunServers(dm *tailcfg.DERPMap, home int, lookup func(name string) []netip.Addr) []netip.AddrPort {
	var regions []*tailcfg.DERPRegion
	for id, r := range dm.Regions {
		if r != nil && (id == home || !r.NoMeasureNoHome) {
			regions = append(regions, r)
		}
	}
	slices.SortFunc(regions, func(a, b *tailcfg.DERPRegion) int {
		if a.RegionID == home || b.RegionID == home {
			return cmp.Compare(b2i(b.RegionID == home), b2i(a.RegionID == home))
		}
		if a.Avoid != b.Avoid {
			return b2i(a.Avoid) - b2i(b.Avoid)
		}
		return cmp.Compare(a.RegionID, b.RegionID)
	})
	var out []netip.AddrPort
	used := 0
	for _, r := range regions {
		if used == stunRegions {
			break
		}
		before := len(out)
		for _, n := range r.Nodes {
			if out = appendSTUN(out, n, lookup); len(out) > before {
				used++
				break
			}
		}
	}
	return out
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// appendSTUN appends the addresses of one relay's STUN server.
func appendSTUN(out []netip.AddrPort, n *tailcfg.DERPNode, lookup func(name string) []netip.Addr) []netip.AddrPort {
	if n == nil || n.STUNPort < 0 || n.STUNPort > 0xffff {
		return out
	}
	port := uint16(cmp.Or(n.STUNPort, 3478))
	if a, err := netip.ParseAddr(n.STUNTestIP); err == nil {
		return append(out, netip.AddrPortFrom(a.Unmap(), port))
	}
	var named []netip.Addr
	looked := false
	for _, f := range []struct {
		text string
		is4  bool
	}{{n.IPv4, true}, {n.IPv6, false}} {
		if f.text == "none" {
			continue
		}
		a, err := netip.ParseAddr(f.text)
		if err != nil {
			if !looked {
				looked = true
				if h, err := netip.ParseAddr(n.HostName); err == nil {
					named = []netip.Addr{h}
				} else {
					named = lookup(n.HostName)
				}
			}
			i := slices.IndexFunc(named, func(x netip.Addr) bool { return x.Unmap().Is4() == f.is4 })
			if i < 0 {
				continue
			}
			a = named[i]
		}
		if a = a.Unmap(); a.Is4() == f.is4 {
			out = append(out, netip.AddrPortFrom(a, port))
		}
	}
	return out
}

// Rebind does what is done when the host's network has changed: it opens the sockets anew and finds paths again.
func (e *Engine) Rebind() {
	e.mu.Lock()
	defer e.mu.Unlock()
	d := e.direct
	if e.closed || d == nil {
		return
	}
	var s netmon.State
	if d.mon != nil {
		s = d.mon.State()
	}
	e.linkChanged(netmon.Change{Old: s, New: s, Major: true})
}
