package datapath

import (
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/path"
)

// Live is what the data path knows of a peer at the moment.
type Live struct {
	Known            bool // the peer has sent or been sent to
	Session          bool // there is a WireGuard session
	TxBytes, RxBytes int64
	LastHandshake    time.Time
	Path             path.PathInfo
}

// RelayConnected reports whether the connection to the relays of region stands.
func (e *Engine) RelayConnected(region int) bool {
	for _, r := range e.trans.Load().relays.Stats() {
		if r.ID == region {
			return r.Connected
		}
	}
	return false
}

// Live returns what the data path knows of a peer. It makes nothing for a peer without traffic.
func (e *Engine) Live(pub key.NodePublic) Live {
	t := e.trans.Load()
	l := Live{Path: t.paths.Path(pub)}
	t.mu.RLock()
	p := t.peers[pub]
	t.mu.RUnlock()
	if p == nil {
		return l
	}
	st := p.wg.Stats()
	l.Known, l.Session = true, p.wg.HasSession()
	l.TxBytes, l.RxBytes, l.LastHandshake = int64(st.TxBytes), int64(st.RxBytes), st.LastHandshake
	return l
}
