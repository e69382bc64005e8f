package netstack

import (
	"sync/atomic"
	"time"
)

const (
	// maxStrays is how many strays may wait: some 4 MiB, and more than a program gets to accept at a time.
	maxStrays = 4096

	// maxStray is the length in bytes of the longest packet that may be one; a longer one is dropped, and sent again.
	maxStray = 4 << 10

	// strayQuiet is how long no answer must have left before those that are waited for are taken to have had none.
	strayQuiet = 25 * time.Millisecond
)

// strays bounds the packets in the stack that belong to no connection: a SYN, or what comes to a listener or to nobody without one having gone
// before. gVisor queues them for its workers without a limit, or up to a listener's receive buffer, which has to be as good as none
// (listenTCP), so a peer that is let in could fill the memory with what it sends faster than it is answered. Others queue too, but in
// connections, where data is bounded and the rest is worked off faster than it can be received, since nothing is sent for it.
//
// For the same reason those strays add up that are answered, with a SYN-ACK or a reset. So what came in is counted up and an answer down;
// beyond maxStrays they are dropped. Some are not answered (a bad cookie, or one that made a connection): once the count has reached its
// bound and no answer leaves any more, nothing is waiting, and it starts again.
type strays struct {
	waiting  atomic.Int32
	answered atomic.Int64 // when the last answer left, on epoch's clock
}

var epoch = time.Now()

// enter reports whether one more stray may come in.
func (s *strays) enter() bool {
	if s.waiting.Load() >= maxStrays {
		now := time.Since(epoch)
		if now-time.Duration(s.answered.Load()) < strayQuiet {
			return false
		}
		s.answered.Store(int64(now))
		s.waiting.Store(0)
	}
	s.waiting.Add(1)
	return true
}

// sent looks at the headers of a packet that has left.
func (s *strays) sent(hdr []byte) {
	t := tcpHeader(hdr)
	if t == nil || t[13]&(tcpSYN|tcpACK) != tcpSYN|tcpACK && t[13]&tcpRST == 0 {
		return
	}
	s.answered.Store(int64(time.Since(epoch)))
	for n := s.waiting.Load(); n > 0 && !s.waiting.CompareAndSwap(n, n-1); n = s.waiting.Load() {
	}
}
