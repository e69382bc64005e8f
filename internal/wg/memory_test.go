package wg

import (
	"crypto/rand"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// heap returns how many bytes are in use; what a test before has left may make that less later.
func heap() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// addWithSession gives d a peer with a session that carried packets each way, out of order, so
// that it has all that a session can have. real says whether it comes from a handshake or, much
// faster, is put there as a handshake would.
func addWithSession(t testing.TB, d *Device, w *wire, real bool) *Peer {
	var s *session // the other end's
	var p *Peer
	if real {
		k := key.NewNode()
		id, _ := newIdentity(k)
		p, _ = d.AddPeer(k.Public(), w, nil)
		pub := d.Public().Raw()
		ss, _ := dh(id.priv, &pub)
		var msg [sizeInitiation]byte
		st, err := initiate(&msg, id, &pub, &ss, newEphemeral(), 1, stampOf(d.start))
		if err != nil {
			t.Fatal(err)
		}
		putMACs(msg[:], &pub, nil)
		if _, _, err := d.Receive(nil, msg[:], nil); err != nil {
			t.Fatal(err)
		}
		resp := w.take()[0]
		ks, err := st.finish((*[sizeResponse]byte)(resp), id, &zeroPSK)
		if err != nil {
			t.Fatal(err)
		}
		s = &session{remote: le.Uint32(resp[rSender:]), send: newAEAD(&ks.send)}
	} else {
		var pub [32]byte
		rand.Read(pub[:])
		p, _ = d.AddPeer(key.NodePublicFromRaw(pub), w, nil)
		var k keys
		rand.Read(k.recv[:])
		now := d.now()
		p.mu.Lock()
		p.next = newSession(p, d.table.reserve(p), 1, false, now, &k)
		d.table.insert(p.next)
		p.mu.Unlock()
		d.sched.wakeBy(p, now+d.t.rejectAfterTime)
		s = &session{remote: p.next.index, send: newAEAD(&k.recv)}
	}
	receive := func(counter uint64) {
		s.counter = counter
		var m [sizeHeader + 32 + sizeTag]byte
		copy(m[sizeHeader:], ip4(24, 1))
		sealAt(m[:], s, 32)
		if _, _, err := d.Receive(nil, m[:], nil); err != nil {
			t.Fatal(err)
		}
	}
	receive(0)
	if err := p.Send(src(ip4(100, 1))); err != nil {
		t.Fatal(err)
	}
	receive(9)
	receive(5)
	w.take()
	return p
}

// TestIdlePeersAreCheap adds 10,000 peers with sessions, lets them go idle, and weighs them.
func TestIdlePeersAreCheap(t *testing.T) { synctest.Test(t, testIdlePeers) }

func testIdlePeers(t *testing.T) {
	n := 10_000
	if testing.Short() {
		n = 500
	}
	d := newDevice(t, nil)
	w := new(wire)
	idle := func() {
		time.Sleep(60 * time.Second)
		synctest.Wait()
		w.take()
	}
	addWithSession(t, d, w, true)
	idle()
	one, goroutines := heap(), runtime.NumGoroutine()
	var peers []*Peer
	for i := range n - 1 {
		peers = append(peers, addWithSession(t, d, w, i < 100))
	}
	busy := heap()
	idle()
	all := heap()
	per := (all - one) / float64(n-1)
	t.Logf("%d peers with sessions: %.1f MB more than one, %.0f bytes each; before they were idle %.1f MB",
		n, (all-one)/1e6, per, (busy-one)/1e6)
	if per > 2500 {
		t.Errorf("%.0f bytes per idle peer", per)
	}
	if g := runtime.NumGoroutine(); g > goroutines+10 { // timers of other tests may run
		t.Errorf("%d goroutines, were %d", g, goroutines)
	}
	for _, p := range peers {
		if !p.HasSession() {
			t.Fatal("a session is gone")
		}
	}
	time.Sleep(3 * time.Minute)
	synctest.Wait()
	if len(w.msgs) != 0 {
		t.Errorf("idle peers sent %d messages", len(w.msgs))
	}
	if d.table.live != 0 || len(d.sched.heap) != 0 || len(d.pool.free) != 0 {
		t.Errorf("left behind: %d sessions, %d deadlines, %d buffers", d.table.live, len(d.sched.heap), len(d.pool.free))
	}
	t.Logf("with the sessions over: %.0f bytes each", (heap()-one)/float64(n-1))
}
