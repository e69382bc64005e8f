package portmap

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

const (
	ssdpPort = 1900
	// resend is when what has not been answered is sent once more, for the first time; the next takes twice as long.
	resend = 150 * time.Millisecond
	// grace is how long other protocols have after the first answer, where any of them will do.
	grace = 100 * time.Millisecond
	// maxLocations bounds the gateways of one router; replies of a search come once for each of its services.
	maxLocations = 4
)

var ssdpGroup = netip.AddrPortFrom(netip.AddrFrom4([4]byte{239, 255, 255, 250}), ssdpPort)

// searchFor are the search targets: some routers answer the first with their first device alone, which need not be the gateway.
var searchFor = []string{"ssdp:all", "urn:schemas-upnp-org:device:InternetGatewayDevice:1"}

func search(target string) []byte {
	return []byte("M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: " + target + "\r\n\r\n")
}

// found is what answered on a network.
type found struct {
	pcp, pmp           bool // it maps
	pcpHeard, pmpHeard bool // it answered at least
	pcpEpoch, pmpEpoch uint32
	pmpAddr            netip.Addr
	locations          []location
}

func (f *found) any() bool { return f.pcp || f.pmp || len(f.locations) > 0 }

// discover asks the router at t.gw for all protocols at once. It takes no longer than window; with
// quick it ends soon after the first that is there. Only the router itself is listened to.
func (c *Client) discover(ctx context.Context, t target, window time.Duration, quick bool) (f found, err error) {
	pc, err := c.cfg.ListenPacket(ctx, c.network(), netip.AddrPortFrom(t.self, 0).String())
	if err != nil {
		return f, err
	}
	defer pc.Close()
	stop := context.AfterFunc(ctx, func() { pc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	pxp, ssdp := netip.AddrPortFrom(t.gw, pxpPort), netip.AddrPortFrom(t.gw, ssdpPort)
	send := func() {
		if !c.cfg.DisablePCP && !f.pcpHeard {
			writeTo(pc, appendPCPAnnounce(nil, t.self), pxp)
		}
		if !c.cfg.DisablePMP && !f.pmpHeard {
			writeTo(pc, appendPMPAddress(nil), pxp)
		}
		if !c.cfg.DisableUPnP && len(f.locations) == 0 {
			// To the router alone first: a host's firewall then lets its answer to the group in too.
			for _, st := range searchFor {
				writeTo(pc, search(st), ssdp)
				writeTo(pc, search(st), ssdpGroup)
			}
		}
	}
	send()
	start := time.Now()
	wait, again, until := resend, start.Add(resend), start.Add(window)
	graced := false
	b := make([]byte, 2048)
	for {
		pcpDone, pmpDone := f.pcpHeard || c.cfg.DisablePCP, f.pmpHeard || c.cfg.DisablePMP
		upnpDone := len(f.locations) > 0 || c.cfg.DisableUPnP
		if pcpDone && pmpDone && upnpDone || quick && (f.pcp || f.pmp && pcpDone) {
			return f, nil
		}
		if quick && !graced && f.any() {
			graced = true
			if t := time.Now().Add(grace); t.Before(until) {
				until = t
			}
		}
		next := until
		if again.Before(until) {
			next = again
		}
		pc.SetReadDeadline(next)
		if ctx.Err() != nil {
			return f, context.Cause(ctx)
		}
		n, from, err := readFrom(pc, b)
		now := time.Now()
		if err != nil {
			switch {
			case ctx.Err() != nil:
				return f, context.Cause(ctx)
			case !now.Before(until):
				return f, nil
			case errors.Is(err, net.ErrClosed):
				return f, err
			case !now.Before(again):
				wait *= 2
				again = now.Add(wait)
				send()
			}
			continue
		}
		if !sameHost(from.Addr(), t.gw) {
			continue // anyone on the network can answer a search
		}
		if from.Port() == pxpPort {
			f.pxp(b[:n])
		} else if u, ok := parseSSDP(b[:n]); ok && !c.cfg.DisableUPnP && len(f.locations) < maxLocations {
			f.locate(u)
		}
	}
}

// pxp takes a reply of NAT-PMP or PCP.
func (f *found) pxp(b []byte) {
	r, err := parsePXP(b)
	switch {
	case err != nil:
	case r.version == pcpVersion && r.op == pcpOpAnnounce:
		f.pcpHeard, f.pcp, f.pcpEpoch = true, r.result == 0, r.epoch
	case r.version == pmpVersion && r.op == pmpOpAddress && r.result == resultUnsupportedVersion && !f.pcpHeard && len(b) < 12:
		f.pcpHeard = true // a router that has NAT-PMP alone, asked for PCP
	case r.version == pmpVersion && r.op == pmpOpAddress:
		f.pmpHeard, f.pmp, f.pmpEpoch = true, r.result == 0, r.epoch
		if f.pmp {
			f.pmpAddr = r.external.Addr()
		}
	}
}

func (f *found) locate(u location) {
	for _, o := range f.locations {
		if o.port == u.port && o.path == u.path {
			return
		}
	}
	f.locations = append(f.locations, u)
}

// sameHost compares addresses of hosts on one link, whose zone has a name or a number.
func sameHost(a, b netip.Addr) bool { return a.WithZone("") == b.WithZone("") }

func writeTo(pc net.PacketConn, b []byte, to netip.AddrPort) {
	// An error is as good as a loss: there may be no route for multicast, or no memory for a moment.
	pc.WriteTo(b, net.UDPAddrFromAddrPort(to))
}

func readFrom(pc net.PacketConn, b []byte) (int, netip.AddrPort, error) {
	n, from, err := pc.ReadFrom(b)
	if err != nil {
		return 0, netip.AddrPort{}, err
	}
	u, ok := from.(*net.UDPAddr)
	if !ok {
		return 0, netip.AddrPort{}, nil
	}
	ap := u.AddrPort()
	return n, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
}

// ask sends a request to the router's NAT-PMP and PCP port, again with doubling intervals (RFC 6886 §3.1), until take
// accepts a reply or says that there will be none.
func (c *Client) ask(ctx context.Context, t target, req []byte, take func(r *pxpReply) (done bool, err error)) error {
	pc, err := c.cfg.ListenPacket(ctx, c.network(), netip.AddrPortFrom(t.self, 0).String())
	if err != nil {
		return err
	}
	defer pc.Close()
	stop := context.AfterFunc(ctx, func() { pc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	to := netip.AddrPortFrom(t.gw, pxpPort)
	b := make([]byte, 2048)
	wait := 250 * time.Millisecond
	for range askTries {
		writeTo(pc, req, to)
		until := time.Now().Add(wait)
		wait *= 2
		for {
			pc.SetReadDeadline(until)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n, from, err := readFrom(pc, b)
			if err != nil {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if errors.Is(err, net.ErrClosed) {
					return err
				}
				if !time.Now().Before(until) {
					break
				}
				continue
			}
			if from.Port() != to.Port() || !sameHost(from.Addr(), to.Addr()) {
				continue
			}
			r, err := parsePXP(b[:n])
			if err != nil {
				continue
			}
			if done, err := take(&r); done {
				return err
			}
		}
	}
	return ErrNoService
}

// askTries bounds the requests: 250 + 500 + 1,000 ms.
const askTries = 3
