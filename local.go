package tailnode

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/node"
)

// LocalClient asks a [Server] about itself and its tailnet. It has the names of upstream's
// client, and needs no socket and no HTTP: it is in the same process.
type LocalClient struct{ s *Server }

// LocalClient starts the server if need be and returns its client.
func (s *Server) LocalClient() (*LocalClient, error) {
	if _, err := s.start("local client"); err != nil {
		return nil, err
	}
	return &LocalClient{s}, nil
}

// Status returns the state of the server and of all peers. It does not block.
func (c *LocalClient) Status(ctx context.Context) (*Status, error) { return c.status(ctx, true) }

// StatusWithoutPeers returns the state of the server alone. It does not block.
func (c *LocalClient) StatusWithoutPeers(ctx context.Context) (*Status, error) {
	return c.status(ctx, false)
}

func (c *LocalClient) status(ctx context.Context, peers bool) (*Status, error) {
	if err := ctx.Err(); err != nil {
		return nil, opError("status", err)
	}
	n, err := c.s.start("status")
	if err != nil {
		return nil, err
	}
	st, _ := n.Status()
	return c.s.status(n, st, peers), nil
}

// WhoIs says who has the address, an IP address or one with a port, such as
// http.Request.RemoteAddr. An address that no node has gives [ErrPeerNotFound]. It waits for the
// first netmap, at most as long as ctx.
func (c *LocalClient) WhoIs(ctx context.Context, remoteAddr string) (*WhoIsResponse, error) {
	n, err := c.s.start("whois")
	if err != nil {
		return nil, err
	}
	ip, err := netip.ParseAddr(remoteAddr)
	if err != nil {
		ap, err2 := netip.ParseAddrPort(remoteAddr)
		if err2 != nil {
			return nil, opError("whois", errcode.New(errcode.InvalidArgument, "%q is neither an address nor an address with a port", remoteAddr))
		}
		ip = ap.Addr()
	}
	ip = ip.Unmap().WithZone("")
	st, err := n.Await(ctx, func(st node.Status) (bool, error) {
		if st.State == node.Failed {
			return false, st.Err
		}
		return st.Netmap != nil, nil
	})
	if err != nil {
		return nil, opError("whois", err)
	}
	m := st.Netmap
	peer := m.PeerByAddr(ip)
	if peer == nil && m.Self.HasAddr(ip) {
		peer = m.Self
	}
	if peer == nil {
		return nil, opError("whois", fmt.Errorf("%v: %w", ip, ErrPeerNotFound))
	}
	r := &WhoIsResponse{Node: nodeOf(peer), UserProfile: profileOf(m, peer)}
	if f := n.Engine().Filter(); f != nil {
		self := m.Self.Addr6()
		if ip.Is4() {
			self = m.Self.Addr4()
		}
		r.CapMap = f.Caps(ip, self)
	}
	return r, nil
}

// Ping pings the node that has ip and waits for its answer, sending again every second, until ctx
// ends. What went wrong is an error, not a PingResult with Err.
func (c *LocalClient) Ping(ctx context.Context, ip netip.Addr, typ PingType) (*PingResult, error) {
	n, err := c.s.start("ping")
	if err != nil {
		return nil, err
	}
	r, err := n.Ping(ctx, ip, string(typ))
	if err != nil {
		return nil, opError("ping", err)
	}
	out := &PingResult{
		IP: r.IP.String(), NodeIP: r.NodeIP.String(), NodeName: r.NodeName,
		LatencySeconds: r.Latency.Seconds(), DERPRegionID: r.Region, DERPRegionCode: r.RegionCode,
		PeerRelay: r.PeerRelay, PeerAPIPort: r.PeerAPIPort, IsLocalIP: r.Local,
	}
	if r.Endpoint.IsValid() {
		out.Endpoint = r.Endpoint.String()
	}
	return out, nil
}

var backendStates = map[node.State]string{
	node.Stopped: "Stopped", node.Starting: "Starting", node.NeedsLogin: "NeedsLogin",
	node.NeedsApproval: "NeedsMachineAuth", node.Running: "Running", node.Failed: "NeedsLogin",
}

func (s *Server) status(n *node.Node, st node.Status, peers bool) *Status {
	out := &Status{
		Version:      Version,
		BackendState: backendStates[st.State],
		HaveNodeKey:  true,
		AuthURL:      st.AuthURL,
		Health:       slices.Clone(st.Health),
		Peer:         map[NodePublic]*PeerStatus{},
		User:         map[UserID]UserProfile{},
	}
	if st.Err != nil {
		out.Health = append(out.Health, st.Err.Error())
	}
	if st.RelayErr != nil {
		out.Health = append(out.Health, "home relay: "+st.RelayErr.Error())
	}
	m := st.Netmap
	if m == nil {
		out.Self = &PeerStatus{PublicKey: n.NodeKey(), HostName: s.Hostname}
		return out
	}
	self := m.Self
	out.Self = peerStatus(m, self)
	out.Self.Relay = node.RegionCode(m, n.Engine().Home())
	out.Self.Online = st.State == node.Running && st.Err == nil
	out.TailscaleIPs = out.Self.TailscaleIPs
	out.MagicDNSSuffix = m.Suffix()
	out.CurrentTailnet = &TailnetStatus{Name: m.Domain, MagicDNSSuffix: out.MagicDNSSuffix, MagicDNSEnabled: m.DNS != nil && m.DNS.Proxied}
	if d := m.DNS; d != nil {
		out.CertDomains = slices.Clone(d.CertDomains)
	}
	if u := profileOf(m, self); u != nil {
		out.User[u.ID] = *u
	}
	if !peers {
		return out
	}
	for p := range m.All() {
		ps := peerStatus(m, p)
		applyLive(m, ps, n.Engine().Live(p.Key))
		out.Peer[p.Key] = ps
		if u := profileOf(m, p); u != nil {
			out.User[u.ID] = *u
		}
	}
	return out
}

func peerStatus(m *netmap.Map, p *netmap.Node) *PeerStatus {
	ps := &PeerStatus{
		ID: p.StableID, NodeID: p.ID, PublicKey: p.Key, HostName: p.Hostname, DNSName: p.Name, OS: p.OS,
		UserID: p.User, AllowedIPs: slices.Clone(p.AllowedIPs), Tags: slices.Clone(p.Tags),
		PrimaryRoutes: slices.Clone(p.PrimaryRoutes), Relay: node.RegionCode(m, p.HomeDERP),
		Created: p.Created, Online: p.Online, CapMap: cloneCaps(p.CapMap),
		InNetworkMap: true, InMagicSock: true, Expired: m.Expired(p, time.Now()),
	}
	for _, a := range p.Addresses {
		ps.TailscaleIPs = append(ps.TailscaleIPs, a.Addr())
	}
	for _, e := range p.Endpoints {
		ps.Addrs = append(ps.Addrs, e.String())
	}
	if !p.KeyExpiry.IsZero() {
		ps.KeyExpiry = new(p.KeyExpiry)
	}
	if !ps.Online {
		ps.LastSeen = p.LastSeen
	}
	for _, r := range p.AllowedIPs {
		ps.ExitNodeOption = ps.ExitNodeOption || r.Bits() == 0
	}
	for _, a := range p.Addresses {
		port := p.PeerAPI4
		if a.Addr().Is6() {
			port = p.PeerAPI6
		}
		if port != 0 {
			ps.PeerAPIURL = append(ps.PeerAPIURL, "http://"+net.JoinHostPort(a.Addr().String(), strconv.Itoa(int(port))))
		}
	}
	return ps
}

// applyLive adds what the data path knows.
func applyLive(m *netmap.Map, ps *PeerStatus, l datapath.Live) {
	ps.InEngine, ps.Active = l.Known, l.Session
	ps.TxBytes, ps.RxBytes, ps.LastHandshake = l.TxBytes, l.RxBytes, l.LastHandshake
	if l.Path.Addr.IsValid() {
		ps.CurAddr = l.Path.Addr.String()
	}
	ps.PeerRelay = l.Path.PeerRelay()
	if l.Known {
		ps.Path = &PathStatus{
			Endpoint: ps.CurAddr, PeerRelay: ps.PeerRelay, Region: node.RegionCode(m, l.Path.Region), RoundTrip: l.Path.RTT,
			Since: l.Path.Since, WhyNotDirect: l.Path.WhyNotDirect,
		}
	}
}

func nodeOf(p *netmap.Node) *Node {
	n := &Node{
		ID: p.ID, StableID: p.StableID, Name: p.Name, ComputedName: p.ShortName(), User: p.User, Key: p.Key,
		KeyExpiry: p.KeyExpiry, Addresses: slices.Clone(p.Addresses), AllowedIPs: slices.Clone(p.AllowedIPs),
		Hostinfo: Hostinfo{Hostname: p.Hostname, OS: p.OS, App: p.App},
		Created:  p.Created, Tags: slices.Clone(p.Tags), MachineAuthorized: p.MachineAuthorized, CapMap: cloneCaps(p.CapMap), Expired: p.Expired,
	}
	if p.OnlineKnown {
		n.Online = new(p.Online)
	}
	if !p.LastSeen.IsZero() {
		n.LastSeen = new(p.LastSeen)
	}
	return n
}

// profileOf returns the profile of p's user, or one that stands for its tags, or nil.
func profileOf(m *netmap.Map, p *netmap.Node) *UserProfile {
	if u, ok := m.UserProfile(p.User); ok {
		return &UserProfile{ID: u.ID, LoginName: u.LoginName, DisplayName: u.DisplayName, ProfilePicURL: u.ProfilePicURL}
	}
	if len(p.Tags) > 0 {
		return &UserProfile{ID: p.User, LoginName: "tagged-devices", DisplayName: "Tagged Devices"}
	}
	return nil
}

// cloneCaps copies what the netmap shares with everybody.
func cloneCaps(m NodeCapMap) NodeCapMap {
	if len(m) == 0 {
		return nil
	}
	out := make(NodeCapMap, len(m))
	for c, vs := range m {
		out[c] = slices.Clone(vs)
	}
	return out
}

func sortKeys(ks []NodePublic) {
	slices.SortFunc(ks, NodePublic.Compare)
}
