// Package netcheck finds out what the network is like: which relay regions answer, how fast, over which
// family, and the node's address as they see it. From that it chooses the home region. A full check, for
// a person to read, also finds out whether UDP between two nodes behind the same NAT comes back in (hairpin), which
// protocols map ports, and whether a captive portal is in the way (docs/protocol/netcheck.md).
//
// What to send and what to make of it are pure functions ([Plan], [ChooseHome]); [Run] is the
// runner around them. It takes no longer than the answer needs: a single region is chosen without a packet, the first
// answers end a check in little more than their round trip, and a network without UDP costs no more than
// [DefaultTimeout].
package netcheck

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/proxy"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// DefaultTimeout bounds a check, and DefaultFullTimeout a full one.
const (
	DefaultTimeout     = 500 * time.Millisecond
	DefaultFullTimeout = 3 * time.Second
)

// defaultSTUNPort is the port of a node that names none (RFC 8489 §8.1).
const defaultSTUNPort = 3478

// ErrNoRegion reports a DERP map without a region that may be home.
var ErrNoRegion = errors.New("netcheck: no relay region may be home")

var errNoAddress = errors.New("netcheck: the relay's name has no address")

// Config is what a check needs. The functions may be nil for the system's own.
type Config struct {
	Map *tailcfg.DERPMap
	// Home is the present home region, 0 for none.
	Home int
	// HomeAlive says that the present home's relay has delivered something lately.
	HomeAlive bool
	// Last is the previous report, for its recent latencies. It may be nil.
	Last *Report
	// Full measures every region even if the choice is clear, for as long as Timeout, and looks for hairpin,
	// port mapping and captive portals as well.
	Full    bool
	Timeout time.Duration // 0: DefaultTimeout, or DefaultFullTimeout

	// Transport, if not nil, carries the STUN messages, so that GlobalV4 and GlobalV6 are those of its sockets. Otherwise the
	// check opens sockets of its own.
	Transport Transport
	// PortMap finds out what maps ports, for a full check. It may be nil.
	PortMap func(ctx context.Context) (PortMapping, error)

	ListenPacket func(ctx context.Context, network, address string) (net.PacketConn, error)
	DialContext  func(ctx context.Context, network, address string) (net.Conn, error)
	// Roots verify relays, and a proxy that is reached by TLS; nil: the system's.
	Roots *x509.CertPool
	// Proxy says by which HTTP proxy a relay's TCP port is reached; nil: as the environment says.
	Proxy       proxy.Func
	LookupNetIP func(ctx context.Context, network, host string) ([]netip.Addr, error)
	Logger      *slog.Logger // nil: silent
}

// Transport is a pair of sockets that somebody else reads, such as those by which a node reaches its peers.
type Transport interface {
	// Families says for which there is a socket.
	Families() (v4, v6 bool)
	// WriteSTUN sends b from the socket of dst's family. It does not block.
	WriteSTUN(b []byte, dst netip.AddrPort) error
	// OnSTUN calls f for each STUN message that comes, request or response, until stop has returned. f neither blocks nor keeps b.
	OnSTUN(f func(b []byte, src netip.AddrPort)) (stop func())
}

// PortMapping says which protocols map ports.
type PortMapping struct{ PMP, PCP, UPnP bool }

// Report is what a check found. It must not be changed.
type Report struct {
	Time time.Time // when the check began
	// Home is the region to use.
	Home int
	// UDP says that a STUN answer came; IPv4 and IPv6, that one came over that family.
	UDP, IPv4, IPv6 bool
	// Latency is each region's least round trip of this check, over UDP where that answers, else
	// the time of a TCP connection.
	Latency              map[int]time.Duration
	LatencyV4, LatencyV6 map[int]time.Duration // over UDP
	// GlobalV4 and GlobalV6 are this node's addresses as the first server of each family saw them; their ports
	// are those of the check's own sockets.
	GlobalV4, GlobalV6 netip.AddrPort
	// MappingVaries says that two servers saw different IPv4 addresses or ports; unset with fewer than two.
	MappingVaries tailcfg.OptBool

	// Of a full check alone:

	// LatencyHTTPS is each region's time of an HTTPS request, where UDP did not answer.
	LatencyHTTPS map[int]time.Duration
	// Hairpin says that a datagram to an address of the NAT's outside comes back in; unset without IPv4.
	Hairpin tailcfg.OptBool
	// PMP, PCP and UPnP say whether the router has them; unset if that is not known.
	PMP, PCP, UPnP tailcfg.OptBool
	// CaptivePortal says that someone else answered in a relay's place; unset where UDP works, and where nobody answered.
	CaptivePortal tailcfg.OptBool

	recent map[int]sample   // each region's best of the last minutes
	tried  map[int]struct{} // regions that this and earlier reports probed
}

type sample struct {
	d  time.Duration
	at time.Time
}

// NetInfo returns the report in the form that control wants.
func (r *Report) NetInfo() *tailcfg.NetInfo {
	ni := &tailcfg.NetInfo{PreferredDERP: r.Home, MappingVariesByDestIP: r.MappingVaries, PMP: r.PMP, PCP: r.PCP, UPnP: r.UPnP}
	if len(r.tried) == 0 {
		return ni // nothing was measured
	}
	ni.WorkingUDP = tailcfg.Bool(r.UDP)
	ni.WorkingIPv6 = tailcfg.Bool(r.IPv6)
	ni.DERPLatency = make(map[string]float64)
	for id, d := range r.LatencyV4 {
		ni.DERPLatency[strconv.Itoa(id)+"-v4"] = d.Seconds()
	}
	for id, d := range r.LatencyV6 {
		ni.DERPLatency[strconv.Itoa(id)+"-v6"] = d.Seconds()
	}
	return ni
}

// answer is what a probe brought.
type answer struct {
	region int
	kind   Kind
	d      time.Duration
	addr   netip.AddrPort // of this node, as the server sees it
	server netip.AddrPort
}

type sentProbe struct {
	Probe
	at time.Time
	to netip.AddrPort
}

// check is one run.
type check struct {
	cfg    Config
	ctx    context.Context
	wg     sync.WaitGroup
	conns  map[Kind]net.PacketConn
	v4, v6 bool // the families there are

	mu   sync.Mutex
	sent map[stun.TxID]sentProbe
	loop hairpin

	names   map[string]*name // by host name, owned by the run's goroutine
	answers chan answer
	failed  chan struct{}      // one for each probe that cannot be answered any more; has room for all
	extra   chan func(*Report) // what else was found; has room for all
}

// name is a host name being looked up.
type name struct {
	done  chan struct{}
	addrs []netip.Addr
}

// Run checks the network. It returns when the choice of the home is clear, at the latest after the
// time-out, or ctx's error if that ends first. Every goroutine and socket of it is gone by then.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	regions := candidates(cfg.Map)
	if len(regions) == 0 {
		return nil, ErrNoRegion
	}
	r := &Report{
		Time:    time.Now(),
		Latency: map[int]time.Duration{}, LatencyV4: map[int]time.Duration{}, LatencyV6: map[int]time.Duration{},
		LatencyHTTPS: map[int]time.Duration{},
		recent:       map[int]sample{}, tried: map[int]struct{}{},
	}
	if cfg.Last != nil {
		for id, s := range cfg.Last.recent {
			if r.Time.Sub(s.at) < historyAge {
				r.recent[id] = s
			}
		}
	}
	if len(regions) == 1 && !cfg.Full {
		r.Home = regions[0].RegionID
		return r, nil
	}
	switch {
	case cfg.Timeout > 0:
	case cfg.Full:
		cfg.Timeout = DefaultFullTimeout
	default:
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.ListenPacket == nil {
		cfg.ListenPacket = new(net.ListenConfig).ListenPacket
	}
	if cfg.DialContext == nil {
		cfg.DialContext = new(net.Dialer).DialContext
	}
	if cfg.LookupNetIP == nil {
		cfg.LookupNetIP = net.DefaultResolver.LookupNetIP
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	cctx, cancel := context.WithTimeout(ctx, cfg.Timeout)
	c := &check{
		cfg: cfg, ctx: cctx,
		conns: map[Kind]net.PacketConn{},
		sent:  map[stun.TxID]sentProbe{},
		names: map[string]*name{},
	}
	defer c.wg.Wait()
	defer c.close()
	defer cancel()
	if t := cfg.Transport; t != nil {
		c.v4, c.v6 = t.Families()
	} else {
		c.v4, c.v6 = c.listen(STUN4, "udp4"), c.listen(STUN6, "udp6")
	}
	last := cfg.Last
	if cfg.Full {
		last = nil
	}
	plan := Plan(cfg.Map, cfg.Home, last, r.Time, c.v4, c.v6)
	if cfg.Full {
		plan = append(plan, captivePlan(cfg.Map, cfg.Home)...)
		sort.SliceStable(plan, func(i, j int) bool { return plan[i].After < plan[j].After })
	}
	// Each probe is answered once at most, so that nobody who delivers an answer waits.
	c.answers = make(chan answer, len(plan))
	c.failed = make(chan struct{}, len(plan))
	c.extra = make(chan func(*Report), len(plan)+2)
	if cfg.Transport != nil {
		defer cfg.Transport.OnSTUN(func(b []byte, _ netip.AddrPort) { c.take(0, b, time.Now()) })()
	}
	c.run(r, plan)
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	recent := make(map[int]time.Duration, len(r.recent))
	for id, d := range r.Latency {
		if s, ok := r.recent[id]; !ok || d <= s.d {
			r.recent[id] = sample{d, r.Time}
		}
	}
	for id, s := range r.recent {
		recent[id] = s.d
	}
	if cfg.Last != nil && r.Time.Sub(cfg.Last.Time) < historyAge {
		for id := range cfg.Last.tried {
			r.tried[id] = struct{}{}
		}
	}
	r.Home = ChooseHome(cfg.Map, cfg.Home, cfg.HomeAlive, r.Latency, recent)
	cfg.Logger.Debug("netcheck: done", "home", r.Home, "udp", r.UDP, "regions", len(r.Latency), "took", time.Since(r.Time))
	return r, nil
}

func (c *check) listen(k Kind, network string) bool {
	pc, err := c.cfg.ListenPacket(c.ctx, network, ":0")
	if err != nil {
		return false // no such family here
	}
	c.conns[k] = pc
	c.wg.Go(func() { c.receive(k, pc) })
	return true
}

// write sends a STUN message from the socket of the family. It does not block.
func (c *check) write(k Kind, b []byte, dst netip.AddrPort) error {
	if t := c.cfg.Transport; t != nil {
		return t.WriteSTUN(b, dst)
	}
	_, err := c.conns[k].WriteTo(b, net.UDPAddrFromAddrPort(dst))
	return err
}

func (c *check) close() {
	for _, pc := range c.conns {
		pc.Close()
	}
}

// run sends the plan and gathers answers until the choice is clear.
func (c *check) run(r *Report, plan []Probe) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	outstanding := len(plan)
	if c.cfg.Full && c.cfg.PortMap != nil {
		outstanding++
		c.wg.Go(c.portMap)
	}
	udp, tcp := map[int]bool{}, map[int]time.Duration{} // regions by what answered
	mapped := map[int]netip.AddrPort{}                  // IPv4 address by region
	for {
		elapsed := time.Since(r.Time)
		until := c.cfg.Timeout
		if t := enough(c.cfg.Map, c.cfg.Home, r.Latency); t != 0 && !c.cfg.Full {
			until = min(until, t)
		}
		if elapsed >= until || outstanding == 0 {
			return
		}
		for len(plan) > 0 && plan[0].After <= elapsed {
			p := plan[0]
			plan = plan[1:]
			_, tcpDone := tcp[p.Region]
			if p.Kind == TCP && (r.UDP && (p.After > 0 || !c.cfg.Full) || udp[p.Region] || tcpDone) ||
				p.Kind == Captive && r.UDP ||
				p.Kind < TCP && p.After > 0 && answered(r, p) {
				outstanding-- // the answer is there
				continue
			}
			if p.Kind != Captive {
				r.tried[p.Region] = struct{}{}
			}
			c.probe(p)
		}
		if outstanding == 0 {
			return
		}
		if len(plan) > 0 {
			until = min(until, plan[0].After)
		}
		timer.Reset(until - elapsed)
		select {
		case <-c.ctx.Done():
			return
		case <-timer.C:
		case <-c.failed:
			outstanding--
		case f := <-c.extra:
			outstanding--
			f(r)
		case a := <-c.answers:
			outstanding--
			switch a.kind {
			case TCP:
				tcp[a.region] = a.d
				if c.cfg.Full {
					r.LatencyHTTPS[a.region] = a.d
				}
				if !udp[a.region] {
					least(r.Latency, a.region, a.d)
				}
				continue
			case STUN4:
				r.IPv4 = true
				least(r.LatencyV4, a.region, a.d)
				if !r.GlobalV4.IsValid() {
					r.GlobalV4 = a.addr
					if c.cfg.Full {
						outstanding++
						c.wg.Go(func() { c.findHairpin(a.server, a.addr) })
					}
				}
				mapped[a.region] = a.addr
				if len(mapped) > 1 {
					varies := false
					for _, ap := range mapped {
						varies = varies || ap != r.GlobalV4
					}
					r.MappingVaries = tailcfg.Bool(varies)
				}
			case STUN6:
				r.IPv6 = true
				least(r.LatencyV6, a.region, a.d)
				if !r.GlobalV6.IsValid() {
					r.GlobalV6 = a.addr
				}
			}
			if r.UDP = true; !udp[a.region] {
				udp[a.region] = true
				delete(r.Latency, a.region) // a TCP latency gives way
			}
			least(r.Latency, a.region, a.d)
		}
	}
}

func answered(r *Report, p Probe) bool {
	m := r.LatencyV4
	if p.Kind == STUN6 {
		m = r.LatencyV6
	}
	_, ok := m[p.Region]
	return ok
}

func least(m map[int]time.Duration, k int, d time.Duration) {
	d = max(d, 1)
	if old, ok := m[k]; !ok || d < old {
		m[k] = d
	}
}

// probe sends p, after looking its host's name up if need be, in a goroutine where that can block.
func (c *check) probe(p Probe) {
	switch p.Kind {
	case TCP:
		c.wg.Go(func() { c.connect(p) })
		return
	case Captive:
		c.wg.Go(func() { c.captive(p) })
		return
	}
	if a, ok := literal(p.Node, p.Kind); ok {
		c.sendSTUN(p, a)
		return
	}
	nm := c.names[p.Node.HostName]
	if nm == nil {
		nm = &name{done: make(chan struct{})}
		c.names[p.Node.HostName] = nm
		c.wg.Go(func() {
			defer close(nm.done)
			nm.addrs, _ = c.cfg.LookupNetIP(c.ctx, "ip", p.Node.HostName)
		})
	}
	c.wg.Go(func() {
		select {
		case <-nm.done:
		case <-c.ctx.Done():
			return
		}
		for _, a := range nm.addrs {
			if a = a.Unmap(); a.Is4() == (p.Kind == STUN4) {
				c.sendSTUN(p, a)
				return
			}
		}
		c.fail()
	})
}

// literal returns the address that the map itself gives for the node.
func literal(n *tailcfg.DERPNode, k Kind) (netip.Addr, bool) {
	s := n.IPv4
	if k == STUN6 {
		s = n.IPv6
	}
	if n.STUNTestIP != "" {
		s = n.STUNTestIP
	}
	a, err := netip.ParseAddr(s)
	return a, err == nil
}

// fail tells the run that one probe less can be answered.
func (c *check) fail() { c.failed <- struct{}{} }

// sendSTUN does not block: the socket is UDP.
func (c *check) sendSTUN(p Probe, a netip.Addr) {
	port := p.Node.STUNPort
	if port == 0 {
		port = defaultSTUNPort
	}
	tx := stun.NewTxID()
	c.mu.Lock()
	dst := netip.AddrPortFrom(a, uint16(port))
	c.sent[tx] = sentProbe{p, time.Now(), dst}
	c.mu.Unlock()
	if err := c.write(p.Kind, stun.AppendRequest(nil, tx), dst); err != nil {
		c.mu.Lock()
		delete(c.sent, tx)
		c.mu.Unlock()
		c.fail() // no route for the family, most often
	}
}

// receive reads one socket until it is closed.
func (c *check) receive(k Kind, pc net.PacketConn) {
	b := make([]byte, 1500)
	for {
		n, _, err := pc.ReadFrom(b)
		now := time.Now()
		if err != nil {
			if c.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			if _, ok := errors.AsType[net.Error](err); ok { // an ICMP error that the system reports on the socket, as some do
				continue
			}
			return
		}
		c.take(k, b[:n], now)
	}
}

// take takes a message that came on the socket of kind k, 0 if that is not known. It does not block.
func (c *check) take(k Kind, b []byte, now time.Time) {
	tx, addr, err := stun.ParseResponse(b)
	if err != nil {
		if tx, err := stun.ParseRequest(b); err == nil {
			c.loop.saw(tx)
		}
		return
	}
	c.mu.Lock()
	s, ok := c.sent[tx]
	if ok = ok && (k == 0 || s.Kind == k); ok {
		delete(c.sent, tx)
	}
	c.mu.Unlock()
	if ok {
		c.answers <- answer{s.Region, s.Kind, now.Sub(s.at), addr, s.to}
	}
}

// connect measures a TCP connection, which takes one round trip, or in a full check the relay's answer to an HTTPS request.
func (c *check) connect(p Probe) {
	n := p.Node
	conn, d, err := c.dialRelay(n)
	if err != nil {
		c.cfg.Logger.Debug("netcheck: TCP", "region", p.Region, "err", err)
		c.fail()
		return
	}
	if c.cfg.Full {
		stop := context.AfterFunc(c.ctx, func() { conn.Close() })
		d, err = latencyCheck(c.ctx, conn, n, c.cfg.Roots)
		stop()
	}
	conn.Close()
	if err != nil {
		c.cfg.Logger.Debug("netcheck: HTTPS", "region", p.Region, "err", err)
		c.fail()
		return
	}
	c.answers <- answer{region: p.Region, kind: TCP, d: d}
}

// dialRelay opens a stream to the relay's TCP port, through a proxy where the node would, and says how long that took.
func (c *check) dialRelay(n *tailcfg.DERPNode) (conn net.Conn, took time.Duration, err error) {
	port := n.DERPPort
	if port == 0 {
		port = 443
	}
	host := n.HostName
	px, err := c.cfg.Proxy.For(cmp.Or(host, n.IPv4, n.IPv6), false)
	if err != nil {
		return nil, 0, err
	}
	if px != nil {
		start := time.Now()
		conn, err = proxy.Dial(c.ctx, c.cfg.DialContext, px, c.cfg.Roots, net.JoinHostPort(cmp.Or(host, n.IPv4, n.IPv6), strconv.Itoa(port)))
		return conn, time.Since(start), err
	}
	network := "tcp"
	switch a4, err4 := netip.ParseAddr(n.IPv4); {
	case err4 == nil:
		host = a4.String()
	case n.IPv4 == "none":
		network = "tcp6"
		if a6, err := netip.ParseAddr(n.IPv6); err == nil {
			host = a6.String()
		}
	case n.IPv6 == "none":
		network = "tcp4"
	}
	addr := netip.AddrPort{}
	if a, err := netip.ParseAddr(host); err == nil {
		addr = netip.AddrPortFrom(a, uint16(port))
	} else {
		addrs, err := c.cfg.LookupNetIP(c.ctx, "ip"+network[3:], host)
		if err == nil && len(addrs) == 0 {
			err = errNoAddress
		}
		if err != nil {
			return nil, 0, err
		}
		addr = netip.AddrPortFrom(addrs[0].Unmap(), uint16(port))
	}
	start := time.Now()
	conn, err = c.cfg.DialContext(c.ctx, "tcp", addr.String())
	return conn, time.Since(start), err
}
