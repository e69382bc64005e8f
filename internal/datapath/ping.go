package datapath

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/packet"
	"github.com/tailnode/tailnode/internal/path"
)

// maxWaits bounds the pings and dials that wait for an answer at one time.
const maxWaits = 1024

// waits holds who waits for a TSMP or ICMP answer, and which dials are under way.
type waits struct {
	mu    sync.Mutex
	pings map[pingID]chan<- pong
	dials map[*dialing]struct{}
	done  chan struct{}
}

type pingID struct {
	peer  netip.Addr
	proto packet.Proto
	data  [8]byte
}

type pong struct {
	at      time.Time
	peerAPI uint16
}

func (w *waits) init() {
	w.pings = map[pingID]chan<- pong{}
	w.dials = map[*dialing]struct{}{}
	w.done = make(chan struct{})
}

// intercept deals with the packets that are for the Engine itself and not for the netstack:
// TSMP, and echo replies that a Ping waits for.
func (e *Engine) intercept(p *peer, h *packet.Parsed) bool {
	switch h.Proto {
	case packet.TSMP:
		if data, ok := h.TSMPPing(); ok {
			if b, err := packet.AppendTSMPPong(nil, h.Dst.Addr(), h.Src.Addr(), data, 0); err == nil {
				p.send(b)
			}
		} else if data, port, ok := h.TSMPPong(); ok {
			e.waits.pong(pingID{h.Src.Addr(), packet.TSMP, data}, port)
		} else if k, ok := h.TSMPDisco(); ok {
			p.t.learn(p, k)
		} else if r, ok := h.Reject(); ok && r.Proto == packet.TCP && !r.MaybeBroken {
			e.waits.reject(r)
		}
		return true
	case packet.ICMPv4, packet.ICMPv6:
		if !h.IsEchoReply() {
			return false
		}
		echo, ok := h.Echo()
		return ok && e.waits.pong(pingID{h.Src.Addr(), packet.ICMPv4, echoData(echo)}, 0)
	}
	return false
}

// rejected tells the sender of a connection attempt that the filter refuses it, so that its
// dial fails at once instead of timing out. dst is the destination as the sender knows it.
func (e *Engine) rejected(p *peer, h *packet.Parsed, dst netip.AddrPort) {
	if h.Proto != packet.TCP || !h.IsSYN() {
		return
	}
	b, err := packet.AppendReject(nil, packet.Reject{Proto: packet.TCP, Src: h.Src, Dst: dst, Reason: packet.RejectedByACL})
	if err == nil {
		p.send(b)
	}
}

// echoData folds an echo's identifier and sequence number into the form of a TSMP ping's data.
func echoData(e packet.Echo) (d [8]byte) {
	binary.BigEndian.PutUint16(d[:], e.ID)
	binary.BigEndian.PutUint16(d[2:], e.Seq)
	return d
}

func (w *waits) pong(id pingID, peerAPI uint16) bool {
	w.mu.Lock()
	ch := w.pings[id]
	delete(w.pings, id)
	w.mu.Unlock()
	if ch == nil {
		return false
	}
	ch <- pong{now(), peerAPI} // buffered, and only ever sent to once
	return true
}

// dialing is a TCP dial under way, for which a peer's rejection is of interest.
type dialing struct {
	dst    netip.AddrPort
	cancel context.CancelCauseFunc
}

// Dialing announces a dial to dst. The context it returns ends when the peer rejects the
// connection, with the reason as its cause. The caller calls stop when the dial is over.
func (e *Engine) Dialing(ctx context.Context, dst netip.AddrPort) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	d := &dialing{dst, cancel}
	w := &e.waits
	w.mu.Lock()
	if len(w.dials) < maxWaits {
		w.dials[d] = struct{}{}
	}
	w.mu.Unlock()
	return ctx, func() {
		w.mu.Lock()
		delete(w.dials, d)
		w.mu.Unlock()
		cancel(nil)
	}
}

func (w *waits) reject(r packet.Reject) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for d := range w.dials {
		if d.dst == r.Dst {
			d.cancel(errcode.New(errcode.Refused, "%v refuses connections to port %d: %v", r.Dst.Addr(), r.Dst.Port(), r.Reason))
		}
	}
}

// ErrNoPeer reports an address that belongs to no peer that can be sent to.
var ErrNoPeer = errors.New("no peer of the tailnet has this address")

// ErrPingsFull reports too many pings at once.
var ErrPingsFull = errors.New("too many pings are under way")

// PingTSMP measures the round trip to the WireGuard engine of the peer that has addr. It
// returns the port of the peer's peer API over the address family of addr, 0 without one.
// It blocks until the answer comes, ctx ends or the Engine is closed.
func (e *Engine) PingTSMP(ctx context.Context, addr netip.Addr) (time.Duration, uint16, error) {
	var data [8]byte
	rand.Read(data[:])
	if _, p := e.route(e.netmap.Load(), addr, now()); p != nil {
		e.advertise(p, addr) // as upstream does: what the ping is for may be a peer that does not know this node's key
	}
	return e.ping(ctx, addr, pingID{addr, packet.TSMP, data}, func(self netip.Addr) ([]byte, error) {
		return packet.AppendTSMPPing(nil, self, addr, data)
	})
}

// PingICMP measures the round trip to the IP stack of the peer that has addr. It blocks until
// the answer comes, ctx ends or the Engine is closed.
func (e *Engine) PingICMP(ctx context.Context, addr netip.Addr) (time.Duration, error) {
	var r [4]byte
	rand.Read(r[:])
	echo := packet.Echo{ID: binary.BigEndian.Uint16(r[:]), Seq: binary.BigEndian.Uint16(r[2:]), Data: []byte("tailnode")}
	d, _, err := e.ping(ctx, addr, pingID{addr, packet.ICMPv4, echoData(echo)}, func(self netip.Addr) ([]byte, error) {
		return packet.AppendEcho(nil, self, addr, echo)
	})
	return d, err
}

// pingInterval is how long a ping waits before it is sent again: the first may be lost with
// a path that is not up yet.
const pingInterval = time.Second

// noPathInterval is how long a disco ping to a peer without a path waits to look again.
const noPathInterval = 50 * time.Millisecond

func (e *Engine) ping(ctx context.Context, addr netip.Addr, id pingID, build func(self netip.Addr) ([]byte, error)) (time.Duration, uint16, error) {
	self, ok := e.selfAddr(addr.Is4())
	if !ok {
		return 0, 0, fmt.Errorf("this node has no address of the family of %v", addr)
	}
	pkt, err := build(self)
	if err != nil {
		return 0, 0, err
	}
	ch := make(chan pong, 1)
	w := &e.waits
	w.mu.Lock()
	if len(w.pings) >= maxWaits {
		w.mu.Unlock()
		return 0, 0, ErrPingsFull
	}
	w.pings[id] = ch
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.pings, id)
		w.mu.Unlock()
	}()
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for {
		_, pr := e.route(e.netmap.Load(), addr, now())
		if pr == nil {
			return 0, 0, ErrNoPeer
		}
		sent := now()
		pr.send(pkt)
		select {
		case p := <-ch:
			return p.at.Sub(sent), p.peerAPI, nil
		case <-tick.C:
		case <-ctx.Done():
			return 0, 0, context.Cause(ctx)
		case <-w.done:
			return 0, 0, errClosed
		}
	}
}

// PingDisco measures the round trip to the path manager of the peer that has addr, and tells
// the path that the answer took. It blocks until the answer comes, ctx ends or the Engine is
// closed.
func (e *Engine) PingDisco(ctx context.Context, addr netip.Addr, size int) (path.PingResult, error) {
	n := e.netmap.Load().Route(addr)
	if n == nil {
		return path.PingResult{}, ErrNoPeer
	}
	for {
		r, err := e.trans.Load().paths.Ping(ctx, n.Key, size)
		if !errors.Is(err, path.ErrNoPath) {
			return r, err
		}
		// Its home relay is not known yet: it may have joined this very moment.
		select {
		case <-time.After(noPathInterval):
		case <-ctx.Done():
			return r, context.Cause(ctx)
		case <-e.waits.done:
			return r, errClosed
		}
	}
}

func (e *Engine) selfAddr(is4 bool) (netip.Addr, bool) {
	m := e.netmap.Load()
	if m == nil {
		return netip.Addr{}, false
	}
	for _, p := range m.Self.Addresses {
		if p.Addr().Is4() == is4 {
			return p.Addr(), true
		}
	}
	return netip.Addr{}, false
}
