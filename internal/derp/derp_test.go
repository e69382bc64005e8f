package derp

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"slices"
	"testing"

	"go.uber.org/goleak"

	"github.com/tailnode/tailnode/internal/key"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var raceEnabled bool // set by race_test.go

func TestReaderMixesSizes(t *testing.T) {
	var wire []byte
	var want [][]byte
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		n := rng.IntN(1500)
		if i%50 == 0 {
			n = MaxPacket
		}
		p := bytes.Repeat([]byte{byte(i)}, n)
		want = append(want, p)
		wire = AppendPacket(wire, RecvPacket, peerPub, p)
		if i%70 == 0 { // to be skipped: unknown and larger than any buffer
			wire = AppendFrame(wire, 0x99, make([]byte, 200_000))
		}
	}
	for _, size := range []int{512, 4 << 10, 16 << 10} {
		rd := NewReader(chop{bytes.NewReader(wire), rng}, size, nil)
		for i := range want {
			ft, p, err := rd.Next()
			if err != nil || ft != RecvPacket {
				t.Fatalf("frame %d: %v %v", i, ft, err)
			}
			if !bytes.Equal(p[32:], want[i]) {
				t.Fatalf("frame %d differs", i)
			}
			clear(p) // may be modified in place
		}
		if _, _, err := rd.Next(); err != io.EOF {
			t.Errorf("after the last frame: %v", err)
		}
		if rd.big != nil {
			t.Error("an idle reader keeps a large buffer")
		}
	}
}

type chop struct {
	r   io.Reader
	rng *rand.Rand
}

func (c chop) Read(p []byte) (int, error) { return c.r.Read(p[:min(len(p), 1+c.rng.IntN(20_000))]) }

func TestReaderDoesNotAllocate(t *testing.T) {
	frame := AppendPacket(nil, RecvPacket, peerPub, make([]byte, 1400))
	rd := NewReader(repeat(frame), 4<<10, nil)
	if n := testing.AllocsPerRun(1000, func() {
		if _, _, err := rd.Next(); err != nil {
			t.Fatal(err)
		}
	}); n >= 1 && !raceEnabled {
		t.Errorf("%v allocations per frame", n)
	}
}

type repeat []byte

func (r repeat) Read(p []byte) (n int, err error) {
	for len(p)-n >= len(r) {
		n += copy(p[n:], r)
	}
	return n, nil
}

func TestReaderBuffered(t *testing.T) {
	frame := AppendPing(nil, Ping, [8]byte{1})
	rd := NewReader(bytes.NewReader(append(bytes.Repeat(frame, 2), frame[:7]...)), 0, nil)
	for i, want := range []bool{true, false} {
		if _, _, err := rd.Next(); err != nil || rd.Buffered() != want {
			t.Errorf("after frame %d: buffered %v, %v", i, rd.Buffered(), err)
		}
	}
}

func TestReaderNeverProgresses(t *testing.T) {
	if _, _, err := NewReader(repeat(make([]byte, 1<<20)), 0, nil).Next(); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("got %v", err)
	}
}

func TestShortPayloads(t *testing.T) {
	for n := range key.Size {
		p := make([]byte, n)
		_, _, e1 := CutKey(p)
		_, _, e2 := ParsePeerGone(p)
		_, _, _, e3 := ParsePeerPresent(p)
		_, _, e4 := ParseClientInfo(serverPriv, p)
		for i, err := range []error{e1, e2, e3, e4} {
			if !errors.Is(err, ErrShort) {
				t.Errorf("%d bytes, parser %d: %v", n, i, err)
			}
		}
		if _, err := ParseServerKey(p); !errors.Is(err, ErrGreeting) {
			t.Errorf("greeting of %d bytes: %v", n, err)
		}
	}
	if _, err := ParsePing(make([]byte, 7)); !errors.Is(err, ErrShort) {
		t.Error(err)
	}
	if _, _, err := ParseRestarting(make([]byte, 7)); !errors.Is(err, ErrShort) {
		t.Error(err)
	}
}

func TestInfoThatDoesNotAuthenticate(t *testing.T) {
	frame, err := AppendClientInfo(nil, clientPriv, serverPriv.Public(), ClientInfo{Version: 2})
	if err != nil {
		t.Fatal(err)
	}
	p := frame[HeaderLen:]
	if _, _, err := ParseClientInfo(clientPriv, p); !errors.Is(err, ErrInfo) || !errors.Is(err, key.ErrOpen) {
		t.Errorf("for another server: %v", err)
	}
	for _, i := range []int{0, 32, len(p) - 1} {
		q := bytes.Clone(p)
		q[i] ^= 1
		if _, _, err := ParseClientInfo(serverPriv, q); !errors.Is(err, ErrInfo) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	long := append(bytes.Clone(p), make([]byte, maxInfo)...)
	if _, _, err := ParseClientInfo(serverPriv, long); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too long: %v", err)
	}
	notJSON := clientPriv.Seal(serverPriv.Public(), []byte("no"))
	if _, _, err := ParseClientInfo(serverPriv, append(clientPriv.Public().AppendTo(nil), notJSON...)); !errors.Is(err, ErrInfo) {
		t.Errorf("not JSON: %v", err)
	}
}

func TestMetaCert(t *testing.T) {
	raw := peerPub.Raw()
	digits := hex.EncodeToString(raw[:])
	cert := func(cn string, serial *big.Int) *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: cn}, SerialNumber: serial}
	}
	leaf := cert("relay.example", big.NewInt(7))
	for _, tt := range []struct {
		name string
		cert *x509.Certificate
		ok   bool
	}{
		{"good", cert(MetaCertPrefix+digits, big.NewInt(2)), true},
		{"none", leaf, false},
		{"short key", cert(MetaCertPrefix+digits[2:], big.NewInt(2)), false},
		{"not hex", cert(MetaCertPrefix+"zz"+digits[2:], big.NewInt(2)), false},
		{"huge serial", cert(MetaCertPrefix+digits, big.NewInt(1<<40)), false},
		{"version 0", cert(MetaCertPrefix+digits, big.NewInt(0)), false},
	} {
		k, v, ok := MetaCert([]*x509.Certificate{leaf, tt.cert})
		if ok != tt.ok || ok && (k != peerPub || v != 2) {
			t.Errorf("%s: %v %d %v", tt.name, k, v, ok)
		}
	}
}

// take empties a queue into frames of (key byte, payload).
func take(t *testing.T, q *Queue) (got []string) {
	t.Helper()
	for c := q.Pop(); c != nil; c = q.Pop() {
		rd, n := NewReader(bytes.NewReader(c.Bytes()), 0, nil), 0
		for {
			_, p, err := rd.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			n++
			got = append(got, string(p[:1])+string(p[32:]))
		}
		if n != c.Frames() {
			t.Errorf("chunk of %d frames says %d", n, c.Frames())
		}
		c.Release()
	}
	return got
}

func named(b byte) key.NodePublic { return key.NodePublicFromRaw([32]byte{b}) }

func TestQueueKeepsOrderAndBounds(t *testing.T) {
	q := Queue{MaxBytes: 1 << 20, MaxFrames: 5}
	var f Flow
	dropped := 0
	for _, s := range []string{"1", "2", "3", "4", "5", "6", "7"} {
		dropped += q.Push(SendPacket, named('a'), []byte(s), &f)
	}
	if got := take(t, &q); dropped != 2 || len(got) != 5 || got[0] != "a3" || got[4] != "a7" {
		t.Errorf("dropped %d, left %q", dropped, got)
	}
	if b, n := q.Len(); b != 0 || n != 0 || f != (Flow{}) && f.bytes+f.frames != 0 {
		t.Errorf("an empty queue counts %d bytes, %d frames", b, n)
	}

	// By bytes, over many chunks, with frames as long as can be.
	q = Queue{MaxBytes: 300_000, MaxFrames: 1000}
	for i := range 50 {
		q.Push(SendPacket, named('a'), append(make([]byte, MaxPacket-1), byte(i)), &f)
		if b, _ := q.Len(); b > q.MaxBytes {
			t.Fatalf("%d bytes queued", b)
		}
	}
	if got := take(t, &q); len(got) != 4 || got[3][MaxPacket] != 49 {
		t.Errorf("%d frames left", len(got))
	}
}

func TestQueueIsFair(t *testing.T) {
	q := Queue{MaxBytes: 1 << 20, MaxFrames: 100}
	var busy, calm Flow
	for i := range 10_000 {
		q.Push(RecvPacket, named('b'), make([]byte, 1400), &busy)
		if i%1000 == 0 {
			q.Push(RecvPacket, named('c'), []byte{byte(i / 1000)}, &calm)
		}
	}
	var calmGot string
	n := 0
	for _, s := range take(t, &q) {
		if s[0] == 'c' {
			calmGot += s[1:]
		}
		n++
	}
	if calmGot != "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09" || n != 100 {
		t.Errorf("of the calm sender %x arrived, of all %d", calmGot, n)
	}

	// Two that are equally greedy share evenly.
	var other Flow
	for range 10_000 {
		q.Push(RecvPacket, named('b'), make([]byte, 1400), &busy)
		q.Push(RecvPacket, named('o'), make([]byte, 1400), &other)
	}
	if d := busy.frames - other.frames; d < -1 || d > 1 {
		t.Errorf("shares of %d and %d", busy.frames, other.frames)
	}
	q.Clear()
}

func TestQueueTrim(t *testing.T) {
	q := Queue{MaxBytes: 1 << 20, MaxFrames: 1000}
	var f Flow
	for i := range 200 {
		q.Push(SendPacket, named('a'), append(make([]byte, 1400), byte(i)), &f)
	}
	if n := q.Trim(10_000, 100); n != 194 {
		t.Errorf("dropped %d", n)
	}
	if n := q.Clear(); n != 6 || len(q.active) != 0 || len(q.chunks) != 0 {
		t.Errorf("cleared %d", n)
	}
}

// TestQueueHoldsWhatIsLive: frames that stay must not keep the memory of those that are dropped around them.
func TestQueueHoldsWhatIsLive(t *testing.T) {
	big := make([]byte, MaxPacket-100)
	for _, tt := range []struct {
		name  string
		every int // of the busy flow's frames: then comes one of another flow
		size  int // of those
	}{
		{"one at the head", 4000, 1},
		{"one in each chunk", 2, 1},
		{"one in each chunk's neighbour", 1, 100},
	} {
		q := Queue{MaxBytes: 512 << 10, MaxFrames: 2048}
		var busy Flow
		want := 0
		for i := range 4000 {
			if i%tt.every == 0 && want < 1000 {
				q.Push(RecvPacket, named('c'), make([]byte, tt.size), new(Flow))
				want++
			}
			p := big
			if tt.every == 2 { // two fill a chunk but for a little
				p = big[:len(big)/2-100]
			}
			q.Push(RecvPacket, named('b'), p, &busy)
			held := 0
			for _, c := range q.chunks {
				held += cap(c.buf)
			}
			if held > 6*q.MaxBytes {
				t.Fatalf("%s: %d KB held after %d frames", tt.name, held>>10, i)
			}
		}
		frames := 0
		for _, s := range take(t, &q) {
			if s[0] == 'c' {
				frames++
			}
		}
		if frames != want {
			t.Errorf("%s: %d frames of %d calm senders", tt.name, frames, want)
		}
		if b, n := q.Len(); b != 0 || n != 0 || len(q.active) != 0 || len(q.chunks) != 0 || busy != (Flow{at: busy.at}) {
			t.Errorf("%s: an empty queue counts %d bytes, %d frames", tt.name, b, n)
		}
	}
}

// TestQueueAgainstModel compares with a list of frames, at each step, what is queued and in what order.
func TestQueueAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	type frame struct{ flow, n, size int }
	for range 50 {
		q := Queue{MaxBytes: 150 << 10, MaxFrames: 40}
		flows := make([]Flow, 4)
		var model []frame
		weigh := func(flow int) (bytes int) {
			for _, f := range model {
				if f.flow == flow {
					bytes += f.size
				}
			}
			return bytes
		}
		for n := range 400 {
			if r.IntN(60) == 0 {
				c := q.Pop()
				if c == nil {
					continue
				}
				rd := NewReader(bytes.NewReader(c.Bytes()), 0, nil)
				for range c.Frames() {
					_, p, err := rd.Next()
					if err != nil {
						t.Fatal(err)
					}
					if want := model[0]; int(p[0]) != want.flow || int(p[32])<<8|int(p[33]) != want.n || len(p)+HeaderLen != want.size {
						t.Fatalf("frame %d of flow %d where frame %d of flow %d is due", int(p[32])<<8|int(p[33]), p[0], want.n, want.flow)
					}
					model = model[1:]
				}
				c.Release()
				continue
			}
			p := make([]byte, 2+r.IntN(10))
			if r.IntN(3) == 0 {
				p = make([]byte, 2+r.IntN(MaxPacket-1))
			}
			p[0], p[1] = byte(n>>8), byte(n)
			f := frame{r.IntN(len(flows)), n, HeaderLen + key.Size + len(p)}
			for range q.Push(SendPacket, named(byte(f.flow)), p, &flows[f.flow]) {
				heavy := f.flow
				for g := range flows {
					if weigh(g) > weigh(heavy) {
						heavy = g
					}
				}
				i := slices.IndexFunc(model, func(g frame) bool { return g.flow == heavy })
				model = slices.Delete(model, i, i+1)
			}
			model = append(model, f)
			total := 0
			for _, g := range model {
				total += g.size
			}
			if b, frames := q.Len(); b != total || frames != len(model) || b > q.MaxBytes || frames > q.MaxFrames {
				t.Fatalf("%d bytes in %d frames, want %d in %d", b, frames, total, len(model))
			}
		}
		if n := q.Trim(1000, 3); len(model)-n > 3 || q.Clear() != len(model)-n {
			t.Errorf("trimmed %d of %d", n, len(model))
		}
	}
}

func TestQueueDoesNotAllocate(t *testing.T) {
	q := Queue{MaxBytes: 1 << 20, MaxFrames: 1000}
	var f Flow
	p := make([]byte, 1400)
	if n := testing.AllocsPerRun(1000, func() {
		for range 100 {
			q.Push(SendPacket, named('a'), p, &f)
		}
		for c := q.Pop(); c != nil; c = q.Pop() {
			c.Release()
		}
	}); n > 1 && !raceEnabled {
		t.Errorf("%v allocations per 100 packets", n)
	}
}

func TestBufConn(t *testing.T) {
	near, far := net.Pipe()
	c := NewBufConn(near)
	defer c.Close()
	waits := 0
	c.BeforeRead = func() { waits++ }
	want := make([]byte, 300_000)
	for i := range want {
		want[i] = byte(i * 7)
	}
	go func() { far.Write(want) }()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read differs: %v", err)
	}
	if waits == 0 || waits > 20 || c.LastRead().IsZero() {
		t.Errorf("%d reads of the socket", waits)
	}
	if at := c.LastRead(); at == at.Round(0) {
		t.Errorf("%v has no monotonic reading: a clock that is set back would make silence shorter", at)
	}
	if c.big != nil {
		t.Error("an idle connection keeps a large buffer")
	}

	// Corked writes arrive at once on Flush, in order.
	back := make(chan []byte, 1)
	go func() {
		b := make([]byte, 1<<20)
		n, _ := io.ReadAtLeast(far, b, len(want)+6)
		back <- b[:n]
	}()
	c.Cork()
	c.Write([]byte("one"))
	c.Write(want) // longer than the buffer
	c.Write([]byte("two"))
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if b := <-back; string(b) != "one"+string(want)+"two" {
		t.Error("written differs")
	}
	far.Close()
	c.Cork()
	c.Write([]byte("x"))
	if err := c.Flush(); err == nil {
		t.Error("a held back write failed silently")
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("the failure was forgotten")
	}
}

func BenchmarkQueue(b *testing.B) {
	q := Queue{MaxBytes: 1 << 20, MaxFrames: 1000}
	var f Flow
	p := make([]byte, 1400)
	b.SetBytes(1400)
	for i := 0; b.Loop(); i++ {
		q.Push(SendPacket, peerPub, p, &f)
		if i%40 == 39 {
			for c := q.Pop(); c != nil; c = q.Pop() {
				c.Release()
			}
		}
	}
}

// BenchmarkQueueFull is a busy flow that pushes its own out, behind a frame that stays.
func BenchmarkQueueFull(b *testing.B) {
	q := Queue{MaxBytes: 512 << 10, MaxFrames: 2048}
	var calm, busy Flow
	p := make([]byte, 32)
	q.Push(SendPacket, peerPub, p, &calm)
	for b.Loop() {
		q.Push(SendPacket, peerPub, p, &busy)
	}
}

func BenchmarkReader(b *testing.B) {
	rd := NewReader(repeat(AppendPacket(nil, RecvPacket, peerPub, make([]byte, 1400))), 4<<10, nil)
	b.SetBytes(1400)
	for b.Loop() {
		rd.Next()
	}
}
