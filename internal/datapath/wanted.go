package datapath

import (
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// callBackAfter is how long a peer that looks for paths to this node has time for a handshake of its own.
const callBackAfter = 150 * time.Millisecond

// wanted is told that a peer looks for paths to this node, which it does when it has something to send. If it has no
// session a little later, its handshake initiation was lost, as happens when it was sent
// before control had told the peer of our home relay. An upstream peer would send the next after 5 s; so this node
// begins a handshake instead. It runs on the path manager's goroutine.
func (t *transport) wanted(pub key.NodePublic) {
	p := t.peer(pub)
	if p == nil || p.wg.HasSession() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.back == nil && t.peers[pub] == p {
		p.back = time.AfterFunc(callBackAfter, p.callBack)
	}
}

func (p *peer) callBack() {
	p.t.mu.Lock()
	due := p.back != nil
	p.back = nil
	p.t.mu.Unlock()
	if due && !p.wg.HasSession() {
		p.wg.Rekey() // an error is a lost packet
	}
}

// stopCallBacks ends what wanted has planned. Nothing calls that any more.
func (t *transport) stopCallBacks() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		if p.back != nil {
			p.back.Stop()
			p.back = nil
		}
	}
}
