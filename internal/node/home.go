package node

import (
	"context"
	"time"

	"github.com/tailnode/tailnode/internal/netcheck"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// homeInterval is how often the home relay is thought over when nothing happens.
const homeInterval = 20 * time.Minute

// firstRetry is when it is after a check without an answer; the times after that double.
const firstRetry = 5 * time.Second

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
	timer := time.NewTimer(homeInterval)
	defer timer.Stop()
	looked := time.Now() // at the router
	var maps netcheck.PortMapping
	var known bool
	mute := 0 // checks in a row to which nobody answered over UDP
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-timer.C:
		case <-n.homeKick:
			mute = 0
		}
		timer.Reset(homeInterval)
		st, _ := n.Status()
		if st.Netmap == nil || st.Netmap.DERPMap == nil {
			continue
		}
		home := n.engine.Home()
		cfg := n.netcheckConfig(st.Netmap.DERPMap)
		cfg.Last = last
		rep, err := netcheck.Run(n.ctx, cfg)
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
		if port, hole := n.wantsPort(); time.Since(looked) >= homeInterval-time.Minute {
			looked = time.Now()
			// Routers do not tell when they restart; their clocks do when they are asked.
			if port {
				if r, err := n.ports.Probe(n.ctx); err == nil {
					maps, known = netcheck.PortMapping(r), true
				}
			}
			if hole {
				n.holes.Probe(n.ctx)
			}
		}
		ni := rep.NetInfo()
		if known {
			ni.PMP, ni.PCP, ni.UPnP = tailcfg.Bool(maps.PMP), tailcfg.Bool(maps.PCP), tailcfg.Bool(maps.UPnP)
		}
		n.tellControl(ni)
		if udp, measured := ni.WorkingUDP.Get(); measured && !udp {
			mute++
		} else {
			mute = 0
		}
		timer.Reset(nextCheck(mute))
	}
}

// nextCheck returns how long after a check the next is due. A check that heard nothing may have come at a bad moment, such as
// that of waking up, and what it says of the network, and of the home, should not stand for long.
func nextCheck(mute int) time.Duration {
	if mute == 0 {
		return homeInterval
	}
	return min(homeInterval, firstRetry<<min(mute-1, 20))
}

// netcheckConfig is a check's over the node's own sockets, so that what it finds is true of those that carry traffic.
func (n *Node) netcheckConfig(dm *tailcfg.DERPMap) netcheck.Config {
	home := n.engine.Home()
	return netcheck.Config{
		Map:         dm,
		Home:        home,
		HomeAlive:   n.engine.RelayConnected(home),
		Transport:   n.engine.STUN(),
		DialContext: n.cfg.Dial,
		Roots:       n.cfg.RootCA,
		Logger:      n.log,
	}
}

// AwaitDERPMap blocks until the node has a map of relays, control refuses the node, ctx ends, or the node is closed.
func (n *Node) AwaitDERPMap(ctx context.Context) (Status, error) {
	return n.Await(ctx, func(st Status) (bool, error) {
		if st.State == Failed {
			return false, st.Err
		}
		return st.Netmap != nil && st.Netmap.DERPMap != nil, nil
	})
}

// Netcheck makes a full check of the network, which takes at most timeout, 0 for the default; portMap has the router asked
// what it maps, unless the node does without that. It blocks until then, or until ctx ends or the node is closed.
func (n *Node) Netcheck(ctx context.Context, timeout time.Duration, portMap bool) (*netcheck.Report, error) {
	st, err := n.AwaitDERPMap(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(n.ctx, func() { cancel(errNodeClosed) })()
	cfg := n.netcheckConfig(st.Netmap.DERPMap)
	cfg.Full, cfg.Timeout = true, timeout
	if portMap {
		cfg.PortMap = func(ctx context.Context) (netcheck.PortMapping, error) {
			r, err := n.ports.Probe(ctx)
			return netcheck.PortMapping(r), err
		}
	}
	return netcheck.Run(ctx, cfg)
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
	n.sess.SetHostinfo(&host) // under the lock, so that what is told last is what is so; it does not block
	n.mu.Unlock()
}
