// Package datapath is where packets flow: it joins the netstack, the packet filter, WireGuard,
// the path manager and the relays into one run-to-completion engine.
//
//	out: netstack → filter notes the flow → peer by destination → WireGuard seals → path sends
//	in:  relay or socket → path tells disco from WireGuard → opened in place → is the source
//	     address that peer's? → filter → netstack
//
// The goroutine that has a packet carries it all the way; there is no queue between the
// stages and no goroutine per peer. What a peer costs before its first packet is an entry in
// a table: its WireGuard state is made when it first sends or is first sent to.
//
// The netstack, its listeners and connections live as long as the [Engine]. Everything that
// is bound to the node key (WireGuard, relays, paths) is a transport, and is replaced when
// the node key changes.
package datapath

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/filter"
	"github.com/tailnode/tailnode/internal/flush"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// MTU is the size in bytes of the largest inner IP packet, the one that every peer of a
// tailnet assumes.
const MTU = 1280

// maxFlows bounds the table of outbound flows whose replies come in without a rule.
const maxFlows = 4096

// Config is what an Engine needs. NodeKey and DiscoKey are required.
type Config struct {
	NodeKey  key.NodePrivate
	DiscoKey key.DiscoPrivate
	// Dial reaches relays over the host's network; nil is net.Dialer's.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// RootCAs verifies relays' certificates; nil is the system's.
	RootCAs *x509.CertPool
	// RelayState, if not nil, is told when a relay's connection comes up or ends. It must not
	// call the Engine.
	RelayState func(region int, connected bool, err error)
	// Port is the UDP port for direct paths, 0 for one that the system chooses.
	Port uint16
	// PeerRelay, if not nil, has the node be a relay for others, unless control forbids it.
	PeerRelay *PeerRelay
	// RelayOnly does without UDP.
	RelayOnly bool
	Limits    Limits
	// Endpoints, if not nil, is told where this node may be reached directly, whenever that changes. It
	// must not block or call the Engine.
	Endpoints func(eps []path.Endpoint)
	// LinkChanged, if not nil, is told after the host's network has changed; major says that connections
	// made before are likely dead. It must not block or call the Engine.
	LinkChanged func(major bool)
	Logger      *slog.Logger
}

// Engine carries packets. All its methods are safe for concurrent use.
type Engine struct {
	cfg   Config
	log   *slog.Logger
	stack *netstack.Stack
	flows *filter.Flows
	waits waits
	dns   resolver

	reclaim  reclaim
	parting  parting
	gatherer flush.Flusher[*peer]
	streams  streams
	stun     stunTap

	netmap atomic.Pointer[netmap.Map]
	filter atomic.Pointer[filter.Filter]
	jail   atomic.Pointer[filter.Filter] // for jailed peers: nothing but replies
	trans  atomic.Pointer[transport]

	home   atomic.Int64
	direct *direct // nil: relays only

	peerRelays peerRelays

	parted sync.Once // Part

	mu     sync.Mutex // guards what follows, and serialises SetNetmap, SetNodeKey and Close
	closed bool
}

// New returns an Engine without addresses and without peers; SetNetmap gives it both.
func New(cfg Config) (*Engine, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Engine{cfg: cfg, log: cfg.Logger, flows: filter.NewFlows(maxFlows)}
	e.gatherer.Flush = (*peer).flush
	e.waits.init()
	e.dns.e = e
	e.peerRelays.e, e.peerRelays.conf = e, cfg.PeerRelay
	stack, err := netstack.New(netstack.Config{
		MTU: MTU, Output: (*output)(e), Logger: cfg.Logger,
		MaxBuffer: cfg.Limits.ConnMemory, BufferBudget: cfg.Limits.TCPMemory, UDPBuffer: cfg.Limits.UDPMemory, Backlog: cfg.Limits.Backlog,
	})
	if err != nil {
		return nil, fmt.Errorf("datapath: %w", err)
	}
	e.stack = stack
	e.openDirect()
	t, err := e.newTransport(cfg.NodeKey)
	if err != nil {
		if e.direct != nil {
			e.direct.socks.Close()
		}
		stack.Close()
		return nil, err
	}
	e.trans.Store(t)
	e.startDirect()
	return e, nil
}

// Stack returns the TCP and UDP stack. It belongs to the Engine.
func (e *Engine) Stack() *netstack.Stack { return e.stack }

// Netmap returns the snapshot in force, nil before the first.
func (e *Engine) Netmap() *netmap.Map { return e.netmap.Load() }

// Filter returns the packet filter in force, nil before the first netmap.
func (e *Engine) Filter() *filter.Filter { return e.filter.Load() }

// Part ends every connection, listener and socket, and waits until peers have been sent their resets. Close does so first of all; a node that
// is about to leave the tailnet calls it while its peers still take what it sends.
func (e *Engine) Part() {
	e.parted.Do(func() {
		close(e.waits.done)
		e.dns.close()
		e.parting.on.Store(true)
		e.stack.Close()
		e.parting.flush()
	})
}

// Close ends every connection, closes relays and sockets, forgets all keys and waits until
// nothing of the Engine runs any more. It is idempotent.
func (e *Engine) Close() {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return
	}
	e.closed = true
	e.mu.Unlock()
	e.Part() // first: what the stack still has to say (RST) goes out while the transport is up
	e.gatherer.Close()
	e.streams.close()
	if e.direct != nil {
		e.direct.close()
	}
	e.peerRelays.close()
	e.trans.Load().close()
	e.reclaim.close()
}

var errClosed = errors.New("datapath: closed")

// SetNetmap puts a snapshot in force. ch says what is different from the one before.
func (e *Engine) SetNetmap(m *netmap.Map, ch netmap.Change) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosed
	}
	was := e.netmap.Load()
	first := was == nil
	if first || ch.Filter || ch.Self {
		e.setFilter(m)
	}
	if first || ch.Self {
		e.stack.SetAddresses(selfAddrs(m)) // before a peer can get in: what came earlier would be lost
	}
	e.netmap.Store(m)
	t := e.trans.Load()
	if first || ch.DERPMap {
		t.relays.SetMap(m.DERPMap)
		e.kickSTUN()
	}
	t.setPeers(was, m, ch)
	e.peerRelays.update(m, ch, first)
	return nil
}

func (e *Engine) setFilter(m *netmap.Map) {
	f, err := filter.Compile(m.Filter, m.Self.Addresses, e.hasCap)
	if err != nil { // what made no sense is left out, so that less is let in and not more
		e.log.Warn("control's packet filter", "err", err)
	}
	e.jail.Store(f.Shielded())
	e.filter.Store(f)
}

// filterFor returns the filter for what n sends, nil before there is one.
func (e *Engine) filterFor(n *netmap.Node) *filter.Filter {
	if n.IsJailed {
		return e.jail.Load()
	}
	return e.filter.Load()
}

// hasCap asks the netmap in force, so that a filter outlives changes of capabilities.
func (e *Engine) hasCap(src netip.Addr, c tailcfg.NodeCapability) bool {
	return e.netmap.Load().HasCap(src, c)
}

// SetNodeKey replaces the node key: sessions, relays and paths begin anew; TCP connections
// live on.
func (e *Engine) SetNodeKey(k key.NodePrivate) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosed
	}
	t, err := e.newTransport(k)
	if err != nil {
		return err
	}
	if m := e.netmap.Load(); m != nil {
		t.relays.SetMap(m.DERPMap)
		t.setPeers(nil, m, netmap.Change{})
		e.peerRelays.tell(t)
		t.relays.SetHome(e.Home())
	}
	e.setLocal(t)
	if e.direct != nil {
		t.paths.SetMapped(e.direct.mapped)
	}
	old := e.trans.Swap(t)
	e.kickSTUN()
	old.close()
	return nil
}

// SetHome makes region the home relay.
func (e *Engine) SetHome(region int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	e.home.Store(int64(region))
	e.trans.Load().relays.SetHome(region)
	e.kickSTUN()
}

// Home returns the home relay's region, 0 before there is one.
func (e *Engine) Home() int { return int(e.home.Load()) }

func selfAddrs(m *netmap.Map) []netip.Addr {
	var out []netip.Addr
	for _, p := range m.Self.Addresses {
		if p.IsSingleIP() {
			out = append(out, p.Addr())
		}
	}
	return out
}

// now is the clock of the packet path.
func now() time.Time { return time.Now() }
