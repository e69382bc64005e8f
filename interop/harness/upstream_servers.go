package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stunserver"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// upstreamControl is upstream's coordination test server.
type upstreamControl struct {
	srv  server
	ctrl *testcontrol.Server

	mu      sync.Mutex
	expired map[key.NodePublic]bool
}

// UpstreamControl starts upstream's testcontrol. It gives out no auth keys and accepts any.
func UpstreamControl(r RelayInfo, logf func(string, ...any)) (Control, error) {
	return upstreamControlMode(r, logf, false)
}

// UpstreamControlInteractive is UpstreamControl with a login by URL: testcontrol takes that choice
// at its start only.
func UpstreamControlInteractive(r RelayInfo, logf func(string, ...any)) (Control, error) {
	return upstreamControlMode(r, logf, true)
}

// UpstreamControlPeerRelays is UpstreamControl where every node may use every other as a peer relay.
func UpstreamControlPeerRelays(r RelayInfo, logf func(string, ...any)) (Control, error) {
	c, err := upstreamControlMode(r, logf, false)
	if err == nil {
		c.(*upstreamControl).ctrl.PeerRelayGrants = true
	}
	return c, err
}

// PeerRelays returns which nodes of an upstream Control say that they are peer relays, by host name.
func PeerRelays(c Control) (names []string) {
	for _, n := range c.(*upstreamControl).ctrl.AllNodes() {
		if n.Hostinfo.Valid() && n.Hostinfo.PeerRelay() {
			names = append(names, n.Hostinfo.Hostname())
		}
	}
	return names
}

func upstreamControlMode(r RelayInfo, logf func(string, ...any), interactive bool) (Control, error) {
	if logf == nil {
		logf = discard
	}
	c := &upstreamControl{
		ctrl: &testcontrol.Server{
			Logf:             logf,
			DERPMap:          UpstreamDERPMap(r),
			DNSConfig:        &tailcfg.DNSConfig{Proxied: true},
			MagicDNSDomain:   "interop.test",
			AllNodesSameUser: true,
			AllOnline:        true,
			RequireAuth:      interactive,
		},
		expired: map[key.NodePublic]bool{},
	}
	if err := c.srv.start(c.ctrl); err != nil {
		return nil, err
	}
	c.ctrl.ExplicitBaseURL = "http://" + c.srv.addr
	return c, nil
}

// UpstreamDERPMap returns a map of that relay alone.
func UpstreamDERPMap(r RelayInfo) *tailcfg.DERPMap {
	host := r.DERP.Addr().String()
	return &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{1: {
		RegionID: 1, RegionCode: "lo", RegionName: "loopback",
		Nodes: []*tailcfg.DERPNode{{
			Name: "1a", RegionID: 1, HostName: host, IPv4: host, IPv6: "none",
			DERPPort: int(r.DERP.Port()), STUNPort: r.STUNPort, CertName: r.CertName,
		}},
	}}}
}

func (c *upstreamControl) URL() string                  { return c.ctrl.BaseURL() }
func (c *upstreamControl) AuthKey(bool) (string, error) { return "tskey-any", nil }
func (c *upstreamControl) Stop() error                  { return c.srv.stop() }
func (c *upstreamControl) Start() error                 { return c.srv.start(c.ctrl) }
func (c *upstreamControl) Close() error                 { return c.srv.stop() }

func (c *upstreamControl) Interactive(on bool) error {
	if on != c.ctrl.RequireAuth {
		return errors.New("harness: testcontrol cannot change its mind about interactive logins")
	}
	return nil
}

func (c *upstreamControl) Approve(_ context.Context, authURL string) error {
	// testcontrol copies a node under its next key with the expiry of the old one. Clear that first,
	// or the new key is born expired.
	c.mu.Lock()
	for _, n := range c.ctrl.AllNodes() {
		if !n.KeyExpiry.IsZero() && !c.expired[n.Key] {
			n.KeyExpiry = time.Time{}
			c.ctrl.UpdateNode(n)
		}
	}
	c.mu.Unlock()
	if !c.ctrl.CompleteAuth(authURL) {
		return fmt.Errorf("harness: testcontrol knows no login %q", authURL)
	}
	return nil
}

func (c *upstreamControl) node(nodeKey string) (*tailcfg.Node, error) {
	for _, n := range c.ctrl.AllNodes() {
		if n.Key.String() == nodeKey {
			return n, nil
		}
	}
	return nil, fmt.Errorf("harness: testcontrol knows no node %s", nodeKey)
}

func (c *upstreamControl) Expire(_ context.Context, nodeKey string) error {
	n, err := c.node(nodeKey)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.expired[n.Key] = true
	c.mu.Unlock()
	n.KeyExpiry = time.Now().Add(-time.Minute)
	c.ctrl.UpdateNode(n)
	return nil
}

func (c *upstreamControl) AllowPorts(ctx context.Context, nodeKey string, ports ...uint16) error {
	rule := tailcfg.FilterRule{SrcIPs: []string{"*"}, IPProto: []int{6}}
	for _, p := range ports {
		rule.DstPorts = append(rule.DstPorts, tailcfg.NetPortRange{IP: "*", Ports: tailcfg.PortRange{First: p, Last: p}})
	}
	return c.raw(ctx, nodeKey, &tailcfg.MapResponse{PacketFilter: []tailcfg.FilterRule{rule}})
}

// raw sends one map response to a node. Afterwards testcontrol sends that node nothing of its own.
func (c *upstreamControl) raw(ctx context.Context, nodeKey string, m *tailcfg.MapResponse) error {
	n, err := c.node(nodeKey)
	if err != nil {
		return err
	}
	if err := c.ctrl.AwaitNodeInMapRequest(ctx, n.Key); err != nil {
		return err
	}
	if !c.ctrl.AddRawMapResponse(n.Key, m) {
		return fmt.Errorf("harness: node %s has no map stream", nodeKey)
	}
	return nil
}

func (c *upstreamControl) Gone(ctx context.Context, nodeKey string) error {
	gone, err := c.node(nodeKey)
	if err != nil {
		return err
	}
	for _, n := range c.ctrl.AllNodes() {
		if n.Key == gone.Key {
			continue
		}
		if err := c.raw(ctx, n.Key.String(), &tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{gone.ID}}); err != nil {
			return err
		}
	}
	return nil
}

// upstreamRelay is upstream's DERP and STUN servers.
type upstreamRelay struct {
	srv  server
	key  key.NodePrivate
	logf func(string, ...any)
	cert string
	derp *derpserver.Server // nil while stopped

	stun     *stunserver.STUNServer
	stunStop context.CancelFunc
	stunDone chan struct{}
}

// UpstreamRelay starts upstream's derpserver and stunserver.
func UpstreamRelay(logf func(string, ...any)) (Relay, error) {
	if logf == nil {
		logf = discard
	}
	conf, cert, err := selfSigned()
	if err != nil {
		return nil, err
	}
	r := &upstreamRelay{srv: server{tls: conf}, key: key.NewNode(), logf: logf, cert: cert}
	if err := r.Start(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stun, r.stunStop, r.stunDone = stunserver.New(ctx), cancel, make(chan struct{})
	if err := r.stun.Listen("127.0.0.1:0"); err != nil {
		cancel()
		r.Stop()
		return nil, err
	}
	go func() {
		defer close(r.stunDone)
		r.stun.Serve()
	}()
	return r, nil
}

func (r *upstreamRelay) Info() RelayInfo {
	return RelayInfo{
		DERP:     netip.MustParseAddrPort(r.srv.addr),
		STUNPort: r.stun.LocalAddr().(*net.UDPAddr).Port,
		CertName: r.cert,
	}
}

func (r *upstreamRelay) Start() error {
	r.derp = derpserver.New(r.key, r.logf)
	return r.srv.start(derpserver.Handler(r.derp))
}

func (r *upstreamRelay) Stop() error {
	if r.derp == nil {
		return nil
	}
	err := r.srv.stop()
	r.derp.Close()
	r.derp = nil
	return err
}

func (r *upstreamRelay) Close() error {
	err := r.Stop()
	r.stunStop()
	<-r.stunDone
	return err
}
