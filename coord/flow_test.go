package coord

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/coord/internal/channel"
	"github.com/tailnode/tailnode/coord/internal/throttle"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestAuthKeys(t *testing.T) {
	s := startServer(t, &Server{})
	auth := func(k string) *tailcfg.RegisterResponseAuth { return &tailcfg.RegisterResponseAuth{AuthKey: k} }
	expired := newKey(t, s, AuthKeyOptions{Expiry: time.Nanosecond})
	revoked := newKey(t, s, AuthKeyOptions{Reusable: true})
	must(t, s.RevokeAuthKey(AuthKeyID(revoked)))
	once := newKey(t, s, AuthKeyOptions{})
	newPeer(t, s, "first").join(once)
	tagged := newKey(t, s, AuthKeyOptions{Reusable: true, Tags: []string{"tag:web"}})
	plain := newKey(t, s, AuthKeyOptions{Reusable: true})
	for _, c := range []struct {
		name, key string
		tags      []string
		want      string // part of the error text; empty: joins
	}{
		{"unknown", "tnkey-auth-abc-def", nil, "not known"},
		{"foreign", "some other thing", nil, "not known"},
		{"right ID, wrong secret", keyPrefix + AuthKeyID(plain) + "-wrong", nil, "not known"},
		{"expired", expired, nil, "expired at"},
		{"revoked", revoked, nil, "was revoked"},
		{"used", once, nil, "was used already"},
		{"reusable", plain, nil, ""},
		{"reusable again", plain, nil, ""},
		{"tagged", tagged, nil, ""},
		{"tagged, asks for it", tagged, []string{"tag:web"}, ""},
		{"tagged, asks for more", tagged, []string{"tag:web", "tag:db"}, "requested tags"},
		{"plain, asks for a tag", plain, []string{"tag:web"}, "requested tags"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPeer(t, s, "n")
			hi := p.hostinfo()
			hi.RequestTags = c.tags
			res := p.register(tailcfg.RegisterRequest{Auth: auth(c.key), Hostinfo: hi})
			switch {
			case c.want == "" && (res.Error != "" || !res.MachineAuthorized):
				t.Errorf("refused: %+v", res)
			case c.want != "" && !strings.Contains(res.Error, c.want):
				t.Errorf("Error = %q, want %q in it", res.Error, c.want)
			case strings.Contains(res.Error, "wrong"):
				t.Errorf("the secret is in the error: %q", res.Error)
			}
		})
	}
	for _, k := range must2(s.ListAuthKeys()) {
		if k.ID == AuthKeyID(plain) && (k.Uses != 2 || k.LastUsed.IsZero()) {
			t.Errorf("plain key: %+v", k)
		}
	}
	for _, n := range must2(s.Nodes()) {
		if len(n.Tags) > 0 && (n.User != TaggedUser || !n.Expiry.IsZero()) {
			t.Errorf("tagged node: %+v", n)
		}
		if len(n.Tags) == 0 && (n.User != DefaultUser || n.Expiry.IsZero()) {
			t.Errorf("untagged node: %+v", n)
		}
	}
}

func must2[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestOneOffKeyOfKnownNode(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{})
	p := newPeer(t, s, "n").join(k)
	p.join(k) // a program that starts again presents the key it was started with
	if l := len(must2(s.Nodes())); l != 1 {
		t.Errorf("%d nodes", l)
	}
}

func TestInteractive(t *testing.T) {
	s := startServer(t, &Server{})
	p := newPeer(t, s, "<laptop>")
	res := p.register(tailcfg.RegisterRequest{})
	if !strings.HasPrefix(res.AuthURL, s.BaseURL()+"/register/") {
		t.Fatalf("AuthURL = %q", res.AuthURL)
	}
	if again := p.register(tailcfg.RegisterRequest{}); again.AuthURL != res.AuthURL {
		t.Errorf("asking again gives another URL")
	}
	page := get(t, res.AuthURL)
	if !strings.Contains(page, "tailnode control approve ") || strings.Contains(page, "<laptop>") {
		t.Errorf("page: %s", page)
	}
	ls := must2(s.PendingLogins())
	if len(ls) != 1 || ls[0].Hostname != "<laptop>" || ls[0].URL != res.AuthURL {
		t.Fatalf("pending: %+v", ls)
	}
	must(t, s.CreateUser("ann@example.com", "Ann"))
	got := make(chan *tailcfg.RegisterResponse, 1)
	go func() {
		r, err := p.registerRaw(tailcfg.RegisterRequest{Followup: res.AuthURL})
		if err != nil {
			t.Error(err)
		}
		got <- r
	}()
	// Another machine that has seen the URL gets nothing from it.
	thief := newPeer(t, s, "thief")
	if r := thief.register(tailcfg.RegisterRequest{Followup: res.AuthURL}); r.AuthURL == "" || r.AuthURL == res.AuthURL {
		t.Errorf("thief: %+v", r)
	}
	if err := s.ApproveLogin(ls[0].ID, ApproveOptions{User: "nobody"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown user: %v", err)
	}
	must(t, s.ApproveLogin(res.AuthURL, ApproveOptions{User: "ann@example.com"}))
	r := <-got
	if r == nil || r.AuthURL != "" || r.Login.LoginName != "ann@example.com" || !r.MachineAuthorized {
		t.Errorf("after approval: %+v", r)
	}
	if err := s.ApproveLogin(ls[0].ID, ApproveOptions{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("approved twice: %v", err)
	}
	if x := p.stream(); x.self.Name != "laptop.tailnode.internal." {
		t.Errorf("name %q", x.self.Name)
	}
	// Rejected. The page tells which tags are asked for.
	q := newPeer(t, s, "q")
	hi := q.hostinfo()
	hi.RequestTags = []string{"tag:a", "tag:b"}
	url := q.register(tailcfg.RegisterRequest{Hostinfo: hi}).AuthURL
	if page := get(t, url); !strings.Contains(page, "tag:a, tag:b") {
		t.Errorf("page: %s", page)
	}
	must(t, s.RejectLogin(url))
	if r := q.register(tailcfg.RegisterRequest{Followup: url}); r.Error == "" {
		t.Errorf("rejected: %+v", r)
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	res, err := http.Get(url)
	must(t, err)
	defer res.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	return string(must2(io.ReadAll(res.Body)))
}

func TestFirstMap(t *testing.T) {
	s := startServer(t, &Server{Relays: []Region{{ID: 7, Nodes: []Relay{{HostName: "relay.example.com"}}}}})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	a := newPeer(t, s, "Ann's Laptop").join(k)
	b := newPeer(t, s, "ann-s laptop.lan").join(k)
	xa := a.stream()
	if xa.self.Name != "anns-laptop.tailnode.internal." || xa.self.Key != a.key.Public() || !xa.self.MachineAuthorized {
		t.Errorf("self: %+v", xa.self)
	}
	if len(xa.self.Addresses) != 2 || !DefaultPrefix4.Contains(xa.self.Addresses[0].Addr()) || xa.self.Addresses[0].Bits() != 32 ||
		!DefaultPrefix6.Contains(xa.self.Addresses[1].Addr()) || xa.self.Addresses[1].Bits() != 128 {
		t.Errorf("addresses: %v", xa.self.Addresses)
	}
	m := xa.last
	if m.Domain != DefaultDomain || m.DNSConfig == nil || !m.DNSConfig.Proxied || m.DERPMap.Regions[7].Nodes[0].HostName != "relay.example.com" ||
		m.ControlTime == nil || m.Debug == nil || !m.Debug.DisableLogTail {
		t.Errorf("first map: %+v", m)
	}
	if len(xa.filter["base"]) != 1 || xa.plain != nil {
		t.Errorf("filters: %+v, %+v", xa.filter, xa.plain)
	}
	pb := xa.peer("ann-s-laptop")
	if pb == nil || pb.Hostinfo == nil || pb.Hostinfo.IPNVersion != "" || pb.Hostinfo.OS != "linux" || !isOffline(pb) {
		t.Fatalf("peer: %+v", pb)
	}
	if u := xa.users[pb.User]; u.LoginName != DefaultUser {
		t.Errorf("users: %+v", xa.users)
	}
	// One map without a stream, and one for an old client.
	b.ver, b.compress = minCap, false
	xb := b.stream()
	if xb.plain == nil || xb.filter != nil {
		t.Errorf("an old client got filters by name")
	}
	res, err := b.post(t.Context(), "/machine/map", tailcfg.MapRequest{Version: b.ver, NodeKey: b.key.Public()})
	must(t, err)
	defer res.Body.Close()
	if m, err := readFrame(res.Body, false); err != nil || len(m.Peers) != 1 {
		t.Errorf("one map: %+v, %v", m, err)
	}
}

func TestRefusals(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	p := newPeer(t, s, "p").join(k)
	other := newPeer(t, s, "other").join(k)
	status := func(path string, body any) (int, string) {
		t.Helper()
		res, err := p.post(t.Context(), path, body)
		must(t, err)
		defer res.Body.Close()
		return res.StatusCode, string(must2(io.ReadAll(res.Body)))
	}
	for _, c := range []struct {
		name, path string
		body       any
		code       int
		text       string
	}{
		{"old client registers", "/machine/register", tailcfg.RegisterRequest{Version: 67, NodeKey: p.key.Public()}, 400, "too old"},
		{"no node key", "/machine/register", tailcfg.RegisterRequest{Version: 100}, 400, "no node key"},
		{"not JSON", "/machine/register", "x", 400, "not the JSON"},
		{"huge", "/machine/register", strings.Repeat("x", 1<<20), 400, "too large"},
		{"old client maps", "/machine/map", tailcfg.MapRequest{Version: 20, NodeKey: p.key.Public()}, 400, "too old"},
		{"unknown node", "/machine/map", tailcfg.MapRequest{Version: 100, NodeKey: key.NewNode().Public()}, 404, "register first"},
		{"another machine's node", "/machine/map", tailcfg.MapRequest{Version: 100, NodeKey: other.key.Public()}, 404, "register first"},
		{"unknown compression", "/machine/map", tailcfg.MapRequest{Version: 100, NodeKey: p.key.Public(), Compress: "lz4"}, 400, "compression"},
		{"huge map request", "/machine/map", strings.Repeat("x", 1<<20), 400, "too large"},
		{"not offered", "/machine/id-token", struct{}{}, 501, "does not offer"},
		{"nowhere", "/elsewhere", struct{}{}, 404, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if code, text := status(c.path, c.body); code != c.code || !strings.Contains(text, c.text) {
				t.Errorf("%d %q, want %d with %q", code, text, c.code, c.text)
			}
		})
	}
	if res := p.register(tailcfg.RegisterRequest{NodeKey: other.key.Public()}); !strings.Contains(res.Error, "another machine") {
		t.Errorf("another machine's key: %+v", res)
	}
	// Whoever is refused all the time is slowed down, and told for how long.
	for range 10 * throttle.Burst { // a refusal a second is forgotten meanwhile
		res, err := p.post(t.Context(), "/machine/register", tailcfg.RegisterRequest{Version: 100, NodeKey: key.NewNode().Public(),
			Auth: &tailcfg.RegisterResponseAuth{AuthKey: "guess"}})
		must(t, err)
		res.Body.Close()
		if res.StatusCode == http.StatusTooManyRequests && res.Header.Get("Retry-After") != "" {
			return
		}
	}
	t.Error("guessing is not slowed down")
}

func TestOutside(t *testing.T) {
	s := startServer(t, &Server{})
	defer http.DefaultClient.CloseIdleConnections()
	for _, c := range []struct{ name, upgrade, handshake string }{
		{"no upgrade", "", "AAAA"},
		{"wrong upgrade", "websocket", "AAAA"},
		{"no handshake", channel.Protocol, ""},
		{"no base64", channel.Protocol, "%%%"},
	} {
		req := must2(http.NewRequest("POST", s.BaseURL()+"/ts2021", nil))
		req.Header.Set("Upgrade", c.upgrade)
		req.Header.Set(channel.HandshakeHeader, c.handshake)
		res, err := http.DefaultClient.Do(req)
		must(t, err)
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", c.name, res.Status)
		}
	}
	// A handshake with another server's key ends in a refusal, not in silence.
	p := newPeer(t, s, "p")
	wrong := &Server{}
	wrong.net, wrong.base = newTailnet(), s.BaseURL()
	wrong.net.srv.Key = key.NewMachine()
	p.s = wrong
	if _, err := p.registerRaw(tailcfg.RegisterRequest{}); err == nil {
		t.Error("a handshake with the wrong key went through")
	}
	if b := get(t, s.BaseURL()+"/key?v=100"); !strings.Contains(b, s.net.srv.Key.Public().String()) {
		t.Errorf("/key: %s", b)
	}
}

func TestDeltas(t *testing.T) {
	s := startServer(t, &Server{Relays: []Region{{ID: 1, Nodes: []Relay{{HostName: "r1"}}}, {ID: 2, Nodes: []Relay{{HostName: "r2"}}}}})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	a := newPeer(t, s, "a").join(k)
	xa := a.stream()

	b := newPeer(t, s, "b").join(k)
	xa.sees("b", "joins", nil)
	if xa.last.Peers != nil || len(xa.last.PeersChanged) != 1 {
		t.Errorf("a join is not a delta: %+v", xa.last)
	}
	xb := b.stream()
	xa.sees("b", "comes online", isOnline)
	if xa.last.OnlineChange == nil || xa.last.PeersChanged != nil {
		t.Errorf("not OnlineChange: %+v", xa.last)
	}

	eps := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:41641")}
	d := key.NewDisco().Public()
	hi := b.hostinfo()
	hi.NetInfo = &tailcfg.NetInfo{PreferredDERP: 2}
	b.update(tailcfg.MapRequest{DiscoKey: d, Hostinfo: hi, Endpoints: append(eps, netip.MustParseAddrPort("[fe80::1]:1"), netip.MustParseAddrPort("0.0.0.0:1"))})
	n := xa.sees("b", "reports", func(n *tailcfg.Node) bool { return len(n.Endpoints) == 1 && n.HomeDERP == 2 })
	if n.Endpoints[0] != eps[0] || n.DiscoKey != d || xa.last.PeersChangedPatch == nil || xa.last.PeersChanged != nil {
		t.Errorf("not a patch: %+v", xa.last)
	}
	xb.until("own home", func() bool { return xb.self.HomeDERP == 2 })
	b.update(tailcfg.MapRequest{DiscoKey: d, Hostinfo: hi})
	xa.sees("b", "has no endpoints", func(n *tailcfg.Node) bool { return len(n.Endpoints) == 0 })

	must(t, s.RenameNode("b", "bee"))
	xa.sees("bee", "renamed", nil)
	xb.until("own name", func() bool { return strings.HasPrefix(xb.self.Name, "bee.") })
	if err := s.RenameNode("bee", "a"); !errors.Is(err, ErrExists) {
		t.Errorf("taken name: %v", err)
	}
	if err := s.RenameNode("bee", "Not A Label"); !errors.Is(err, ErrInvalid) {
		t.Errorf("bad name: %v", err)
	}
	must(t, s.SetTags("bee", []string{"tag:x"}))
	xa.sees("bee", "is tagged", func(n *tailcfg.Node) bool { return len(n.Tags) == 1 })

	f := &Filter{Rules: []FilterRule{{Src: []string{"*"}, Dst: []string{"*"}, Ports: []string{"80", "8000-8010"}, Proto: []string{"tcp"}}},
		Grants: []Grant{{Src: []string{"*"}, Dst: []string{"*"}, Caps: map[string][]json.RawMessage{"example.com/cap/x": {json.RawMessage(`{"role":"admin"}`)}}}}}
	must(t, s.SetFilter(f))
	has := func(x *session) func() bool {
		return func() bool {
			r := x.filter["base"]
			return len(r) == 2 && r[0].DstPorts[0].Ports.Last == 80 && r[0].IPProto[0] == 6 && r[1].CapGrant[0].CapMap["example.com/cap/x"][0] == `{"role":"admin"}`
		}
	}
	xa.until("filter", has(xa))
	xb.until("filter", has(xb))
	must(t, s.SetNodeFilter("bee", &Filter{}))
	xb.until("own filter", func() bool { return len(xb.filter["base"]) == 0 })
	must(t, s.SetFilter(nil))
	xa.until("filter gone", func() bool { r := xa.filter["base"]; return len(r) == 1 && r[0].SrcIPs[0] == "*" })

	must(t, s.SetRelays([]Region{{ID: 2, Nodes: []Relay{{HostName: "r2b"}}}, {ID: 3, Nodes: []Relay{{HostName: "r3"}}}}))
	xa.until("relays", func() bool { return xa.derp[1] == nil && xa.derp[2].Nodes[0].HostName == "r2b" && xa.derp[3] != nil })
	if x := newPeer(t, s, "late").join(k).stream(); len(x.derp) != 2 {
		t.Errorf("a new node gets %d regions", len(x.derp))
	}
	must(t, s.CreateUser("bob", ""))
	xa.until("user", func() bool {
		for _, u := range xa.users {
			if u.LoginName == "bob" {
				return true
			}
		}
		return false
	})
	must(t, s.SetMessages("a", Message{ID: "m", Title: "T", Text: "X"}))
	xa.until("message", func() bool { return xa.last.DisplayMessages["m"] != nil })

	xb.cancel()
	n = xa.sees("bee", "goes offline", isOffline)
	if n.LastSeen == nil {
		t.Error("offline without LastSeen")
	}
	must(t, s.DeleteNode("bee"))
	xa.until("gone", func() bool { return xa.peer("bee") == nil })
}

func TestDeletedNodeIsTold(t *testing.T) {
	s := startServer(t, &Server{})
	p := newPeer(t, s, "p").join(newKey(t, s, AuthKeyOptions{}))
	x := p.stream()
	must(t, s.DeleteNode("p"))
	x.ended()
	if !x.self.Expired || x.self.KeyExpiry.After(time.Now()) {
		t.Errorf("last word: %+v", x.self)
	}
	if l := len(must2(s.Nodes())); l != 0 {
		t.Errorf("%d nodes", l)
	}
}

func TestStreamIsReplaced(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	xw := newPeer(t, s, "watcher").join(k).stream()
	p := newPeer(t, s, "p").join(k)
	old := p.stream()
	xw.sees("p", "online", isOnline)
	p.stream()
	old.ended()
	if n := must2(s.Node("p")); !n.Online {
		t.Error("offline although the new stream is open")
	}
}

func TestExpiryAndLogin(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	xw := newPeer(t, s, "watcher").join(k).stream()
	p := newPeer(t, s, "p").join(k)
	x := p.stream()
	before := x.self
	must(t, s.ExpireNode("p"))
	x.until("own expiry", func() bool { return x.self.Expired && len(x.peers) == 0 })
	xw.sees("p", "expired", func(n *tailcfg.Node) bool { return n.Expired })
	if res := p.register(tailcfg.RegisterRequest{}); !res.NodeKeyExpired {
		t.Errorf("register with the expired key: %+v", res)
	}
	old := p.key
	p.key = key.NewNode()
	if res := p.register(tailcfg.RegisterRequest{OldNodeKey: old.Public()}); res.AuthURL == "" {
		t.Errorf("a new key without a credential: %+v", res)
	}
	res := p.register(tailcfg.RegisterRequest{OldNodeKey: old.Public(), Auth: &tailcfg.RegisterResponseAuth{AuthKey: k}})
	if res.Error != "" || res.NodeKeyExpired {
		t.Fatalf("login: %+v", res)
	}
	x.ended()
	x = p.stream()
	if x.self.ID != before.ID || x.self.StableID != before.StableID || x.self.Addresses[0] != before.Addresses[0] || x.self.Key != p.key.Public() || x.self.Expired {
		t.Errorf("after login: %+v, before %+v", x.self, before)
	}
	xw.sees("p", "has the new key", func(n *tailcfg.Node) bool {
		return n.Key == p.key.Public() && !n.Expired && n.KeyExpiry.After(time.Now())
	})

	// A key that is still good, replaced: a patch.
	xw.sees("p", "is online", isOnline)
	p.key = key.NewNode()
	p.join(k)
	xw.sees("p", "has another key", func(n *tailcfg.Node) bool { return n.Key == p.key.Public() })
	if len(must2(s.Nodes())) != 2 {
		t.Error("a login made another node")
	}
	x = p.stream()

	// Sooner expiry at the node's own wish, and by the clock.
	soon := time.Now().Add(300 * time.Millisecond)
	p.register(tailcfg.RegisterRequest{Expiry: soon})
	x.until("expiry by the clock", func() bool { return x.self.Expired })
	xw.sees("p", "expired by the clock", func(n *tailcfg.Node) bool { return n.Expired })
}

func TestLogout(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	xw := newPeer(t, s, "watcher").join(k).stream()
	p := newPeer(t, s, "p").join(k)
	past := time.Unix(123, 0)
	if res := p.register(tailcfg.RegisterRequest{Expiry: past}); !res.NodeKeyExpired {
		t.Errorf("logout: %+v", res)
	}
	xw.sees("p", "expired", func(n *tailcfg.Node) bool { return n.Expired })
	e := newPeer(t, s, "eph").join(newKey(t, s, AuthKeyOptions{Ephemeral: true}))
	xw.sees("eph", "joins", nil)
	e.register(tailcfg.RegisterRequest{Expiry: past})
	xw.until("eph removed", func() bool { return xw.peer("eph") == nil })
	if res := e.register(tailcfg.RegisterRequest{Expiry: past}); !res.NodeKeyExpired {
		t.Errorf("logout twice: %+v", res)
	}
}

func TestEphemeral(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	xw := newPeer(t, s, "watcher").join(k).stream()
	e := newPeer(t, s, "eph").join(newKey(t, s, AuthKeyOptions{Ephemeral: true}))
	x := e.stream()
	xw.sees("eph", "joins", isOnline)
	s.mu.Lock()
	s.ephemera = time.Millisecond // not before: its stream comes when it can
	s.mu.Unlock()
	x.cancel()
	xw.until("eph removed", func() bool { return xw.peer("eph") == nil })
	if _, err := s.Node("eph"); !errors.Is(err, ErrNotFound) {
		t.Errorf("still there: %v", err)
	}
}

// TestEphemeralThatNeverCame: it is removed as well. Who watches may hear of its coming and going at once.
func TestEphemeralThatNeverCame(t *testing.T) {
	s := startServer(t, &Server{EphemeralTimeout: 100 * time.Millisecond})
	xw := newPeer(t, s, "watcher").join(newKey(t, s, AuthKeyOptions{})).stream()
	newPeer(t, s, "eph").join(newKey(t, s, AuthKeyOptions{Ephemeral: true}))
	xw.until("eph removed", func() bool {
		_, err := s.Node("eph")
		return errors.Is(err, ErrNotFound)
	})
	xw.until("its peer sees that", func() bool { return xw.peer("eph") == nil })
}

func TestApproval(t *testing.T) {
	s := startServer(t, &Server{RequireMachineApproval: true})
	pre := newKey(t, s, AuthKeyOptions{Reusable: true, Preauthorized: true})
	xw := newPeer(t, s, "watcher").join(pre).stream()
	p := newPeer(t, s, "p")
	res := p.register(tailcfg.RegisterRequest{Auth: &tailcfg.RegisterResponseAuth{AuthKey: newKey(t, s, AuthKeyOptions{})}})
	if res.MachineAuthorized || res.Error != "" {
		t.Fatalf("%+v", res)
	}
	rule := func(port string) *Filter {
		return &Filter{Rules: []FilterRule{{Src: []string{"100.64.0.77"}, Dst: []string{"100.64.0.99"}, Ports: []string{port}}}}
	}
	must(t, s.SetFilter(rule("22")))
	must(t, s.CreateUser("alice", ""))
	x := p.stream()
	nothing := func(when string) {
		t.Helper()
		if r, ok := x.filter["base"]; x.self.MachineAuthorized || len(x.peers) != 0 || !ok || len(r) != 0 || len(x.users) != 1 || x.users[x.self.User].LoginName != DefaultUser {
			t.Errorf("%s a node that is not approved sees peers %v, users %v, rules %v", when, x.peers, x.users, x.filter)
		}
	}
	nothing("at first")
	must(t, s.CreateUser("bob", ""))
	must(t, s.SetFilter(rule("23")))
	must(t, s.SetNodeFilter("p", rule("24")))
	must(t, s.SetMessages("p", Message{ID: "m"}))
	x.until("message", func() bool { _, ok := x.last.DisplayMessages["m"]; return ok })
	nothing("later")
	must(t, s.SetNodeFilter("p", nil))
	if xw.peer("p") != nil {
		t.Error("a node that is not approved is seen")
	}
	if err := s.AdmitRelayClient(p.key.Public().Raw(), netip.Addr{}); !errors.Is(err, ErrNotAllowed) {
		t.Errorf("relay admits it: %v", err)
	}
	must(t, s.ApproveNode("p"))
	x.until("approval", func() bool { return x.self.MachineAuthorized && x.peer("watcher") != nil })
	if r := x.filter["base"]; len(r) != 1 || r[0].DstPorts[0].Ports.First != 23 || len(x.users) != len(must2(s.ListUsers())) {
		t.Errorf("after approval: users %v, rules %v", x.users, x.filter)
	}
	xw.sees("p", "approved", nil)
	must(t, s.AdmitRelayClient(p.key.Public().Raw(), netip.Addr{}))
}

func TestPing(t *testing.T) {
	s := startServer(t, &Server{})
	p := newPeer(t, s, "p").join(newKey(t, s, AuthKeyOptions{}))
	x := p.stream()
	go func() {
		for m := range x.msgs {
			if m.PingRequest == nil {
				continue
			}
			if m.PingRequest.Types == "" {
				res, err := http.Head(m.PingRequest.URL)
				if err == nil {
					res.Body.Close()
				}
			} else {
				res, err := http.Post(m.PingRequest.URL, "", strings.NewReader(`{"Type":"disco","LatencySeconds":0.5}`))
				if err == nil {
					res.Body.Close()
				}
			}
		}
	}()
	defer http.DefaultClient.CloseIdleConnections()
	if _, err := s.Ping(t.Context(), "p", "", netip.Addr{}); err != nil {
		t.Error(err)
	}
	if r, err := s.Ping(t.Context(), "p", "disco", netip.MustParseAddr("100.64.0.9")); err != nil || r.RTT != 500*time.Millisecond {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestRestart stops the server and starts another on the same folder: everybody is who they were.
func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "coord")
	s := &Server{Dir: dir}
	must(t, s.Start(t.Context()))
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	once := newKey(t, s, AuthKeyOptions{})
	must(t, s.CreateUser("ann", ""))
	must(t, s.SetFilter(&Filter{}))
	a := newPeer(t, s, "a").join(k)
	b := newPeer(t, s, "b").join(once)
	hi := b.hostinfo()
	hi.NetInfo = &tailcfg.NetInfo{PreferredDERP: 4}
	b.update(tailcfg.MapRequest{Hostinfo: hi, DiscoKey: key.NewDisco().Public()})
	was := must2(s.Nodes())
	serverKey := s.net.srv.Key.Public()
	if err := (&Server{Dir: dir}).Start(t.Context()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second server on the folder: %v", err)
	}
	must(t, s.Close())
	a.tr.CloseIdleConnections()
	b.tr.CloseIdleConnections()

	s = startServer(t, &Server{Dir: dir})
	if s.net.srv.Key.Public() != serverKey {
		t.Error("the server's key changed")
	}
	for i, n := range must2(s.Nodes()) {
		w := was[i]
		if n.ID != w.ID || n.Name != w.Name || n.Key != w.Key || n.Addrs[0] != w.Addrs[0] || n.HomeRegion != w.HomeRegion || !n.Expiry.Equal(w.Expiry) {
			t.Errorf("node %+v, was %+v", n, w)
		}
	}
	a.s, b.s = s, s
	a.join(k)
	x := a.stream()
	if len(x.peers) != 1 || len(x.filter["base"]) != 0 {
		t.Errorf("map after the restart: %d peers, filter %v", len(x.peers), x.filter)
	}
	if res := newPeer(t, s, "c").register(tailcfg.RegisterRequest{Auth: &tailcfg.RegisterResponseAuth{AuthKey: once}}); res.Error == "" {
		t.Error("a one-off key works again after a restart")
	}
	c := newPeer(t, s, "b").join(k).stream()
	if c.self.Addresses[0] == x.self.Addresses[0] || c.self.Name != "b-1.tailnode.internal." || c.self.ID <= x.peer("b").ID {
		t.Errorf("new node: %+v", c.self)
	}
}

// TestNotStored registers while the store takes nothing. The request must not be acknowledged when it is repeated,
// though by then the server knows the node.
func TestNotStored(t *testing.T) {
	s := startServer(t, &Server{Dir: t.TempDir()})
	k := newKey(t, s, AuthKeyOptions{})
	p := newPeer(t, s, "p")
	must(t, s.store.Close())
	for range 2 {
		res, err := p.registerRaw(tailcfg.RegisterRequest{Auth: &tailcfg.RegisterResponseAuth{AuthKey: k}})
		if err == nil || !strings.HasPrefix(err.Error(), "500 ") {
			t.Errorf("%+v, %v", res, err)
		}
	}
}

func TestClose(t *testing.T) {
	var never Server
	must(t, never.Close())
	must(t, never.Close())
	if err := never.Start(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("start after close: %v", err)
	}
	s := startServer(t, &Server{})
	p := newPeer(t, s, "p").join(newKey(t, s, AuthKeyOptions{}))
	x := p.stream()
	done := make(chan error, 2)
	go func() { done <- s.Close() }()
	go func() { done <- s.Close() }()
	must(t, <-done)
	must(t, <-done)
	x.ended()
	if _, err := s.Nodes(); !errors.Is(err, ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}
