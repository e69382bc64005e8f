package client

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/derp"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// bubble runs a test in virtual time, on a network of its own.
func bubble(t *testing.T, f func(t *testing.T, w *world, rs *Regions, l log)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		rs, l := w.newRegions()
		f(t, w, rs, l)
		rs.Close()
		w.wg.Wait()
	})
}

func TestHomeAndOthers(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		notes := make(chan string, 10)
		packets := make(chan string, 10)
		for _, name := range []string{"one", "two"} {
			w.serve(name, good(func(_ *relay, ft derp.FrameType, p []byte) {
				switch ft {
				case derp.NotePreferred:
					notes <- fmt.Sprint(name, " ", p[0])
				case derp.SendPacket:
					packets <- name + " " + string(p[32:])
				}
			}))
		}
		rs.SetHome(1) // before the map is known
		rs.SetMap(mapOf(reg(1, "one"), reg(2, "two")))
		l.want(t, "up", 1)
		if n := <-notes; n != "one 1" {
			t.Errorf("note %q", n)
		}
		if len(w.dialTimes("two")) != 0 {
			t.Error("a region nobody needs was dialled")
		}
		peer := key.NewNode().Public()
		if err := rs.Send(2, peer, []byte("abcde"), 2); err != nil {
			t.Fatal(err)
		}
		l.want(t, "up", 2)
		for _, want := range []string{"two ab", "two cd", "two e"} {
			if p := <-packets; p != want {
				t.Errorf("got %q, want %q", p, want)
			}
		}
		// Idle: region 2 goes, home stays.
		idle := time.Now()
		if e := l.want(t, "down", 2); e.err != nil {
			t.Errorf("dropped for %v", e.err)
		}
		if d := time.Since(idle); d < 60*time.Second || d > 80*time.Second {
			t.Errorf("dropped after %v", d)
		}
		synctest.Wait() // its goroutine ends after it has told
		st := rs.Stats()
		if !st[0].Connected || !st[0].Home || st[1].Connected || st[1].Connecting || st[1].Sent != 3 || st[1].SentBytes != 5 {
			t.Errorf("%+v", st)
		}
		// A new home; the old one is told.
		rs.SetHome(2)
		l.want(t, "up", 2)
		got := []string{<-notes, <-notes}
		slices.Sort(got)
		if got[0] != "one 0" || got[1] != "two 1" || rs.Home() != 2 {
			t.Errorf("notes %q", got)
		}
		l.want(t, "down", 1)
		if d, err := rs.Ping(t.Context(), 2); err != nil || d != 0 {
			t.Errorf("ping: %v %v", d, err)
		}
		if _, err := rs.Ping(t.Context(), 1); !errors.Is(err, ErrNoRegion) {
			t.Errorf("ping of a region that is not connected: %v", err)
		}
	})
}

// TestCloseWritesWhatIsQueued: the last packets of a node reach a relay that takes them, and one that does not holds Close up for a moment only.
func TestCloseWritesWhatIsQueued(t *testing.T) {
	for _, reads := range []bool{true, false} {
		bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
			const n = 500
			stop := make(chan struct{})
			var got atomic.Int32
			w.serve("one", good(func(_ *relay, ft derp.FrameType, _ []byte) {
				if ft == derp.NotePreferred && !reads {
					<-stop
				}
				if ft == derp.SendPacket {
					got.Add(1)
				}
			}))
			rs.SetMap(mapOf(reg(1, "one")))
			rs.SetHome(1)
			l.want(t, "up", 1)
			synctest.Wait()
			peer := key.NewNode().Public()
			for range n {
				if err := rs.Send(1, peer, make([]byte, 1000), 0); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now()
			if !reads {
				time.AfterFunc(time.Minute, func() { close(stop) })
			}
			rs.Close()
			took := time.Since(began)
			synctest.Wait()
			if reads && (got.Load() != n || took != 0) {
				t.Errorf("%d of %d packets have come; Close took %v", got.Load(), n, took)
			}
			if !reads && (took < closeWait || took > 10*time.Second) {
				t.Errorf("Close took %v with a relay that does not read", took)
			}
		})
	}
}

func TestSendErrors(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		rs.SetMap(mapOf(reg(1, "one")))
		k := key.NewNode().Public()
		if err := rs.Send(9, k, []byte("x"), 0); !errors.Is(err, ErrNoRegion) {
			t.Errorf("unknown region: %v", err)
		}
		if err := rs.Send(1, k, make([]byte, derp.MaxPacket+1), 0); !errors.Is(err, ErrTooLarge) {
			t.Errorf("too large: %v", err)
		}
		rs.Close()
		rs.Close()
		if err := rs.Send(1, k, []byte("x"), 0); !errors.Is(err, ErrClosed) {
			t.Errorf("closed: %v", err)
		}
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
	})
}

func TestNextNodeIsTried(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		w.serve("b", func(r *relay) { r.nc.Write([]byte("SSH-2.0-x\r\n")) })
		req := make(chan string, 1)
		w.serve("c", good(func(r *relay, ft derp.FrameType, _ []byte) {
			if ft == derp.NotePreferred {
				req <- r.request
			}
		}))
		def := reg(1, "a", "b", "c")
		def.Nodes = slices.Insert(def.Nodes, 1, &tailcfg.DERPNode{Name: "s", HostName: "s", STUNOnly: true})
		rs.SetMap(mapOf(def))
		rs.SetHome(1)
		l.want(t, "up", 1)
		if r := <-req; !strings.Contains(r, "\r\nIdeal-Node: a\r\n") || !strings.HasPrefix(r, "GET /derp HTTP/1.1\r\nHost: c:3340\r\n") {
			t.Errorf("request %q", r)
		}
		if s := rs.Stats()[0]; s.Relay != "c" {
			t.Errorf("relay %q", s.Relay)
		}
		if len(w.dialTimes("s")) != 0 {
			t.Error("a STUN-only node was dialled")
		}
	})
}

func TestBadRelays(t *testing.T) {
	infoFor := func(r *relay, priv key.NodePrivate) {
		r.upgrade()
		_, p := r.next()
		k, _, _ := derp.CutKey(p)
		b, _ := derp.AppendServerInfo(nil, priv, k, derp.ServerInfo{})
		r.write(b)
		r.serveUntilGone(nil)
	}
	after := func(frames []byte) func(*relay) {
		return func(r *relay) {
			r.accept(derp.ServerInfo{})
			go func() { r.nc.Write(frames) }()
			r.serveUntilGone(nil)
		}
	}
	for _, tt := range []struct {
		name  string
		relay func(*relay)
		err   error
		text  string
	}{
		{"is not there", nil, nil, "connection refused"},
		{"hangs up", func(*relay) {}, io.ErrClosedPipe, ""},
		{"answers HTML", func(r *relay) { go r.nc.Read(make([]byte, 4096)); r.write([]byte("HTTP/1.1 200 OK\r\n\r\n<html>")) }, ErrUpgrade, "200 OK"},
		{"is no HTTP server", func(r *relay) { go r.nc.Read(make([]byte, 4096)); r.write([]byte("SSH-2.0-OpenSSH\r\n")) }, ErrUpgrade, "does not speak HTTP"},
		{"has an endless head", func(r *relay) {
			go r.nc.Read(make([]byte, 4096))
			r.write([]byte("HTTP/1.1 101 x\r\n" + strings.Repeat("a", 5000)))
		}, ErrUpgrade, "endless"},
		{"never answers", func(r *relay) { io.Copy(io.Discard, r.nc) }, context.DeadlineExceeded, ""},
		{"never greets", func(r *relay) {
			r.nc.Read(make([]byte, 4096))
			r.write([]byte("HTTP/1.1 101 x\r\n\r\n"))
			r.next()
		}, context.DeadlineExceeded, ""},
		{"greets badly", func(r *relay) {
			r.nc.Read(make([]byte, 4096))
			r.write(append([]byte("HTTP/1.1 101 x\r\n\r\n"), derp.AppendFrame(nil, derp.ServerKey, make([]byte, 40))...))
		}, derp.ErrGreeting, ""},
		{"greets with another frame", func(r *relay) {
			r.nc.Read(make([]byte, 4096))
			r.write(append([]byte("HTTP/1.1 101 x\r\n\r\n"), derp.AppendPing(nil, derp.Ping, [8]byte{})...))
		}, derp.ErrGreeting, "Ping"},
		{"does not admit us", func(r *relay) { r.upgrade(); r.next() }, ErrNotAdmitted, ""},
		{"is not who it says", func(r *relay) { infoFor(r, key.NewNode()) }, derp.ErrInfo, ""},
		{"sends an over-long frame", after(derp.AppendHeader(nil, derp.RecvPacket, derp.MaxPayload+1)), derp.ErrTooLarge, "RecvPacket"},
		{"sends garbage", after([]byte(strings.Repeat("\xff", 100))), derp.ErrTooLarge, ""},
		{"sends a short packet", after(derp.AppendFrame(nil, derp.RecvPacket, make([]byte, 31))), derp.ErrShort, ""},
		{"sends a short ping", after(derp.AppendFrame(nil, derp.Ping, nil)), derp.ErrShort, ""},
		{"sends a short restart", after(derp.AppendFrame(nil, derp.Restarting, nil)), derp.ErrShort, ""},
		{"sends a short goodbye", after(derp.AppendFrame(nil, derp.PeerGone, nil)), derp.ErrShort, ""},
		{"changes its key", after(derp.AppendServerKey(nil, key.NewNode().Public())), nil, "not the one its certificate names"},
		{"vanishes mid-frame", func(r *relay) {
			r.accept(derp.ServerInfo{})
			r.next() // NotePreferred: a write that fails would be told first
			r.nc.Write(derp.AppendHeader(nil, derp.RecvPacket, 100))
		}, nil, "unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
				if tt.relay != nil {
					w.serve("one", script(tt.relay))
				}
				rs.SetMap(mapOf(reg(1, "one")))
				rs.SetHome(1)
				e := l.want(t, "down", 1)
				if tt.err != nil && !errors.Is(e.err, tt.err) || !contains(e.err, tt.text) {
					t.Errorf("got %v", e.err)
				}
				// It is tried again, ever more seldom, and found once it is well.
				for range 7 {
					l.want(t, "down", 1)
				}
				times := w.dialTimes("one")
				if d := times[len(times)-1].Sub(times[len(times)-2]); d < 8*time.Second || d > 60*time.Second {
					t.Errorf("after %d failures tried again after %v", len(times)-1, d)
				}
				if d := times[1].Sub(times[0]); d > 9*time.Second {
					t.Errorf("first tried again after %v", d)
				}
				w.serve("one", good(nil))
				l.want(t, "up", 1)
			})
		})
	}
}

func TestOtherRegionThatFailsIsLeft(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		rs.SetMap(mapOf(reg(2, "two")))
		rs.Send(2, key.NewNode().Public(), []byte("x"), 0)
		l.want(t, "down", 2)
		time.Sleep(time.Hour)
		if n := len(w.dialTimes("two")); n != 1 {
			t.Errorf("dialled %d times for one packet", n)
		}
		if s := rs.Stats()[0]; s.Connecting || s.Dropped != 1 || s.Err == nil {
			t.Errorf("%+v", s)
		}
		// A further packet tries again, but not in a storm.
		for range 100 {
			rs.Send(2, key.NewNode().Public(), []byte("x"), 0)
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(w.dialTimes("two")); n < 2 || n > 6 {
			t.Errorf("dialled %d times in a second", n)
		}
	})
}

func TestRestarting(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		leave := make(chan time.Time, 1)
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{})
			go func() {
				r.nc.Write(derp.AppendRestarting(nil, 1500*time.Millisecond, 10*time.Second))
				w.serve("one", nil)
				leave <- time.Now()
				r.nc.Close()
			}()
			r.serveUntilGone(nil)
		}))
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		at := <-leave
		for range 10 {
			l.want(t, "down", 1)
		}
		times := w.dialTimes("one")
		if d := times[1].Sub(at); d != 1500*time.Millisecond {
			t.Errorf("came back after %v", d)
		}
		for i := 2; i < len(times); i++ { // and then tries quickly
			if d := times[i].Sub(times[i-1]); d > 400*time.Millisecond {
				t.Errorf("try %d after %v", i, d)
			}
		}
		w.serve("one", good(nil))
		l.want(t, "up", 1)
	})
}

func TestHostileRestartIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{})
			go func() { r.nc.Write(derp.AppendRestarting(nil, 1000*time.Hour, 1000*time.Hour)); r.nc.Close() }()
			r.serveUntilGone(nil)
		}))
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		start := time.Now()
		l.want(t, "up", 1)
		l.want(t, "up", 1)
		if d := time.Since(start); d > maxReconnectIn {
			t.Errorf("kept away for %v", d)
		}
	})
}

func TestSilentRelay(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		var asked time.Time
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{})
			for n := 0; ; {
				if ft, _ := r.next(); ft == derp.Ping {
					if n++; n == 2 { // the first is the one that measures
						asked = time.Now()
					}
				}
			}
		}))
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		start := time.Now()
		e := l.want(t, "down", 1)
		if !errors.Is(e.err, ErrTimeout) {
			t.Errorf("got %v", e.err)
		}
		synctest.Wait() // for asked
		if d := time.Since(start); asked.Sub(start) != silence || d != silence+answerTime {
			t.Errorf("asked after %v, gave up after %v", asked.Sub(start), d)
		}
	})
}

func TestKeepAlivesKeepAlive(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		pings := 0
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{})
			go func() {
				for range 20 {
					time.Sleep(64 * time.Second)
					if _, err := r.nc.Write(derp.AppendHeader(nil, derp.KeepAliveT, 0)); err != nil {
						return
					}
				}
			}()
			r.serveUntilGone(func(ft derp.FrameType, _ []byte) {
				if ft == derp.Ping {
					pings++
				}
			})
		}))
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		time.Sleep(20 * time.Minute)
		synctest.Wait() // for pings
		if n := len(w.dialTimes("one")); n != 1 || pings != 1 {
			t.Errorf("%d connections, %d pings", n, pings)
		}
		rs.Close()
		time.Sleep(2 * time.Minute) // the relay's own timer
	})
}

func TestWhatRelaysSay(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		peer := key.NewNode().Public()
		say := make(chan []byte)
		pong := make(chan []byte, 1)
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{})
			go func() {
				for b := range say {
					r.nc.Write(b)
				}
			}()
			r.serveUntilGone(func(ft derp.FrameType, p []byte) {
				if ft == derp.Pong {
					pong <- p
				}
			})
		}))
		defer close(say)
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		say <- derp.AppendPing(nil, derp.Ping, [8]byte{1, 2, 3})
		if p := <-pong; p[2] != 3 {
			t.Errorf("pong %x", p)
		}
		say <- derp.AppendPeerGone(nil, peer, derp.GoneNotHere)
		l.want(t, "gone", 1)
		if _, is := rs.Gone(1, peer); !is {
			t.Error("forgot that the peer is gone")
		}
		// Two packets in one write: one flush. And the peer is back.
		two := derp.AppendPacket(nil, derp.RecvPacket, peer, []byte("a"))
		say <- derp.AppendPacket(two, derp.RecvPacket, peer, []byte("b"))
		for _, want := range []event{{"packet", 1, "a", nil}, {"packet", 1, "b", nil}, {"flush", 1, "", nil}} {
			if e := <-l; e != want {
				t.Errorf("got %v, want %v", e, want)
			}
		}
		if _, is := rs.Gone(1, peer); is {
			t.Error("the peer has spoken and counts as gone")
		}
		say <- derp.AppendFrame(nil, derp.Health, []byte("sick"))
		say <- derp.AppendFrame(nil, 0x7f, []byte("of a later version"))
		say <- nil // the last has been read once the next write is taken
		synctest.Wait()
		if s := rs.Stats()[0]; s.Health != "sick" || s.Received != 2 || s.ReceivedBytes != 2 {
			t.Errorf("%+v", s)
		}
		say <- derp.AppendFrame(nil, derp.Health, nil)
		synctest.Wait()
		if s := rs.Stats()[0]; s.Health != "" {
			t.Errorf("%+v", s)
		}
	})
}

func TestGoneIsBounded(t *testing.T) {
	rs := NewRegions(RegionsConfig{PrivateKey: key.NewNode(), Handler: make(log, 10*maxGone)})
	defer rs.Close()
	h := &relayed{rs, newRegion(rs, 1)}
	for range 2 * maxGone {
		h.PeerGone(1, key.NewNode().Public(), 0)
	}
	if n := len(h.r.gone); n != maxGone {
		t.Errorf("%d peers remembered", n)
	}
}

func TestRateLimitIsKept(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		got := 0
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{TokenBucketBytesPerSecond: 100_000, TokenBucketBytesBurst: 200_000})
			r.serveUntilGone(func(ft derp.FrameType, p []byte) {
				if ft == derp.SendPacket {
					got += len(p) + derp.HeaderLen
				}
			})
		}))
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		limited := 0
		for range 1000 { // 10 s at 1 MB/s
			if err := rs.Send(1, key.NodePublic{}, make([]byte, 10_000), 0); errors.Is(err, ErrRateLimited) {
				limited++
			}
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait() // for got
		if got < 1_100_000 || got > 1_210_000 || limited < 870 {
			t.Errorf("sent %d bytes in 10 s, %d packets refused", got, limited)
		}
	})
}

func TestPacketsBeforeTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		open := make(chan struct{})
		packets := make(chan string, 1000)
		w.serve("two", script(func(r *relay) {
			<-open
			r.accept(derp.ServerInfo{})
			r.serveUntilGone(func(ft derp.FrameType, p []byte) {
				if ft == derp.SendPacket {
					packets <- string(p[32:])
				}
			})
		}))
		rs.SetMap(mapOf(reg(2, "two")))
		for i := range 1000 {
			rs.Send(2, key.NodePublic{}, []byte(fmt.Sprint(i)), 0)
		}
		close(open)
		l.want(t, "up", 2)
		synctest.Wait()
		if n := len(packets); n != idleFrames {
			t.Errorf("%d packets were kept", n)
		}
		if p := <-packets; p != fmt.Sprint(1000-idleFrames) {
			t.Errorf("the oldest kept is %s", p)
		}
	})
}

func TestSlowRelayLosesTheOldest(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		stall := make(chan struct{})
		last := make(chan string, 10000)
		w.serve("one", script(func(r *relay) {
			r.accept(derp.ServerInfo{})
			<-stall
			r.serveUntilGone(func(ft derp.FrameType, p []byte) {
				if ft == derp.SendPacket {
					last <- string(p[32:36])
				}
			})
		}))
		rs.SetMap(mapOf(reg(1, "one")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		for i := range 5000 { // 7 MB, of which 1 MiB is kept: no Send blocks
			rs.Send(1, key.NodePublic{}, append([]byte(fmt.Sprintf("%04d", i)), make([]byte, 1396)...), 0)
		}
		close(stall)
		synctest.Wait()
		var tail string
		n := len(last)
		for range n {
			tail = <-last
		}
		if tail != "4999" || n < 700 || n > 850 {
			t.Errorf("%d packets arrived, the last %s", n, tail)
		}
		if s := rs.Stats()[0]; s.Dropped != uint64(5000-n) {
			t.Errorf("%d dropped", s.Dropped)
		}
	})
}

func TestMapChanges(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
		for _, n := range []string{"a", "b"} {
			w.serve(n, good(nil))
		}
		rs.SetMap(mapOf(reg(1, "a")))
		rs.SetHome(1)
		l.want(t, "up", 1)
		rs.SetMap(mapOf(reg(1, "b", "a"))) // still there
		synctest.Wait()
		if s := rs.Stats()[0]; !s.Connected || s.Relay != "a" {
			t.Errorf("%+v", s)
		}
		rs.SetMap(mapOf(reg(1, "b")))
		l.want(t, "down", 1)
		l.want(t, "up", 1)
		if s := rs.Stats()[0]; s.Relay != "b" {
			t.Errorf("%+v", s)
		}
		rs.SetMap(mapOf())
		l.want(t, "down", 1)
		if err := rs.Send(1, key.NodePublic{}, []byte("x"), 0); !errors.Is(err, ErrNoRegion) {
			t.Errorf("got %v", err)
		}
		rs.SetMap(mapOf(reg(1, "a")))
		l.want(t, "up", 1)
		n := len(w.dialTimes("a"))
		rs.Rebind()
		l.want(t, "down", 1)
		start := time.Now()
		l.want(t, "up", 1)
		if len(w.dialTimes("a")) != n+1 || time.Since(start) != 0 {
			t.Errorf("reconnected after %v", time.Since(start))
		}
	})
}

// TestMapChangesWhileDialling: a relay that leaves the map while it is dialled is not used; one that is in it is dialled at once.
func TestMapChangesWhileDialling(t *testing.T) {
	for name, tt := range map[string]struct {
		want  func(*Regions)
		after *tailcfg.DERPRegion
	}{
		"home":        {func(rs *Regions) { rs.SetHome(1) }, reg(1, "b")},
		"Connect":     {func(rs *Regions) { rs.Connect(1) }, reg(1, "b")},
		"Send":        {func(rs *Regions) { rs.Send(1, key.NodePublic{}, []byte("x"), 0) }, reg(1, "b")},
		"a new entry": {func(rs *Regions) { rs.SetHome(1) }, &tailcfg.DERPRegion{Nodes: []*tailcfg.DERPNode{{Name: "b", HostName: "a", IPv4: "192.0.2.2", IPv6: "none"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
				w.serve("a", script(func(r *relay) {
					rs.SetMap(mapOf(tt.after, reg(2, "c")))
					r.accept(derp.ServerInfo{})
					r.serveUntilGone(nil)
				}))
				w.serve("b", good(nil))
				w.serve("192.0.2.2", good(nil))
				tt.after.RegionID = 1
				rs.SetMap(mapOf(reg(1, "a")))
				start := time.Now()
				tt.want(rs)
				l.want(t, "up", 1)
				if s := rs.Stats()[0]; s.Relay != "b" || time.Since(start) > time.Second {
					t.Errorf("after %v connected to %q", time.Since(start), s.Relay)
				}
			})
		})
	}
	t.Run("region removed", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world, rs *Regions, l log) {
			w.serve("a", script(func(r *relay) {
				rs.SetMap(mapOf())
				r.accept(derp.ServerInfo{})
				r.serveUntilGone(nil)
			}))
			rs.SetMap(mapOf(reg(1, "a")))
			rs.SetHome(1)
			time.Sleep(time.Hour)
			if n := len(w.dialTimes("a")); n != 1 || len(l) != 0 {
				t.Errorf("%d dials, %d events", n, len(l))
			}
			w.serve("a", good(nil))
			rs.SetMap(mapOf(reg(1, "a")))
			l.want(t, "up", 1)
		})
	})
}

func TestCloseAtAnyTime(t *testing.T) {
	for delay := range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			rs, _ := w.newRegions()
			w.serve("one", good(nil))
			w.serve("two", script(func(r *relay) { io.Copy(io.Discard, r.nc) })) // never answers
			rs.SetMap(mapOf(reg(1, "one"), reg(2, "two"), reg(3, "three")))
			var wg sync.WaitGroup
			wg.Go(func() { rs.SetHome(1) })
			for id := 1; id < 4; id++ {
				wg.Go(func() {
					for range 50 {
						rs.Send(id, key.NodePublic{}, []byte("x"), 0)
						time.Sleep(time.Millisecond)
					}
				})
			}
			time.Sleep(time.Duration(delay) * 3 * time.Millisecond)
			wg.Go(rs.Close)
			rs.Close()
			wg.Wait()
			w.wg.Wait()
		})
	}
}

func TestDialCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.serve("one", script(func(r *relay) { io.Copy(io.Discard, r.nc) }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := Dial(ctx, Options{PrivateKey: key.NewNode(), Dial: w.dial, PlainHTTP: true}, reg(1, "one"))
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		for _, r := range []*tailcfg.DERPRegion{nil, reg(1)} {
			if _, err := Dial(t.Context(), Options{}, r); !errors.Is(err, ErrNoRegion) {
				t.Errorf("got %v", err)
			}
		}
		w.wg.Wait()
	})
}

func TestConnClosedBeforeServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.serve("one", good(nil))
		c, err := Dial(t.Context(), Options{PrivateKey: key.NewNode(), Dial: w.dial, PlainHTTP: true}, reg(1, "one"))
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		c.Close()
		if err := c.Serve(make(log, 9)); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
		if _, err := c.Ping(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
		w.wg.Wait()
	})
}

func TestTargets(t *testing.T) {
	n := func(host, v4, v6 string, port int) *tailcfg.DERPNode {
		return &tailcfg.DERPNode{HostName: host, IPv4: v4, IPv6: v6, DERPPort: port}
	}
	for _, tt := range []struct {
		node  *tailcfg.DERPNode
		plain bool
		want  target
	}{
		{n("h", "", "", 0), false, target{"h", 443, "h", "h", false}},
		{n("h", "192.0.2.1", "none", 8443), false, target{"h", 8443, "192.0.2.1", "", false}},
		{n("h", "none", "2001:db8::1", 0), false, target{"h", 443, "", "2001:db8::1", false}},
		{n("h", "2001:db8::1", "junk", 0), false, target{"h", 443, "", "", false}},
		{n("192.0.2.1", "", "", 0), false, target{"192.0.2.1", 443, "192.0.2.1", "", false}},
		{n("h", "", "", 0), true, target{"h", plainPort, "h", "h", true}},
		{n("http://h", "", "", 0), false, target{"h", 80, "h", "h", true}},
		{n("http://h:99/", "", "", 0), false, target{"h", 99, "h", "h", true}},
		{n("http://[::1]:99", "", "", 7), false, target{"::1", 7, "", "::1", true}},
		{n("http://[::1]", "", "", 7), false, target{"::1", 7, "", "::1", true}},
	} {
		if got := targetOf(&Options{PlainHTTP: tt.plain}, tt.node); got != tt.want {
			t.Errorf("%+v: got %+v, want %+v", tt.node, got, tt.want)
		}
	}
}

// TestPinIsOfTheLeaf: the handshake proves possession of the first certificate's key only, whatever that is named.
func TestPinIsOfTheLeaf(t *testing.T) {
	_, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	cert := func(cn string, age time.Duration) *x509.Certificate {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: cn}, DNSNames: []string{"relay.test"},
			NotBefore: time.Now().Add(-age - time.Hour), NotAfter: time.Now().Add(-age + time.Hour)}
		der, err := x509.CreateCertificate(nil, tmpl, tmpl, priv.Public(), priv)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	meta := cert(derp.MetaCertPrefix+strings.Repeat("ab", 32), 0)
	pinned, other, old := cert("relay.test", 0), cert("other", 0), cert("relay.test", 2*time.Hour)
	for name, tt := range map[string]struct {
		pin   *x509.Certificate
		chain []*x509.Certificate
		ok    bool
	}{
		"alone":                     {pinned, []*x509.Certificate{pinned}, true},
		"with meta certificate":     {pinned, []*x509.Certificate{pinned, meta}, true},
		"named as meta certificate": {meta, []*x509.Certificate{meta}, true},
		"after a meta certificate":  {pinned, []*x509.Certificate{meta, pinned}, false},
		"after another":             {pinned, []*x509.Certificate{other, pinned}, false},
		"before another":            {pinned, []*x509.Certificate{pinned, other}, false},
		"only a meta certificate":   {pinned, []*x509.Certificate{meta}, false},
		"out of date":               {old, []*x509.Certificate{old}, false},
		"none":                      {pinned, nil, false},
	} {
		n := &tailcfg.DERPNode{HostName: "relay.test", CertName: fmt.Sprintf("sha256-raw:%x", sha256.Sum256(tt.pin.Raw))}
		conf := tlsConfig(&Options{}, n, target{host: "relay.test"})
		err := conf.VerifyConnection(tls.ConnectionState{PeerCertificates: tt.chain})
		if tt.ok != (err == nil) || err != nil && !errors.Is(err, ErrPin) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRequestCannotBeSplit(t *testing.T) {
	r := string(request(target{host: "h\r\nX: y", port: 443}, true, "n\r\nEvil: 1"))
	if strings.Contains(r, "\r\nX") || strings.Contains(r, "\r\nEvil") {
		t.Errorf("%q", r)
	}
	if r := string(request(target{host: "::1", port: 1}, false, "")); !strings.Contains(r, "Host: [::1]:1\r\n") {
		t.Errorf("%q", r)
	}
}

// FuzzClientRecv lets a relay send hostile bytes, after a good handshake or from the first byte.
func FuzzClientRecv(f *testing.F) {
	k := key.PrivateFromRaw[key.Node]([32]byte{5})
	f.Add(true, derp.AppendPacket(nil, derp.RecvPacket, k.Public(), []byte("x")))
	f.Add(true, derp.AppendPeerGone(nil, k.Public(), 1))
	f.Add(true, derp.AppendRestarting(nil, time.Hour, time.Hour))
	f.Add(true, derp.AppendPing(nil, derp.Ping, [8]byte{}))
	f.Add(true, derp.AppendHeader(nil, derp.RecvPacket, 1<<31-1))
	f.Add(true, derp.AppendFrame(nil, derp.ServerInfoT, make([]byte, 50)))
	f.Add(false, []byte("HTTP/1.1 101 x\r\n\r\n"))
	f.Add(false, []byte("HTTP/1.1 500 x\r\n\r\n"))
	f.Fuzz(func(t *testing.T, greet bool, data []byte) {
		w := newWorld()
		w.serve("one", script(func(r *relay) {
			if greet {
				r.accept(derp.ServerInfo{})
				w.wg.Go(func() { io.Copy(io.Discard, r.nc) }) // what the client writes must not block it
			} else {
				r.nc.Read(make([]byte, 4096))
			}
			r.write(data)
		}))
		defer w.wg.Wait()
		c, err := Dial(t.Context(), Options{PrivateKey: k, Dial: w.dial, PlainHTTP: true}, reg(1, "one"))
		if err != nil {
			return
		}
		c.Serve(drop{})
	})
}

type drop struct{}

func (drop) Packet(int, key.NodePublic, []byte) {}
func (drop) Flush(int)                          {}
func (drop) PeerGone(int, key.NodePublic, byte) {}
func (drop) State(int, bool, error)             {}
