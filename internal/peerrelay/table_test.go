package peerrelay

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	addrA  = netip.MustParseAddrPort("192.0.2.1:1111")
	addrB  = netip.MustParseAddrPort("[2001:db8::2]:2222")
	addrX  = netip.MustParseAddrPort("192.0.2.9:9999")
	tStart = time.Unix(1e9, 0)
)

// sent is what a relay has sent.
type sent struct {
	dst netip.AddrPort
	b   []byte
	seg int
}

type outbox struct{ list []sent }

func (o *outbox) Send(dst netip.AddrPort, b []byte, seg int) error {
	o.list = append(o.list, sent{dst, bytes.Clone(b), seg})
	return nil
}

func (o *outbox) take() []sent {
	l := o.list
	o.list = nil
	return l
}

// rig is a relay with an endpoint and its two clients.
type rig struct {
	t    *testing.T
	tab  *Table
	now  time.Time
	out  outbox
	ep   disco.RelayEndpoint
	a, b key.DiscoPrivate
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, tab: NewTable(tStart), now: tStart, a: key.NewDisco(), b: key.NewDisco()}
	var err error
	if r.ep, err = r.tab.Allocate(r.now, r.a.Public(), r.b.Public()); err != nil {
		t.Fatal(err)
	}
	return r
}

// common is what a client says in its messages.
func (r *rig) common(other key.DiscoPrivate, gen uint32) disco.BindCommon {
	return disco.BindCommon{VNI: r.ep.VNI, Generation: gen, RemoteKey: other.Public()}
}

func (r *rig) message(from key.DiscoPrivate, typ disco.Type, m disco.BindCommon) []byte {
	b := disco.Geneve{VNI: r.ep.VNI, Protocol: disco.GeneveDisco, Control: true}.Append(nil)
	shared := from.Shared(r.ep.Server)
	return disco.Seal(b, from.Public(), &shared, m.Append(nil, typ))
}

func (r *rig) recv(src netip.AddrPort, b []byte) []sent {
	r.tab.Receive(r.now, src, b, len(b), &r.out)
	return r.out.take()
}

// open reads the relay's challenge.
func (r *rig) open(me key.DiscoPrivate, b []byte) (m disco.BindCommon, ok bool) {
	g, ok := disco.ParseGeneve(b)
	if !ok || !g.Control || g.VNI != r.ep.VNI || g.Protocol != disco.GeneveDisco {
		return m, false
	}
	shared := me.Shared(r.ep.Server)
	plain, err := disco.Open(nil, &shared, b[disco.GeneveLen:])
	if err != nil {
		return m, false
	}
	typ, _, body, err := disco.Split(plain)
	if err != nil || typ != disco.TypeBindEndpointChallenge {
		return m, false
	}
	m, err = disco.ParseBind(body)
	return m, err == nil
}

// bind does a client's handshake.
func (r *rig) bind(me, other key.DiscoPrivate, at netip.AddrPort, gen uint32) {
	r.t.Helper()
	m := r.common(other, gen)
	q := r.message(me, disco.TypeBindEndpoint, m)
	got := r.recv(at, q)
	if len(got) != 1 || got[0].dst != at || len(got[0].b) != len(q) {
		r.t.Fatalf("answer to a bind message: %+v", got)
	}
	c, ok := r.open(me, got[0].b)
	if !ok || c.Generation != gen || c.RemoteKey != other.Public() || c.VNI != r.ep.VNI {
		r.t.Fatalf("challenge %+v", c)
	}
	m.Challenge = c.Challenge
	if got := r.recv(at, r.message(me, disco.TypeBindEndpointAnswer, m)); len(got) != 0 {
		r.t.Fatalf("answer to an answer: %+v", got)
	}
}

func (r *rig) data(payload string) []byte {
	return append(disco.Geneve{VNI: r.ep.VNI, Protocol: disco.GeneveWireGuard}.Append(nil), payload...)
}

func TestRelaying(t *testing.T) {
	r := newRig(t)
	if r.ep.Server != r.tab.Disco() || r.ep.LamportID == 0 || r.ep.VNI == 0 || r.ep.VNI > disco.MaxVNI || r.ep.BindLifetime != BindLifetime || r.ep.SteadyStateLifetime != SteadyStateLifetime {
		t.Fatalf("%+v", r.ep)
	}
	// The other client gets the same.
	again, err := r.tab.Allocate(r.now, r.b.Public(), r.a.Public())
	if err != nil || again.VNI != r.ep.VNI || again.LamportID != r.ep.LamportID || again.Clients != r.ep.Clients {
		t.Fatalf("%+v, %v", again, err)
	}
	hello := r.data("hello")
	if got := r.recv(addrA, hello); len(got) != 0 {
		t.Errorf("unbound, and sent %+v", got)
	}
	r.bind(r.a, r.b, addrA, 7)
	if got := r.recv(addrA, hello); len(got) != 0 {
		t.Errorf("half bound, and sent %+v", got)
	}
	r.bind(r.b, r.a, addrB, 9)
	for _, x := range []struct{ from, to netip.AddrPort }{{addrA, addrB}, {addrB, addrA}} {
		if got := r.recv(x.from, hello); len(got) != 1 || got[0].dst != x.to || !bytes.Equal(got[0].b, hello) {
			t.Errorf("from %v: %+v", x.from, got)
		}
	}
	ping := append(disco.Geneve{VNI: r.ep.VNI, Protocol: disco.GeneveDisco}.Append(nil), "a sealed ping"...)
	if got := r.recv(addrA, ping); len(got) != 1 || got[0].dst != addrB {
		t.Errorf("ping: %+v", got)
	}
	other := bytes.Clone(hello)
	other[6]++ // VNI
	for name, x := range map[string]struct {
		from netip.AddrPort
		b    []byte
	}{
		"from elsewhere":    {addrX, hello},
		"another VNI":       {addrA, other},
		"no Geneve":         {addrA, []byte("hello hello hello")},
		"short":             {addrA, hello[:7]},
		"control, no disco": {addrA, disco.Geneve{VNI: r.ep.VNI, Protocol: disco.GeneveWireGuard, Control: true}.Append(nil)},
	} {
		if got := r.recv(x.from, x.b); len(got) != 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	// A client comes from another address: only after a new handshake.
	r.bind(r.a, r.b, addrX, 8)
	if got := r.recv(addrB, hello); len(got) != 1 || got[0].dst != addrX {
		t.Errorf("after the move: %+v", got)
	}
	if got := r.recv(addrA, hello); len(got) != 0 {
		t.Errorf("the old address still works: %+v", got)
	}
}

// TestBatches: runs of datagrams of one endpoint go on as they came, others by themselves.
func TestBatches(t *testing.T) {
	r := newRig(t)
	r.bind(r.a, r.b, addrA, 1)
	r.bind(r.b, r.a, addrB, 1)
	one := r.data("0123456789abcdef")
	alien := bytes.Clone(one)
	alien[4] ^= 1
	last := r.data("x")
	b := slicesConcat(one, one, one, alien, one, last)
	r.tab.Receive(r.now, addrA, b, len(one), &r.out)
	got := r.out.take()
	if len(got) != 2 || !bytes.Equal(got[0].b, slicesConcat(one, one, one)) || got[0].seg != len(one) || !bytes.Equal(got[1].b, slicesConcat(one, last)) || got[1].seg != len(one) {
		t.Errorf("%d batches: %+v", len(got), got)
	}
	if n := r.tab.forwarded.Load(); n != uint64(4*len(one)+len(last)) {
		t.Errorf("counted %d bytes", n)
	}
	// A handshake message in between is not forwarded.
	q := r.message(r.a, disco.TypeBindEndpoint, r.common(r.b, 3))
	wide := append(r.data(""), make([]byte, len(q)-8)...)
	r.tab.Receive(r.now, addrA, slicesConcat(wide, q, wide), len(q), &r.out)
	if got := r.out.take(); len(got) != 3 || got[1].dst != addrA || got[0].dst != addrB || got[2].dst != addrB {
		t.Errorf("%d: %+v", len(got), got)
	}
}

func slicesConcat(bs ...[]byte) (out []byte) {
	for _, b := range bs {
		out = append(out, b...)
	}
	return out
}

// TestHandshakeRefused: nobody is bound who is not a client, has not been challenged, or is not where the challenge went.
func TestHandshakeRefused(t *testing.T) {
	r := newRig(t)
	r.bind(r.b, r.a, addrB, 1)
	stranger := key.NewDisco()
	m := r.common(r.b, 5)
	for name, q := range map[string][]byte{
		"a stranger":        r.message(stranger, disco.TypeBindEndpoint, m),
		"wrong remote key":  r.message(r.a, disco.TypeBindEndpoint, r.common(stranger, 5)),
		"generation 0":      r.message(r.a, disco.TypeBindEndpoint, r.common(r.b, 0)),
		"wrong VNI inside":  r.message(r.a, disco.TypeBindEndpoint, disco.BindCommon{VNI: r.ep.VNI + 1, Generation: 5, RemoteKey: r.b.Public()}),
		"a challenge":       r.message(r.a, disco.TypeBindEndpointChallenge, m),
		"an early answer":   r.message(r.a, disco.TypeBindEndpointAnswer, m),
		"a changed message": func() []byte { b := r.message(r.a, disco.TypeBindEndpoint, m); b[len(b)-1] ^= 1; return b }(),
		"cut":               r.message(r.a, disco.TypeBindEndpoint, m)[:120],
	} {
		if got := r.recv(addrA, q); len(got) != 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	got := r.recv(addrA, r.message(r.a, disco.TypeBindEndpoint, m))
	c, ok := r.open(r.a, got[0].b)
	if !ok {
		t.Fatal("no challenge")
	}
	m.Challenge = c.Challenge
	bound := func() bool { return len(r.recv(addrB, r.data("?"))) > 0 }
	wrong := m
	wrong.Challenge[0] ^= 1
	r.recv(addrA, r.message(r.a, disco.TypeBindEndpointAnswer, wrong))
	r.recv(addrX, r.message(r.a, disco.TypeBindEndpointAnswer, m)) // from where the challenge did not go
	late := m
	late.Generation++
	r.recv(addrA, r.message(r.a, disco.TypeBindEndpointAnswer, late))
	r.recv(addrA, r.message(r.b, disco.TypeBindEndpointAnswer, r.common(r.a, 5))) // by the other client
	if bound() {
		t.Error("bound")
	}
	// The right one counts until the secret has changed twice.
	r.now = r.now.Add(secretEvery + time.Second)
	r.recv(addrA, r.message(r.a, disco.TypeBindEndpointAnswer, m))
	if !bound() {
		t.Error("not bound by the right answer")
	}
	m.Generation = 6
	got = r.recv(addrA, r.message(r.a, disco.TypeBindEndpoint, m))
	c, _ = r.open(r.a, got[0].b)
	m.Challenge = c.Challenge
	r.now = r.now.Add(2 * secretEvery)
	r.bind(r.a, r.b, addrX, 7)
	m.Generation = 7
	r.recv(addrA, r.message(r.a, disco.TypeBindEndpointAnswer, m))
	if got := r.recv(addrB, r.data("!")); len(got) != 1 || got[0].dst != addrX {
		t.Errorf("an answer of before counts: %+v", got)
	}
}

func TestExpiry(t *testing.T) {
	r := newRig(t)
	if r.tab.Expire(r.now.Add(BindLifetime)) != 1 || r.tab.Expire(r.now.Add(BindLifetime+1)) != 0 || len(r.tab.owners) != 0 {
		t.Fatal("not bound in time, and not gone when it is over")
	}
	r = newRig(t)
	r.bind(r.a, r.b, addrA, 1)
	r.bind(r.b, r.a, addrB, 1)
	for range 10 { // traffic both ways keeps it
		r.now = r.now.Add(SteadyStateLifetime)
		r.recv(addrA, r.data("x"))
		r.recv(addrB, r.data("x"))
		if r.tab.Expire(r.now) != 1 {
			t.Fatal("gone in spite of traffic")
		}
	}
	r.recv(addrA, r.data("x"))
	r.now = r.now.Add(SteadyStateLifetime + 1)
	if got := r.recv(addrA, r.data("x")); len(got) != 1 {
		t.Error("it works until it is looked for")
	}
	// What has expired is not handed out again, though nobody has swept yet.
	ep, err := r.tab.Allocate(r.now, r.a.Public(), r.b.Public())
	if err != nil || ep.LamportID <= r.ep.LamportID || ep.VNI == r.ep.VNI {
		t.Errorf("%+v, %v", ep, err)
	}
	if got := r.recv(addrA, r.data("x")); len(got) != 0 || r.tab.Len() != 1 {
		t.Errorf("the old endpoint: %+v", got)
	}
}

func TestLimits(t *testing.T) {
	tab := NewTable(tStart)
	now := tStart
	a := key.NewDisco().Public()
	other := func(i int) key.DiscoPublic {
		var raw [32]byte
		raw[0], raw[1], raw[2], raw[3] = 9, byte(i), byte(i>>8), byte(i>>16)
		return key.DiscoPublicFromRaw(raw)
	}
	for name, p := range map[string][2]key.DiscoPublic{
		"itself": {a, a}, "nobody": {a, key.DiscoPublic{}}, "the relay": {a, tab.Disco()}, "from the relay": {tab.Disco(), a},
	} {
		if _, err := tab.Allocate(now, p[0], p[1]); !errors.Is(err, ErrClients) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range maxWaiting {
		if _, err := tab.Allocate(now, a, other(i)); err != nil {
			t.Fatal(i, err)
		}
	}
	if _, err := tab.Allocate(now, a, other(maxWaiting)); !errors.Is(err, ErrFull) {
		t.Errorf("one requester: %v", err)
	}
	if _, err := tab.Allocate(now, a, other(1)); err != nil {
		t.Errorf("what it has: %v", err)
	}
	// Others have room, as fast as the rate allows.
	n := 0
	for i := range 2 * allocBurst {
		if _, err := tab.Allocate(now, other(1000+i), other(1)); err == nil {
			n++
		} else if !errors.Is(err, ErrRate) {
			t.Fatal(err)
		}
	}
	if n != allocBurst-maxWaiting {
		t.Errorf("%d at once", n)
	}
	now = now.Add(BindLifetime + time.Second)
	if _, err := tab.Allocate(now, a, other(maxWaiting)); err != nil {
		t.Errorf("when the first have expired: %v", err)
	}
}

func TestForwardingAllocatesNothing(t *testing.T) {
	r := newRig(t)
	r.bind(r.a, r.b, addrA, 1)
	r.bind(r.b, r.a, addrB, 1)
	b := bytes.Repeat(append(r.data(""), make([]byte, 1304)...), 40)
	var out nowhere
	if n := testing.AllocsPerRun(100, func() { r.tab.Receive(r.now, addrA, b, 1312, &out) }); n > 0 {
		t.Errorf("%v allocations for a batch", n)
	}
	if n := testing.AllocsPerRun(100, func() { r.tab.Receive(r.now, addrX, b, 1312, &out) }); n > 0 {
		t.Errorf("%v allocations for a batch that is dropped", n)
	}
}

type nowhere struct{}

func (*nowhere) Send(netip.AddrPort, []byte, int) error { return nil }

func BenchmarkForward(b *testing.B) {
	tab := NewTable(tStart)
	x, y := key.NewDisco(), key.NewDisco()
	ep, _ := tab.Allocate(tStart, x.Public(), y.Public())
	e := tab.endpoint(ep.VNI)
	e.bound = [2]netip.AddrPort{addrA, addrB}
	pkt := bytes.Repeat(append(disco.Geneve{VNI: ep.VNI, Protocol: disco.GeneveWireGuard}.Append(nil), make([]byte, 1304)...), 40)
	b.SetBytes(int64(len(pkt)))
	for b.Loop() {
		tab.Receive(tStart, addrA, pkt, 1312, &nowhere{})
	}
}

// FuzzReceive: whatever comes in, nothing goes out but to bound clients or back where it came from, and never more than came.
func FuzzReceive(f *testing.F) {
	tab := NewTable(tStart)
	a, b := key.PrivateFromRaw[key.Disco]([32]byte{8}), key.PrivateFromRaw[key.Disco]([32]byte{16})
	ep, err := tab.Allocate(tStart, a.Public(), b.Public())
	if err != nil {
		f.Fatal(err)
	}
	tab.endpoint(ep.VNI).bound = [2]netip.AddrPort{addrA, addrB}
	r := &rig{tab: tab, ep: ep, a: a, b: b}
	f.Add(0, 1312, r.data("hello"))
	f.Add(1, 13, r.data("hellohellohello"))
	f.Add(2, 200, r.message(a, disco.TypeBindEndpoint, r.common(b, 1)))
	f.Add(0, 200, r.message(a, disco.TypeBindEndpointAnswer, r.common(b, 1)))
	f.Add(0, 0, []byte{})
	f.Fuzz(func(t *testing.T, from, seg int, pkt []byte) {
		src := []netip.AddrPort{addrA, addrB, addrX}[uint(from)%3]
		var out outbox
		tab.Receive(tStart, src, bytes.Clone(pkt), seg, &out)
		n := 0
		for _, s := range out.list {
			n += len(s.b)
			if s.dst != addrA && s.dst != addrB && s.dst != src || s.seg <= 0 {
				t.Fatalf("to %v, segments of %d", s.dst, s.seg)
			}
		}
		if n > len(pkt) {
			t.Fatalf("%d bytes in, %d out", len(pkt), n)
		}
	})
}
