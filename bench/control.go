package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"tailscale.com/control/controlhttp/controlhttpserver"
	"tailscale.com/net/tsaddr"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/zstdframe"

	"github.com/tailnode/tailnode/interop/harness"
)

// bigControl is a coordination server for nodes of either side that tells each of them of many peers besides each other. The many are
// encoded once, at its start: upstream's test server would encode them anew for each node, and that would be most of what is measured.
// It is upstream's types, Noise acceptor and compression, with the least of a server around them.
type bigControl struct {
	url   string
	noise key.MachinePrivate
	derp  *tailcfg.DERPMap
	many  []byte // JSON of the peers that are not there, each after a comma
	fake  int    // how many they are
	http  *http.Server
	ctx   context.Context
	stop  context.CancelFunc

	mu      sync.Mutex
	nodes   []*tailcfg.Node
	streams map[*mapStream]struct{}
	added   int
}

// mapStream is what one node's map stream is still to send.
type mapStream struct {
	node  tailcfg.NodeID
	queue []*tailcfg.MapResponse
	kick  chan struct{}
}

const (
	firstFake  = 1000   // ID of the first of the many
	firstAdded = 20_000 // of those of addPeer
	domain     = "bench.test"
	theUser    = tailcfg.UserID(1)
)

func newBigControl(relay harness.RelayInfo, peers int) (*bigControl, error) {
	c := &bigControl{noise: key.NewMachine(), derp: harness.UpstreamDERPMap(relay), fake: peers, streams: map[*mapStream]struct{}{}}
	for i := range peers {
		b, err := json.Marshal(fakePeer(firstFake + i))
		if err != nil {
			return nil, err
		}
		c.many = append(append(c.many, ','), b...)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c.url = "http://" + ln.Addr().String()
	c.ctx, c.stop = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("/key", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(tailcfg.OverTLSPublicKeyResponse{PublicKey: c.noise.Public(), LegacyPublicKey: c.noise.Public()})
	})
	mux.HandleFunc("/ts2021", c.upgrade)
	c.http = &http.Server{Handler: mux}
	go c.http.Serve(ln)
	return c, nil
}

func (c *bigControl) close() {
	c.stop()
	c.http.Close()
}

// address is the IPv4 address of a node.
func address(id int) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 64 + byte(id>>16), byte(id >> 8), byte(id)})
}

func newNode(id int, name string) *tailcfg.Node {
	v4 := address(id)
	addrs := []netip.Prefix{netip.PrefixFrom(v4, 32), netip.PrefixFrom(tsaddr.Tailscale4To6(v4), 128)}
	return &tailcfg.Node{
		ID: tailcfg.NodeID(id), StableID: tailcfg.StableNodeID(fmt.Sprintf("nBench%dCNTRL", id)), Name: name + "." + domain + ".",
		User: theUser, Addresses: addrs, AllowedIPs: addrs, MachineAuthorized: true, Online: new(true), Cap: tailcfg.CurrentCapabilityVersion,
		Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), HomeDERP: 1,
		CapMap: tailcfg.NodeCapMap{tailcfg.CapabilityFileSharing: nil, tailcfg.NodeAttrFunnel: nil},
	}
}

// fakePeer is a peer as large as those of a real tailnet.
func fakePeer(id int) *tailcfg.Node {
	name := fmt.Sprintf("machine-%d", id)
	n := newNode(id, name)
	n.Key, n.Machine, n.DiscoKey = key.NewNode().Public(), key.NewMachine().Public(), key.NewDisco().Public()
	n.Endpoints = []netip.AddrPort{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(id)}), 41641),
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, byte(id >> 8), byte(id)}), 41641),
	}
	n.Hostinfo = (&tailcfg.Hostinfo{
		OS: "linux", Hostname: name, Services: []tailcfg.Service{{Proto: tailcfg.PeerAPI4, Port: 40000}, {Proto: tailcfg.PeerAPI6, Port: 40000}},
	}).View()
	return n
}

func (c *bigControl) upgrade(w http.ResponseWriter, r *http.Request) {
	nc, err := controlhttpserver.AcceptHTTP(r.Context(), w, r, c.noise, nil)
	if err != nil {
		return
	}
	defer nc.Close()
	machine := nc.Peer()
	mux := http.NewServeMux()
	mux.HandleFunc("/machine/register", func(w http.ResponseWriter, r *http.Request) { c.register(w, r, machine) })
	mux.HandleFunc("/machine/map", c.serveMap)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }) // health reports and the like
	one := &oneConn{Conn: nc, done: make(chan struct{})}
	unhook := context.AfterFunc(c.ctx, func() { nc.Close(); one.end() })
	defer unhook()
	srv := &http.Server{Handler: mux, Protocols: new(http.Protocols), ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			one.end()
		}
	}}
	srv.Protocols.SetUnencryptedHTTP2(true)
	srv.Serve(one)
}

// oneConn is a listener that accepts the connection in it, and is closed when that is.
type oneConn struct {
	net.Conn
	taken bool
	once  sync.Once
	done  chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.taken {
		l.taken = true
		return l.Conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneConn) end()           { l.once.Do(func() { close(l.done) }) }
func (l *oneConn) Close() error   { l.end(); return nil }
func (l *oneConn) Addr() net.Addr { return l.LocalAddr() }

func (c *bigControl) register(w http.ResponseWriter, r *http.Request, machine key.MachinePublic) {
	var req tailcfg.RegisterRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.NodeKey.IsZero() || req.Hostinfo == nil {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	if !slices.ContainsFunc(c.nodes, func(n *tailcfg.Node) bool { return n.Key == req.NodeKey }) {
		n := newNode(len(c.nodes)+1, req.Hostinfo.Hostname)
		n.Key, n.Machine, n.Hostinfo = req.NodeKey, machine, req.Hostinfo.View()
		c.nodes = append(c.nodes, n)
		c.tellOthers(n)
	}
	c.mu.Unlock()
	json.NewEncoder(w).Encode(tailcfg.RegisterResponse{
		MachineAuthorized: true, User: tailcfg.User{ID: theUser, DisplayName: "bench"},
		Login: tailcfg.Login{ID: 1, Provider: "bench", LoginName: "bench@" + domain},
	})
}

// tellOthers sends a node as it is now to all streams but its own. c.mu is held; what is in a queue is not changed any more.
func (c *bigControl) tellOthers(n *tailcfg.Node) {
	c.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n.Clone()}}, n.ID)
}

// send queues a response to all streams but that of one node. c.mu is held.
func (c *bigControl) send(m *tailcfg.MapResponse, but tailcfg.NodeID) {
	for st := range c.streams {
		if st.node == but {
			continue
		}
		st.queue = append(st.queue, m)
		select {
		case st.kick <- struct{}{}:
		default:
		}
	}
}

// addPeer tells all nodes of one peer more, and returns its address.
func (c *bigControl) addPeer() netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := firstAdded + c.added
	c.added++
	c.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{fakePeer(id)}}, 0)
	return address(id)
}

// patch sends n responses, each with another endpoint of one of the many.
func (c *bigControl) patch(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range n {
		ep := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), uint16(1024+i))
		c.send(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{
			NodeID: tailcfg.NodeID(firstFake + i*7919%c.fake), Endpoints: []netip.AddrPort{ep},
		}}}, 0)
	}
}

func (c *bigControl) serveMap(w http.ResponseWriter, r *http.Request) {
	var req tailcfg.MapRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	i := slices.IndexFunc(c.nodes, func(n *tailcfg.Node) bool { return n.Key == req.NodeKey })
	if i < 0 {
		c.mu.Unlock()
		http.Error(w, "no such node", http.StatusNotFound)
		return
	}
	n := c.nodes[i]
	if !req.Stream { // an update; the answer is not read
		n.Endpoints, n.DiscoKey = req.Endpoints, req.DiscoKey
		if req.Hostinfo != nil {
			n.Hostinfo = req.Hostinfo.View()
		}
		c.tellOthers(n)
		c.mu.Unlock()
		w.WriteHeader(http.StatusOK)
		return
	}
	first, err := c.firstResponse(n)
	st := &mapStream{node: n.ID, kick: make(chan struct{}, 1)}
	c.streams[st] = struct{}{}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.streams, st)
		c.mu.Unlock()
	}()
	for b := first; ; {
		if err != nil || write(w, b, req.Compress == "zstd") != nil {
			return
		}
		b = nil
		for b == nil {
			c.mu.Lock()
			if len(st.queue) > 0 {
				b, err = json.Marshal(st.queue[0])
				st.queue = st.queue[1:]
			}
			c.mu.Unlock()
			if b != nil {
				break
			}
			select {
			case <-st.kick:
			case <-r.Context().Done():
				return
			case <-time.After(time.Minute):
				b = []byte(`{"KeepAlive":true}`)
			}
		}
	}
}

// firstResponse is the whole map for a node: the nodes that are there, and behind them the many.
func (c *bigControl) firstResponse(self *tailcfg.Node) ([]byte, error) {
	now := time.Now().UTC()
	m := &tailcfg.MapResponse{
		Node: self.Clone(), DERPMap: c.derp, Domain: domain, PacketFilter: tailcfg.FilterAllowAll, ControlTime: &now,
		DNSConfig:    &tailcfg.DNSConfig{Proxied: true, Domains: []string{domain}},
		UserProfiles: []tailcfg.UserProfile{{ID: theUser, LoginName: "bench@" + domain, DisplayName: "bench"}},
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	peers := make([]byte, 0, len(c.many)+4096)
	for _, n := range c.nodes {
		if n.ID == self.ID {
			continue
		}
		p, err := json.Marshal(n)
		if err != nil {
			return nil, err
		}
		peers = append(append(peers, ','), p...)
	}
	peers = append(peers, c.many...)
	b = append(b[:len(b)-1], `,"Peers":[`...)
	return append(append(b, bytes.TrimPrefix(peers, []byte{44})...), "]}"...), nil
}

// write sends a message of a map stream: its length, four bytes with the least first, and itself.
func write(w io.Writer, b []byte, compress bool) error {
	if compress {
		b = zstdframe.AppendEncode(nil, b, zstdframe.FastestCompression)
	}
	if _, err := w.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return err
	}
	w.(http.Flusher).Flush()
	return nil
}
