package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Handler receives what comes from relays. Its methods run on the region's own goroutine,
// one at a time per region: while one runs, nothing more is read from that relay. They must
// not call Close, Serve or Ping.
type Handler interface {
	// Packet is one packet from src. b is lent for the call and may be modified in place.
	Packet(region int, src key.NodePublic, b []byte)
	// Flush follows Packet calls once no further packet is at hand.
	Flush(region int)
	// PeerGone says that the region does not reach peer; reason is one of derp.Gone….
	PeerGone(region int, peer key.NodePublic, reason byte)
	// State says that the region's connection came up (connected), went down or could not be
	// made (err says why; nil: it was no longer wanted).
	State(region int, connected bool, err error)
}

const (
	restingBuffer = 4 << 10
	silence       = derp.KeepAlive + derp.KeepAliveJitter + 10*time.Second // then we ask
	answerTime    = 10 * time.Second                                       // and wait this long
	writeTimeout  = 15 * time.Second
)

// Conn is one live connection to a relay. All methods are safe for concurrent use.
type Conn struct {
	o      *Options
	region int
	node   *tailcfg.DERPNode
	server key.NodePublic
	nc     net.Conn // what frames are spoken on
	bc     *derp.BufConn
	rd     *derp.Reader
	out    *outbox

	admitted func() // called by Serve once the relay's info is there; may be nil
	ready    atomic.Bool
	serving  atomic.Bool
	done     chan struct{} // closed when Serve has returned or Close came before it

	mu       sync.Mutex
	closed   bool
	cause    error // of closing
	watchdog *time.Timer
	asked    bool // the watchdog's ping is out
	pings    map[[8]byte]chan<- time.Time
	health   string
	restart  *restart

	probeData [8]byte // of the ping that measures rtt
	probeSent time.Time

	rtt      atomic.Int64  // nanoseconds; 0: not measured
	received atomic.Uint64 // packets
	recvByte atomic.Uint64
}

type restart struct{ in, tryFor time.Duration }

func newConn(o *Options, n *tailcfg.DERPNode, nc net.Conn, bc *derp.BufConn, rd *derp.Reader, server key.NodePublic, out *outbox) *Conn {
	return &Conn{o: o, node: n, server: server, nc: nc, bc: bc, rd: rd, out: out, done: make(chan struct{})}
}

// Node returns the relay's entry in the DERP map.
func (c *Conn) Node() *tailcfg.DERPNode { return c.node }

// ServerKey returns the relay's public key.
func (c *Conn) ServerKey() key.NodePublic { return c.server }

// Send queues for dst the packets in b, each seg bytes but for the last, which may be shorter;
// seg <= 0 says that b is one packet. It copies b and never blocks. When the relay takes
// packets too slowly the oldest queued ones are dropped, which is no error.
func (c *Conn) Send(dst key.NodePublic, b []byte, seg int) error {
	_, err := c.out.send(dst, b, seg)
	return err
}

// NotePreferred tells the relay whether it is the node's home. It does not block.
func (c *Conn) NotePreferred(home bool) { c.out.control(derp.AppendNotePreferred(nil, home)) }

// Ping measures a round trip to the relay. It blocks until the answer, ctx or Close. Serve must be running.
func (c *Conn) Ping(ctx context.Context) (time.Duration, error) {
	var data [8]byte
	rand.Read(data[:])
	got := make(chan time.Time, 1)
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return 0, ErrClosed
	}
	if c.pings == nil {
		c.pings = make(map[[8]byte]chan<- time.Time)
	}
	c.pings[data] = got
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pings, data)
		c.mu.Unlock()
	}()
	sent := time.Now()
	c.out.control(derp.AppendPing(nil, derp.Ping, data))
	select {
	case at := <-got:
		return at.Sub(sent), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("derp/client: ping: %w", context.Cause(ctx))
	case <-c.done:
		return 0, ErrClosed
	}
}

// probe sends a ping whose answer sets rtt. It does not wait for it.
func (c *Conn) probe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.probeLocked()
}

func (c *Conn) probeLocked() {
	rand.Read(c.probeData[:])
	c.probeSent = time.Now()
	c.out.control(derp.AppendPing(nil, derp.Ping, c.probeData))
}

// restarting returns what the relay said about its restart, if it did.
func (c *Conn) restarting() (restart, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.restart == nil {
		return restart{}, false
	}
	return *c.restart, true
}

// Health returns the problem that the relay reported with this connection, or "".
func (c *Conn) Health() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.health
}

// Close ends the connection and waits until Serve has returned. It may be called any number
// of times, from anywhere but a Handler.
func (c *Conn) Close() error {
	c.shut(ErrClosed)
	if c.serving.CompareAndSwap(false, true) {
		c.rd.Release()
		close(c.done)
	}
	<-c.done
	return nil
}

// shut ends the connection for the given reason; the first reason stays.
func (c *Conn) shut(cause error) {
	c.mu.Lock()
	if !c.closed {
		c.closed, c.cause = true, cause
		if c.watchdog != nil {
			c.watchdog.Stop()
		}
	}
	c.mu.Unlock()
	c.bc.Conn.Close() // the socket: TLS's own Close would wait for a writer
}

// Serve carries packets both ways until the connection ends, and returns why. It must be
// called at most once. [Handler.State] is not called.
func (c *Conn) Serve(h Handler) error {
	if !c.serving.CompareAndSwap(false, true) {
		return ErrClosed
	}
	defer close(c.done)
	var writer sync.WaitGroup
	stop := make(chan struct{})
	c.out.attach()
	writer.Go(func() {
		if err := c.write(stop); err != nil {
			if !c.ready.Load() { // the refusal can be noticed here first
				err = fmt.Errorf("%w: %w", ErrNotAdmitted, err)
			}
			c.shut(err)
		}
	})
	c.mu.Lock()
	if !c.closed {
		c.watchdog = time.AfterFunc(silence, c.watch)
	}
	c.mu.Unlock()

	err := c.read(h)
	c.shut(err)
	close(stop)
	writer.Wait()
	c.out.detach()
	c.rd.Release()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// watch asks a relay that has been silent for longer than its keepalives allow, then gives it up.
func (c *Conn) watch() {
	quiet := time.Since(c.bc.LastRead())
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	switch {
	case quiet < silence-time.Second:
		c.asked = false
		c.watchdog.Reset(silence - quiet)
	case !c.asked:
		c.asked = true
		c.probeLocked()
		c.watchdog.Reset(answerTime)
	default:
		go c.shut(fmt.Errorf("%w: nothing for %v", ErrTimeout, quiet.Round(time.Second)))
	}
}

// write drains the outbox into the relay until stop.
func (c *Conn) write(stop <-chan struct{}) error {
	for {
		ctl, chunk := c.out.next()
		if ctl == nil && chunk == nil {
			select {
			case <-c.out.wake:
				continue
			case <-stop:
				return nil
			}
		}
		c.bc.SetWriteDeadline(time.Now().Add(writeTimeout))
		c.bc.Cork()
		var err error
		if len(ctl) > 0 {
			_, err = c.nc.Write(ctl)
		}
		if chunk != nil {
			if err == nil {
				_, err = c.nc.Write(chunk.Bytes())
			}
			chunk.Release()
		}
		if ferr := c.bc.Flush(); err == nil {
			err = ferr
		}
		if err != nil {
			return fmt.Errorf("derp/client: write: %w", err)
		}
	}
}

// read hands what the relay sends to h.
func (c *Conn) read(h Handler) error {
	dirty := false
	c.bc.BeforeRead = func() {
		if dirty {
			dirty = false
			h.Flush(c.region)
		}
	}
	defer c.bc.BeforeRead()
	for {
		t, p, err := c.rd.Next()
		switch {
		case err == nil:
		case !c.ready.Load() && !errors.Is(err, derp.ErrTooLarge):
			return fmt.Errorf("%w: %w", ErrNotAdmitted, err)
		default:
			return fmt.Errorf("derp/client: read: %w", err)
		}
		switch t {
		case derp.RecvPacket:
			src, b, err := derp.CutKey(p)
			if err != nil {
				return fmt.Errorf("derp/client: %v: %w", t, err)
			}
			c.received.Add(1)
			c.recvByte.Add(uint64(len(b)))
			dirty = true
			h.Packet(c.region, src, b)
		case derp.PeerGone:
			peer, reason, err := derp.ParsePeerGone(p)
			if err != nil {
				return fmt.Errorf("derp/client: %v: %w", t, err)
			}
			h.PeerGone(c.region, peer, reason)
		default:
			if err := c.control(t, p); err != nil {
				return fmt.Errorf("derp/client: %v: %w", t, err)
			}
		}
	}
}

func (c *Conn) control(t derp.FrameType, p []byte) error {
	switch t {
	case derp.ServerKey: // follows a fast start
		k, err := derp.ParseServerKey(p)
		if err != nil {
			return err
		}
		if k != c.server {
			return errors.New("the relay's key is not the one its certificate names")
		}
	case derp.ServerInfoT:
		info, err := derp.ParseServerInfo(c.o.PrivateKey, c.server, p)
		if err != nil {
			return err
		}
		c.out.limit(info.TokenBucketBytesPerSecond, info.TokenBucketBytesBurst)
		if !c.ready.Swap(true) && c.admitted != nil {
			c.admitted()
		}
	case derp.Ping:
		data, err := derp.ParsePing(p)
		if err != nil {
			return err
		}
		c.out.control(derp.AppendPing(nil, derp.Pong, data))
	case derp.Pong:
		data, err := derp.ParsePing(p)
		if err != nil {
			return err
		}
		c.mu.Lock()
		got := c.pings[data]
		delete(c.pings, data)
		if data == c.probeData && !c.probeSent.IsZero() {
			c.rtt.Store(int64(time.Since(c.probeSent)))
			c.probeSent = time.Time{}
		}
		c.mu.Unlock()
		if got != nil {
			got <- time.Now()
		}
	case derp.Health:
		c.mu.Lock()
		c.health = string(p[:min(len(p), 512)])
		c.mu.Unlock()
	case derp.Restarting:
		in, tryFor, err := derp.ParseRestarting(p)
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.restart = &restart{min(in, maxReconnectIn), min(tryFor, maxTryFor)}
		c.mu.Unlock()
	}
	return nil // keepalives, and what later versions add
}
