// Package server is a DERP relay: it takes packets from clients and hands them to the
// clients they are addressed to, by node key. docs/protocol/derp.md describes the protocol
// and what a client may count on.
//
// A [Server] serves HTTP ([Server.ServeHTTP]); it opens no port of its own.
package server

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
)

var (
	// ErrClosed reports a server that is closed or shutting down.
	ErrClosed = errors.New("derp/server: closed")
	// ErrBusy reports a connection over a limit.
	ErrBusy = errors.New("derp/server: too many connections")
	// ErrRefused reports a client that the admission hook did not let in.
	ErrRefused = errors.New("derp/server: client refused")
	// ErrProtocol reports a client that broke the protocol.
	ErrProtocol = errors.New("derp/server: protocol violation")
)

// Config configures [New]. Zero values of the limits mean the defaults in brackets.
type Config struct {
	PrivateKey key.NodePrivate // the relay's own; zero: a new one
	// Admit, if not nil, is asked whether a client that proved its key may use the relay. It may block
	// until ctx is done, which is when the handshake times out. An error refuses the client.
	Admit func(ctx context.Context, client key.NodePublic, from netip.Addr) error
	// Logger; nil means silent.
	Logger *slog.Logger

	MaxConns         int           // connections at a time, handshakes included [65536]
	HandshakeTimeout time.Duration // from the upgrade to ServerInfo [10 s]
	WriteTimeout     time.Duration // of one batch of at most 64 KiB; then the client is cut off [10 s]
	QueueBytes       int           // that wait for one client [512 KiB]
	QueuePackets     int           // that wait for one client [2048]
	// RateBytes, if not 0, is how many bytes a second each client may send, framing included.
	// The server reads no faster than that, and tells the client.
	RateBytes int
	RateBurst int // [one second's worth, at least 128 KiB]
	// KeepAlive is the interval of keepalives; up to 5 s are added [60 s].
	KeepAlive time.Duration
}

// Server is a relay. All methods are safe for concurrent use.
type Server struct {
	cfg  Config
	pub  key.NodePublic
	log  *slog.Logger
	meta []byte

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // connections

	mu       sync.RWMutex
	byKey    map[key.NodePublic]*clientSet
	conns    map[net.Conn]struct{} // all, handshaking ones too
	draining bool                  // Shutdown or Close was called

	stats counters
}

type counters struct {
	accepted, refused, failed                atomic.Uint64
	packetsIn, packetsOut, bytesIn, bytesOut atomic.Uint64
	droppedFull, droppedUnknown, droppedGone atomic.Uint64
	gone, notHere, slow, duplicates          atomic.Uint64
}

// Stats is a snapshot of what the server did.
type Stats struct {
	Clients     int // node keys connected
	Connections int // open, handshakes and duplicates included

	Accepted uint64 // connections that completed the handshake
	Refused  uint64 // by Admit
	Failed   uint64 // handshakes that failed otherwise

	PacketsIn, BytesIn   uint64
	PacketsOut, BytesOut uint64

	DroppedFull    uint64 // packets, the receiver's queue being full
	DroppedUnknown uint64 // packets to clients that are not here
	DroppedGone    uint64 // packets queued for a client that left
	PeerGone       uint64 // frames sent, for a client that left
	NotHere        uint64 // frames sent, for a client that is not here
	SlowClients    uint64 // cut off by the write timeout
	Duplicates     uint64 // connections of a key that had one already
}

// clientSet is the connections of one node key. The active one gets what is sent to the key.
type clientSet struct {
	active atomic.Pointer[client] // nil: the set is no longer in the map
	all    []*client              // in the order they came; Server.mu
}

// New returns a server. The caller must Close it.
func New(cfg Config) *Server {
	if cfg.PrivateKey.IsZero() {
		cfg.PrivateKey = key.NewNode()
	}
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	defd := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&cfg.MaxConns, 65536)
	defd(&cfg.HandshakeTimeout, 10*time.Second)
	defd(&cfg.WriteTimeout, 10*time.Second)
	def(&cfg.QueueBytes, 512<<10)
	def(&cfg.QueuePackets, 2048)
	defd(&cfg.KeepAlive, derp.KeepAlive)
	if cfg.RateBytes > 0 {
		cfg.RateBurst = max(cfg.RateBurst, 2*derp.MaxPacket)
		def(&cfg.RateBurst, cfg.RateBytes)
	}
	s := &Server{cfg: cfg, pub: cfg.PrivateKey.Public(), log: cfg.Logger,
		byKey: make(map[key.NodePublic]*clientSet), conns: make(map[net.Conn]struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.meta = metaCert(s.pub)
	return s
}

// PublicKey returns the relay's key.
func (s *Server) PublicKey() key.NodePublic { return s.pub }

// MetaCert returns the DER of the certificate that tells clients the relay's key during the TLS
// handshake, so that they need not wait for the greeting; see docs/protocol/derp.md#fast-start.
func (s *Server) MetaCert() []byte { return slices.Clone(s.meta) }

// AddMetaCert returns a copy of c that appends the meta certificate to every chain it
// presents, and does not offer HTTP/2, with which there is no upgrade.
func (s *Server) AddMetaCert(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.NextProtos = slices.DeleteFunc(slices.Clone(c.NextProtos), func(p string) bool { return p == "h2" })
	if !slices.Contains(c.NextProtos, "http/1.1") {
		c.NextProtos = append(c.NextProtos, "http/1.1")
	}
	c.DynamicRecordSizingDisabled = true // batches are large; short records would undo that
	c.Certificates = slices.Clone(c.Certificates)
	for i := range c.Certificates {
		c.Certificates[i].Certificate = append(slices.Clip(c.Certificates[i].Certificate), s.meta)
	}
	if get := c.GetCertificate; get != nil {
		c.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, err := get(hello)
			if err != nil || cert == nil {
				return cert, err
			}
			with := *cert
			with.Certificate = append(slices.Clip(cert.Certificate), s.meta)
			return &with, nil
		}
	}
	return c
}

// metaCert makes the certificate: its name is the key, its serial the protocol version. The
// TLS signature of the leaf covers it, so its own says nothing and its key is thrown away.
func metaCert(pub key.NodePublic) []byte {
	signer, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic("derp/server: " + err.Error()) // the random source does not fail
	}
	raw := pub.Raw()
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(derp.Version),
		Subject:               pkix.Name{CommonName: derp.MetaCertPrefix + hex.EncodeToString(raw[:])},
		NotBefore:             now.AddDate(0, 0, -30),
		NotAfter:              now.AddDate(10, 0, 0),
		BasicConstraintsValid: true, // some platforms want it of a certificate that is its own issuer
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, signer, priv)
	if err != nil {
		panic("derp/server: " + err.Error()) // the template is fixed
	}
	return der
}

// Stats returns a snapshot.
func (s *Server) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := &s.stats
	return Stats{
		Clients: len(s.byKey), Connections: len(s.conns),
		Accepted: c.accepted.Load(), Refused: c.refused.Load(), Failed: c.failed.Load(),
		PacketsIn: c.packetsIn.Load(), BytesIn: c.bytesIn.Load(),
		PacketsOut: c.packetsOut.Load(), BytesOut: c.bytesOut.Load(),
		DroppedFull: c.droppedFull.Load(), DroppedUnknown: c.droppedUnknown.Load(), DroppedGone: c.droppedGone.Load(),
		PeerGone: c.gone.Load(), NotHere: c.notHere.Load(), SlowClients: c.slow.Load(), Duplicates: c.duplicates.Load(),
	}
}

// Connected reports whether the client is connected.
func (s *Server) Connected(k key.NodePublic) bool { return s.lookup(k) != nil }

// Disconnect closes every connection of the client; it returns how many there were. The
// client may connect again unless Admit refuses it.
func (s *Server) Disconnect(k key.NodePublic) int {
	var all []*client
	s.mu.RLock()
	if set := s.byKey[k]; set != nil {
		all = slices.Clone(set.all)
	}
	s.mu.RUnlock()
	for _, c := range all {
		cut(c.nc)
	}
	return len(all)
}

// cut closes the socket of a connection: TLS's own Close waits up to 5 s for a client that does not read.
func cut(nc net.Conn) { netConn(nc).Close() }

// Serve speaks DERP on nc, of which buffered is what has been read already, until the
// connection ends; then nc is closed. It blocks, and returns why the connection ended: nil
// when the client left or the server closed.
func (s *Server) Serve(nc net.Conn, buffered []byte) error {
	if err := s.track(nc); err != nil {
		nc.Close()
		return err
	}
	defer s.untrack(nc)
	c, err := s.handshake(nc, buffered)
	if err != nil {
		if errors.Is(err, ErrRefused) {
			s.stats.refused.Add(1)
		} else {
			s.stats.failed.Add(1)
		}
		return err
	}
	s.stats.accepted.Add(1)
	err = c.run()
	if s.ctx.Err() != nil || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (s *Server) track(nc net.Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return ErrClosed
	}
	if len(s.conns) >= s.cfg.MaxConns {
		return ErrBusy
	}
	s.conns[nc] = struct{}{}
	s.wg.Add(1)
	return nil
}

func (s *Server) untrack(nc net.Conn) {
	nc.Close()
	s.mu.Lock()
	delete(s.conns, nc)
	s.mu.Unlock()
	s.wg.Done()
}

func (s *Server) handshake(nc net.Conn, buffered []byte) (*client, error) {
	deadline := time.Now().Add(s.cfg.HandshakeTimeout)
	nc.SetDeadline(deadline)
	if _, err := nc.Write(derp.AppendServerKey(nil, s.pub)); err != nil {
		return nil, fmt.Errorf("derp/server: greeting: %w", err)
	}
	rd := derp.NewReader(nc, 2<<10, buffered)
	t, p, err := rd.Next()
	if err != nil {
		return nil, fmt.Errorf("derp/server: client info: %w", err)
	}
	if t != derp.ClientInfoT {
		return nil, fmt.Errorf("%w: first comes %v", ErrProtocol, t)
	}
	k, info, err := derp.ParseClientInfo(s.cfg.PrivateKey, p)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	addr, _ := netip.ParseAddrPort(nc.RemoteAddr().String())
	from := netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	if s.cfg.Admit != nil {
		ctx, cancel := context.WithDeadline(s.ctx, deadline)
		err := s.cfg.Admit(ctx, k, from.Addr())
		cancel()
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrRefused, k.ShortString(), err)
		}
	}
	hello, err := derp.AppendServerInfo(nil, s.cfg.PrivateKey, k, derp.ServerInfo{
		Version:                   derp.Version,
		TokenBucketBytesPerSecond: s.cfg.RateBytes,
		TokenBucketBytesBurst:     s.cfg.RateBurst,
	})
	if err != nil {
		return nil, err
	}
	// Registered before the client hears of it: once it has the info, packets to it arrive.
	c := newClient(s, nc, rd, k, from, info)
	c.ctl = hello
	nc.SetDeadline(time.Time{})
	return c, nil
}

// lookup returns the key's connection set, or nil.
func (s *Server) lookup(k key.NodePublic) *clientSet {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.byKey[k]
}

const dupText = "another connection with the same node key is active"

// register makes c the active connection of its key: the newest is, until an older one speaks.
func (s *Server) register(c *client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return ErrClosed
	}
	set := s.byKey[c.key]
	if set == nil {
		set = &clientSet{}
		s.byKey[c.key] = set
	}
	c.set = set
	set.all = append(set.all, c)
	if len(set.all) > 1 {
		s.stats.duplicates.Add(1)
		for _, d := range set.all {
			d.dup.Store(true)
		}
		old := set.active.Load()
		old.unhealthy = true
		old.control(derp.AppendFrame(nil, derp.Health, []byte(dupText)))
	}
	set.active.Store(c)
	return nil
}

// spoke makes c active again among the connections of its key.
func (s *Server) spoke(c *client) {
	if c.set.active.Load() == c {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := c.set.active.Load()
	if old == nil || old == c || !slices.Contains(c.set.all, c) {
		return
	}
	c.set.active.Store(c)
	if !old.unhealthy {
		old.unhealthy = true
		old.control(derp.AppendFrame(nil, derp.Health, []byte(dupText)))
	}
}

// unregister takes c out; it returns the connection that its key's packets go to from now on, or nil.
func (s *Server) unregister(c *client) (next *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := c.set
	set.all = slices.DeleteFunc(set.all, func(d *client) bool { return d == c })
	if len(set.all) == 0 {
		set.active.Store(nil)
		delete(s.byKey, c.key)
		return nil
	}
	if set.active.Load() == c {
		set.active.Store(set.all[len(set.all)-1])
	}
	if len(set.all) == 1 {
		d := set.all[0]
		d.dup.Store(false)
		if d.unhealthy {
			d.unhealthy = false
			d.control(derp.AppendFrame(nil, derp.Health, nil))
		}
	}
	return set.active.Load()
}

// Restart timing that Shutdown announces: clients spread their return over restartSpread,
// and should try quickly for restartTryFor.
const (
	restartSpread = 2 * time.Second
	restartTryFor = 10 * time.Second
)

// Shutdown tells every client that the relay restarts, lets what is queued go out, and closes.
// It blocks until that is done, or ctx is; then what is left is cut off and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	for _, set := range s.byKey {
		for _, c := range set.all {
			c.finish(derp.AppendRestarting(nil, mrand.N(restartSpread), restartTryFor))
		}
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	select {
	case <-done:
		s.Close()
		return nil
	case <-ctx.Done():
		s.Close()
		<-done
		return context.Cause(ctx)
	}
}

// Close ends every connection and waits for their goroutines. It may be called any number of times.
func (s *Server) Close() {
	s.mu.Lock()
	s.draining = true
	s.cancel()
	conns := slices.Collect(maps.Keys(s.conns)) // none is added from now on
	s.mu.Unlock()
	for _, nc := range conns {
		cut(nc)
	}
	s.wg.Wait()
}
