package wg

// Renew is for a peer that is known to have started anew: it holds no session of before, and drops
// in silence what comes on one, so that without Renew everything sent to it is lost until
// KEEPALIVE_TIMEOUT + REKEY_TIMEOUT (paper §6.5) have passed. Renew sends no more on the sessions that
// exist, stages what is to be sent, and initiates at once. Messages that come on the last session
// are still accepted, in case the peer has initiated one with its new life already.
//
// It does not block but for the Conduit, and does nothing for a peer without a session.
func (p *Peer) Renew() error {
	p.mu.Lock()
	cur := p.current.Load()
	if cur == nil || p.removed.Load() {
		p.mu.Unlock()
		return nil
	}
	p.retire(cur)
	p.current.Store(nil)
	p.attempts = 0
	p.nextInit.Store(0)
	p.mu.Unlock()
	return p.handshake(p.dev.now(), true)
}
