// Package udp holds the UDP sockets of a node: one for IPv4 and one for IPv6, on the same port
// where that is free.
//
// Batches of equal datagrams go out with one system call and come in with one where the kernel
// has UDP_SEGMENT and UDP_GRO (Linux 4.18 and 5.0), which is found out at run time. Linux without them, and
// for addresses behind a device that cannot do segmentation, still moves several datagrams with one call; elsewhere
// each is sent and received by itself. Nothing is allocated per packet, and the large buffer that a
// coalesced batch needs is held only while there is something to receive.
//
// Datagrams carry no instruction about fragments. Linux then forbids routers to make any of what fits the path as it knows it
// from ICMP, which [Sockets.MaxPayload] tells, and makes them itself of what does not: so datagrams that fit are whole
// when they arrive, and on a link for which even the base size is too long (1360 bytes with all headers) nothing is lost. Elsewhere
// IPv4's routers may make fragments.
package udp

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	// ErrClosed reports the use of closed [Sockets].
	ErrClosed = fmt.Errorf("udp: %w", net.ErrClosed)
	// ErrNoSocket reports an address of a family for which there is no socket.
	ErrNoSocket = errors.New("udp: no socket for this address family")
)

// PacketConn is what a socket must have. *net.UDPConn has it, and so have the sockets of in-memory networks.
type PacketConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, dst netip.AddrPort) (int, error)
	LocalAddr() net.Addr
	Close() error
}

// Config says what sockets to open. The zero value is good.
type Config struct {
	// Port is the port of both sockets, 0 for one that the system chooses. If it is taken, another is used.
	Port uint16
	// Listen opens a socket; nil is the system's. Networks are "udp4" and "udp6".
	Listen func(network, address string) (PacketConn, error)
	// Plain has every datagram sent and received by itself.
	Plain bool
	// NoOffload turns UDP_SEGMENT and UDP_GRO off.
	NoOffload bool
	Logger    *slog.Logger // nil: silent
}

// Recv takes what one system call has received: datagrams of seg bytes each in b, but for the last, which may be
// shorter. b is borrowed and may be changed. socket is 0 for IPv4 and 1 for IPv6; calls for one socket come one at a time.
type Recv func(socket int, src netip.AddrPort, b []byte, seg int)

// Sockets are the two sockets. Their methods are safe for concurrent use.
type Sockets struct {
	cfg   Config
	log   *slog.Logger
	socks [2]sock

	mu     sync.Mutex // serialises Start, Rebind and Close
	recv   Recv
	closed atomic.Bool
}

type sock struct {
	network string
	conn    atomic.Pointer[conn] // nil: none
	port    atomic.Uint32
	done    chan struct{} // closed when the receive goroutine of conn has ended; nil: none was started
}

// conn is one socket between two rebinds.
type conn struct {
	pc  PacketConn
	udp *net.UDPConn    // nil: not the system's
	raw syscall.RawConn // of udp; nil: without many
	gso atomic.Bool
	gro bool
	// many says that several datagrams go and come with one call where gso and gro do not hold.
	many bool
	// lame are addresses behind a device that cannot do segmentation; nil: none.
	lame atomic.Pointer[lameList]
}

// lameList is a list of addresses. It is immutable.
type lameList []netip.Addr

// maxLame is how many addresses may need sparing before segmentation is given up altogether.
const maxLame = 32

func (c *conn) isLame(a netip.Addr) bool {
	l := c.lame.Load()
	return l != nil && slices.Contains(*l, a)
}

// spare does without segmentation on the way to a.
func (c *conn) spare(a netip.Addr) {
	for {
		old := c.lame.Load()
		var list lameList
		if old != nil {
			list = *old
		}
		switch {
		case slices.Contains(list, a):
			return
		case len(list) == maxLame:
			c.gso.Store(false)
			return
		}
		list = append(slices.Clone(list), a)
		if c.lame.CompareAndSwap(old, &list) {
			return
		}
	}
}

const (
	// bufferSize is what is asked of the kernel for each direction of a socket: one lost batch costs up to 64 KB.
	bufferSize = 7 << 20
	// plainSize is the room for a datagram received by itself: a jumbo frame.
	plainSize = 9216
	// maxPayload is the most that one datagram, and so one batch of segments, holds over IPv4.
	maxPayload = 65507
	// maxSegments is how many segments the kernels since 4.18 take at once.
	maxSegments = 64
)

// Open opens the sockets. It fails only if neither family has one. Nothing is received before Start; Close
// must be called.
func Open(cfg Config) (*Sockets, error) {
	s := &Sockets{cfg: cfg, log: cfg.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.socks[0].network, s.socks[1].network = "udp4", "udp6"
	if err := s.open(cfg.Port); err != nil {
		return nil, err
	}
	return s, nil
}

// open opens both sockets, on one port if possible.
func (s *Sockets) open(port uint16) error {
	const tries = 4 // for a port that is free in both families
	var err4, err6 error
	for i := range tries {
		var c4, c6 *conn
		c4, err4 = s.listen(0, port)
		want := port
		if c4 != nil {
			want = portOf(c4)
		}
		c6, err6 = s.listen(1, want)
		if c4 != nil && c6 != nil && portOf(c4) != portOf(c6) && port == 0 && i < tries-1 {
			c4.pc.Close()
			c6.pc.Close()
			continue
		}
		for i, c := range []*conn{c4, c6} {
			s.socks[i].conn.Store(c)
			s.socks[i].port.Store(0)
			if c != nil {
				s.socks[i].port.Store(uint32(portOf(c)))
			}
		}
		break
	}
	if s.socks[0].conn.Load() == nil && s.socks[1].conn.Load() == nil {
		return fmt.Errorf("udp: no socket: %w", errors.Join(err4, err6))
	}
	return nil
}

func portOf(c *conn) uint16 {
	if a, ok := c.pc.LocalAddr().(interface{ AddrPort() netip.AddrPort }); ok {
		return a.AddrPort().Port()
	}
	return 0
}

// listen opens one socket on port, or on another port if that is taken.
func (s *Sockets) listen(i int, port uint16) (*conn, error) {
	network := s.socks[i].network
	open := s.cfg.Listen
	if open == nil {
		open = listenSystem
	}
	pc, err := open(network, ":"+strconv.Itoa(int(port)))
	if err != nil && port != 0 {
		var err2 error
		if pc, err2 = open(network, ":0"); err2 == nil && port == s.cfg.Port {
			s.log.Warn("udp: the port is taken, using another", "network", network, "port", port, "err", err)
		} else if err2 != nil {
			err = err2
		} else {
			err = nil
		}
	}
	if pc == nil {
		return nil, err
	}
	c := &conn{pc: pc}
	if c.udp, _ = pc.(*net.UDPConn); c.udp != nil {
		c.udp.SetReadBuffer(bufferSize) // as much of it as the system allows
		c.udp.SetWriteBuffer(bufferSize)
		c.setup(&s.cfg)
	}
	return c, nil
}

func listenSystem(network, address string) (PacketConn, error) {
	a, err := net.ResolveUDPAddr(network, address)
	if err != nil {
		return nil, err
	}
	c, err := net.ListenUDP(network, a)
	if err != nil {
		return nil, err // not a nil *net.UDPConn in an interface
	}
	return c, nil
}

// Start begins to receive: one goroutine per socket calls recv until Close. It may be called once.
func (s *Sockets) Start(recv Recv) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recv != nil || s.closed.Load() {
		return
	}
	s.recv = recv
	s.run()
}

// run starts the receive goroutines. s.mu is held.
func (s *Sockets) run() {
	if s.recv == nil {
		return
	}
	for i := range s.socks {
		k := &s.socks[i]
		c := k.conn.Load()
		if c == nil {
			continue
		}
		k.done = make(chan struct{})
		go func(done chan struct{}) {
			defer close(done)
			s.receive(i, c)
		}(k.done)
	}
}

// Ports returns the local ports, 0 where there is no socket.
func (s *Sockets) Ports() (v4, v6 uint16) {
	return uint16(s.socks[0].port.Load()), uint16(s.socks[1].port.Load())
}

// Rebind closes the sockets and opens them anew on the same ports, for a host whose network has changed. It waits
// for calls of Recv that are under way, and so must not be called by one. Sends meanwhile fail.
func (s *Sockets) Rebind() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return ErrClosed
	}
	v4, v6 := s.Ports()
	s.shut()
	port := s.cfg.Port
	if port == 0 {
		if port = v4; port == 0 {
			port = v6
		}
	}
	if err := s.open(port); err != nil {
		return err
	}
	s.run()
	return nil
}

// shut closes the sockets and waits for their goroutines. s.mu is held.
func (s *Sockets) shut() {
	for i := range s.socks {
		if c := s.socks[i].conn.Swap(nil); c != nil {
			c.pc.Close()
		}
	}
	for i := range s.socks {
		if d := s.socks[i].done; d != nil {
			<-d
			s.socks[i].done = nil
		}
	}
}

// Close closes the sockets and waits for calls of Recv that are under way, so it must not be called by one. It may be called more than once.
func (s *Sockets) Close() {
	s.closed.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut()
}

// Send transmits the datagrams in b, each seg bytes but for the last, to dst. It does not keep b, and blocks while the
// kernel's buffer is full. An error means that some of them were not sent.
func (s *Sockets) Send(dst netip.AddrPort, b []byte, seg int) error {
	if s.closed.Load() {
		return ErrClosed
	}
	a := dst.Addr()
	i := 0
	if !a.Is4() {
		if a.Is4In6() {
			dst = netip.AddrPortFrom(a.Unmap(), dst.Port())
		} else {
			i = 1
		}
	}
	c := s.socks[i].conn.Load()
	if c == nil {
		return ErrNoSocket
	}
	return c.send(dst, b, seg)
}

func (c *conn) send(dst netip.AddrPort, b []byte, seg int) error {
	if seg <= 0 || seg > len(b) {
		seg = len(b)
	}
	if seg < len(b) && c.gso.Load() && !c.isLame(dst.Addr()) {
		per := min(maxPayload/seg, maxSegments) * seg
		for per > seg && len(b) > seg {
			n := min(per, len(b))
			if err := c.writeGSO(dst, b[:n], seg); err != nil {
				if !c.gsoFailed(err, dst.Addr()) {
					return err
				}
				break // this batch by single datagrams
			}
			b = b[n:]
		}
	}
	if seg < len(b) && c.many {
		_, err := c.writeMany(dst, b, seg)
		return err
	}
	for len(b) > 0 {
		n := min(seg, len(b))
		if _, err := c.pc.WriteToUDPAddrPort(b[:n], dst); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// MaxPayload returns how long a datagram to dst may be, in bytes, to leave this host in one piece: what the link on the way carries, or
// less where the system has learned that a link further on carries less. 0 means that it is not known. It sends nothing.
func (s *Sockets) MaxPayload(dst netip.AddrPort) int {
	a := dst.Addr().Unmap()
	i, headers := 0, 20+8
	if !a.Is4() {
		i, headers = 1, 40+8
	}
	c := s.socks[i].conn.Load()
	if c == nil || c.udp == nil {
		return 0
	}
	mtu := linkMTU(netip.AddrPortFrom(a, dst.Port()))
	return min(max(mtu-headers, 0), maxPayload)
}

// receive serves one socket until it is closed.
func (s *Sockets) receive(i int, c *conn) {
	switch {
	case c.gro:
		s.receiveGRO(i, c)
		return
	case c.many:
		s.receiveMany(i, c)
		return
	}
	b := make([]byte, plainSize)
	var bad failures
	for {
		n, src, err := c.pc.ReadFromUDPAddrPort(b)
		if err != nil {
			if !bad.again(err) {
				return
			}
			continue
		}
		bad = 0
		if n > 0 {
			s.recv(i, src, b[:n], n)
		}
	}
}

// failures counts receive errors in a row. Some systems report with the next receive that an earlier datagram
// met a closed port, so an error says little.
type failures int

// again reports whether to go on after err, and waits a little if errors do not end.
func (f *failures) again(err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	if *f++; *f > 100 {
		time.Sleep(10 * time.Millisecond)
	}
	return true
}
