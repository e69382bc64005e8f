package server

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
)

const (
	maxPeers   = 4096      // conversations remembered per client, for PeerGone
	maxControl = 256 << 10 // control frames that wait for one client: PeerGone for maxPeers fits
	discoBytes = 32 << 10
	discoCount = 64
	maxPing    = 1000 // of the payload

	notHereBurst = 3 // and one a second
)

// client is one connection after its handshake. Two goroutines belong to it: run's own, which
// reads, and the writer.
type client struct {
	s    *Server
	nc   net.Conn
	rd   *derp.Reader
	key  key.NodePublic
	addr netip.AddrPort
	info derp.ClientInfo

	set       *clientSet
	dup       atomic.Bool // its key has other connections
	unhealthy bool        // a Health problem is out; Server.mu

	wake chan struct{} // one token: there may be something to write
	stop chan struct{} // closed when reading ended
	dead chan struct{} // closed when writing ended

	mu       sync.Mutex // guards the rest
	closed   bool
	finished bool   // what is queued goes out, then the connection ends
	ctl      []byte // control frames; they go first
	disco    derp.Queue
	data     derp.Queue
	asleep   bool
	// peers are those this connection exchanged packets with. Each is told when it leaves.
	peers map[*client]*flows

	// Owned by the reader:
	lastDst key.NodePublic
	lastSet *clientSet
	tokens  float64 // of notHere
	tokenAt time.Time
}

// flows is a sender's share of a client's queues.
type flows struct{ disco, data derp.Flow }

func newClient(s *Server, nc net.Conn, rd *derp.Reader, k key.NodePublic, addr netip.AddrPort, info derp.ClientInfo) *client {
	return &client{
		s: s, nc: nc, rd: rd, key: k, addr: addr, info: info,
		wake:   make(chan struct{}, 1),
		stop:   make(chan struct{}),
		dead:   make(chan struct{}),
		disco:  derp.Queue{MaxBytes: discoBytes, MaxFrames: discoCount},
		data:   derp.Queue{MaxBytes: s.cfg.QueueBytes, MaxFrames: s.cfg.QueuePackets},
		peers:  make(map[*client]*flows),
		tokens: notHereBurst, tokenAt: time.Now(),
	}
}

// run carries the connection until it ends.
func (c *client) run() error {
	if err := c.s.register(c); err != nil {
		return err
	}
	var writer sync.WaitGroup
	var writeErr error
	writer.Go(func() {
		writeErr = c.write()
		close(c.dead)
		c.nc.Close() // ends the reader too
	})
	err := c.read()
	close(c.stop)
	c.nc.Close()
	writer.Wait()
	c.leave(c.s.unregister(c))
	c.rd.Release()
	if writeErr != nil {
		if errors.Is(writeErr, os.ErrDeadlineExceeded) {
			c.s.stats.slow.Add(1)
		}
		return fmt.Errorf("derp/server: write: %w", writeErr)
	}
	return err
}

// leave empties the connection's queues. Those it spoke with are told that its key is gone, or
// if another connection of the key is left they are told when that one leaves.
func (c *client) leave(next *client) {
	c.mu.Lock()
	c.closed = true
	c.s.stats.droppedGone.Add(uint64(c.disco.Clear() + c.data.Clear()))
	peers := c.peers
	c.peers, c.ctl = nil, nil
	c.mu.Unlock()
	delete(peers, c) // it may have spoken with itself, and next must not remember what has ended
	for p := range peers {
		p.forget(c)
		if next != nil {
			acquaint(next, p)
			continue
		}
		c.s.stats.gone.Add(1)
		p.control(derp.AppendPeerGone(nil, c.key, derp.GoneDisconnected))
	}
}

// acquaint has two connections remember each other, unless one has left.
func acquaint(a, b *client) {
	a.meet(b)
	b.meet(a)
	if a.left() || b.left() { // in between, and its leave may have missed the other
		a.forget(b)
		b.forget(a)
	}
}

// meet notes that c and p exchange packets.
func (c *client) meet(p *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed && c.peers[p] == nil {
		c.meetLocked(p)
	}
}

// forget is the reverse of meet.
func (c *client) forget(p *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.peers, p)
}

// left reports whether leave has begun.
func (c *client) left() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *client) signalLocked() {
	if c.asleep {
		c.asleep = false
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
}

// control queues a control frame.
func (c *client) control(frame []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed && len(c.ctl)+len(frame) <= maxControl {
		c.ctl = append(c.ctl, frame...)
		c.signalLocked()
	}
}

// finish queues a last control frame; what is queued goes out, then the connection ends.
func (c *client) finish(frame []byte) {
	c.control(frame)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finished = true
	c.signalLocked()
}

// deliver queues a packet from src. It reports false if c is gone.
func (c *client) deliver(src *client, packet []byte) bool {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return false
	}
	f := c.peers[src]
	met := f == nil
	if met {
		f = c.meetLocked(src)
	}
	var dropped int
	if derp.LooksLikeDisco(packet) {
		dropped = c.disco.Push(derp.RecvPacket, src.key, packet, &f.disco)
	} else {
		dropped = c.data.Push(derp.RecvPacket, src.key, packet, &f.data)
	}
	c.signalLocked()
	c.mu.Unlock()
	if dropped > 0 {
		c.s.stats.droppedFull.Add(uint64(dropped))
	}
	if met && src != c {
		acquaint(src, c)
	}
	return true
}

// meetLocked notes that c and p exchange packets; of too many it forgets one.
func (c *client) meetLocked(p *client) *flows {
	if len(c.peers) >= maxPeers {
		for q := range c.peers {
			delete(c.peers, q) // queued frames keep their flow until they are sent
			break
		}
	}
	f := new(flows)
	c.peers[p] = f
	return f
}

// read handles what the client sends.
func (c *client) read() error {
	lim := newPacer(c.s.cfg.RateBytes, c.s.cfg.RateBurst)
	for {
		t, p, err := c.rd.Next()
		if err != nil {
			return err
		}
		if lim != nil && !lim.wait(derp.HeaderLen+len(p), c.dead, c.s.ctx.Done()) {
			return nil
		}
		if c.dup.Load() {
			c.s.spoke(c)
		}
		switch t {
		case derp.SendPacket:
			dst, packet, err := derp.CutKey(p)
			if err == nil && len(packet) > derp.MaxPacket {
				err = derp.ErrTooLarge
			}
			if err != nil {
				return fmt.Errorf("%w: %v: %w", ErrProtocol, t, err)
			}
			c.forward(dst, packet)
		case derp.NotePreferred:
			if len(p) != 1 {
				return fmt.Errorf("%w: %v of %d bytes", ErrProtocol, t, len(p))
			}
		case derp.Ping:
			data, err := derp.ParsePing(p)
			if err != nil || len(p) > maxPing {
				return fmt.Errorf("%w: %v of %d bytes", ErrProtocol, t, len(p))
			}
			c.control(derp.AppendPing(nil, derp.Pong, data))
		case derp.WatchConns, derp.ClosePeer, derp.ForwardPacket:
			return fmt.Errorf("%w: %v needs a mesh key", ErrProtocol, t)
		}
	}
}

// forward hands a packet to whoever holds dst.
func (c *client) forward(dst key.NodePublic, packet []byte) {
	c.s.stats.packetsIn.Add(1)
	c.s.stats.bytesIn.Add(uint64(len(packet)))
	set := c.lastSet
	if set == nil || c.lastDst != dst || set.active.Load() == nil {
		set = c.s.lookup(dst)
		c.lastDst, c.lastSet = dst, set
	}
	if set != nil {
		if to := set.active.Load(); to != nil && to.deliver(c, packet) {
			return
		}
		c.lastSet = nil
	}
	c.s.stats.droppedUnknown.Add(1)
	// One a second suffices: the answer to a flood must not be another.
	now := time.Now()
	c.tokens = min(notHereBurst, c.tokens+now.Sub(c.tokenAt).Seconds())
	if c.tokenAt = now; c.tokens >= 1 {
		c.tokens--
		c.s.stats.notHere.Add(1)
		c.control(derp.AppendPeerGone(nil, dst, derp.GoneNotHere))
	}
}

// next takes what is to be written now: control frames, then disco, then one chunk of data.
func (c *client) next() (ctl []byte, disco, data *derp.Chunk, finished bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctl, c.ctl = c.ctl, nil
	disco, data = c.disco.Pop(), c.data.Pop()
	if ctl == nil && disco == nil && data == nil {
		c.asleep = true
	}
	return ctl, disco, data, c.finished
}

// write drains the queues, and keeps an idle connection alive.
func (c *client) write() error {
	bc, _ := netConn(c.nc).(*derp.BufConn)
	tick := func() time.Duration { return c.s.cfg.KeepAlive + rand.N(derp.KeepAliveJitter) }
	alive := time.NewTimer(tick())
	defer alive.Stop()
	for {
		ctl, disco, data, finished := c.next()
		if ctl == nil && disco == nil && data == nil {
			if finished {
				return nil
			}
			select {
			case <-c.wake:
			case <-c.stop:
				return nil
			case <-alive.C:
				alive.Reset(tick())
				c.control(derp.AppendHeader(nil, derp.KeepAliveT, 0))
			}
			continue
		}
		c.nc.SetWriteDeadline(time.Now().Add(c.s.cfg.WriteTimeout))
		if bc != nil {
			bc.Cork()
		}
		var err error
		if ctl != nil {
			_, err = c.nc.Write(ctl)
		}
		for _, chunk := range [...]*derp.Chunk{disco, data} {
			if chunk == nil {
				continue
			}
			if err == nil {
				if _, err = c.nc.Write(chunk.Bytes()); err == nil {
					c.s.stats.packetsOut.Add(uint64(chunk.Frames()))
					c.s.stats.bytesOut.Add(uint64(len(chunk.Bytes()) - chunk.Frames()*(derp.HeaderLen+key.Size)))
				}
			}
			chunk.Release()
		}
		if bc != nil {
			if ferr := bc.Flush(); err == nil {
				err = ferr
			}
		}
		if err != nil {
			select {
			case <-c.stop: // reading ended first, and says why
				return nil
			default:
				return err
			}
		}
	}
}

// netConn returns what TLS runs on, or nc itself.
func netConn(nc net.Conn) net.Conn {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return nc
}

// pacer is a token bucket that makes its caller wait.
type pacer struct {
	rate, burst, tokens float64
	last                time.Time
}

func newPacer(rate, burst int) *pacer {
	if rate <= 0 {
		return nil
	}
	return &pacer{rate: float64(rate), burst: float64(burst), tokens: float64(burst), last: time.Now()}
}

// wait takes n tokens, waiting for them; it reports false when stop or halt was closed first.
func (p *pacer) wait(n int, stop, halt <-chan struct{}) bool {
	now := time.Now()
	p.tokens = min(p.burst, p.tokens+now.Sub(p.last).Seconds()*p.rate) - float64(n)
	p.last = now
	if p.tokens >= 0 {
		return true
	}
	t := time.NewTimer(time.Duration(-p.tokens / p.rate * float64(time.Second)))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
	case <-halt:
	}
	return false
}
