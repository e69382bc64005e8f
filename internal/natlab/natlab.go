// Package natlab models NATs and firewalls for tests: each way in which RFC 4787 lets them map and filter, hairpinning, time-outs, NATs
// behind NATs, blocked UDP. A [NAT] alone is a pure table with time as an argument; a [Lab] joins
// several and is the router of a memnet network, or of any simulation.
package natlab

import (
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// Behaviour is on what a NAT's decision depends (RFC 4787 §4.1 for mapping, §5 for filtering).
type Behaviour uint8

// The behaviours. A "full cone" maps and filters endpoint-independently; a "symmetric" NAT maps and filters by address
// and port.
const (
	EndpointIndependent Behaviour = iota
	AddressDependent
	AddressAndPortDependent
)

// String returns the behaviour's name.
func (b Behaviour) String() string {
	switch b {
	case EndpointIndependent:
		return "endpoint-independent"
	case AddressDependent:
		return "address-dependent"
	case AddressAndPortDependent:
		return "address-and-port-dependent"
	}
	return fmt.Sprintf("Behaviour(%d)", uint8(b))
}

// Config describes a NAT or firewall.
type Config struct {
	// Inside is the network behind it.
	Inside netip.Prefix
	// Outside is its address; invalid for a firewall, which filters and does not translate.
	Outside            netip.Addr
	Mapping, Filtering Behaviour
	Hairpin            bool          // what the inside sends to an outside address of its own comes back in
	Timeout            time.Duration // of a mapping without outgoing traffic; 0: 2 minutes (RFC 4787 REQ-5)
	PreservePort       bool          // the outside port is the inside one if free
	BlockUDP           bool          // nothing gets out or in
	// Forward holds static mappings, from outside ports to inside sockets, as people make them for a server.
	Forward map[uint16]netip.AddrPort
}

// NAT is one box. It is not safe for concurrent use.
type NAT struct {
	cfg  Config
	next uint16
	maps map[flow]*mapping
	ext  map[netip.AddrPort]*mapping
	fwd  map[flow]forwarded // what has come in by a static mapping, by inside socket and remote
}

// forwarded is a conversation that began outside, over a static mapping.
type forwarded struct {
	ext  netip.AddrPort
	used time.Time
}

// flow is an inside socket and that of the remote one on which the decision depends.
type flow struct{ local, remote netip.AddrPort }

type mapping struct {
	key    flow
	inside netip.AddrPort
	ext    netip.AddrPort
	used   time.Time                    // last outgoing datagram
	opened map[netip.AddrPort]time.Time // remotes, as far as filtering regards them
}

// NewNAT returns a box without mappings.
func NewNAT(cfg Config) *NAT {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 2 * time.Minute
	}
	n := &NAT{cfg: cfg, next: 40000}
	n.Rebind()
	return n
}

// Config returns what the box is.
func (n *NAT) Config() Config { return n.cfg }

// Rebind forgets all mappings, as a restart does. Ports go on from where they were, so new mappings differ.
func (n *NAT) Rebind() {
	n.maps = make(map[flow]*mapping)
	n.ext = make(map[netip.AddrPort]*mapping)
	n.fwd = make(map[flow]forwarded)
}

// SetBlockUDP changes whether UDP passes.
func (n *NAT) SetBlockUDP(block bool) { n.cfg.BlockUDP = block }

// regard returns of remote what b depends on.
func (b Behaviour) regard(remote netip.AddrPort) netip.AddrPort {
	switch b {
	case EndpointIndependent:
		return netip.AddrPort{}
	case AddressDependent:
		return netip.AddrPortFrom(remote.Addr(), 0)
	}
	return remote
}

// Out translates the source of a datagram from inside to remote.
func (n *NAT) Out(now time.Time, inside, remote netip.AddrPort) (netip.AddrPort, bool) {
	if n.cfg.BlockUDP {
		return inside, false
	}
	if f, ok := n.fwd[flow{inside, remote}]; ok && now.Sub(f.used) < n.cfg.Timeout {
		f.used = now
		n.fwd[flow{inside, remote}] = f
		return f.ext, true
	}
	k := flow{inside, n.cfg.Mapping.regard(remote)}
	if !n.cfg.Outside.IsValid() {
		k.remote = netip.AddrPort{}
	}
	m := n.maps[k]
	if m != nil && now.Sub(m.used) >= n.cfg.Timeout {
		n.drop(m)
		m = nil
	}
	if m == nil {
		m = &mapping{key: k, inside: inside, ext: inside, opened: make(map[netip.AddrPort]time.Time)}
		if n.cfg.Outside.IsValid() {
			ext, ok := n.port(now, inside.Port())
			if !ok {
				return inside, false
			}
			m.ext = ext
		}
		n.maps[k], n.ext[m.ext] = m, m
	}
	m.used = now
	m.opened[n.cfg.Filtering.regard(remote)] = now
	return m.ext, true
}

func (n *NAT) drop(m *mapping) {
	delete(n.maps, m.key)
	delete(n.ext, m.ext)
}

// port finds a free outside port.
func (n *NAT) port(now time.Time, inside uint16) (netip.AddrPort, bool) {
	free := func(p uint16) (netip.AddrPort, bool) {
		if _, taken := n.cfg.Forward[p]; taken {
			return netip.AddrPort{}, false
		}
		ap := netip.AddrPortFrom(n.cfg.Outside, p)
		m := n.ext[ap]
		if m != nil && now.Sub(m.used) >= n.cfg.Timeout {
			n.drop(m)
			m = nil
		}
		return ap, m == nil
	}
	if n.cfg.PreservePort {
		if ap, ok := free(inside); ok {
			return ap, true
		}
	}
	for range 1 << 14 {
		n.next++
		if n.next < 1024 {
			n.next = 1024
		}
		if ap, ok := free(n.next); ok {
			return ap, true
		}
	}
	return netip.AddrPort{}, false
}

// In translates the destination of a datagram from remote to ext, an outside address of the box (of a
// firewall: to an address behind it).
func (n *NAT) In(now time.Time, remote, ext netip.AddrPort) (netip.AddrPort, bool) {
	if to, ok := n.cfg.Forward[ext.Port()]; ok && ext.Addr() == n.cfg.Outside && !n.cfg.BlockUDP {
		n.fwd[flow{to, remote}] = forwarded{ext, now}
		return to, true
	}
	m := n.ext[ext]
	if m == nil || n.cfg.BlockUDP || now.Sub(m.used) >= n.cfg.Timeout {
		return ext, false
	}
	at, ok := m.opened[n.cfg.Filtering.regard(remote)]
	if !ok || now.Sub(at) >= n.cfg.Timeout {
		return ext, false
	}
	return m.inside, true
}

// Mappings returns how many mappings there are, expired ones included.
func (n *NAT) Mappings() int { return len(n.ext) }

// Lab joins NATs. It implements memnet's Router, and is safe for concurrent use.
type Lab struct {
	now func() time.Time

	mu   sync.Mutex
	nats []*NAT
}

// New returns a lab in which every address is open to the world. now is time.Now if nil.
func New(now func() time.Time) *Lab {
	if now == nil {
		now = time.Now
	}
	return &Lab{now: now}
}

// Add puts a box in front of cfg.Inside. Its outside address may lie inside another box: then it is behind that one. Inside
// networks must not overlap.
func (l *Lab) Add(cfg Config) *NAT {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.nats {
		if n.cfg.Inside.Overlaps(cfg.Inside) {
			panic("natlab: inside networks overlap")
		}
	}
	n := NewNAT(cfg)
	l.nats = append(l.nats, n)
	return n
}

// behind returns the box in front of a, nil if a is open to the world. mu is held.
func (l *Lab) behind(a netip.Addr) *NAT {
	for _, n := range l.nats {
		if n.cfg.Inside.Contains(a) {
			return n
		}
	}
	return nil
}

// owner returns the box whose outside address a is. mu is held.
func (l *Lab) owner(a netip.Addr) *NAT {
	for _, n := range l.nats {
		if n.cfg.Outside == a {
			return n
		}
	}
	return nil
}

// Out takes a datagram through the boxes in front of its source.
func (l *Lab) Out(src, dst netip.AddrPort) (netip.AddrPort, bool) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	for n := l.behind(src.Addr()); n != nil; {
		if n.cfg.Inside.Contains(dst.Addr()) {
			return src, true // within one network
		}
		ext, ok := n.Out(now, src, dst)
		if !ok {
			return src, false
		}
		if src = ext; !n.cfg.Outside.IsValid() {
			break
		}
		if dst.Addr() == n.cfg.Outside {
			if !n.cfg.Hairpin {
				return src, false
			}
			break // back in by the same box
		}
		n = l.behind(src.Addr())
	}
	return src, true
}

// In takes a datagram through the boxes in front of its destination.
func (l *Lab) In(src, dst netip.AddrPort) (netip.AddrPort, bool) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	var through *NAT
	for {
		n := l.owner(dst.Addr())
		if n == nil {
			break
		}
		if b := l.behind(dst.Addr()); b != nil && b != through && !b.cfg.Inside.Contains(src.Addr()) {
			return dst, false // the box's own outside is another's inside
		}
		inside, ok := n.In(now, src, dst)
		if !ok {
			return dst, false
		}
		dst, through = inside, n
	}
	n := l.behind(dst.Addr())
	switch {
	case n == nil || n == through || n.cfg.Inside.Contains(src.Addr()):
		return dst, true
	case !n.cfg.Outside.IsValid():
		return n.In(now, src, dst)
	}
	return dst, false // an inside address from without
}
