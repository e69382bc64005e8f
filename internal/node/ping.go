package node

import (
	"context"
	"errors"
	"net/netip"
	"strconv"
	"time"

	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/netmap"
)

// The kinds of ping, in upstream's spelling.
const (
	PingDisco = "disco"
	PingTSMP  = "TSMP"
	PingICMP  = "ICMP"
)

// PingResult is the answer to a ping.
type PingResult struct {
	IP, NodeIP  netip.Addr
	NodeName    string
	Latency     time.Duration
	Region      int // relay region that the answer came by; 0: directly, or not known to this kind
	RegionCode  string
	Endpoint    netip.AddrPort // the answer came directly from there
	PeerRelay   string         // the peer relay that it came by, as "address:port:vni:number"
	PeerAPIPort uint16
	Local       bool // the address is this node's own
}

// Ping pings the node that has ip and waits for one answer. It blocks until the answer comes,
// ctx ends, or the node is closed.
func (n *Node) Ping(ctx context.Context, ip netip.Addr, kind string) (PingResult, error) {
	ip = ip.Unmap()
	r := PingResult{IP: ip, NodeIP: ip}
	m, err := n.awaitPeer(ctx, func(m *netmap.Map) error {
		if err := reachable(m, ip); err != nil {
			return err
		}
		if p := m.Route(ip); kind == PingDisco && p != nil && p.DiscoKey.IsZero() {
			return notYet(errcode.Unsupported, "%s does not speak disco", p.ShortName())
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	if m.Self.HasAddr(ip) {
		r.Local, r.NodeName = true, m.Self.ShortName()
		return r, nil
	}
	peer := m.Route(ip)
	r.NodeName = peer.ShortName()
	if !peer.HasAddr(ip) && len(peer.Addresses) > 0 { // behind a subnet router
		r.NodeIP = peer.Addresses[0].Addr()
	}
	switch kind {
	case PingDisco:
		pr, err := n.engine.PingDisco(ctx, r.NodeIP, 0)
		if err != nil {
			return r, pingErr(err)
		}
		r.Latency, r.Region, r.PeerRelay = pr.Latency, pr.Region, pr.PeerRelay()
		if r.PeerRelay == "" {
			r.Endpoint = pr.Addr
		}
	case PingTSMP:
		d, port, err := n.engine.PingTSMP(ctx, ip)
		if err != nil {
			return r, pingErr(err)
		}
		r.Latency, r.PeerAPIPort = d, port
	case PingICMP:
		d, err := n.engine.PingICMP(ctx, ip)
		if err != nil {
			return r, pingErr(err)
		}
		r.Latency = d
	default:
		return r, errcode.New(errcode.Unsupported, "the kind of ping %q is not offered; use %s, %s or %s", kind, PingDisco, PingTSMP, PingICMP)
	}
	r.RegionCode = RegionCode(m, r.Region)
	return r, nil
}

func pingErr(err error) error {
	switch {
	case errors.Is(err, datapath.ErrNoPeer):
		return errcode.With(errcode.Unreachable, err)
	case errors.Is(err, datapath.ErrPingsFull):
		return errcode.With(errcode.Exhausted, err)
	}
	return err
}

// RegionCode returns the short name of a relay region, or its number where there is none.
func RegionCode(m *netmap.Map, region int) string {
	if region == 0 {
		return ""
	}
	if dm := m.DERPMap; dm != nil {
		if r := dm.Regions[region]; r != nil && r.RegionCode != "" {
			return r.RegionCode
		}
	}
	return strconv.Itoa(region)
}
