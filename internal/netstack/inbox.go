package netstack

import (
	"bytes"
	"encoding/binary"
	"runtime"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	chunkSize = 64 << 10 // gVisor's largest pooled chunk

	// copyBelow: what is delivered with fewer bytes than this is copied out of the chunk, so that a small segment that
	// an application leaves unread holds its own size and not 64 KiB.
	copyBelow = 8 << 10

	// yieldAfter is how many bytes in datagrams may be delivered at a time before their readers get to run.
	yieldAfter = 4 << 10

	maxHdr     = 60 + 60 // IP and TCP headers with all options
	maxPayload = 0xffff - maxHdr

	protoUDP    = 17
	protoICMPv6 = 58
)

// An Inbox brings packets into a Stack, for one receive loop: it is not safe for concurrent use, but a Stack may have
// several.
//
//	for each message received {
//		dst := in.Room(len(message))
//		plain, ok := open(dst, message) // decrypts to dst
//		if ok && allowed(plain) {
//			in.Commit(plain) // or CommitStray
//		}
//	}
//	in.Flush()
//
// The payload of consecutive TCP segments of one flow comes to lie contiguously in a chunk of 64 KiB: Room ends up
// overlapping the end of the payload collected so far by as much as the next headers are expected to take, and the
// bytes under them are put back once they are parsed (or the packet turns out to be something else).
type Inbox struct {
	s     *Stack
	chunk *buffer.View
	mem   []byte // all of chunk
	end   int    // mem before it is taken

	lent  bool // Room was called and not yet Commit
	room  int  // where the latest Room starts
	saved int  // bytes at room that belong to the batch; kept in stash
	alone int  // bytes delivered in datagrams since Flush
	small int  // and TCP segments with little data, or that begin or end a connection
	stash [maxHdr]byte

	batch batch
}

// NewInbox returns an Inbox for one receive loop. It holds one chunk of 64 KiB once it is used. An Inbox needs no
// closing; after Stack.Close it drops what it gets.
func (s *Stack) NewInbox() *Inbox { return &Inbox{s: s} }

// Room returns n bytes of space for the next packet. Their content is arbitrary. The space of an earlier Room that was
// not committed is given up. Room panics if n is negative or above 65,536.
func (in *Inbox) Room(n int) []byte {
	if n < 0 || n > chunkSize {
		panic("netstack: Room beyond 64 KiB")
	}
	in.restore()
	in.reserve(n)
	at := in.end
	if b := &in.batch; b.n > 0 && at-b.start >= b.hlen {
		at -= b.hlen
	}
	in.room, in.lent = at, true
	in.saved = copy(in.stash[:], in.mem[at:in.end])
	return in.mem[at : at+n : at+n]
}

// reserve makes mem[end:] at least n bytes long, for which it may deliver the batch.
func (in *Inbox) reserve(n int) {
	if in.chunk != nil && in.end+n <= len(in.mem) {
		return
	}
	in.deliver()
	if in.chunk != nil && in.end+n <= len(in.mem) {
		return
	}
	in.drop()
	in.chunk = buffer.NewViewSize(chunkSize)
	in.mem = in.chunk.AsSlice()
}

// restore puts back what Room lent out of the batch.
func (in *Inbox) restore() {
	if in.saved > 0 {
		copy(in.mem[in.room:], in.stash[:in.saved])
		in.saved = 0
	}
}

func (in *Inbox) drop() {
	if in.chunk != nil {
		in.chunk.Release()
	}
	in.chunk, in.mem, in.end = nil, nil, 0
}

// Commit takes pkt, one whole IP packet that the node may receive: normally the beginning of the latest Room; other
// bytes are copied. What lies beyond the length in the IP header is ignored, and so is what is no IP packet. Commit
// does not keep pkt but may overwrite it. Packets of one flow reach the stack in the order of their Commit, at the
// latest with Flush.
func (in *Inbox) Commit(pkt []byte) {
	if !in.lent || len(pkt) == 0 || in.room+len(pkt) > len(in.mem) || &pkt[0] != &in.mem[in.room] {
		// Not in its place: put it there.
		if len(pkt) > chunkSize {
			return
		}
		pkt = bytes.Clone(pkt) // it may lie where restore is going to write
		pkt = append(in.Room(len(pkt))[:0], pkt...)
	}
	in.lent = false
	var s segment
	kind := s.parse(pkt)
	if kind == malformed {
		in.restore()
		return
	}
	pkt = pkt[:s.total]
	b := &in.batch
	same := b.n > 0 && s.sameFlow(b)

	switch {
	case same && kind == bulk && s.continues(b) && in.end-b.start+s.payload() <= maxPayload:
		b.merge(&s)
		if in.room+s.hlen == in.end {
			in.restore() // the payload is already behind the last one; the headers lay on its end
		} else {
			copy(in.mem[in.end:], pkt[s.hlen:])
		}
		in.end += s.payload()

	case kind == bulk:
		at := in.room
		if in.saved > 0 { // Room made sure that it fits behind the batch too
			at = in.end
			copy(in.mem[at:], pkt)
			in.restore()
			s.hdr = in.mem[at : at+s.hlen]
		}
		in.deliver()
		b.begin(&s, at+s.hlen)
		in.end = at + s.total

	default:
		// Not to be collected: passed on now, in views of its own, after what its flow has waiting.
		answer := false // to be acknowledged with what the application sends next
		if s.tcp {
			switch s.hdr[s.ipLen+13] & (tcpSYN | tcpFIN | tcpRST | tcpACK) {
			case tcpSYN | tcpACK:
				// Others' listeners might take the acknowledgement and the first data together amiss: gVisor's does when it is full.
				answer = markSYN(s.hdr[s.ipLen:], int(in.s.link.mtu), s.ipLen)
			case tcpSYN:
				markSYN(s.hdr[s.ipLen:], int(in.s.link.mtu), s.ipLen)
			case tcpFIN | tcpACK:
				answer = true
			}
		}
		head := buffer.NewViewWithData(pkt[:s.hlen])
		var body *buffer.View
		if s.hlen < len(pkt) {
			body = buffer.NewViewWithData(pkt[s.hlen:])
		}
		in.restore()
		if same || kind == opaque {
			in.deliver()
		}
		switch {
		case !s.tcp:
			in.alone += s.total
		case s.hdr[s.ipLen+13] != tcpACK:
			in.small++
		}
		if answer {
			n := s.payload() + 1
			in.s.link.acks.expect(head.AsSlice(), n, binary.BigEndian.Uint32(head.AsSlice()[s.ipLen+4:])+uint32(n))
		}
		var again *buffer.View
		if s.tcp && body == nil {
			if seq, yes := in.s.link.windows.refused(head.AsSlice()); yes {
				again = buffer.NewViewWithData(head.AsSlice())
				binary.BigEndian.PutUint32(again.AsSlice()[s.ipLen+4:], seq)
			}
		}
		in.inject(s.proto, head, body)
		if again != nil {
			in.inject(s.proto, again, nil)
		}
	}
}

// CommitStray is Commit for a TCP packet that begins a connection or belongs to no established one; to is what [Stack.Taker] says. It drops one that is
// never answered, one with anything unusual in its IP header, for the stack might drop that, and one that is long, or
// comes when too many have not been answered yet (the peer sends again what it cares about).
func (in *Inbox) CommitStray(pkt []byte, to Taker) {
	var s segment
	if kind := s.parse(pkt); kind == malformed || !s.tcp || s.ipLen != header.IPv4MinimumSize && pkt[0]>>4 == 4 || !in.s.link.strays.admit(pkt, &s, to) {
		return
	}
	in.Commit(pkt)
	if to == Nobody {
		in.deliver() // alone, for it has an answer of its own
	}
}

// Flush delivers what has been collected. Call it when the receive loop has nothing more at hand.
func (in *Inbox) Flush() {
	in.lent = false
	in.restore()
	in.deliver()
	if in.end > chunkSize/2 {
		in.drop() // the next batch gets a whole chunk
	}
	if in.alone >= yieldAfter || in.small > 1 {
		// Who reads datagrams gets to run now, on this processor if there is no other: what does not fit a socket's queue is lost after all
		// the work that it was, and while more comes the receive loop would not pause. And where small segments come
		// several at a time, of many connections, their answers leave before the loop looks for more.
		runtime.Gosched()
	}
	in.alone, in.small = 0, 0
}

// deliver passes the batch to the stack.
func (in *Inbox) deliver() {
	b := &in.batch
	if b.n == 0 {
		return
	}
	n := in.end - b.start
	if b.n > 1 {
		b.fixLength(n)
	} else if n <= ackable {
		in.small++
		in.s.link.acks.expect(b.hdr[:b.hlen], n, b.next)
	}
	b.n = 0
	head := buffer.NewViewWithData(b.hdr[:b.hlen])
	var body *buffer.View
	if n < copyBelow {
		body = buffer.NewViewWithData(in.mem[b.start:in.end])
		in.end = b.start - b.hlen // the space may be used again
	} else {
		body = in.chunk.Clone()
		body.TrimFront(b.start)
		body.CapLength(n)
	}
	in.inject(b.proto, head, body)
}

// inject delivers a packet. The headers have a view of their own because the stack pulls them up while it shares that
// view, which copies the view's whole chunk.
func (in *Inbox) inject(proto tcpip.NetworkProtocolNumber, head, body *buffer.View) {
	payload := buffer.MakeWithView(head)
	if body != nil {
		rest := buffer.MakeWithView(body)
		payload.Merge(&rest)
	}
	in.s.link.deliver(proto, stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload}))
}

// kind is what an Inbox may do with a packet.
type kind uint8

const (
	malformed kind = iota // no IP packet, or shorter than it says: dropped
	bulk                  // a TCP segment with data and no flags but ACK and PSH: collected
	apart                 // a whole packet of a known flow: delivered on its own
	opaque                // a packet whose flow is not known (fragment, extension header): keeps its place
)

// segment is a parsed packet.
type segment struct {
	hdr   []byte // IP and transport headers
	proto tcpip.NetworkProtocolNumber
	tcp   bool
	ipLen int
	hlen  int // where the payload starts
	total int
}

func (s *segment) payload() int { return s.total - s.hlen }

func (s *segment) parse(b []byte) kind {
	if !validIP(b) {
		return malformed
	}
	var next byte
	flow := true // the transport header follows the IP header
	if b[0]>>4 == 4 {
		s.proto = header.IPv4ProtocolNumber
		s.ipLen = int(b[0]&15) * 4
		s.total = int(binary.BigEndian.Uint16(b[2:]))
		next = b[9]
		flow = binary.BigEndian.Uint16(b[6:])&0x3fff == 0 // no fragment
	} else {
		s.proto = header.IPv6ProtocolNumber
		s.ipLen = header.IPv6MinimumSize
		s.total = s.ipLen + int(binary.BigEndian.Uint16(b[4:]))
		next = b[6]
		flow = next == protoTCP || next == protoUDP || next == protoICMPv6
	}
	if s.ipLen < header.IPv4MinimumSize || s.total < s.ipLen || s.total > len(b) {
		return malformed
	}
	s.hlen = s.ipLen
	switch {
	case !flow:
		s.hlen = s.total
		return opaque
	case next == protoUDP && s.total >= s.ipLen+header.UDPMinimumSize:
		s.hlen += header.UDPMinimumSize
		return apart
	case next != protoTCP || s.total < s.ipLen+header.TCPMinimumSize:
		s.hlen = s.total
		return apart
	}
	t := b[s.ipLen:]
	off := int(t[12]>>4) * 4
	if off < header.TCPMinimumSize || s.ipLen+off > s.total {
		return malformed
	}
	s.tcp = true
	s.hlen += off
	s.hdr = b[:s.hlen]
	if s.hlen < s.total && t[13]&^tcpPSH == tcpACK && (s.ipLen == header.IPv4MinimumSize || b[0]>>4 == 6) {
		return bulk
	}
	return apart
}

func (s *segment) sameFlow(b *batch) bool {
	if !s.tcp || s.proto != b.proto || s.ipLen != b.ipLen {
		return false
	}
	at := 12
	if s.ipLen == header.IPv6MinimumSize {
		at = 8
	}
	return bytes.Equal(s.hdr[at:s.ipLen+4], b.hdr[at:s.ipLen+4])
}

// continues reports whether a bulk segment of the batch's flow may be joined to it: the next in sequence, the same in
// every header field that the stack looks at, or newer in those of which only the newest counts.
func (s *segment) continues(b *batch) bool {
	if s.hlen != b.hlen {
		return false
	}
	h, p := s.hdr, b.hdr[:b.hlen]
	if s.ipLen == header.IPv4MinimumSize {
		// TOS with its ECN bits, DF, TTL.
		if h[1] != p[1] || h[6] != p[6] || h[8] != p[8] {
			return false
		}
	} else if !bytes.Equal(h[:4], p[:4]) || h[7] != p[7] {
		return false
	}
	h, p = h[s.ipLen:], p[s.ipLen:]
	be := binary.BigEndian
	if be.Uint32(h[4:]) != b.next || h[12] != p[12] || before(be.Uint32(h[8:]), be.Uint32(p[8:])) {
		return false
	}
	ho, po := h[header.TCPMinimumSize:], p[header.TCPMinimumSize:]
	if bytes.Equal(ho, po) {
		return true
	}
	return onlyTimestamps(ho) && onlyTimestamps(po) &&
		!before(be.Uint32(ho[4:]), be.Uint32(po[4:])) && !before(be.Uint32(ho[8:]), be.Uint32(po[8:]))
}

// onlyTimestamps recognises the layout of RFC 7323 appendix A.
func onlyTimestamps(o []byte) bool {
	return len(o) == 12 && binary.BigEndian.Uint32(o) == 0x0101080a
}

// before compares sequence numbers (RFC 9293 §3.4).
func before(a, b uint32) bool { return int32(a-b) < 0 }

// batch is a run of TCP segments being collected. Its payload is the Inbox's mem[start:end].
type batch struct {
	n     int // segments; 0: none
	start int
	next  uint32 // the sequence number that continues it
	proto tcpip.NetworkProtocolNumber
	ipLen int
	hlen  int
	hdr   [maxHdr]byte
}

func (b *batch) begin(s *segment, start int) {
	b.n, b.start = 1, start
	b.proto, b.ipLen, b.hlen = s.proto, s.ipLen, s.hlen
	copy(b.hdr[:], s.hdr)
	b.next = binary.BigEndian.Uint32(s.hdr[s.ipLen+4:]) + uint32(s.payload())
}

// merge brings the headers up to date for one more segment: the newest acknowledgement, window and timestamp echo,
// but the oldest timestamp, which is the one to be echoed (RFC 7323 §4.3).
func (b *batch) merge(s *segment) {
	b.n++
	b.next += uint32(s.payload())
	h, p := s.hdr[s.ipLen:], b.hdr[b.ipLen:b.hlen]
	copy(p[8:12], h[8:12])
	p[13] |= h[13]
	copy(p[14:16], h[14:16])
	if o := p[header.TCPMinimumSize:]; onlyTimestamps(o) {
		copy(o[8:12], h[header.TCPMinimumSize+8:])
	}
}

// fixLength makes the IP header that of a packet with n bytes of payload.
func (b *batch) fixLength(n int) {
	if b.ipLen != header.IPv4MinimumSize {
		binary.BigEndian.PutUint16(b.hdr[4:], uint16(b.hlen-b.ipLen+n))
		return
	}
	binary.BigEndian.PutUint16(b.hdr[2:], uint16(b.hlen+n))
	b.hdr[10], b.hdr[11] = 0, 0
	binary.BigEndian.PutUint16(b.hdr[10:], ^checksum.Checksum(b.hdr[:b.ipLen], 0))
}
