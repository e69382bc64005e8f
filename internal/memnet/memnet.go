// Package memnet is an in-memory network for tests: hosts with addresses that exchange datagrams
// and byte streams with latency, jitter, loss, duplication and reordering, from a seeded source.
// It keeps time by package time alone, so inside testing/synctest all of its time is virtual, and
// every wait is one that synctest understands.
//
// Datagrams may be lost, doubled and overtaken as the Link says. Streams have the latency but
// are reliable, as TCP is.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Link is what happens to what goes from one address to another.
type Link struct {
	Down      bool          // nothing passes; a connection attempt waits for its context
	Latency   time.Duration // one way
	Jitter    time.Duration // up to so much more, for datagrams: beyond their spacing it reorders
	Loss      float64       // probability that a datagram is lost
	Duplicate float64       // probability that a datagram arrives twice
	Reorder   float64       // probability that a datagram arrives one Latency (or a millisecond) late
	MTU       int           // longer datagrams are lost; 0: any length passes
}

// Router is what datagrams meet on their way besides links: NATs and firewalls. Package natlab has one.
type Router interface {
	// Out is called when a host sends: it returns the source as the rest of the network sees it, and whether
	// the datagram gets out.
	Out(src, dst netip.AddrPort) (netip.AddrPort, bool)
	// In is called when a datagram arrives, a latency later: it returns the socket that gets it, and whether it gets in.
	In(src, dst netip.AddrPort) (netip.AddrPort, bool)
}

// Network joins hosts. Its methods are safe for concurrent use.
type Network struct {
	mu       sync.Mutex
	router   Router
	rnd      *rand.Rand
	link     func(src, dst netip.AddrPort, udp bool) Link
	packets  map[netip.AddrPort]*PacketConn
	streams  map[netip.AddrPort]*Listener
	nextPort uint16
}

// New returns a network with the same link between all hosts. Equal seeds give equal choices for equal traffic.
func New(seed uint64, link Link) *Network {
	n := &Network{
		rnd:      rand.New(rand.NewPCG(seed, 0x6d656d6e6574)),
		packets:  make(map[netip.AddrPort]*PacketConn),
		streams:  make(map[netip.AddrPort]*Listener),
		nextPort: 32768,
	}
	n.SetLink(func(netip.AddrPort, netip.AddrPort, bool) Link { return link })
	return n
}

// SetLink makes f decide about each datagram and each connection from now on; open streams keep their latency. f is
// called with the network locked and must not call it.
func (n *Network) SetLink(f func(src, dst netip.AddrPort, udp bool) Link) {
	n.mu.Lock()
	n.link = f
	n.mu.Unlock()
}

// SetRouter puts r into the way of all datagrams. The network calls it with its lock held, so one call at a time.
func (n *Network) SetRouter(r Router) {
	n.mu.Lock()
	n.router = r
	n.mu.Unlock()
}

// Host is a machine on the network.
type Host struct {
	n     *Network
	addrs []netip.Addr
}

// Host returns a host with the addresses. It panics without any.
func (n *Network) Host(addrs ...string) *Host {
	h := &Host{n: n}
	for _, a := range addrs {
		h.addrs = append(h.addrs, netip.MustParseAddr(a))
	}
	if len(h.addrs) == 0 {
		panic("memnet: a host needs an address")
	}
	return h
}

// Addr is an address of either kind of traffic.
type Addr struct {
	net string
	ap  netip.AddrPort
}

// Network returns "tcp" or "udp".
func (a Addr) Network() string { return a.net }

// String returns address and port.
func (a Addr) String() string { return a.ap.String() }

// AddrPort returns address and port.
func (a Addr) AddrPort() netip.AddrPort { return a.ap }

func opError(op, network string, a netip.AddrPort, err error) error {
	return &net.OpError{Op: op, Net: network, Addr: Addr{network, a}, Err: err}
}

// local picks the host's address for a network such as "udp6" and an address such as ":0".
func (h *Host) local(network, address string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	want, _ := netip.ParseAddr(host)
	for _, a := range h.addrs {
		switch {
		case host != "" && !want.IsUnspecified() && a != want,
			network[len(network)-1] == '4' && !a.Is4(),
			network[len(network)-1] == '6' && !a.Is6():
			continue
		}
		return netip.AddrPortFrom(a, uint16(p)), nil
	}
	return netip.AddrPort{}, syscall.EADDRNOTAVAIL
}

// port replaces port 0 by a free one. n is locked.
func (n *Network) port(ap netip.AddrPort, taken func(netip.AddrPort) bool) (netip.AddrPort, error) {
	if ap.Port() != 0 {
		if taken(ap) {
			return ap, syscall.EADDRINUSE
		}
		return ap, nil
	}
	for range 1 << 15 {
		n.nextPort = n.nextPort | 0x8000
		c := netip.AddrPortFrom(ap.Addr(), n.nextPort)
		n.nextPort++
		if !taken(c) {
			return c, nil
		}
	}
	return ap, syscall.EADDRINUSE
}

// Listen opens a listener for streams on "tcp", "tcp4" or "tcp6".
func (h *Host) Listen(network, address string) (*Listener, error) {
	ap, err := h.local(network, address)
	if err != nil {
		return nil, opError("listen", network, ap, err)
	}
	n := h.n
	n.mu.Lock()
	defer n.mu.Unlock()
	ap, err = n.port(ap, func(c netip.AddrPort) bool { return n.streams[c] != nil })
	if err != nil {
		return nil, opError("listen", network, ap, err)
	}
	l := &Listener{n: n, addr: ap, backlog: make(chan *Conn, 128), done: make(chan struct{})}
	n.streams[ap] = l
	return l, nil
}

// DialContext connects a stream. address holds a literal IP address. Where the link is down it waits for ctx; where
// nothing listens it fails after a round trip.
func (h *Host) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("memnet: dial %s: %w", address, err)
	}
	want := ":0"
	fam := "tcp4"
	if dst.Addr().Is6() {
		fam = "tcp6"
	}
	src, err := h.local(fam, want)
	if err != nil {
		return nil, opError("dial", network, dst, syscall.ENETUNREACH)
	}
	n := h.n
	n.mu.Lock()
	src, _ = n.port(src, func(netip.AddrPort) bool { return false })
	there, back := n.link(src, dst, false), n.link(dst, src, false)
	n.mu.Unlock()
	if there.Down || back.Down {
		<-ctx.Done()
		return nil, opError("dial", network, dst, ctx.Err())
	}
	if d := there.Latency + back.Latency; d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, opError("dial", network, dst, ctx.Err())
		}
	}
	n.mu.Lock()
	l := n.streams[dst]
	n.mu.Unlock()
	if l == nil {
		return nil, opError("dial", network, dst, syscall.ECONNREFUSED)
	}
	a, b := pipe(src, dst, there.Latency, back.Latency)
	select {
	case <-l.done:
	default:
		select {
		case l.backlog <- b:
			return a, nil
		default:
		}
	}
	return nil, opError("dial", network, dst, syscall.ECONNREFUSED)
}

// Listener accepts streams. It implements net.Listener.
type Listener struct {
	n       *Network
	addr    netip.AddrPort
	backlog chan *Conn
	once    sync.Once
	done    chan struct{}
}

// Accept waits for a stream or Close.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, opError("accept", "tcp", l.addr, net.ErrClosed)
	default:
	}
	select {
	case c := <-l.backlog:
		return c, nil
	case <-l.done:
		return nil, opError("accept", "tcp", l.addr, net.ErrClosed)
	}
}

// Addr returns the listener's address.
func (l *Listener) Addr() net.Addr {
	return &net.TCPAddr{IP: l.addr.Addr().AsSlice(), Port: int(l.addr.Port())}
}

// Close ends Accept and resets streams that nobody has accepted.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.n.mu.Lock()
		delete(l.n.streams, l.addr)
		l.n.mu.Unlock()
		close(l.done)
		for {
			select {
			case c := <-l.backlog:
				c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// deadline is a point in time that can be waited for and moved.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	ch    chan struct{} // closed once it has passed
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.ch == nil || isClosed(d.ch) {
		d.ch = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	ch := d.ch
	if dur := time.Until(t); dur > 0 {
		d.timer = time.AfterFunc(dur, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.ch == ch && !isClosed(ch) {
				close(ch)
			}
		})
		return
	}
	close(ch)
}

func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	return d.ch
}

func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

var errTimeout = os.ErrDeadlineExceeded

// IsTimeout reports whether err is a passed deadline.
func IsTimeout(err error) bool { return errors.Is(err, errTimeout) }
