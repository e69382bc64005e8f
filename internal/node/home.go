package node

import (
	"context"
	"time"

	"github.com/tailnode/tailnode/internal/netcheck"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// homeInterval is how often the home relay is thought over when nothing happens.
const homeInterval = 20 * time.Minute

// relayWait bounds how long control is not told of a new home relay that does not answer.
const relayWait = time.Second

func (n *Node) kickHome() {
	select {
	case n.homeKick <- struct{}{}:
	default:
	}
}

// chooseHome picks the home relay whenever the relay map changes, and now and then, and
// tells control of it.
func (n *Node) chooseHome() {
	var last *netcheck.Report
	tick := time.NewTicker(homeInterval)
	defer tick.Stop()
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-tick.C:
		case <-n.homeKick:
		}
		st, _ := n.Status()
		if st.Netmap == nil || st.Netmap.DERPMap == nil {
			continue
		}
		home := n.engine.Home()
		rep, err := netcheck.Run(n.ctx, netcheck.Config{
			Map:         st.Netmap.DERPMap,
			Home:        home,
			HomeAlive:   n.engine.RelayConnected(home),
			Last:        last,
			DialContext: n.cfg.Dial,
			Logger:      n.log,
		})
		if err != nil {
			if n.ctx.Err() == nil {
				n.log.Warn("no home relay", "err", err)
			}
			continue
		}
		last = rep
		if rep.Home != home {
			n.update(func(s *Status) { s.HomeRelay, s.RelayErr = false, nil })
			n.engine.SetHome(rep.Home)
		}
		n.awaitRelay()
		n.tellControl(rep.NetInfo())
	}
}

// awaitRelay waits a moment for the home relay: peers that hear of it send their first packet
// there at once, and it should not come before we do.
func (n *Node) awaitRelay() {
	ctx, cancel := context.WithTimeout(n.ctx, relayWait)
	defer cancel()
	n.Await(ctx, func(s Status) (bool, error) { return s.HomeRelay || s.RelayErr != nil, nil })
}

// relayState follows the connection to the home relay. It runs on the relay's goroutine.
func (n *Node) relayState(region int, connected bool, err error) {
	if region != n.engine.Home() {
		return
	}
	n.update(func(s *Status) { s.HomeRelay, s.RelayErr = connected, err })
}

// tellControl sends the host information with what is known of the network.
func (n *Node) tellControl(ni *tailcfg.NetInfo) {
	n.mu.Lock()
	_, ni.HavePortMap = n.ports.Mapping()
	n.host.NetInfo = ni
	host := n.host
	n.mu.Unlock()
	n.sess.SetHostinfo(&host)
}
