package path

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/memnet"
	"github.com/tailnode/tailnode/internal/natlab"
	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/udp"
)

// internet is a network with NATs, a STUN server and one relay, for whole Managers in virtual time.
type internet struct {
	t     *testing.T
	net   *memnet.Network
	lab   *natlab.Lab
	stuns []netip.AddrPort
	wg    sync.WaitGroup
	relay time.Duration // one way
	down  func() bool   // the relay does not deliver; nil: never

	mu       sync.Mutex
	nodes    map[key.NodePublic]*inode
	datagram int // that the nodes have sent by any way
}

const stunAddr = "9.9.9.9:3478"

func newInternet(t *testing.T) *internet {
	w := &internet{t: t, relay: 20 * time.Millisecond, nodes: make(map[key.NodePublic]*inode)}
	w.net = memnet.New(1, memnet.Link{Latency: 5 * time.Millisecond})
	w.lab = natlab.New(nil)
	w.net.SetRouter(w.lab)
	t.Cleanup(w.wg.Wait)
	w.server(netip.MustParseAddrPort(stunAddr))
	return w
}

// server starts a STUN server, which nodes made from now on ask.
func (w *internet) server(at netip.AddrPort) {
	w.t.Helper()
	pc, err := w.net.Host(at.Addr().String()).ListenPacket("udp4", fmt.Sprintf(":%d", at.Port()))
	if err != nil {
		w.t.Fatal(err)
	}
	w.stuns = append(w.stuns, at)
	w.t.Cleanup(func() { pc.Close() })
	w.wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, src, err := pc.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if tx, err := stun.ParseRequest(b[:n]); err == nil {
				pc.WriteToUDPAddrPort(stun.AppendResponse(nil, tx, src), src)
			}
		}
	})
}

// inode is a node on the internet: a Manager, its sockets, and what WireGuard would be.
type inode struct {
	w     *internet
	key   key.NodePublic
	disco key.DiscoPrivate
	host  *memnet.Host
	socks *udp.Sockets
	m     *Manager
	peer  *inode

	mu       sync.Mutex
	eps      []Endpoint
	reports  int
	arrived  time.Time
	maxGap   time.Duration
	received map[uint32]bool
	byRelay  int
	byUDP    int
	sent     uint32
	directAt time.Time
}

type nodeOpts struct {
	noSTUN bool
	noUDP  bool
	relay  PeerRelay
	port   uint16 // fixed
}

func (w *internet) node(o nodeOpts, addrs ...string) *inode {
	w.t.Helper()
	n := &inode{w: w, key: key.NewNode().Public(), disco: key.NewDisco(), received: make(map[uint32]bool)}
	n.host = w.net.Host(addrs...)
	cfg := Config{FixedPort: o.port, NodeKey: n.key, DiscoKey: n.disco, Relay: n, NewSink: func() Sink { return &isink{n} }, PeerRelay: o.relay,
		Endpoints: func(eps []Endpoint) {
			n.mu.Lock()
			n.eps = eps
			n.reports++
			n.mu.Unlock()
		},
		DirectUp: func(*Peer, bool) {
			n.mu.Lock()
			if n.directAt.IsZero() {
				n.directAt = time.Now()
			}
			n.mu.Unlock()
		}}
	if !o.noUDP {
		var err error
		n.socks, err = udp.Open(udp.Config{Port: o.port, Listen: func(network, address string) (udp.PacketConn, error) {
			c, err := n.host.ListenPacket(network, address)
			if err != nil {
				return nil, err
			}
			return &counted{c, w}, nil
		}})
		if err != nil {
			w.t.Fatal(err)
		}
		cfg.UDP = n.socks
	}
	m, err := New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	n.m = m
	m.RelayState(1, true, nil)
	if n.socks != nil {
		n.socks.Start(m.FromUDP)
	}
	w.t.Cleanup(n.close)
	var local []netip.Addr
	for _, a := range addrs {
		local = append(local, netip.MustParseAddr(a))
	}
	m.SetLocal(local)
	if !o.noSTUN {
		m.SetSTUN(w.stuns)
	}
	w.mu.Lock()
	w.nodes[n.key] = n
	w.mu.Unlock()
	return n
}

func (n *inode) close() {
	if n.socks != nil {
		n.socks.Close()
	}
	n.m.Close()
}

// counted counts what is sent.
type counted struct {
	*memnet.PacketConn
	w *internet
}

func (c *counted) WriteToUDPAddrPort(b []byte, dst netip.AddrPort) (int, error) {
	c.w.mu.Lock()
	c.w.datagram++
	c.w.mu.Unlock()
	return c.PacketConn.WriteToUDPAddrPort(b, dst)
}

// Send implements Relay.
func (n *inode) Send(region int, dst key.NodePublic, b []byte, seg int) error {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.datagram++
	if w.down != nil && w.down() {
		return nil
	}
	p := w.nodes[dst]
	for len(b) > 0 {
		pkt := slices.Clone(b[:min(seg, len(b))])
		b = b[len(pkt):]
		if p != nil {
			time.AfterFunc(w.relay, func() {
				p.m.FromRelay(region, n.key, pkt)
				p.m.FlushRelay(region)
			})
		}
	}
	return nil
}

// isink is what WireGuard and the stack would be: it takes each packet for authentic.
type isink struct{ n *inode }

func (s *isink) WireGuard(src Source, _ *Peer, b []byte) {
	n := s.n
	if src.Region == 0 {
		n.m.Peer(n.peer.key).Heard(src)
	}
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.arrived.IsZero() {
		n.maxGap = max(n.maxGap, now.Sub(n.arrived))
	}
	n.arrived = now
	n.received[binary.BigEndian.Uint32(b[4:])] = true
	if src.Region == 0 {
		n.byUDP++
	} else {
		n.byRelay++
	}
}

func (s *isink) Flush() {}

// pair has the nodes know each other as control would tell them, endpoints and all.
func (w *internet) pair(a, b *inode) {
	a.peer, b.peer = b, a
	synctest.Wait()
	time.Sleep(probesEnd) // both have asked STUN and told control
	w.meet(a, b)
}

// meet has control tell each of what the other has reported.
func (w *internet) meet(a, b *inode) {
	synctest.Wait()
	a.m.UpsertPeer(b.info())
	b.m.UpsertPeer(a.info())
}

func (n *inode) info() PeerInfo {
	n.mu.Lock()
	defer n.mu.Unlock()
	pi := PeerInfo{Key: n.key, Disco: n.disco.Public(), HomeRegion: 1}
	for _, e := range n.eps {
		pi.Endpoints = append(pi.Endpoints, e.Addr)
	}
	return pi
}

func (n *inode) send() {
	b := wgPacket(100)
	n.sent++
	binary.BigEndian.PutUint32(b[4:], n.sent)
	n.m.Peer(n.peer.key).Send(b, len(b))
}

func (n *inode) direct() bool { return n.m.Path(n.peer.key).Addr.IsValid() }

// talk has both send each so often for d.
func (w *internet) talk(d, every time.Duration, nodes ...*inode) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(every) {
		for _, n := range nodes {
			n.send()
		}
	}
	synctest.Wait()
}

func (n *inode) resetGap() {
	n.mu.Lock()
	n.arrived, n.maxGap = time.Now(), 0
	n.mu.Unlock()
}

func (w *internet) nat(inside, outside string, mapping, filtering natlab.Behaviour) *natlab.NAT {
	return w.lab.Add(natlab.Config{Inside: netip.MustParsePrefix(inside), Outside: netip.MustParseAddr(outside), Mapping: mapping, Filtering: filtering})
}
