package wg

import (
	"crypto/cipher"
	"math"
	"sync"
	"sync/atomic"
)

// A session is a pair of transport keys (paper §5.4.5, "keypair").
type session struct {
	peer          *Peer
	index, remote uint32 // receiver indices: ours and theirs
	initiator     bool
	created       int64
	send, recv    cipher.AEAD
	counter       uint64       // of the next message; guarded by peer.sendMu
	users         atomic.Int32 // calls that use send or recv; negative once dead
	heard         atomic.Int64 // when the first message came on it; 0 is not yet
	asked         atomic.Int64 // of one that we initiated and have not heard on: when data was sent on it; see Peer.unproved
	rtt           int64        // ... and how long its handshake took

	winMu sync.Mutex
	win   window
}

// dead is added to users when the session ends.
const dead = math.MinInt32 / 2

func newSession(p *Peer, index, remote uint32, initiator bool, created int64, k *keys) *session {
	return &session{peer: p, index: index, remote: remote, initiator: initiator, created: created,
		send: newAEAD(&k.send), recv: newAEAD(&k.recv)}
}

// acquire keeps the session's keys from being wiped until release. It fails on a dead session.
func (s *session) acquire() bool {
	for {
		n := s.users.Load()
		if n < 0 {
			return false
		}
		if s.users.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (s *session) release() {
	if s.users.Add(-1) == dead {
		s.wipe()
	}
}

// kill ends the session; whoever uses it last wipes its keys.
func (s *session) kill() {
	s.peer.dev.table.remove(s)
	for {
		n := s.users.Load()
		if n < 0 {
			return
		}
		if s.users.CompareAndSwap(n, n+dead) {
			if n == 0 {
				s.wipe()
			}
			return
		}
	}
}

func (s *session) wipe() {
	wipeAEAD(s.send)
	wipeAEAD(s.recv)
}
