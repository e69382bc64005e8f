package datapath

import (
	"bytes"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/path"
)

// When two nodes meet of which one has only just started, the first WireGuard handshake finds several
// ways to be lost. When to initiate again is decided in one place, wg's meeting; what it is told, and what is done
// for the peer's initiations, stands here. docs/protocol/wireguard.md, "Two nodes meet", says what
// is lost how, and what mends it.

// gone: a relay has nobody of that key. What was last sent there is lost.
func (t *transport) gone(pub key.NodePublic) {
	if p := t.known(pub); p != nil {
		p.wg.Gone()
	}
}

// alive: the peer has shown itself; looks says that it looks for paths to this node, which it does when it
// has something to send. It runs on the path manager's goroutine.
func (t *transport) alive(at *path.Peer, looks bool) {
	p := t.known(at.Public())
	if p == nil && looks {
		p = t.peer(at.Public())
	}
	if p == nil || p.wg.HasSession() {
		return
	}
	p.wg.Alive(at.Path().RTT)
	if looks {
		p.wg.Wanted()
	}
}

// known returns the peer of that key, if it has sent or been sent to, or nil.
func (t *transport) known(pub key.NodePublic) *peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.peers[pub]
}

// restarted renews the session with a peer whose disco key is another than before. A process has one
// disco key, so the peer's is a new one, which knows nothing of the session.
func (t *transport) restarted(n *netmap.Node) {
	t.saidMu.Lock()
	k := t.discoOf(n)
	t.saidMu.Unlock()
	if k.IsZero() {
		return
	}
	t.mu.Lock()
	p := t.peers[n.Key]
	renew := p != nil && p.disco != k
	if renew {
		renew = !p.disco.IsZero()
		p.disco = k
	}
	t.mu.Unlock()
	if renew {
		if err := p.wg.Renew(); err != nil {
			t.e.log.Debug("peer restarted", "peer", n.Key.ShortString(), "err", err)
		}
	}
}

// Control tells a node of a peer that has just joined a moment after that peer knows of the
// node, and the peer may well dial at once. Its handshake initiation then comes from nobody that
// the netmap knows. It is kept for that moment: thrown away, it would come again only after the
// sender's first retry, a quarter of a second later.
const (
	maxKnocks     = 32
	knockLife     = 2 * time.Second
	initiationLen = 148 // docs/protocol/wireguard.md
)

// knocks holds valid initiations from keys that the netmap does not have, the latest last.
type knocks struct {
	mu   sync.Mutex
	list []knock
}

type knock struct {
	at  time.Time
	src path.Source
	msg []byte
}

// add keeps a copy of msg, if it has the form of an initiation, and reports whether it has.
func (k *knocks) add(now time.Time, src path.Source, msg []byte) bool {
	if len(msg) != initiationLen || msg[0] != 1 {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.list) == maxKnocks {
		k.list = append(k.list[:0], k.list[1:]...)
	}
	k.list = append(k.list, knock{now, src, bytes.Clone(msg)})
	return true
}

// take empties the list and returns what is young enough.
func (k *knocks) take(now time.Time) []knock {
	k.mu.Lock()
	list := k.list
	k.list = nil
	k.mu.Unlock()
	for len(list) > 0 && now.Sub(list[0].at) > knockLife {
		list = list[1:]
	}
	return list
}

// answerKnocks receives again what came from nodes that the netmap may know now. Whoever is still
// unknown has to send again.
func (t *transport) answerKnocks() {
	for _, k := range t.knocks.take(now()) {
		if n := t.e.netmap.Load().PeerByKey(k.src.Key); n != nil && n.HomeDERP == 0 && k.src.Region != 0 {
			// Control does not say yet where it is. The relay that it came by is where the answer goes.
			info := peerInfo(n)
			info.HomeRegion = k.src.Region
			t.paths.UpsertPeer(info)
		}
		reply := t.paths.Reply(k.src)
		t.dev.Receive(nil, k.msg, &reply)
	}
}
