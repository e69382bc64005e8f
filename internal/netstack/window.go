package netstack

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// smallWindows watches the connections of which the stack might refuse the peer's acknowledgements for good.
//
// A window is advertised in units of 2^scale bytes, rounded down, so a receiver that takes a part of what its window
// allowed may then advertise one that ends a few bytes short of where it ended before, or none at all. A peer that has
// filled the first window stands beyond the end of the second, and each acknowledgement it sends bears that sequence
// number. RFC 9293 §3.10.7.4 would have even a zero window accept valid acknowledgements; gVisor drops them, together
// with the few bytes that would mend it. Once the application reads, the window opens again. But one that does not read
// until it has written, an echo server for one, waits for room in its send buffer that only those acknowledgements can
// make: for ever.
//
// So an inbound acknowledgement beyond a small window is delivered twice, as it is and with the sequence number that
// the window begins with, which the stack accepts.
type smallWindows struct {
	scale uint8        // of the windows we advertise
	n     atomic.Int32 // len(flows), so that the others do not pay for this

	mu    sync.Mutex
	flows map[flow]window
}

const (
	tcpRST = 0x04

	small = 32 << 10 // bytes

	// maxWatched is how many connections are watched at most. One that had to give way to another is watched again
	// with the next packet it sends.
	maxWatched = 1024
)

// flow names a connection.
type flow struct{ local, remote netip.AddrPort }

// window is what was last advertised: so many units from the byte that is expected next.
type window struct {
	next  uint32
	units uint16
}

func (s *smallWindows) init(maxBuffer int) {
	s.scale = uint8(tcp.FindWndScale(seqnum.Size(maxBuffer)))
	s.flows = make(map[flow]window)
}

// sent looks at the headers of an outbound packet.
func (s *smallWindows) sent(hdr []byte) {
	t := tcpHeader(hdr)
	if t == nil || t[13]&(tcpSYN|tcpACK) != tcpACK {
		return
	}
	w := window{binary.BigEndian.Uint32(t[8:]), binary.BigEndian.Uint16(t[14:])}
	if int(w.units)<<s.scale >= small || t[13]&tcpRST != 0 {
		if s.n.Load() > 0 {
			s.forget(flowOf(hdr, t))
		}
		return
	}
	f := flowOf(hdr, t)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.flows[f]; !ok && len(s.flows) >= maxWatched {
		for other := range s.flows {
			delete(s.flows, other)
			break
		}
	}
	s.flows[f] = w
	s.n.Store(int32(len(s.flows)))
}

// forget ends the watch over a connection.
func (s *smallWindows) forget(f flow) {
	if s.n.Load() == 0 {
		return
	}
	s.mu.Lock()
	delete(s.flows, f)
	s.n.Store(int32(len(s.flows)))
	s.mu.Unlock()
}

// refused reports whether the stack may refuse an inbound acknowledgement, a segment without payload of which hdr are
// the headers, and the sequence number with which it does not.
func (s *smallWindows) refused(hdr []byte) (seq uint32, yes bool) {
	if s.n.Load() == 0 {
		return 0, false
	}
	t := tcpHeader(hdr)
	if t == nil || t[13]&^tcpPSH != tcpACK {
		return 0, false
	}
	f := flowOf(hdr, t)
	f.local, f.remote = f.remote, f.local
	s.mu.Lock()
	w, ok := s.flows[f]
	s.mu.Unlock()
	return w.next, ok && before(w.next+uint32(w.units)<<s.scale, binary.BigEndian.Uint32(t[4:]))
}

// tcpHeader returns the TCP header that follows an IP header without extensions; nil if there is none.
func tcpHeader(b []byte) []byte {
	var t []byte
	switch {
	case len(b) >= header.IPv4MinimumSize && b[0]>>4 == 4 && b[9] == protoTCP:
		t = b[min(int(b[0]&15)*4, len(b)):]
	case len(b) >= header.IPv6MinimumSize && b[0]>>4 == 6 && b[6] == protoTCP:
		t = b[header.IPv6MinimumSize:]
	}
	if len(t) < header.TCPMinimumSize {
		return nil
	}
	return t
}

// flowOf names the flow of a packet from local to remote, whose TCP header is t.
func flowOf(b, t []byte) flow {
	var src, dst netip.Addr
	if b[0]>>4 == 4 {
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	} else {
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	}
	be := binary.BigEndian
	return flow{netip.AddrPortFrom(src, be.Uint16(t)), netip.AddrPortFrom(dst, be.Uint16(t[2:]))}
}
