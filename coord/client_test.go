package coord

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/tailnode/tailnode/coord/internal/channel"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/noise"
	"github.com/tailnode/tailnode/internal/tailcfg"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("COORD_CHILD"); dir != "" {
		childMain(dir)
	}
	goleak.VerifyTestMain(m)
}

// peerNode is a node as small as it can be: it speaks the protocol and nothing else.
type peerNode struct {
	t        testing.TB
	s        *Server
	machine  key.MachinePrivate
	key      key.NodePrivate
	host     string
	ver      tailcfg.CapabilityVersion
	compress bool
	hc       *http.Client
	tr       *http.Transport
	fresh    atomic.Bool // there is a channel, and no answer has come by it yet
}

func newPeer(t testing.TB, s *Server, host string) *peerNode {
	p := &peerNode{t: t, s: s, machine: key.NewMachine(), key: key.NewNode(), host: host, ver: tailcfg.CurrentCapabilityVersion, compress: true}
	p.tr = &http.Transport{Protocols: new(http.Protocols), MaxConnsPerHost: 1}
	p.tr.Protocols.SetUnencryptedHTTP2(true)
	p.tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx) }
	p.hc = &http.Client{Transport: p.tr}
	t.Cleanup(p.tr.CloseIdleConnections)
	return p
}

func (p *peerNode) dial(ctx context.Context) (net.Conn, error) {
	addr := strings.TrimPrefix(p.s.BaseURL(), "http://")
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	init, finish, err := noise.ClientDeferred(p.machine, p.s.net.srv.Key.Public(), uint16(p.ver))
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(c, "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: %s\r\nConnection: upgrade\r\n%s: %s\r\nContent-Length: 0\r\n\r\n",
		channel.Protocol, channel.HandshakeHeader, base64.StdEncoding.EncodeToString(init))
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		c.Close()
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		c.Close()
		return nil, errors.New(resp.Status)
	}
	nc, err := finish(ctx, &bufferedConn{c, br})
	if err != nil {
		c.Close()
		return nil, err
	}
	p.fresh.Store(true)
	return noise.NewEarlyConn(nc), nil
}

func (p *peerNode) hostinfo() *tailcfg.Hostinfo {
	return &tailcfg.Hostinfo{Hostname: p.host, OS: "linux", IPNVersion: "test"}
}

// post sends a request, again by another channel if the first one ends before anything was heard: net/http gives a client two seconds to begin
// with HTTP/2, which are not much on a machine that does other things.
func (p *peerNode) post(ctx context.Context, path string, body any) (*http.Response, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	for tries := 1; ; tries++ {
		req, err := http.NewRequestWithContext(ctx, "POST", "http://control"+path, bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		res, err := p.hc.Do(req)
		if again := p.fresh.Swap(false); err == nil || !again || tries == 5 || ctx.Err() != nil {
			return res, err
		}
	}
}

// registerRaw sends a request with what p is filled in.
func (p *peerNode) registerRaw(req tailcfg.RegisterRequest) (*tailcfg.RegisterResponse, error) {
	if req.Version == 0 {
		req.Version = p.ver
	}
	if req.NodeKey.IsZero() {
		req.NodeKey = p.key.Public()
	}
	if req.Hostinfo == nil {
		req.Hostinfo = p.hostinfo()
	}
	res, err := p.post(p.t.Context(), "/machine/register", req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != 200 {
		return nil, fmt.Errorf("%s: %s", res.Status, bytes.TrimSpace(b))
	}
	var out tailcfg.RegisterResponse
	return &out, json.Unmarshal(b, &out)
}

func (p *peerNode) register(req tailcfg.RegisterRequest) *tailcfg.RegisterResponse {
	p.t.Helper()
	res, err := p.registerRaw(req)
	if err != nil {
		p.t.Fatalf("register: %v", err)
	}
	return res
}

// join registers with an auth key, which must work.
func (p *peerNode) join(authKey string) *peerNode {
	p.t.Helper()
	res := p.register(tailcfg.RegisterRequest{Auth: &tailcfg.RegisterResponseAuth{AuthKey: authKey}})
	if res.Error != "" || res.AuthURL != "" || res.NodeKeyExpired {
		p.t.Fatalf("join: %+v", res)
	}
	return p
}

// update sends an update request, and fails the test unless the status is 200.
func (p *peerNode) update(req tailcfg.MapRequest) {
	p.t.Helper()
	req.Version, req.NodeKey, req.OmitPeers = p.ver, p.key.Public(), true
	res, err := p.post(p.t.Context(), "/machine/map", req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); res.StatusCode != 200 || len(b) > 0 {
		p.t.Fatalf("update: %s: %q", res.Status, b)
	}
}

// session is a map stream as its node sees it, with the netmap that it adds up to.
type session struct {
	p      *peerNode
	cancel context.CancelFunc
	msgs   chan *tailcfg.MapResponse // closed at the end
	self   *tailcfg.Node
	peers  map[tailcfg.NodeID]*tailcfg.Node
	filter map[string][]tailcfg.FilterRule
	plain  []tailcfg.FilterRule
	derp   map[int]*tailcfg.DERPRegion
	users  map[tailcfg.UserID]tailcfg.UserProfile
	last   *tailcfg.MapResponse
}

func (p *peerNode) open(ctx context.Context) (*http.Response, error) {
	req := tailcfg.MapRequest{Version: p.ver, NodeKey: p.key.Public(), Stream: true, KeepAlive: true}
	if p.compress {
		req.Compress = "zstd"
	}
	return p.post(ctx, "/machine/map", req)
}

// stream opens a map stream and takes in the first message.
func (p *peerNode) stream() *session {
	p.t.Helper()
	ctx, cancel := context.WithCancel(p.t.Context())
	res, err := p.open(ctx)
	if err != nil {
		cancel()
		p.t.Fatal(err)
	}
	if res.StatusCode != 200 {
		b, _ := io.ReadAll(res.Body)
		cancel()
		p.t.Fatalf("map: %s: %s", res.Status, b)
	}
	x := &session{p: p, cancel: cancel, msgs: make(chan *tailcfg.MapResponse, 1000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(x.msgs)
		defer res.Body.Close()
		for {
			m, err := readFrame(res.Body, p.compress)
			if err != nil {
				return
			}
			select {
			case x.msgs <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	p.t.Cleanup(func() { cancel(); <-done })
	x.next()
	if x.self == nil {
		p.t.Fatal("first message without Node")
	}
	return x
}

var zdec, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0))

func readFrame(r io.Reader, compress bool) (*tailcfg.MapResponse, error) {
	b, err := readBody(r, compress)
	if err != nil {
		return nil, err
	}
	m := new(tailcfg.MapResponse)
	return m, json.Unmarshal(b, m)
}

func readBody(r io.Reader, compress bool) ([]byte, error) {
	var hdr [4]byte
	if _, err := io.ReadFull(r, hdr[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.LittleEndian.Uint32(hdr[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	if compress {
		var err error
		if b, err = zdec.DecodeAll(b, nil); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// patience is how long a test waits for what must come.
const patience = time.Minute

// next takes in one message.
func (x *session) next() {
	x.p.t.Helper()
	select {
	case m, ok := <-x.msgs:
		if !ok {
			x.p.t.Fatal("the map stream ended")
		}
		x.apply(m)
	case <-time.After(patience):
		x.p.t.Fatal("nothing came on the map stream")
	}
}

// until takes in messages until ok, and fails the test if that does not come.
func (x *session) until(what string, ok func() bool) {
	x.p.t.Helper()
	timeout := time.After(patience)
	for !ok() {
		select {
		case m, open := <-x.msgs:
			if !open {
				x.p.t.Fatalf("the map stream ended before: %s", what)
			}
			x.apply(m)
		case <-timeout:
			x.p.t.Fatalf("never came: %s", what)
		}
	}
}

// ended takes in messages until the stream ends.
func (x *session) ended() {
	x.p.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case m, open := <-x.msgs:
			if !open {
				return
			}
			x.apply(m)
		case <-timeout:
			x.p.t.Fatal("the map stream did not end")
		}
	}
}

func (x *session) apply(m *tailcfg.MapResponse) {
	x.last = m
	if m.KeepAlive {
		return
	}
	if m.Node != nil {
		x.self = m.Node
	}
	if m.Peers != nil || x.peers == nil {
		x.peers = map[tailcfg.NodeID]*tailcfg.Node{}
	}
	for _, list := range [][]*tailcfg.Node{m.Peers, m.PeersChanged} {
		if !slices.IsSortedFunc(list, func(a, b *tailcfg.Node) int { return int(a.ID - b.ID) }) {
			x.p.t.Errorf("peers are not sorted by ID")
		}
		for _, n := range list {
			if x.self != nil && n.ID == x.self.ID {
				x.p.t.Errorf("a node is among its own peers")
			}
			x.peers[n.ID] = n
		}
	}
	for _, id := range m.PeersRemoved {
		delete(x.peers, id)
	}
	for id, on := range m.OnlineChange {
		x.patch(&tailcfg.PeerChange{NodeID: id, Online: &on})
	}
	for _, c := range m.PeersChangedPatch {
		x.patch(c)
	}
	if m.PacketFilter != nil {
		x.plain = *m.PacketFilter
	}
	for k, v := range m.PacketFilters {
		if x.filter == nil {
			x.filter = map[string][]tailcfg.FilterRule{}
		}
		x.filter[k] = v
	}
	if m.DERPMap != nil {
		if x.derp == nil {
			x.derp = map[int]*tailcfg.DERPRegion{}
		}
		for id, r := range m.DERPMap.Regions {
			if x.derp[id] = r; r == nil {
				delete(x.derp, id)
			}
		}
	}
	for _, u := range m.UserProfiles {
		if x.users == nil {
			x.users = map[tailcfg.UserID]tailcfg.UserProfile{}
		}
		x.users[u.ID] = u
	}
}

func (x *session) patch(c *tailcfg.PeerChange) {
	n := x.peers[c.NodeID]
	if n == nil {
		x.p.t.Errorf("patch of a peer that is not known: %+v", c)
		return
	}
	if c.Endpoints != nil {
		n.Endpoints = c.Endpoints
	}
	if c.DERPRegion != 0 {
		n.HomeDERP = c.DERPRegion
	}
	if c.Key != nil {
		n.Key = *c.Key
	}
	if c.DiscoKey != nil {
		n.DiscoKey = *c.DiscoKey
	}
	if c.KeyExpiry != nil {
		n.KeyExpiry = *c.KeyExpiry
	}
	if c.Cap != 0 {
		n.Cap = c.Cap
	}
	if c.Online != nil {
		if n.Online = c.Online; *c.Online {
			n.LastSeen = nil
		}
	}
	if c.LastSeen != nil {
		n.LastSeen = c.LastSeen
	}
}

// peer returns the peer with this label, or nil.
func (x *session) peer(name string) *tailcfg.Node {
	for _, n := range x.peers {
		if l, _, _ := strings.Cut(n.Name, "."); l == name {
			return n
		}
	}
	return nil
}

// sees waits until the peer is there and ok.
func (x *session) sees(name, what string, ok func(*tailcfg.Node) bool) *tailcfg.Node {
	x.p.t.Helper()
	x.until(name+" "+what, func() bool { n := x.peer(name); return n != nil && (ok == nil || ok(n)) })
	return x.peer(name)
}

// startServer starts s on loopback and closes it with the test.
func startServer(t testing.TB, s *Server) *Server {
	t.Helper()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newKey(t testing.TB, s *Server, o AuthKeyOptions) string {
	t.Helper()
	k, err := s.CreateAuthKey(o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func isOnline(n *tailcfg.Node) bool  { return n.Online != nil && *n.Online }
func isOffline(n *tailcfg.Node) bool { return n.Online != nil && !*n.Online }

func listen() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }

// getAny fetches url and returns the body, whatever the status.
func getAny(t *testing.T, url string) string {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// bufferedConn reads first what the HTTP client had read ahead.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(b []byte) (int, error) {
	if c.r.Buffered() == 0 {
		return c.Conn.Read(b)
	}
	return c.r.Read(b[:min(len(b), c.r.Buffered())])
}
