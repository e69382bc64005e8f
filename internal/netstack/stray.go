package netstack

import (
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Taker says what a TCP packet is for.
type Taker uint8

// What Stack.Taker returns.
const (
	Foreign    Taker = iota // the address is not the stack's
	Nobody                  // the stack answers with a reset, or the fallback handler decides
	Listener                // a connection may begin, or the stack answers with a reset
	Handshake               // a connection on its way, or one in TIME-WAIT
	Connection              // an established connection
)

const (
	// maxStrays is how many strays may wait: some 4 MiB, and more than a program gets to accept at a time.
	maxStrays = 4096

	// maxStray is the length in bytes of the longest packet that may be one; a longer one is dropped, and sent again.
	maxStray = 4 << 10

	// strayQuiet is how long no answer must have left before those that are waited for are taken to have had none, in parts.
	strayQuiet = 2

	// maxStrays packets to handshakes may come in each time that the workers have run for handshakeRun parts, which is 20,000 in a second and
	// any machine works off, or after handshakeLong, which is few enough even if they have not.
	handshakeRun  = 8
	handshakeLong = 10 * time.Second

	pausePart = 25 * time.Millisecond
)

// strays bounds the TCP packets in the stack that are of no established connection. gVisor queues them for its workers without a limit, or up to
// a listener's receive buffer, which has to be as good as none (listenTCP), so a peer that is let in could fill the memory with what
// it sends faster than it is answered, or while a worker is held up in WritePacket. Two things are counted, up to maxStrays each:
//
//   - What comes to a listener, or to nobody: in when it comes, and out when an answer leaves, a SYN-ACK or a reset. What is never
//     answered is dropped instead (admit). Some still have no answer: a SYN to a listener whose backlog is full, an acknowledgement of a
//     cookie, which makes a connection, a SYN that the fallback handler has already, and segments to a listener that were joined (which they
//     have to be: of the first data of a connection, come when the backlog is full, the second alone would be answered with a reset). So once
//     the count has reached its bound and no answer has left for strayQuiet, nothing is waiting, unless a worker is held up, and the count
//     starts again. What comes to nobody is answered before Commit returns, so none of it waits; it is counted because its resets are.
//   - What comes to a handshake. Most of that has no answer, so this count starts again once the workers have had the time for it.
//
// Not counted is what comes to an established connection: data is bounded there by its receive buffer, and for the rest nothing is sent,
// or an acknowledgement at a bounded rate, so it is worked off faster than it can be received.
type strays struct {
	waiting   atomic.Int32
	answered  atomic.Int64 // when the last answer left, on epoch's clock
	handshake atomic.Int32

	// Packets on their way out, by the parity of era when they began: once era has moved on and those of the one before are none, no
	// packet is held up since before that.
	era     atomic.Uint32
	writing [2]atomic.Int32

	mu     sync.Mutex // guards the following
	quiet  pause      // since when no answer has left
	seen   int64      // answered by then
	asked  time.Duration
	worked pause     // since packets to handshakes are counted
	first  time.Time // the first of these
}

var epoch = time.Now()

// pause is a time in which no packet was held up on its way out, for a part of it or longer. It is measured in parts, for what begins to be
// held up within one shows in the next.
type pause struct {
	since time.Time // when the present part began; zero: none
	era   uint32
	parts int // before that
}

// beginLocked begins a part of p, unless something has been held up since before the latest era.
func (s *strays) beginLocked(p *pause, parts int) {
	*p = pause{}
	if s.writing[(s.era.Load()+1)&1].Load() == 0 {
		*p = pause{time.Now(), s.era.Add(1), parts}
	}
}

// overLocked takes p on, and reports whether it has had so many parts.
func (s *strays) overLocked(p *pause, parts int) bool {
	switch {
	case p.since.IsZero():
		s.beginLocked(p, 0)
	case time.Since(p.since) < pausePart:
	case s.era.Load() == p.era && s.writing[(p.era+1)&1].Load() != 0:
		*p = pause{} // if era has moved on, what had begun before it has left
	case p.parts+1 >= parts:
		return true
	default:
		s.beginLocked(p, p.parts+1)
	}
	return false
}

// admit reports whether a packet may come in, which is for to and has SYN or is of no established connection.
func (s *strays) admit(pkt []byte, seg *segment, to Taker) bool {
	flags := seg.hdr[seg.ipLen+13]
	if flags&tcpSYN != 0 && flags&(tcpFIN|tcpRST) != 0 {
		return false
	}
	switch to {
	case Connection:
		return true
	case Handshake:
		return s.enterHandshake()
	case Listener, Nobody:
		// Resets, and what has neither SYN nor ACK, have no answer; nor has what the stack drops before TCP.
		answered := flags&tcpRST == 0 && flags&(tcpSYN|tcpACK) != 0 &&
			(pkt[0]>>4 == 6 || checksum.Checksum(pkt[:header.IPv4MinimumSize], 0) == 0xffff)
		return answered && seg.total <= maxStray && s.enter()
	}
	return false
}

// enter reports whether one more that is to be answered may come in.
func (s *strays) enter() bool {
	// From half of the bound on, so that where little goes on the few without an answer do not add up to it over the days.
	if n := s.waiting.Load(); n >= maxStrays/2 && !s.settled() && n >= maxStrays {
		return false
	}
	s.waiting.Add(1)
	return true
}

// settled reports that what is counted does not wait any more, and starts the count again.
func (s *strays) settled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Since(epoch)
	// Asked after a while without strays, and not over and over until the moment between two packets that are held up.
	idle := now-s.asked >= strayQuiet*pausePart && s.writing[0].Load() == 0 && s.writing[1].Load() == 0
	s.asked = now
	over := s.overLocked(&s.quiet, strayQuiet)
	answered := s.answered.Load() // after, for it is set before an answer is no longer held up
	switch {
	case idle && now-time.Duration(answered) >= strayQuiet*pausePart:
	case answered != s.seen:
		s.seen = answered
		s.beginLocked(&s.quiet, 0)
		return false
	case !over:
		return false
	}
	s.quiet = pause{}
	s.waiting.Store(0)
	return true
}

// enterHandshake reports whether one more may come in for a handshake.
func (s *strays) enterHandshake() bool {
	n := s.handshake.Add(1)
	if n != 1 && n%(maxStrays/16) != 0 && n <= maxStrays {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case n == 1:
	case s.overLocked(&s.worked, handshakeRun), n > maxStrays && time.Since(s.first) >= handshakeLong:
		s.handshake.Store(1)
	case n > maxStrays:
		s.handshake.Store(maxStrays)
		return false
	default:
		return true
	}
	s.first = time.Now()
	s.beginLocked(&s.worked, 0)
	return true
}

// leaving is called before a packet leaves, and left with its result once it has.
func (s *strays) leaving() uint32 {
	era := s.era.Load() & 1
	s.writing[era].Add(1)
	return era
}

func (s *strays) left(era uint32, hdr []byte) {
	if t := tcpHeader(hdr); t != nil && (t[13]&(tcpSYN|tcpACK) == tcpSYN|tcpACK || t[13]&tcpRST != 0) {
		s.answered.Store(int64(time.Since(epoch)))
		for n := s.waiting.Load(); n > 0 && !s.waiting.CompareAndSwap(n, n-1); n = s.waiting.Load() {
		}
	}
	s.writing[era].Add(-1)
}
