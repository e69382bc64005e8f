package coord

import (
	"bytes"
	"context"
	"encoding/json"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/coord/internal/alloc"
	"github.com/tailnode/tailnode/coord/internal/channel"
	"github.com/tailnode/tailnode/coord/internal/throttle"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// inside returns a request as it comes out of machine m's Noise channel, from a client that hangs up.
func inside(m key.MachinePublic, path string, body []byte) *http.Request {
	r := httptest.NewRequest("POST", path, bytes.NewReader(body))
	ctx, cancel := context.WithCancel(channel.WithMachine(context.Background(), m))
	cancel()
	return r.WithContext(ctx)
}

// fuzzServer starts a server with one node, whose keys are always the same so that a corpus can name them.
func fuzzServer(f *testing.F) (*Server, key.MachinePublic, key.NodePublic, string) {
	s := startServer(f, &Server{})
	raw := [32]byte{1, 2, 3}
	m, n := key.PrivateFromRaw[key.Machine](raw).Public(), key.PrivateFromRaw[key.Node](raw).Public()
	k := newKey(f, s, AuthKeyOptions{Reusable: true, Ephemeral: true})
	w := httptest.NewRecorder()
	b, _ := json.Marshal(tailcfg.RegisterRequest{Version: 119, NodeKey: n, Auth: &tailcfg.RegisterResponseAuth{AuthKey: k}, Hostinfo: &tailcfg.Hostinfo{Hostname: "h"}})
	s.serveRegister(w, inside(m, "/machine/register", b))
	if len(s.net.nodes) != 1 {
		f.Fatalf("the node did not join: %s", w.Body)
	}
	return s, m, n, k
}

// checkAnswer fails if the answer is none that a client could make sense of, and checks the state behind it.
func checkAnswer(t *testing.T, s *Server, w *httptest.ResponseRecorder) {
	switch w.Code {
	case 200, 400, 404, 429:
	default:
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, n := range s.net.nodes {
		if n.rec.ID != id || s.net.byKey[n.rec.Key] != n || s.net.byName[n.rec.Name] != n || alloc.Label(n.rec.Name) == "" ||
			s.net.byAddr[n.rec.IPv4] != n || s.net.byAddr[n.rec.IPv6] != n || n.stream != nil || len(n.live.Endpoints) > maxEndpoints {
			t.Errorf("the indexes do not agree on %+v", n.rec)
		}
		if s.net.peerJSON(n, s.domain, time.Now()) == nil {
			t.Errorf("node %+v cannot be encoded", n.rec)
		}
	}
	if len(s.net.byKey) != len(s.net.nodes) || len(s.net.byName) != len(s.net.nodes) || len(s.net.byAddr) != 2*len(s.net.nodes) {
		t.Error("the indexes differ in size")
	}
	count := 0
	for n := s.net.newest; n != nil; n = n.older {
		count++
		if n.older != nil && n.older.top > n.top {
			t.Error("the list of changes is out of order")
		}
	}
	if count != len(s.net.nodes) {
		t.Errorf("%d of %d nodes are in the list of changes", count, len(s.net.nodes))
	}
}

func FuzzRegister(f *testing.F) {
	s, m, n, k := fuzzServer(f)
	for _, req := range []tailcfg.RegisterRequest{
		{Version: 119, NodeKey: n},
		{Version: 119, NodeKey: n, Expiry: time.Unix(123, 0)},
		{Version: 119, NodeKey: key.NewNode().Public(), OldNodeKey: n, Auth: &tailcfg.RegisterResponseAuth{AuthKey: k}},
		{Version: 119, NodeKey: key.NewNode().Public(), Followup: "http://x/register/y"},
		{Version: 68, NodeKey: n, Ephemeral: true, Hostinfo: &tailcfg.Hostinfo{Hostname: "a.b", RequestTags: []string{"tag:x"}, NetInfo: &tailcfg.NetInfo{PreferredDERP: -1}}},
	} {
		b, _ := json.Marshal(req)
		f.Add(b)
	}
	f.Add([]byte(`{"Version":119,"NodeKey":"nodekey:` + strings.Repeat("00", 32) + `"}`))
	f.Add([]byte(`{"Version":119,"Hostinfo":{"RoutableIPs":["::/0"],"Services":[null]},"Auth":{}}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s.failures = throttle.New()
		w := httptest.NewRecorder()
		s.serveRegister(w, inside(m, "/machine/register", bytes.ReplaceAll(body, []byte("KEY"), []byte(k))))
		checkAnswer(t, s, w)
		s.mu.Lock()
		clear(s.logins)
		s.mu.Unlock()
	})
}

func FuzzMap(f *testing.F) {
	s, m, n, _ := fuzzServer(f)
	for _, req := range []tailcfg.MapRequest{
		{Version: 119, NodeKey: n},
		{Version: 119, NodeKey: n, Stream: true, Compress: "zstd", KeepAlive: true},
		{Version: 70, NodeKey: n, Stream: true, OmitPeers: true},
		{Version: 119, NodeKey: n, OmitPeers: true, DiscoKey: key.NewDisco().Public(), Hostinfo: &tailcfg.Hostinfo{Hostname: "x", NetInfo: &tailcfg.NetInfo{PreferredDERP: math.MaxInt}}},
		{Version: 119, NodeKey: n, ReadOnly: true},
	} {
		b, _ := json.Marshal(req)
		f.Add(b)
	}
	nk, _ := n.MarshalText()
	f.Add([]byte(`{"Version":119,"NodeKey":"` + string(nk) + `","OmitPeers":true,"Endpoints":["1.2.3.4:5","[::1%eth0]:1","0.0.0.0:0","[ff02::1]:1"]}`))
	f.Add([]byte(`{"Version":119,"NodeKey":"` + string(nk) + `","OmitPeers":true,"Hostinfo":{"Hostname":"\u0000\ud800","OS":"x","Services":[{"Proto":"peerapi4","Port":1}]}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, body []byte) {
		w := httptest.NewRecorder()
		s.serveMap(w, inside(m, "/machine/map", body))
		checkAnswer(t, s, w)
	})
}
