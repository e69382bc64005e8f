// Package netstack is TCP, UDP and ICMP echo in userspace for one tailnet node, on gVisor's network stack.
//
// Outbound, the stack hands over TCP segments of up to about 60 KB; Output gets them as a [Packet] on the goroutine
// that wrote, and [Packet.Next] cuts them into MTU-sized IP packets, copying and checksumming in one pass. Inbound, an
// [Inbox] offers the space that the next packet is decrypted into and joins the in-order segments of one flow before
// they reach the stack, whose cost is per packet and not per byte. Nothing is queued between the stack and
// Output, but for acknowledgements that wait for an answer to go with (ackTable).
//
// The package decides nothing about security: what may come in or go out is settled before [Inbox.Commit] and in
// [Output].
//
// A [Stack] has GOMAXPROCS goroutines (gVisor's TCP workers), one more from the first burst of small writes on, and,
// with [Stack.SetFallbackTCP], one for each handler that runs. gVisor's workers sleep in a way that testing/synctest
// does not take for durably blocked, so virtual time stands still in a bubble with a Stack in it.
package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	glog "gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/tailnode/tailnode/internal/flush"
)

// DefaultMTU is the largest IP packet inside the tunnel unless Config says otherwise: what every tailnet path carries.
const DefaultMTU = 1280

const nicID tcpip.NICID = 1

// How long an endpoint whose connection is over is kept. The values bound what a burst of short connections holds;
// RFC 9293 §3.4.2 asks for 2 MSL in TIME-WAIT. What that is to keep apart, a copy that the network kept back, the tunnel's
// replay window does not let in; what is left is a last acknowledgement that was lost, for which a few retries of the peer are time enough.
// Each endpoint in TIME-WAIT holds some 6 KB, and a busy client has thousands of them.
const (
	timeWait  = 3 * time.Second
	finWait2  = 30 * time.Second
	orphanTTL = 60 * time.Second // a closed connection whose peer acknowledges nothing
)

// Config says how a Stack is built. Output is required; the zero value of every other field means its default.
type Config struct {
	// MTU is the size in bytes of the largest IP packet that Packet.Next yields, 1280 to 65535. Default DefaultMTU.
	MTU int
	// Output takes every packet that leaves the stack.
	Output Output
	// MaxBuffer is the size in bytes to which one connection's receive buffer, and its send buffer, may grow; the TCP
	// window is half the receive buffer. Only paths with a long round trip get that far. Default 8 MiB.
	MaxBuffer int
	// BufferBudget is the ceiling in bytes for all growth beyond the initial sizes, over all connections of the Stack.
	// Default 32 MiB.
	BufferBudget int
	// Backlog bounds, for each listener, the connections not yet accepted and those still in their handshake (beyond
	// it: SYN cookies). Default 1,024.
	Backlog int
	// FallbackInFlight bounds the connection attempts that are with the fallback handler and not yet established.
	// Default 256.
	FallbackInFlight int
	// UDPBuffer is the size in bytes of each UDP socket's receive queue. Default 256 KiB.
	UDPBuffer int
	// Logger gets what an operator might want to know; nil is silent.
	Logger *slog.Logger
}

func (c *Config) setDefaults() error {
	if c.Output == nil {
		return errors.New("netstack: Config.Output is nil")
	}
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&c.MTU, DefaultMTU)
	def(&c.MaxBuffer, 8<<20)
	def(&c.BufferBudget, 32<<20)
	def(&c.Backlog, 1024)
	def(&c.FallbackInFlight, 256)
	def(&c.UDPBuffer, 256<<10)
	if c.MTU < header.IPv6MinimumMTU || c.MTU > 65535 {
		return fmt.Errorf("netstack: MTU %d is not within 1280..65535", c.MTU)
	}
	if c.MaxBuffer < initialBuffer || c.BufferBudget < 0 || c.Backlog < 1 || c.FallbackInFlight < 1 || c.UDPBuffer < 4096 {
		return errors.New("netstack: a limit in Config is too small")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// A Stack is the network stack of one node. Its methods are safe for concurrent use.
type Stack struct {
	cfg    Config
	gv     *stack.Stack
	link   *link
	budget budget
	// piece is how much of a Write the stack gets at a time: what fits one segment, so that the first leaves while the
	// next is copied, and no small remainder goes out between large ones.
	piece   int
	flusher flush.Flusher[*conn]

	addrMu sync.Mutex                          // serialises SetAddresses
	addrs  atomic.Pointer[map[netip.Addr]bool] // replaced, not changed

	mu     sync.Mutex
	closed bool
	socks  map[socket]struct{} // every open conn and listener, so that Close ends them all

	fallback     atomic.Pointer[fallbackFunc]
	fallbackOnce sync.Once
	forwarding   sync.WaitGroup // fallback handshakes under way
	stop         context.CancelFunc
	life         context.Context
	done         chan struct{} // Close has finished
}

// socket is something that Stack.Close ends.
type socket interface{ abort() }

var quietGVisor sync.Once

// discard drops gVisor's own log lines, which would otherwise go to the standard error of the host program.
type discard struct{}

func (discard) Emit(int, glog.Level, time.Time, string, ...any) {}

// New returns a running Stack without addresses. It does not block.
func New(cfg Config) (*Stack, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	quietGVisor.Do(func() { glog.SetTarget(discard{}) })

	s := &Stack{
		cfg:   cfg,
		socks: make(map[socket]struct{}),
		done:  make(chan struct{}),
	}
	s.addrs.Store(new(map[netip.Addr]bool))
	s.budget.init(cfg.MaxBuffer, cfg.BufferBudget)
	s.life, s.stop = context.WithCancel(context.Background())
	s.flusher.Flush = (*conn).flush
	s.link = &link{mtu: uint32(cfg.MTU), out: cfg.Output}
	s.link.windows.init(cfg.MaxBuffer)
	s.link.acks.scale, s.link.acks.out = s.link.windows.scale, s.link.sendRaw
	s.piece = int(s.link.GSOMaxSize()) - header.TCPTotalHeaderMaximumSize - 1
	s.gv = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		HandleLocal:        true,
	})
	if err := s.configure(); err != nil {
		s.stop()
		s.gv.Destroy()
		return nil, err
	}
	return s, nil
}

const (
	// maxRTO bounds the pause before TCP sends again (RFC 6298 §5.5 doubles it each time). It is short because what ends
	// an outage here is a new path, of which TCP is not told.
	maxRTO = 2 * time.Second
	// maxProbes is how many probes of a closed window may go unanswered: a quarter of an hour's worth.
	maxProbes = 450
)

func (s *Stack) configure() error {
	if err := s.gv.CreateNIC(nicID, s.link); err != nil {
		return fmt.Errorf("netstack: create interface: %s", err)
	}
	s.gv.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	var (
		sack     = tcpip.TCPSACKEnabled(true)
		recovery = tcpip.TCPRecovery(0) // RACK off: it misjudges reordering on links that lose bursts
		moderate = tcpip.TCPModerateReceiveBufferOption(true)
		cc       = tcpip.CongestionControlOption("cubic")
		tw       = tcpip.TCPTimeWaitTimeoutOption(timeWait)
		reuse    = tcpip.TCPTimeWaitReuseGlobal
		linger   = tcpip.TCPLingerTimeoutOption(finWait2)
		rto      = tcpip.TCPMaxRTOOption(maxRTO)
		retries  = tcpip.TCPMaxRetriesOption(maxProbes)
		rcv      = tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: initialBuffer, Max: s.cfg.MaxBuffer}
		snd      = tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: initialBuffer, Max: s.cfg.MaxBuffer}
	)
	for _, o := range []tcpip.SettableTransportProtocolOption{
		&sack, &recovery, &moderate, &cc, &tw, &reuse, &linger, &rto, &retries, &rcv, &snd,
	} {
		if err := s.gv.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("netstack: set %T: %s", o, err)
		}
	}
	return nil
}

// MTU returns the size in bytes of the largest IP packet that leaves the stack.
func (s *Stack) MTU() int { return s.cfg.MTU }

// SetAddresses makes addrs the node's own addresses, adding and removing as needed. Listeners on the unspecified
// address and connections on addresses that stay are not touched; a listener on an address that goes keeps its port
// and serves again when the address returns. Invalid and duplicate entries are ignored.
func (s *Stack) SetAddresses(addrs []netip.Addr) {
	s.addrMu.Lock()
	defer s.addrMu.Unlock()
	want := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		if a = a.Unmap().WithZone(""); a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() {
			want[a] = true
		}
	}
	have := make(map[netip.Addr]bool, len(want))
	for a := range *s.addrs.Load() {
		if want[a] {
			have[a] = true
		} else {
			s.gv.RemoveAddress(nicID, toGV(a))
		}
	}
	for _, a := range addrs { // in the caller's order: the first of a family is the source of what is dialled
		a = a.Unmap().WithZone("")
		if !want[a] || have[a] {
			continue
		}
		pa := tcpip.ProtocolAddress{
			Protocol:          netProto(a),
			AddressWithPrefix: toGV(a).WithPrefix(),
		}
		if err := s.gv.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); err != nil {
			s.cfg.Logger.Warn("netstack: address not added", "addr", a, "err", err.String())
			continue
		}
		have[a] = true
	}
	s.addrs.Store(&have)
}

// SendRaw passes pkt, a whole IP packet with its checksums filled in, to Output as it is. It neither keeps nor changes
// pkt, and reports false for what is no IP packet, is longer than the MTU, or comes after Close.
func (s *Stack) SendRaw(pkt []byte) bool {
	if len(pkt) > s.cfg.MTU || !validIP(pkt) || s.life.Err() != nil {
		return false
	}
	s.link.sendRaw(pkt)
	return true
}

// Close ends every connection (its peer gets a reset), listener and socket at once, and waits for the stack's own
// goroutines. It does not wait for fallback handlers that the caller supplied: their connections fail, and so they
// return. Output is not used after Close has returned, but by a call of an Inbox that was under way. Close may be called
// more than once and from any goroutine but the ones that run Output or hold an Inbox in the middle of a call.
func (s *Stack) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		<-s.done
		return
	}
	s.closed = true
	socks := s.socks
	s.socks = nil
	s.mu.Unlock()

	s.stop()
	for k := range socks {
		k.abort()
	}
	s.flusher.Close()
	s.endForwarding()
	s.gv.Close() // half-open connections and those that linger after their Close
	s.gv.Wait()
	s.link.closed.Store(true)
	s.link.acks.close()
	close(s.done)
}

// endForwarding waits for the handshakes that the fallback handler asked for. Each would go on until the peer answers
// or a minute is over, and cannot be told to stop before it has registered its endpoint; so what is registered is
// aborted until none is left.
func (s *Stack) endForwarding() {
	idle := make(chan struct{})
	go func() {
		s.forwarding.Wait()
		close(idle)
	}()
	for {
		for _, ep := range s.gv.RegisteredEndpoints() {
			ep.Abort()
		}
		select {
		case <-idle:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// add registers k to be aborted by Close, or reports that it is too late.
func (s *Stack) add(k socket) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.socks[k] = struct{}{}
	return true
}

func (s *Stack) remove(k socket) {
	s.mu.Lock()
	delete(s.socks, k)
	s.mu.Unlock()
}

// NumSockets returns how many connections, listeners and sockets are open.
func (s *Stack) NumSockets() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.socks)
}

// Taker returns what a TCP packet from remote to local is for. It does not block but for short locks, and does not allocate.
func (s *Stack) Taker(local, remote netip.AddrPort) Taker {
	proto := netProto(local.Addr())
	ep, ok := s.gv.FindTransportEndpoint(proto, tcp.ProtocolNumber, stack.TransportEndpointID{
		LocalPort: local.Port(), LocalAddress: toGV(local.Addr()),
		RemotePort: remote.Port(), RemoteAddress: toGV(remote.Addr()),
	}, nicID).(*tcp.Endpoint)
	if ok {
		switch ep.EndpointState() {
		case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateCloseWait, tcp.StateClosing, tcp.StateLastAck:
			return Connection
		case tcp.StateListen:
		default:
			return Handshake
		}
	}
	switch {
	case !(*s.addrs.Load())[local.Addr()]:
		return Foreign
	case ok:
		return Listener
	}
	return Nobody
}

func toGV(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

func fromGV(a tcpip.Address) netip.Addr {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return ip.Unmap()
}

func netProto(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func validIP(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	switch b[0] >> 4 {
	case 4:
		return len(b) >= header.IPv4MinimumSize
	case 6:
		return len(b) >= header.IPv6MinimumSize
	}
	return false
}
