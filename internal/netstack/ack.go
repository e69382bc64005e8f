package netstack

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Acknowledgements of small segments wait a moment for the answer that most often follows, and go with it (RFC 9293 §3.8.6.3,
// RFC 1122 §4.2.3.2): gVisor acknowledges every segment at once and by itself, which makes four packets of each request and its
// answer, where two do, and each is sealed, sent, received and opened, and wakes goroutines at both ends.
//
// Inbound segments of up to ackable bytes in all, with their FIN, are expected to be acknowledged. Their acknowledgement, and no
// other, is kept back as it leaves the stack, and goes
//   - not at all, if another packet of its connection leaves: that has the same acknowledgement, or a newer one; ahead of a reset;
//   - at once, if more follows than ackable bytes, so that of full segments every second is acknowledged without a delay;
//   - when the application wants to read more and there is nothing: it has seen what there was, and did not answer;
//   - at the latest after ackDelay, for an application that does not read.
//
// Duplicate acknowledgements, those with SACK blocks, window updates and small windows are never kept back.
// What is kept lies in a table of fixed size; connections that meet in one place of it lose the delay, and nothing else.
//
// The last acknowledgement of a connection, of the peer's FIN after our own, answers nobody who waits. It goes ahead of the next packet
// to that peer, of whatever connection, or after ackDelay.
type ackTable struct {
	scale uint8 // of the windows we advertise
	out   func(pkt []byte)
	slots [1 << ackBits]ackSlot

	lastMu sync.Mutex
	last   [8]lastAck // of which nLast are in use
	nLast  atomic.Int32

	mu     sync.Mutex // held during a sweep
	timer  *time.Timer
	armed  atomic.Bool // the timer runs
	used   atomic.Bool // since the last sweep
	closed bool
}

const (
	ackBits  = 7
	ackable  = 2400    // bytes: two full segments of the smallest MSS
	ackRoom  = 8 << 10 // bytes of window, with less of which the peer may wait for room
	ackDelay = 20 * time.Millisecond
)

type ackSlot struct {
	state atomic.Uint32 // ackState; changed with mu held
	mu    sync.Mutex
	key   flowKey
	sum   int    // bytes that wait to be acknowledged
	first uint32 // the numbers that acknowledge the first segment of them
	last  uint32 // and all
	n     int    // held: bytes of pkt
	pkt   ackPacket
}

// ackPacket has room for an acknowledgement.
type ackPacket [header.IPv6MinimumSize + header.TCPMinimumSize + 12]byte

// lastAck is the last packet of a connection.
type lastAck struct {
	key flowKey
	n   int
	pkt ackPacket
}

type ackState = uint32

const (
	ackNone     ackState = iota
	ackExpected          // the segments are on their way to the stack
	ackHeld              // pkt is kept back, and perhaps another expected
	ackAtOnce            // the next is not kept back: the application already waits for more
	ackClosing           // our FIN has left
	ackLast              // and the peer's has come
)

// flowKey names a connection by the bytes of the headers that leave: source and destination address, and both ports.
type flowKey [36]byte

// keyOf returns the flow key of the IP header b and the TCP header t, reversed if they are inbound.
func keyOf(b, t []byte, inbound bool) (k flowKey) {
	at, n := 8, 16
	if b[0]>>4 == 4 {
		at, n = 12, 4
	}
	src, dst := b[at:at+n], b[at+n:at+2*n]
	if inbound {
		copy(k[:16], dst)
		copy(k[16:], src)
		copy(k[32:], t[2:4])
		copy(k[34:], t[:2])
	} else {
		copy(k[:16], src)
		copy(k[16:], dst)
		copy(k[32:], t[:4])
	}
	return k
}

// keyFor returns the flow key of a connection by its addresses.
func keyFor(f flow) (k flowKey) {
	copy(k[:16], f.local.Addr().AsSlice())
	copy(k[16:], f.remote.Addr().AsSlice())
	binary.BigEndian.PutUint16(k[32:], f.local.Port())
	binary.BigEndian.PutUint16(k[34:], f.remote.Port())
	return k
}

func (a *ackTable) slot(k *flowKey) *ackSlot {
	le := binary.LittleEndian
	h := le.Uint64(k[:]) ^ le.Uint64(k[8:])>>7 ^ le.Uint64(k[16:])<<1 ^ le.Uint64(k[24:])>>9 ^ uint64(le.Uint32(k[32:]))<<17
	return &a.slots[h*0x9e3779b97f4a7c15>>(64-ackBits)]
}

// expect notes that a segment is about to be delivered, of which hdr are the headers, n is the length, in sequence numbers, and
// ack is the number that acknowledges it.
func (a *ackTable) expect(hdr []byte, n int, ack uint32) {
	t := tcpHeader(hdr)
	if t == nil {
		return
	}
	k := keyOf(hdr, t, true)
	s := a.slot(&k)
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.state.Load()
	if state != ackNone && s.key != k {
		a.send(s)
		state = ackNone
	}
	switch {
	case state == ackNone && n <= ackable:
		s.key, s.sum, s.first, s.last = k, n, ack, ack
		s.state.Store(ackExpected)
		a.arm()
	case (state == ackExpected || state == ackHeld) && s.sum+n <= ackable:
		s.sum += n
		s.last = ack
	case state == ackHeld:
		s.sum = ackable + 1 // the next is not kept
	case state == ackClosing && t[13]&tcpFIN != 0:
		s.first, s.last = ack, ack
		s.state.Store(ackLast)
	default:
		s.state.Store(ackNone)
	}
}

// keep looks at a packet that leaves, of which hdr are the headers and size is the length, and reports whether it is kept back. Then it has
// been taken from src, which writes it with its checksums.
func (a *ackTable) keep(hdr []byte, size int, src interface{ Next(dst []byte) int }) bool {
	t := tcpHeader(hdr)
	if t == nil {
		return false
	}
	k := keyOf(hdr, t, false)
	s := a.slot(&k)
	fin, rst := t[13]&tcpFIN != 0, t[13]&tcpRST != 0
	if s.state.Load() == ackNone && !fin && !rst {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.state.Load()
	switch ours := s.key == k; {
	case fin && (ours || state == ackNone):
		s.key = k
		s.state.Store(ackClosing)
		a.arm()
	case !ours:
	case rst: // and not while it is on its way: without it the peer may never have seen that there was a connection
		a.send(s)
	case state == ackLast:
		s.state.Store(ackNone)
		return s.covers(binary.BigEndian.Uint32(t[8:])) && a.plain(t, size-(len(hdr)-len(t))) && a.keepLast(&k, size, src)
	case (state == ackExpected || state == ackHeld) && s.sum <= ackable && size <= len(s.pkt) &&
		a.plain(t, size-(len(hdr)-len(t))) && s.covers(binary.BigEndian.Uint32(t[8:])):
		s.n = src.Next(s.pkt[:])
		s.state.Store(ackHeld)
		return true
	default:
		s.state.Store(ackNone)
	}
	return false
}

// keepLast keeps the packet of src for [ackTable.ahead], or reports that there is no room.
func (a *ackTable) keepLast(k *flowKey, size int, src interface{ Next(dst []byte) int }) bool {
	a.lastMu.Lock()
	defer a.lastMu.Unlock()
	n := a.nLast.Load()
	if int(n) == len(a.last) || size > len(ackPacket{}) {
		return false
	}
	l := &a.last[n]
	l.key, l.n = *k, src.Next(l.pkt[:])
	a.nLast.Store(n + 1)
	a.arm()
	return true
}

// ahead takes a last acknowledgement that may go ahead of a packet with the headers hdr, writes it to dst and returns its length; 0: there
// is none.
func (a *ackTable) ahead(hdr []byte, dst *ackPacket) int {
	if a.nLast.Load() == 0 {
		return 0
	}
	t := tcpHeader(hdr)
	if t == nil {
		return 0
	}
	k := keyOf(hdr, t, false)
	a.lastMu.Lock()
	defer a.lastMu.Unlock()
	n := int(a.nLast.Load())
	for i := range a.last[:n] {
		if l := &a.last[i]; [32]byte(l.key[:32]) == [32]byte(k[:32]) { // both addresses
			size := copy(dst[:], l.pkt[:l.n])
			*l = a.last[n-1]
			a.nLast.Store(int32(n - 1))
			return size
		}
	}
	return 0
}

// covers reports whether ack acknowledges some of what waits and nothing else.
func (s *ackSlot) covers(ack uint32) bool { return !before(ack, s.first) && !before(s.last, ack) }

// plain reports whether a TCP segment of n bytes with its header, which begins with t, does nothing but acknowledge.
func (a *ackTable) plain(t []byte, n int) bool {
	hlen := int(t[12]>>4) * 4
	if t[13] != tcpACK || n != hlen || len(t) < hlen || int(binary.BigEndian.Uint16(t[14:]))<<a.scale < ackRoom {
		return false
	}
	options := t[header.TCPMinimumSize:hlen]
	return len(options) == 0 || onlyTimestamps(options)
}

// release sends what is kept of a connection whose application waits for more.
func (a *ackTable) release(k *flowKey) {
	s := a.slot(k)
	if s.state.Load() == ackNone {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key != *k {
		return
	}
	if s.state.Load() == ackExpected { // the application was quicker than the stack
		s.state.Store(ackAtOnce)
		return
	}
	a.send(s)
}

// send empties s, whose mu is held.
func (a *ackTable) send(s *ackSlot) {
	if s.state.Swap(ackNone) == ackHeld {
		a.out(s.pkt[:s.n])
	}
}

// arm sees to it that there is a sweep within ackDelay. A timer that is set for each acknowledgement would cost more than that.
func (a *ackTable) arm() {
	a.used.Store(true)
	if a.armed.Load() || a.armed.Swap(true) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed:
	case a.timer == nil:
		a.timer = time.AfterFunc(ackDelay, a.sweep)
	default:
		a.timer.Reset(ackDelay)
	}
}

func (a *ackTable) sweep() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	if !a.used.Swap(false) {
		a.armed.Store(false)
		if !a.used.Load() || a.armed.Swap(true) { // or what came in between has armed it, or is about to
			return
		}
	}
	for i := range a.slots {
		s := &a.slots[i]
		if s.state.Load() != ackNone {
			s.mu.Lock()
			a.send(s)
			s.mu.Unlock()
		}
	}
	a.lastMu.Lock()
	for i := range a.last[:a.nLast.Load()] {
		a.out(a.last[i].pkt[:a.last[i].n])
	}
	a.nLast.Store(0)
	a.lastMu.Unlock()
	a.timer.Reset(ackDelay)
}

// close drops what is kept, once no packet leaves any more. Nothing is sent afterwards, not even for a reader that was about to wait.
func (a *ackTable) close() {
	a.mu.Lock()
	a.closed = true
	if a.timer != nil {
		a.timer.Stop()
	}
	a.mu.Unlock() // expect takes it with a slot's
	for i := range a.slots {
		s := &a.slots[i]
		s.mu.Lock()
		s.state.Store(ackNone)
		s.mu.Unlock()
	}
}
