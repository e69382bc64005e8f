package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/control"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/state"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// nowhere is a network on which nobody answers.
func nowhere(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// lonely starts a node that control never answers; the test is its control server.
func lonely(t testing.TB) (*Node, *handler) {
	t.Helper()
	n, err := Start(Config{Store: state.NewMemory(), Hostname: "lonely", ControlURL: "http://control.test", Dial: nowhere})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n, (*handler)(n)
}

func keyOf(b byte) key.NodePublic { return key.NodePublicFromRaw([32]byte{b, 31: 1}) }

func self() *tailcfg.Node {
	return &tailcfg.Node{
		ID: 1, StableID: "n1", Name: "me.example.ts.net.", Key: keyOf(1), MachineAuthorized: true,
		Addresses: []netip.Prefix{netip.MustParsePrefix("100.64.0.1/32"), netip.MustParsePrefix("fd7a:115c:a1e0::1/128")},
	}
}

// use does with the netmap in force all that a program may do, and may find nothing there.
func use(t *testing.T, n *Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	for _, addr := range []string{"peer:80", "me:80", "100.64.0.2:80", "[fd7a:115c:a1e0::2]:80", "10.0.0.1:80"} {
		if c, err := n.Dial(ctx, "tcp", addr); err == nil {
			c.Close()
		}
	}
	if ln, err := n.Listen(ctx, "tcp", ":80"); err == nil {
		ln.Close()
	}
	for _, kind := range []string{PingDisco, PingTSMP, PingICMP} {
		n.Ping(ctx, netip.MustParseAddr("100.64.0.2"), kind)
	}
	n.Engine().Live(keyOf(2))
	st, _ := n.Status()
	if m := st.Netmap; m != nil {
		if f := n.Engine().Filter(); f != nil {
			f.Caps(netip.MustParseAddr("100.64.0.2"), m.Self.Addr4())
		}
		for p := range m.All() {
			RegionCode(m, p.HomeDERP)
			n.Engine().Live(p.Key)
		}
	}
}

// TestHostileMapResponses plays a control server that means no good, or is broken.
func TestHostileMapResponses(t *testing.T) {
	v4, v6 := netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("fd7a:115c:a1e0::2")
	online := true
	peer := func(f func(*tailcfg.Node)) *tailcfg.Node {
		n := &tailcfg.Node{
			ID: 2, StableID: "n2", Name: "peer.example.ts.net.", Key: keyOf(2), HomeDERP: 1, Online: &online,
			DiscoKey:  key.DiscoPublicFromRaw([32]byte{2}),
			Addresses: []netip.Prefix{netip.PrefixFrom(v4, 32), netip.PrefixFrom(v6, 128)},
		}
		if f != nil {
			f(n)
		}
		return n
	}
	withPeer := func(f func(*tailcfg.Node)) *tailcfg.MapResponse {
		return &tailcfg.MapResponse{Peers: []*tailcfg.Node{peer(f)}}
	}
	many := func(n int) (out []*tailcfg.Node) {
		for i := range n {
			out = append(out, &tailcfg.Node{ID: tailcfg.NodeID(i + 2), Key: key.NodePublicFromRaw([32]byte{byte(i), byte(i >> 8), 2}), Name: fmt.Sprintf("p%d.example.ts.net.", i)})
		}
		return out
	}
	rules := func(rs ...tailcfg.FilterRule) *[]tailcfg.FilterRule { return &rs }
	long := strings.Repeat("x", 1<<20)
	for name, r := range map[string]*tailcfg.MapResponse{
		"empty":                     {},
		"nil nodes":                 {Peers: []*tailcfg.Node{nil, nil}, PeersChanged: []*tailcfg.Node{nil}, PeersChangedPatch: []*tailcfg.PeerChange{nil}},
		"zero nodes":                {Peers: []*tailcfg.Node{{}, {}}, PeersChanged: []*tailcfg.Node{{}}, PeersChangedPatch: []*tailcfg.PeerChange{{}}},
		"this node as a peer":       {Peers: []*tailcfg.Node{self()}},
		"this node's key at a peer": withPeer(func(n *tailcfg.Node) { n.Key = keyOf(1) }),
		"this node's address":       withPeer(func(n *tailcfg.Node) { n.Addresses = self().Addresses }),
		"the same peer twice":       {Peers: []*tailcfg.Node{peer(nil), peer(nil)}},
		"the same key twice":        {Peers: []*tailcfg.Node{peer(nil), peer(func(n *tailcfg.Node) { n.ID = 3 })}},
		"without addresses":         withPeer(func(n *tailcfg.Node) { n.Addresses = nil }),
		"invalid addresses": withPeer(func(n *tailcfg.Node) {
			n.Addresses = []netip.Prefix{{}, netip.PrefixFrom(v4, 0), netip.PrefixFrom(v4, -1)}
		}),
		"everything routed": withPeer(func(n *tailcfg.Node) {
			n.AllowedIPs = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("0.0.0.0/1")}
		}),
		"without keys":         withPeer(func(n *tailcfg.Node) { n.Key, n.DiscoKey = key.NodePublic{}, key.DiscoPublic{} }),
		"without a name":       withPeer(func(n *tailcfg.Node) { n.Name = "" }),
		"a name of dots":       withPeer(func(n *tailcfg.Node) { n.Name = "...." }),
		"a name of a megabyte": withPeer(func(n *tailcfg.Node) { n.Name = long }),
		"negative numbers":     withPeer(func(n *tailcfg.Node) { n.ID, n.HomeDERP, n.Cap, n.User = -2, -1, -1, -1 }),
		"huge numbers":         withPeer(func(n *tailcfg.Node) { n.ID, n.HomeDERP, n.Cap = math.MaxInt64, math.MaxInt, math.MaxInt }),
		"invalid endpoints": withPeer(func(n *tailcfg.Node) {
			n.Endpoints = []netip.AddrPort{{}, netip.AddrPortFrom(netip.IPv4Unspecified(), 1), netip.AddrPortFrom(v4, 0), netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), 9), netip.AddrPortFrom(tailcfg.DERPMagicIP(), 1)}
		}),
		"invalid masquerade": withPeer(func(n *tailcfg.Node) {
			n.SelfNodeV4MasqAddrForThisPeer, n.SelfNodeV6MasqAddrForThisPeer = &v6, &netip.Addr{}
		}),
		"nil hostinfo services":          withPeer(func(n *tailcfg.Node) { n.Hostinfo = &tailcfg.Hostinfo{Services: make([]tailcfg.Service, 10000)} }),
		"patches of nobody":              {PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 99, Key: new(key.NodePublic), DiscoKey: new(key.DiscoPublic), DERPRegion: -5}}, PeersRemoved: []tailcfg.NodeID{0, -1, 99}, OnlineChange: map[tailcfg.NodeID]bool{0: true}, PeerSeenChange: map[tailcfg.NodeID]bool{-1: true}},
		"a peer's key taken away":        {Peers: []*tailcfg.Node{peer(nil)}, PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 2, Key: new(key.NodePublic), DiscoKey: new(key.DiscoPublic)}}},
		"20,000 peers":                   {Peers: many(20000)},
		"self without anything":          {Node: &tailcfg.Node{}},
		"self with another ID":           {Node: &tailcfg.Node{ID: 7, Key: keyOf(1), Name: "other."}},
		"self without addresses":         {Node: &tailcfg.Node{ID: 1, Key: keyOf(1), Name: "me.example.ts.net."}},
		"self with odd addresses":        {Node: &tailcfg.Node{ID: 1, Key: keyOf(1), Name: "me.", Addresses: []netip.Prefix{{}, netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("224.0.0.1/32"), netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("::ffff:1.2.3.4/128")}}},
		"DERP map without regions":       {DERPMap: &tailcfg.DERPMap{}},
		"DERP map of nil regions":        {DERPMap: &tailcfg.DERPMap{HomeParams: &tailcfg.DERPHomeParams{RegionScore: map[int]float64{1: -1, 2: 0}}, Regions: map[int]*tailcfg.DERPRegion{0: nil, 1: nil, -1: {}, math.MaxInt: {RegionID: math.MaxInt}}}},
		"DERP map of nil nodes":          {DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, Nodes: []*tailcfg.DERPNode{nil, {}, {HostName: "\x00", IPv4: "nonsense", IPv6: "127.0.0.1", DERPPort: -1, STUNPort: 1 << 20, CertName: "sha256-raw:zz"}}}}}},
		"DERP regions by another number": {DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 2, Nodes: []*tailcfg.DERPNode{{Name: "1a", RegionID: 3, HostName: "relay.test"}}}}}},
		"DNS of nil":                     {DNSConfig: &tailcfg.DNSConfig{Resolvers: []*tailcfg.Resolver{nil, {}}, Routes: map[string][]*tailcfg.Resolver{"": nil, ".": {nil}}, Domains: []string{"", ".", long}, Nameservers: []netip.Addr{{}}, ExtraRecords: []tailcfg.DNSRecord{{}, {Name: long, Value: long}, {Name: ".", Type: "A", Value: "::1"}}}},
		"filters of nonsense": {
			PacketFilter:  rules(tailcfg.FilterRule{}, tailcfg.FilterRule{SrcIPs: []string{"", "*", "1.2.3.4/99", "9-1", long, "cap:"}, SrcBits: []int{-1, 999}, IPProto: []int{-1, 1 << 30}, DstPorts: []tailcfg.NetPortRange{{}, {IP: "*", Ports: tailcfg.PortRange{First: 9, Last: 1}}, {IP: "x", Bits: new(int)}}}, tailcfg.FilterRule{SrcIPs: []string{"*"}, CapGrant: []tailcfg.CapGrant{{Dsts: []netip.Prefix{{}}, CapMap: tailcfg.PeerCapMap{"": nil}}}}),
			PacketFilters: tailcfg.PacketFilterDelta{"": nil, "*": nil, long[:100]: {{}}}},
		"messages of nil": {DisplayMessages: tailcfg.DisplayMessages{"": nil, "a": nil, "b": {}}, Health: &[]string{"", long}},
		"profiles":        {UserProfiles: []tailcfg.UserProfile{{}, {ID: -1, LoginName: long}}, Domain: long},
		"clocks":          {ControlTime: &time.Time{}, Node: &tailcfg.Node{ID: 1, Key: keyOf(1), Name: "me.", KeyExpiry: time.Unix(1<<40, 0)}},
		"leftovers":       {TKAInfo: &tailcfg.TKAInfo{}, Debug: &tailcfg.Debug{}, ControlDialPlan: &tailcfg.ControlDialPlan{}, ClientVersion: &tailcfg.ClientVersion{}},
	} {
		t.Run(name, func(t *testing.T) {
			n, h := lonely(t)
			// As the first response of a stream, as a delta on a good one, and again.
			first := *r
			if first.Node == nil {
				first.Node = self()
			}
			good := &tailcfg.MapResponse{Node: self(), Peers: []*tailcfg.Node{peer(nil)}, PacketFilter: &tailcfg.FilterAllowAll}
			for _, step := range []struct {
				start bool
				r     *tailcfg.MapResponse
			}{{true, &first}, {true, good}, {false, r}, {false, r}, {true, good}} {
				if step.start {
					h.MapStart()
				}
				if err := h.Map(step.r); err != nil && step.r == good {
					t.Fatalf("a good response after a bad one: %v", err)
				}
				if st, _ := n.Status(); st.Netmap != nil { // as control.Session sees to it
					h.State(control.Connected, nil)
				}
				use(t, n)
			}
			st, _ := n.Status()
			if p := st.Netmap.PeerByAddr(v4); p == nil || p.Key != keyOf(2) {
				t.Errorf("after all, the peer is %+v", p)
			}
		})
	}
}

// FuzzMapResponse feeds JSON to a node as control would.
func FuzzMapResponse(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"Node":{"ID":1,"Name":"me.","Key":"nodekey:0100000000000000000000000000000000000000000000000000000000000001","Addresses":["100.64.0.1/32"]},"Peers":[null,{}]}`,
		`{"DERPMap":{"Regions":{"1":null,"2":{"Nodes":[null]}}},"DNSConfig":{"Resolvers":[null],"Routes":{"":null}}}`,
		`{"PeersChanged":[{"ID":2,"Key":"nodekey:0200000000000000000000000000000000000000000000000000000000000001","AllowedIPs":["100.64.0.2/32"]}],"PeersChangedPatch":[{"NodeID":2,"DERPRegion":-1}]}`,
		`{"PacketFilters":{"*":null,"a":[{"SrcIPs":["*"],"DstPorts":[{"IP":"*","Ports":{"First":9,"Last":1}}]}]}}`,
	} {
		f.Add([]byte(s))
	}
	n, h := lonely(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h.MapStart()
		if err := h.Map(&tailcfg.MapResponse{Node: self(), DERPMap: &tailcfg.DERPMap{}}); err != nil {
			t.Fatal(err)
		}
		var r tailcfg.MapResponse
		if json.Unmarshal(b, &r) != nil {
			return
		}
		h.Map(&r)
		n.Engine().Live(keyOf(2))
	})
}

// failing is a user's store that fails when told to.
type failing struct {
	state.Store
	mu          sync.Mutex
	read, write error
}

func (s *failing) set(read, write error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.read, s.write = read, write
}

func (s *failing) ReadState(id string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.read != nil {
		return nil, s.read
	}
	return s.Store.ReadState(id)
}

func (s *failing) WriteState(id string, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.write != nil {
		return s.write
	}
	return s.Store.WriteState(id, b)
}

// asking is a log that asks the node for its state at every error.
type asking struct {
	slog.Handler
	node  atomic.Pointer[Node]
	asked atomic.Int32
}

func (a *asking) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }

func (a *asking) Handle(context.Context, slog.Record) error {
	if n := a.node.Load(); n != nil {
		n.Status()
		a.asked.Add(1)
	}
	return nil
}

func TestStoreFails(t *testing.T) {
	boom := errors.New("the disk is gone")
	for name, c := range map[string]struct{ read, write error }{"read": {read: boom}, "write": {write: boom}} {
		t.Run(name, func(t *testing.T) {
			st := &failing{Store: state.NewMemory(), read: c.read, write: c.write}
			cfg := Config{Store: st, Hostname: "a", ControlURL: "http://control.test", Dial: nowhere}
			_, err := Start(cfg)
			if errcode.Of(err) != errcode.StateIO || !errors.Is(err, boom) {
				t.Errorf("got %v (code %v), want StateIO because of %v", err, errcode.Of(err), boom)
			}
			st.set(nil, nil)
			if _, err := st.ReadState(stateNode); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a failed start left something: %v", err)
			}
			n, err := Start(cfg)
			if err != nil {
				t.Fatal(err)
			}
			n.Close()
		})
	}
	t.Run("a failed read does not make a new node", func(t *testing.T) {
		st := &failing{Store: state.NewMemory()}
		cfg := Config{Store: st, Hostname: "a", ControlURL: "http://control.test", Dial: nowhere}
		n, err := Start(cfg)
		if err != nil {
			t.Fatal(err)
		}
		was := n.NodeKey()
		n.Close()
		st.set(boom, nil)
		if n, err := Start(cfg); err == nil {
			n.Close()
			t.Fatal("started without its state")
		}
		st.set(nil, nil)
		if n, err = Start(cfg); err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		if n.NodeKey() != was {
			t.Error("the node is another one")
		}
	})
	t.Run("a new key that cannot be stored is not used", func(t *testing.T) {
		st := &failing{Store: state.NewMemory()}
		n, err := Start(Config{Store: st, Hostname: "a", ControlURL: "http://control.test", Dial: nowhere})
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		was := n.NodeKey()
		st.set(nil, boom)
		if err := (*handler)(n).NewNodeKey(key.NewNode()); !errors.Is(err, boom) {
			t.Errorf("got %v, want %v", err, boom)
		}
		if n.NodeKey() != was {
			t.Error("a node key is in use that is not stored")
		}
	})
	t.Run("who logs that a registration is not stored may ask for the state", func(t *testing.T) {
		st := &failing{Store: state.NewMemory()}
		a := &asking{Handler: slog.DiscardHandler}
		n, err := Start(Config{Store: st, Hostname: "a", ControlURL: "http://control.test", Dial: nowhere, Logger: slog.New(a)})
		if err != nil {
			t.Fatal(err)
		}
		a.node.Store(n)
		st.set(nil, boom)
		done := make(chan struct{})
		go func() {
			defer close(done)
			(*handler)(n).Registered(nil)
			n.Close()
		}()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Fatal("the log waits for itself")
		}
		if a.asked.Load() == 0 {
			t.Error("nothing was logged")
		}
	})
	t.Run("another control server gets another key", func(t *testing.T) {
		st := state.NewMemory()
		keys := map[key.NodePublic]bool{}
		for _, url := range []string{"http://one.test", "http://two.test", "http://two.test/"} {
			n, err := Start(Config{Store: st, Hostname: "a", ControlURL: url, Dial: nowhere})
			if err != nil {
				t.Fatal(err)
			}
			keys[n.NodeKey()] = true
			n.Close()
		}
		if len(keys) != 2 {
			t.Errorf("%d node keys for two servers", len(keys))
		}
	})
}

// TestWhy has contexts end while something else is wrong, which must not look like their end.
func TestWhy(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	given, give := context.WithCancelCause(t.Context())
	give(context.DeadlineExceeded)
	coded, end := context.WithCancelCause(t.Context())
	end(errNodeClosed)
	for _, c := range []struct {
		name string
		ctx  context.Context
		code errcode.Code
		is   error
	}{
		{"cancelled", canceled, errcode.Canceled, context.Canceled},
		{"timed out", late, errcode.Timeout, context.DeadlineExceeded},
		{"a cause", given, errcode.Timeout, context.DeadlineExceeded},
		{"a cause with a code", coded, errcode.Closed, net.ErrClosed},
	} {
		for _, wrong := range []error{nil, context.Canceled, context.DeadlineExceeded, errcode.New(errcode.StateIO, "the disk is gone")} {
			st := Status{State: Starting, Err: wrong}
			err := why(c.ctx, st)
			if errcode.Of(err) != c.code || !errors.Is(err, c.is) {
				t.Errorf("%s while %v: %v (code %v), want %v", c.name, wrong, err, errcode.Of(err), c.code)
			}
			for _, other := range []error{context.Canceled, context.DeadlineExceeded} {
				if other != c.is && errors.Is(err, other) {
					t.Errorf("%s while %v: %v is %v", c.name, wrong, err, other)
				}
			}
			if wrong != nil && !strings.Contains(err.Error(), wrong.Error()) {
				t.Errorf("%v does not say %v", err, wrong)
			}
		}
	}
}

func TestURLs(t *testing.T) {
	t.Run("in order, the oldest left out", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var got []string
			goOn := make(chan struct{})
			u := urls{show: func(url string) { got = append(got, url); <-goOn }}
			u.add("first")
			synctest.Wait()
			for i := range maxURLs + 1 {
				u.add(fmt.Sprint(i))
			}
			close(goOn)
			synctest.Wait()
			if want := []string{"first", "1", "2", "3", "4", "5", "6", "7", "8"}; !slices.Equal(got, want) {
				t.Errorf("shown %q, want %q", got, want)
			}
			u.add("later")
			synctest.Wait()
			u.close()
			u.add("too late")
			synctest.Wait()
			if got[len(got)-1] != "later" {
				t.Errorf("shown %q", got)
			}
		})
	})
	t.Run("close waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			for _, c := range []struct{ takes, waits time.Duration }{{showWait / 2, showWait / 2}, {2 * showWait, showWait}} {
				u := urls{show: func(string) { time.Sleep(c.takes) }}
				u.add("")
				synctest.Wait()
				began := time.Now()
				u.close()
				if d := time.Since(began); d != c.waits {
					t.Errorf("waited %v for what takes %v", d, c.takes)
				}
				time.Sleep(c.takes) // until it ends
			}
		})
	})
}

// TestURLIsWhatIsMissing: a call that ends when a URL is shown says so, and not what had gone wrong before.
func TestURLIsWhatIsMissing(t *testing.T) {
	_, h := lonely(t)
	h.State(control.Disconnected, control.ErrKeyExpired)
	h.AuthURL("https://control.test/login")
	ctx, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	if _, err := (*Node)(h).AwaitRunning(ctx); errcode.Of(err) != errcode.Timeout || !strings.Contains(err.Error(), "https://control.test/login") {
		t.Error(err)
	}
}

func TestBadConfig(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no URL":       {ControlURL: "control.test"},
		"odd scheme":   {ControlURL: "ftp://control.test"},
		"no host":      {ControlURL: "https://"},
		"not a tag":    {Tags: []string{"server"}},
		"an empty tag": {Tags: []string{"tag:"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Store, cfg.Dial = state.NewMemory(), nowhere
			if _, err := Start(cfg); errcode.Of(err) != errcode.InvalidArgument {
				t.Errorf("got %v, want InvalidArgument", err)
			}
		})
	}
}
