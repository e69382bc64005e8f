package coord

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func TestAddressesUsedUp(t *testing.T) {
	s := startServer(t, &Server{Prefix4: netip.MustParsePrefix("10.9.0.0/30")})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	newPeer(t, s, "a").join(k)
	newPeer(t, s, "b").join(k)
	res := newPeer(t, s, "c").register(tailcfg.RegisterRequest{Auth: &tailcfg.RegisterResponseAuth{AuthKey: k}})
	if !strings.Contains(res.Error, "no free address") {
		t.Errorf("%+v", res)
	}
	must(t, s.DeleteNode("a"))
	newPeer(t, s, "c").join(k)
}

func TestFilterChecks(t *testing.T) {
	all := []string{"*"}
	for name, f := range map[string]*Filter{
		"no source":        {Rules: []FilterRule{{Dst: all}}},
		"no destination":   {Rules: []FilterRule{{Src: all}}},
		"bad address":      {Rules: []FilterRule{{Src: []string{"10.0.0"}, Dst: all}}},
		"bits set":         {Rules: []FilterRule{{Src: []string{"10.0.0.1/8"}, Dst: all}}},
		"bad range":        {Rules: []FilterRule{{Src: []string{"10.0.0.9-10.0.0.1"}, Dst: all}}},
		"mixed range":      {Rules: []FilterRule{{Src: []string{"10.0.0.9-::1"}, Dst: all}}},
		"bad port":         {Rules: []FilterRule{{Src: all, Dst: all, Ports: []string{"70000"}}}},
		"bad ports":        {Rules: []FilterRule{{Src: all, Dst: all, Ports: []string{"9-1"}}}},
		"bad protocol":     {Rules: []FilterRule{{Src: all, Dst: all, Proto: []string{"quic"}}}},
		"empty grant":      {Grants: []Grant{{Src: all, Dst: all}}},
		"relays for range": {Grants: []Grant{{Src: []string{"10.0.0.1-10.0.0.2"}, Dst: all, Caps: map[string][]json.RawMessage{CapRelay: nil}}}},
		"grant to range":   {Grants: []Grant{{Src: all, Dst: []string{"10.0.0.1-10.0.0.2"}, Caps: map[string][]json.RawMessage{"x": nil}}}},
	} {
		if _, err := f.rules(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := &Filter{Rules: []FilterRule{{Src: []string{"10.0.0.1", "10.0.0.0/8", "10.0.0.1-10.0.0.9", "fd00::/8"}, Dst: []string{"*", "100.64.0.1"},
		Ports: []string{"1-2", "*"}, Proto: []string{"TCP", "47"}}}}
	r, err := good.rules()
	if err != nil || len(r[0].DstPorts) != 4 || r[0].IPProto[1] != 47 {
		t.Errorf("%+v, %v", r, err)
	}
	// A grant of relays tells both sides.
	relays := &Filter{Grants: []Grant{{Src: []string{"*"}, Dst: []string{"100.64.0.9"}, Caps: map[string][]json.RawMessage{CapRelay: nil}}}}
	r, err = relays.rules()
	if err != nil || len(r) != 2 || r[0].SrcIPs[0] != "*" || r[0].CapGrant[0].Dsts[0].String() != "100.64.0.9/32" || r[0].CapGrant[0].CapMap[tailcfg.PeerCapabilityRelay] == nil ||
		r[1].SrcIPs[0] != "100.64.0.9" || len(r[1].CapGrant[0].Dsts) != 2 || r[1].CapGrant[0].CapMap[tailcfg.PeerCapabilityRelayTarget] == nil {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := (&Filter{}).rules(); err != nil || r == nil || len(r) != 0 {
		t.Errorf("the empty filter: %v, %v", r, err)
	}
}

func TestSettings(t *testing.T) {
	for name, s := range map[string]*Server{
		"domain":      {Domain: "bad domain"},
		"domain dots": {Domain: "a..b"},
		"no listener": {Addr: "none"},
		"URL":         {URL: "ftp://x"},
		"prefix4":     {Prefix4: netip.MustParsePrefix("fd00::/64")},
		"prefix6":     {Prefix6: netip.MustParsePrefix("fd00::/120")},
		"region ID":   {Relays: []Region{{ID: 0}}},
		"region":      {Relays: []Region{{ID: 1}, {ID: 1}}},
		"relay":       {Relays: []Region{{ID: 1, Nodes: []Relay{{}}}}},
	} {
		if err := s.Start(t.Context()); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
			s.Close()
		}
	}
	// A failed start leaves nothing behind: the same server starts once the reason is gone.
	s := &Server{Dir: t.TempDir(), Addr: "256.256.256.256:1"}
	if err := s.Start(t.Context()); err == nil {
		t.Fatal("started")
	}
	s.Addr = ""
	startServer(t, s)
}

func TestBadDatabase(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, databaseFile), []byte("something else entirely"), 0o600))
	s := &Server{Dir: dir}
	if err := s.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "left as it is") {
		t.Errorf("err = %v", err)
	}
}

func TestHandlerElsewhere(t *testing.T) {
	s := startServer(t, &Server{Addr: "none", URL: "https://control.example.com/"})
	hs := &http.Server{Handler: s.Handler()}
	ln := must2(listen())
	go hs.Serve(ln)
	defer hs.Close()
	s.mu.Lock()
	s.base = "http://" + ln.Addr().String()
	s.mu.Unlock()
	p := newPeer(t, s, "p").join(newKey(t, s, AuthKeyOptions{}))
	p.stream()
	must(t, s.Close())
	if body := getAny(t, "http://"+ln.Addr().String()+"/key"); !strings.Contains(body, "not running") {
		t.Errorf("after Close: %s", body)
	}
}

func TestAdmin(t *testing.T) {
	dir := t.TempDir()
	if _, err := OpenAdmin(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no server: %v", err)
	}
	s := startServer(t, &Server{Dir: dir})
	st := must2(os.Stat(filepath.Join(dir, adminFile)))
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	a := must2(OpenAdmin(dir))
	a.Client = &http.Client{Transport: &http.Transport{}}
	defer a.Client.CloseIdleConnections()
	ctx := t.Context()
	if info, err := a.Info(ctx); err != nil || info.URL != s.BaseURL() || info.Domain != DefaultDomain {
		t.Errorf("%+v, %v", info, err)
	}
	k, err := a.CreateAuthKey(ctx, AuthKeyOptions{Reusable: true, Description: "d"})
	must(t, err)
	newPeer(t, s, "p").join(k)
	if l, err := a.ListAuthKeys(ctx); err != nil || len(l) != 1 || l[0].ID != AuthKeyID(k) || l[0].Uses != 1 {
		t.Errorf("%+v, %v", l, err)
	}
	must(t, a.RenameNode(ctx, "p", "q"))
	must(t, a.SetTags(ctx, "q", []string{"tag:a"}))
	if n, err := a.Node(ctx, "q"); err != nil || n.Tags[0] != "tag:a" {
		t.Errorf("%+v, %v", n, err)
	}
	must(t, a.ExpireNode(ctx, "q"))
	must(t, a.ApproveNode(ctx, "q"))
	must(t, a.RevokeAuthKey(ctx, AuthKeyID(k)))
	must(t, a.CreateUser(ctx, "ann", "Ann"))
	if err := a.CreateUser(ctx, "ann", "Ann"); !errors.Is(err, ErrExists) {
		t.Errorf("twice: %v", err)
	}
	if l, err := a.ListUsers(ctx); err != nil || len(l) != 3 {
		t.Errorf("%+v, %v", l, err)
	}
	must(t, a.SetFilter(ctx, &Filter{}))
	must(t, a.SetRelays(ctx, []Region{{ID: 1}}))
	if err := a.SetFilter(ctx, &Filter{Rules: []FilterRule{{}}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("bad filter: %v", err)
	}
	x, y := newPeer(t, s, "x"), newPeer(t, s, "y")
	must(t, a.ApproveLogin(ctx, x.register(tailcfg.RegisterRequest{}).AuthURL, ApproveOptions{User: "ann"}))
	must(t, a.RejectLogin(ctx, y.register(tailcfg.RegisterRequest{}).AuthURL))
	if l, err := a.PendingLogins(ctx); err != nil || len(l) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	must(t, a.DeleteNode(ctx, "q"))
	if err := a.DeleteNode(ctx, "q"); !errors.Is(err, ErrNotFound) || !strings.HasPrefix(err.Error(), "coord: node") {
		t.Errorf("twice: %v", err)
	}
	if l, err := a.Nodes(ctx); err != nil || len(l) != 1 {
		t.Errorf("%+v, %v", l, err)
	}
	bad := *a
	bad.Token = "x"
	if _, err := bad.Nodes(ctx); err == nil || strings.Contains(err.Error(), a.Token) {
		t.Errorf("wrong token: %v", err)
	}
	if err := a.call(ctx, "no-such", adminArgs{}, nil); err == nil {
		t.Error("unknown method")
	}
	must(t, s.Close())
	if _, err := OpenAdmin(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

func TestRelayAdmission(t *testing.T) {
	s := startServer(t, &Server{})
	p := newPeer(t, s, "p").join(newKey(t, s, AuthKeyOptions{}))
	ask := func(k key.NodePublic) string {
		res, err := http.Post(s.BaseURL()+"/relay/admit", "application/json", strings.NewReader(fmt.Sprintf(`{"NodePublic":%q,"Source":"192.0.2.1"}`, k)))
		must(t, err)
		defer res.Body.Close()
		defer http.DefaultClient.CloseIdleConnections()
		var out tailcfg.DERPAdmitClientResponse
		must(t, json.NewDecoder(res.Body).Decode(&out))
		return fmt.Sprint(out.Allow)
	}
	if got := ask(p.key.Public()); got != "true" {
		t.Errorf("a node: %s", got)
	}
	if got := ask(key.NewNode().Public()); got != "false" {
		t.Errorf("a stranger: %s", got)
	}
	must(t, s.ExpireNode("p"))
	if got := ask(p.key.Public()); got != "false" {
		t.Errorf("an expired node: %s", got)
	}
}

// TestSlowNode has a node that opens a map stream and never reads. The others must not notice, and
// it must not cost memory for each change.
func TestSlowNode(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	slow := newPeer(t, s, "slow").join(k)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res, err := slow.open(ctx)
	must(t, err)
	defer res.Body.Close()
	xa := newPeer(t, s, "a").join(k).stream()
	b := newPeer(t, s, "b").join(k)
	for i := range 300 {
		hi := b.hostinfo()
		hi.Services = []tailcfg.Service{{Proto: "tcp", Port: uint16(i + 1), Description: strings.Repeat("x", 20_000)}}
		b.update(tailcfg.MapRequest{Hostinfo: hi})
	}
	xa.sees("b", "last update", func(n *tailcfg.Node) bool {
		return len(n.Hostinfo.Services) == 1 && n.Hostinfo.Services[0].Port == 300
	})
	// When it reads again, it has few messages to read and the last state at their end.
	msgs := 0
	for {
		m, err := readFrame(res.Body, true)
		must(t, err)
		msgs++
		done := false
		for _, n := range append(m.PeersChanged, m.Peers...) {
			if len(n.Hostinfo.Services) == 1 && n.Hostinfo.Services[0].Port == 300 {
				done = true
			}
		}
		if done {
			break
		}
	}
	t.Logf("%d messages for 300 changes", msgs)
}

// TestForgottenRemovals lets a stream fall so far behind that the removals it missed are forgotten.
func TestForgottenRemovals(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	newPeer(t, s, "a").join(k)
	b := newPeer(t, s, "b").join(k)
	n := s.net.byKey[b.key.Public()]
	st := &stream{node: n, named: true, kick: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.cursor = s.net.seq
	for i := range maxRemovals + 1 {
		s.net.hide(&node{rec: nodeRec{ID: tailcfg.NodeID(1000 + i)}})
	}
	f := s.delta(st, time.Now())
	if f == nil || f.List != "Peers" || len(f.Peers) != 1 {
		t.Errorf("want the whole map, got %+v", f)
	}
	if len(s.net.removed) > maxRemovals {
		t.Errorf("%d removals are kept", len(s.net.removed))
	}
}

func TestParseDERPMap(t *testing.T) {
	r, err := ParseDERPMap([]byte(`{"Regions":{"2":{"RegionID":2,"RegionCode":"b","Nodes":[{"Name":"2a","HostName":"h","CertName":"sha256-raw:00","DERPPort":8443}]},"1":{"RegionID":1},"3":null}}`))
	if err != nil || len(r) != 2 || r[0].ID != 1 || r[1].Nodes[0].DERPPort != 8443 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, bad := range []string{"", "[]", `{"Regions":{"0":{}}}`, `{"Regions":{"1":{"Nodes":[{}]}}}`} {
		if _, err := ParseDERPMap([]byte(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

// TestLoginFlood fills the list of waiting logins from one address, and from many. Who comes then is asked to wait: a refusal
// would be final. Logins that were decided do not count.
func TestLoginFlood(t *testing.T) {
	s := startServer(t, &Server{})
	p := newPeer(t, s, "p")
	var urls []string
	for range maxLoginsFrom {
		urls = append(urls, p.register(tailcfg.RegisterRequest{NodeKey: key.NewNode().Public()}).AuthURL)
	}
	q := newPeer(t, s, "q")
	put := func(words string) {
		t.Helper()
		res, err := q.post(t.Context(), "/machine/register", tailcfg.RegisterRequest{Version: q.ver, NodeKey: q.key.Public()})
		must(t, err)
		defer res.Body.Close()
		if text := string(must2(io.ReadAll(res.Body))); res.StatusCode != 429 || res.Header.Get("Retry-After") == "" || !strings.Contains(text, words) {
			t.Errorf("%s, %v: %s", res.Status, res.Header, text)
		}
	}
	put("too many logins from this address")
	must(t, s.RejectLogin(urls[0]))
	res := q.register(tailcfg.RegisterRequest{})
	if res.AuthURL == "" {
		t.Fatalf("after one was decided: %+v", res)
	}

	s.mu.Lock()
	for _, l := range s.logins {
		l.req.from = netip.MustParsePrefix("192.0.2.1/32")
	}
	for i := range maxLogins {
		s.logins[strconv.Itoa(i)] = &login{req: &registration{}, done: make(chan struct{}), expires: time.Now().Add(time.Hour)}
	}
	s.mu.Unlock()
	if again := q.register(tailcfg.RegisterRequest{}); again.AuthURL != res.AuthURL {
		t.Errorf("one that waits already: %+v", again)
	}
	q.key = key.NewNode()
	put("too many logins are waiting")
	s.mu.Lock()
	for _, l := range s.logins {
		l.finish(loginRejected)
	}
	s.mu.Unlock()
	if res := q.register(tailcfg.RegisterRequest{}); res.AuthURL == "" {
		t.Errorf("after all were decided: %+v", res)
	}
}

// TestChannelsAreCounted opens and closes channels; none stays in the count.
func TestChannelsAreCounted(t *testing.T) {
	s := &Server{}
	must(t, s.Start(t.Context()))
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	for range 3 {
		newPeer(t, s, "p").join(k)
	}
	if n := s.noise.Open(); n != 3 {
		t.Errorf("%d channels are open, want 3", n)
	}
	p := newPeer(t, s, "p")
	p.s = &Server{base: s.base, net: newTailnet()}
	p.s.net.srv.Key = key.NewMachine()
	p.registerRaw(tailcfg.RegisterRequest{}) // a handshake that fails
	must(t, s.Close())
	tick, limit := time.NewTicker(time.Millisecond), time.After(patience)
	defer tick.Stop()
	for s.noise.Open() != 0 { // net/http gives no event for the end of its goroutines
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("%d channels are left in the count", s.noise.Open())
		}
	}
}

// TestSharedFrame has two streams at one cursor and a change between their turns: the second uses the first one's
// frame, and must not miss the change that the frame does not have.
func TestSharedFrame(t *testing.T) {
	s := startServer(t, &Server{})
	k := newKey(t, s, AuthKeyOptions{Reusable: true})
	var st [2]*stream
	var changing *node
	for i, name := range []string{"a", "b", "c"} {
		p := newPeer(t, s, name).join(k)
		s.mu.Lock()
		n := s.net.byKey[p.key.Public()]
		if i < 2 {
			st[i] = &stream{node: n, named: true, kick: make(chan struct{}, 1)}
		} else {
			changing = n
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waking != nil {
		s.waking.Stop()
		s.waking = nil
	}
	st[0].cursor, st[1].cursor = s.net.seq, s.net.seq
	change := func(name string) {
		s.rename(changing, name)
	}
	change("one")
	f0 := s.delta(st[0], time.Now())
	change("two")
	f1 := s.delta(st[1], time.Now())
	if f0 == nil || f0 != f1 {
		t.Fatal("the frame is not shared")
	}
	select {
	case <-st[1].kick:
	default:
		t.Fatal("the second stream sleeps although it is behind")
	}
	if f := s.delta(st[1], time.Now()); f == nil || !strings.Contains(string(f.Peers[0]), `"two.`) {
		t.Errorf("%+v", f)
	}
}
