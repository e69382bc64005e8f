package netstack

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Output takes the packets that leave a Stack.
type Output interface {
	// WritePacket carries p away. It runs on the goroutine that caused the packet: an application's Write, an
	// Inbox.Flush that provokes an answer, or a timer, with locks of the stack held. So it must not block for long and
	// must not call into the same Stack. p is borrowed for the call. Calls come from several goroutines at once, but
	// in order within one TCP connection.
	WritePacket(p *Packet)
}

// link is the stack's only interface: it turns each of the stack's packets into a Packet for Output, at once.
//
// TX checksum offload is not claimed. TCP with GSO leaves its checksum to us anyway, fused into the copy; for the rest
// the stack must do it, or a UDP datagram that the stack fragments would leave without one, which IPv6 forbids
// (RFC 8200 §8.1).
type link struct {
	mtu     uint32
	out     Output
	windows smallWindows
	acks    ackTable
	strays  strays
	disp    atomic.Pointer[stack.NetworkDispatcher]
	closed  atomic.Bool
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

// maxBatch is what one UDP datagram with segmentation offload can carry in all (65,535 less headers), and sealed is
// what sealing adds to a packet: WireGuard's header, tag and padding.
const (
	maxBatch = 65507
	sealed   = 32 + 15
	maxGSO   = 61 << 10
)

// GSOMaxSize keeps a super-segment, once split and sealed, within one send.
func (l *link) GSOMaxSize() uint32 {
	n := maxBatch / (l.mtu + sealed)
	return min(maxGSO, max(n, 1)*(l.mtu-60))
}

func (l *link) SupportedGSO() stack.SupportedGSO { return stack.HostGSOSupported }

func (l *link) MTU() uint32 { return l.mtu }

func (l *link) SetMTU(uint32) {}

func (l *link) MaxHeaderLength() uint16 { return 0 }

func (l *link) LinkAddress() tcpip.LinkAddress { return "" }

func (l *link) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities: what comes in was authenticated whole by the tunnel's AEAD, so checksums are not checked again.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.disp.Store(nil)
		return
	}
	l.disp.Store(&d)
}

func (l *link) IsAttached() bool { return l.disp.Load() != nil }

func (l *link) Wait() {}

func (l *link) Close() {}

func (l *link) SetOnCloseAction(func()) {}

func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

func (l *link) AddHeader(*stack.PacketBuffer) {}

func (l *link) ParseHeader(*stack.PacketBuffer) bool { return true }

// WritePackets implements stack.LinkWriter: straight through, no queue.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	if l.closed.Load() {
		return 0, &tcpip.ErrClosedForSend{}
	}
	list := pkts.AsSlice()
	for _, pk := range list {
		p := newPacket()
		p.set(pk, int(l.mtu))
		l.windows.sent(p.hdr)
		era := l.strays.leaving()
		if !l.acks.keep(p.hdr, p.size, p) {
			p.nAhead = l.acks.ahead(p.hdr, &p.ahead)
			l.out.WritePacket(p)
		}
		l.strays.left(era, p.hdr)
		p.free()
	}
	return len(list), nil
}

// sendRaw passes a whole IP packet to Output as it is.
func (l *link) sendRaw(pkt []byte) {
	p := newPacket()
	p.raw = pkt
	l.out.WritePacket(p)
	p.free()
}

// deliver passes one inbound IP packet to the stack and gives up the reference to pk.
func (l *link) deliver(proto tcpip.NetworkProtocolNumber, pk *stack.PacketBuffer) {
	if d := l.disp.Load(); d != nil {
		(*d).DeliverNetworkPacket(proto, pk)
	}
	pk.DecRef()
}
