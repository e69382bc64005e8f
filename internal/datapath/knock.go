package datapath

import (
	"bytes"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/path"
)

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
func (k *knocks) add(src path.Source, msg []byte) bool {
	if len(msg) != initiationLen || msg[0] != 1 {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.list) == maxKnocks {
		k.list = append(k.list[:0], k.list[1:]...)
	}
	k.list = append(k.list, knock{now(), src, bytes.Clone(msg)})
	return true
}

// take empties the list and returns what is young enough.
func (k *knocks) take() []knock {
	k.mu.Lock()
	list := k.list
	k.list = nil
	k.mu.Unlock()
	for len(list) > 0 && now().Sub(list[0].at) > knockLife {
		list = list[1:]
	}
	return list
}

// answerKnocks receives again what came from nodes that the netmap may know now. Whoever is still
// unknown has to send again.
func (t *transport) answerKnocks() {
	for _, k := range t.knocks.take() {
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
