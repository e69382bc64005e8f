package wireguard

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/blake2s"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/wg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// link carries messages between our device and wireguard-go's, with faults. All of it runs in
// a synctest bubble, so its delays are virtual.
type link struct {
	mu      sync.Mutex
	delay   time.Duration
	spread  time.Duration // reorders
	loss    float64
	dup     float64
	replay  float64 // chance that some old message is sent once more
	old     [2][][]byte
	seen    func(toTheirs bool, msg []byte) // every message that enters
	deliver [2]func([]byte)                 // to ours, to theirs
	rnd     *rand.Rand
	wg      sync.WaitGroup
	closed  bool
}

const (
	toOurs = iota
	toTheirs
)

func (l *link) send(to int, msg []byte) {
	msg = bytes.Clone(msg)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	if l.seen != nil {
		l.seen(to == toTheirs, msg)
	}
	if l.replay > 0 {
		if len(l.old[to]) < 2000 {
			l.old[to] = append(l.old[to], bytes.Clone(msg))
		}
		if l.rnd.Float64() < l.replay {
			l.later(to, bytes.Clone(l.old[to][l.rnd.IntN(len(l.old[to]))]))
		}
	}
	if l.rnd.Float64() < l.loss {
		return
	}
	l.later(to, msg)
	if l.rnd.Float64() < l.dup {
		l.later(to, bytes.Clone(msg))
	}
}

func (l *link) later(to int, msg []byte) {
	d := l.delay
	if l.spread > 0 {
		d += time.Duration(l.rnd.Int64N(int64(l.spread)))
	}
	l.wg.Add(1)
	time.AfterFunc(d, func() {
		defer l.wg.Done()
		l.deliver[to](msg)
	})
}

func (l *link) set(f func()) { l.mu.Lock(); f(); l.mu.Unlock() }

func (l *link) close() {
	l.set(func() { l.closed = true })
	l.wg.Wait()
}

// endpoint is where wireguard-go believes that we are.
type endpoint struct{ netip.AddrPort }

func (endpoint) ClearSrc()             {}
func (endpoint) SrcToString() string   { return "" }
func (e endpoint) DstToString() string { return e.String() }
func (e endpoint) DstToBytes() []byte  { b, _ := e.MarshalBinary(); return b }
func (e endpoint) DstIP() netip.Addr   { return e.Addr() }
func (endpoint) SrcIP() netip.Addr     { return netip.Addr{} }

var ourEndpoint = endpoint{netip.MustParseAddrPort("192.0.2.1:51820")}

// bind is wireguard-go's socket: our link.
type bind struct {
	l    *link
	in   chan []byte
	mu   sync.Mutex
	done chan struct{}
}

func (b *bind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	done := make(chan struct{})
	b.done = done
	return []conn.ReceiveFunc{func(pkts [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		select {
		case m := <-b.in:
			n := 0
			for {
				sizes[n], eps[n] = copy(pkts[n], m), ourEndpoint
				if n++; n == len(pkts) {
					return n, nil
				}
				select {
				case m = <-b.in:
				default:
					return n, nil
				}
			}
		case <-done:
			return 0, net.ErrClosed
		}
	}}, 51820, nil
}

func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.done != nil {
		close(b.done)
		b.done = nil
	}
	return nil
}
func (b *bind) SetMark(uint32) error { return nil }
func (b *bind) BatchSize() int       { return 64 }
func (b *bind) Send(bufs [][]byte, _ conn.Endpoint) error {
	for _, m := range bufs {
		b.l.send(toOurs, m)
	}
	return nil
}
func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(s)
	return endpoint{a}, err
}

// conduit is our way to wireguard-go.
type conduit struct{ l *link }

func (c conduit) Send(b []byte, seg int) error {
	for len(b) > 0 {
		n := min(seg, len(b))
		c.l.send(toTheirs, b[:n])
		b = b[n:]
	}
	return nil
}

func (c conduit) AppendSource(b []byte) []byte { return append(b, "192.0.2.2:51820"...) }

// rig is our device and wireguard-go's with a link between them.
type rig struct {
	t      *testing.T
	l      *link
	ours   *wg.Device
	peer   *wg.Peer
	theirs *device.Device
	tun    *tuntest.ChannelTUN
	bind   *bind
	pub    [2]key.NodePublic // ours, theirs

	mu    sync.Mutex
	got   [2]map[uint32]int // by receiver: how often each packet came
	errs  map[error]int
	ended chan struct{}
	wg    sync.WaitGroup
}

var (
	ourIP   = netip.MustParseAddr("100.64.0.1")
	theirIP = netip.MustParseAddr("100.64.0.2")
)

func newRig(t *testing.T, seed uint64) *rig {
	t.Helper()
	l := &link{delay: 10 * time.Millisecond, rnd: rand.New(rand.NewPCG(seed, 1))}
	r := &rig{t: t, l: l, tun: tuntest.NewChannelTUN(), errs: map[error]int{}, ended: make(chan struct{})}
	r.got = [2]map[uint32]int{{}, {}}
	k := [2]key.NodePrivate{key.NewNode(), key.NewNode()}
	r.pub = [2]key.NodePublic{k[0].Public(), k[1].Public()}
	var err error
	if r.ours, err = wg.NewDevice(wg.Config{PrivateKey: k[0], MTU: 1420}); err != nil {
		t.Fatal(err)
	}
	if r.peer, err = r.ours.AddPeer(r.pub[1], conduit{l}, nil); err != nil {
		t.Fatal(err)
	}
	r.bind = &bind{l: l, in: make(chan []byte, 4096)}
	l.deliver = [2]func([]byte){
		func(m []byte) {
			pkt, _, err := r.ours.Receive(nil, m, conduit{l})
			r.mu.Lock()
			defer r.mu.Unlock()
			if err != nil {
				for errors.Unwrap(err) != nil {
					err = errors.Unwrap(err)
				}
				r.errs[err]++
			} else if pkt != nil {
				r.note(toOurs, pkt)
			}
		},
		func(m []byte) {
			select {
			case r.bind.in <- m:
			default:
			}
		},
	}
	r.theirs = device.NewDevice(r.tun.TUN(), r.bind, device.NewLogger(device.LogLevelSilent, ""))
	priv, pub := k[1].Raw(), r.pub[0].Raw()
	if err := r.theirs.IpcSet(fmt.Sprintf("private_key=%s\npublic_key=%s\nendpoint=%s\nallowed_ip=100.64.0.1/32\n",
		hex.EncodeToString(priv[:]), hex.EncodeToString(pub[:]), ourEndpoint)); err != nil {
		t.Fatal(err)
	}
	if err := r.theirs.Up(); err != nil {
		t.Fatal(err)
	}
	r.wg.Go(func() {
		for {
			select {
			case pkt := <-r.tun.Inbound:
				r.mu.Lock()
				r.note(toTheirs, pkt)
				r.mu.Unlock()
			case <-r.ended:
				return
			}
		}
	})
	return r
}

func (r *rig) close() {
	r.ours.Close()
	r.theirs.Close()
	r.l.close()
	close(r.ended)
	r.wg.Wait()
}

// packet makes an IPv4 packet of n bytes with an id and a body that follows from it.
func packet(src, dst netip.Addr, n int, id uint32) []byte {
	b := make([]byte, n)
	b[0], b[8], b[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint32(b[20:], id)
	for i := 24; i < n; i++ {
		b[i] = byte(uint32(i) * (id + 7))
	}
	return b
}

// note counts a packet that arrived whole. mu is held.
func (r *rig) note(at int, pkt []byte) {
	src, dst := theirIP, ourIP
	if at == toTheirs {
		src, dst = dst, src
	}
	id := binary.BigEndian.Uint32(pkt[20:])
	if !bytes.Equal(pkt, packet(src, dst, len(pkt), id)) {
		r.t.Errorf("packet %d arrived changed", id)
	}
	r.got[at][id]++
}

type source [][]byte

func (s *source) Next(dst []byte) int {
	if len(*s) == 0 {
		return 0
	}
	n := copy(dst, (*s)[0])
	*s = (*s)[1:]
	return n
}

func (r *rig) sendOurs(n int, ids ...uint32) {
	var s source
	for _, id := range ids {
		s = append(s, packet(ourIP, theirIP, n, id))
	}
	if err := r.peer.Send(&s); err != nil {
		r.t.Errorf("Send: %v", err)
	}
}

func (r *rig) sendTheirs(n int, ids ...uint32) {
	for _, id := range ids {
		r.tun.Outbound <- packet(theirIP, ourIP, n, id)
	}
}

// want fails unless each side has each of the packets first to last exactly once.
func (r *rig) want(first, last uint32) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for at, name := range []string{"ours", "theirs"} {
		missing := 0
		for id := first; id <= last; id++ {
			switch n := r.got[at][id]; {
			case n == 0:
				missing++
			case n > 1:
				r.t.Errorf("%s got packet %d %d times", name, id, n)
			}
		}
		if missing > 0 {
			r.t.Errorf("%s misses %d of the packets %d to %d (our errors: %v)", name, missing, first, last, r.errs)
		}
	}
}

// junk is an initiation that only its MAC1 makes look real.
func junk(to key.NodePublic) []byte {
	b := make([]byte, 148)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	copy(b, []byte{1, 0, 0, 0})
	pub := to.Raw()
	k := blake2s.Sum256(append([]byte("mac1----"), pub[:]...))
	h, _ := blake2s.New128(k[:])
	h.Write(b[:116])
	h.Sum(b[116:116])
	clear(b[132:])
	return b
}
