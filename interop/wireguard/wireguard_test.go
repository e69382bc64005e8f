// Package wireguard holds our WireGuard engine against wireguard-go, in virtual time.
package wireguard

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailnode/tailnode/internal/wg"
)

func TestEitherInitiates(t *testing.T) {
	for _, who := range []string{"ours", "theirs"} {
		t.Run(who, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 1)
				defer r.close()
				if who == "ours" {
					r.sendOurs(100, 1, 2, 3)
				} else {
					r.sendTheirs(100, 1, 2, 3)
				}
				time.Sleep(100 * time.Millisecond)
				if !r.peer.HasSession() {
					t.Fatal("no session")
				}
				if who == "ours" {
					r.sendTheirs(100, 1, 2, 3)
				} else {
					r.sendOurs(100, 1, 2, 3)
				}
				for i, n := range []int{24, 25, 39, 40, 41, 1000, 1279, 1280, 1404, 1405, 1419, 1420} {
					r.sendOurs(n, uint32(4+i))
					r.sendTheirs(n, uint32(4+i))
				}
				time.Sleep(100 * time.Millisecond)
				r.want(1, 15)
			})
		})
	}
}

// TestRekeyUnderTraffic runs for eight minutes in which both sides send all the time. The
// network loses nothing, so neither may the engines, over all rekeys.
func TestRekeyUnderTraffic(t *testing.T) {
	for _, who := range []string{"ours", "theirs", "both"} {
		t.Run(who, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2)
				defer r.close()
				inits := [2]int{}
				r.l.seen = func(toTheirs bool, m []byte) {
					if m[0] == 1 && toTheirs {
						inits[0]++
					} else if m[0] == 1 {
						inits[1]++
					}
				}
				if who != "theirs" {
					r.sendOurs(100, 0)
				}
				if who != "ours" {
					r.sendTheirs(100, 0)
				}
				time.Sleep(8 * time.Second)
				const n = 480 * 20
				for i := range uint32(n) {
					r.sendOurs(200, i+1)
					r.sendTheirs(200, i+1)
					time.Sleep(50 * time.Millisecond)
				}
				time.Sleep(time.Second)
				r.want(1, n)
				t.Logf("initiations: ours %d, theirs %d", inits[0], inits[1])
				if sum := inits[0] + inits[1]; sum < 4 || sum > 12 {
					t.Errorf("%d initiations in eight minutes", sum)
				}
			})
		})
	}
}

// TestHostileNetwork loses, reorders, duplicates and replays for seven minutes of traffic. No
// packet may arrive twice, and when the network is well again all must arrive.
func TestHostileNetwork(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, seed)
				defer r.close()
				r.l.set(func() {
					r.l.spread = 60 * time.Millisecond
					r.l.loss, r.l.dup, r.l.replay = 0.25, 0.2, 0.2
				})
				const n = 420 * 10
				for i := range uint32(n) {
					r.sendOurs(200, i+1)
					r.sendTheirs(200, i+1)
					time.Sleep(100 * time.Millisecond)
				}
				r.l.set(func() { r.l.loss, r.l.spread = 0, 0 })
				r.sendOurs(200, n+1)
				r.sendTheirs(200, n+1)
				time.Sleep(30 * time.Second)
				const m = n + 100
				for i := uint32(n + 2); i <= m; i++ {
					r.sendOurs(200, i)
					r.sendTheirs(200, i)
					time.Sleep(10 * time.Millisecond)
				}
				time.Sleep(time.Second)
				r.want(n+1, m)
				r.mu.Lock()
				defer r.mu.Unlock()
				for at := range r.got {
					if len(r.got[at]) < m*6/10 {
						t.Errorf("side %d: only %d of %d packets came", at, len(r.got[at]), m)
					}
					for id, c := range r.got[at] {
						if c > 1 {
							t.Errorf("side %d: packet %d came %d times", at, id, c)
						}
					}
				}
				t.Logf("ours %d, theirs %d of %d; refused: %v", len(r.got[0]), len(r.got[1]), m, r.errs)
				for _, err := range []error{wg.ErrReplay, wg.ErrUnknownIndex} {
					if r.errs[err] == 0 {
						t.Errorf("nothing was refused with %q", err)
					}
				}
			})
		})
	}
}

func TestSimultaneousInitiation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 4)
		defer r.close()
		for round := range uint32(3) {
			r.sendOurs(100, 10*round)
			r.sendTheirs(100, 10*round)
			time.Sleep(time.Second)
			r.sendOurs(100, 10*round+1)
			r.sendTheirs(100, 10*round+1)
			time.Sleep(12 * time.Second)
			r.want(10*round, 10*round+1)
			time.Sleep(4 * time.Minute) // the session is gone then
			if r.peer.HasSession() {
				t.Error("an idle session outlived its time")
			}
		}
	})
}

// TestCookieFromThem has wireguard-go under load: our initiation gets a cookie, and the next
// one, with it, a response.
func TestCookieFromThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 5)
		defer r.close()
		cookies, proved := 0, 0
		r.l.seen = func(toTheirs bool, m []byte) {
			if m[0] == 3 && len(m) == 64 && !toTheirs {
				cookies++
			}
			if m[0] == 1 && toTheirs && [16]byte(m[132:]) != [16]byte{} {
				proved++
			}
		}
		flood := func() {
			msgs := make([][]byte, 900)
			for i := range msgs {
				msgs[i] = junk(r.pub[1])
			}
			for _, m := range msgs {
				r.l.deliver[toTheirs](m)
			}
		}
		r.sendOurs(100, 1)
		for range 40 {
			flood()
			time.Sleep(250 * time.Millisecond)
			if r.peer.HasSession() {
				break
			}
		}
		r.sendTheirs(100, 1)
		time.Sleep(time.Second)
		r.want(1, 1)
		if cookies == 0 || proved == 0 {
			t.Errorf("%d cookie replies, %d initiations with a cookie", cookies, proved)
		}
	})
}

// TestCookieFromUs is the same with us under load.
func TestCookieFromUs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 6)
		defer r.close()
		cookies, proved := 0, 0
		r.l.seen = func(toTheirs bool, m []byte) {
			if m[0] == 3 && toTheirs {
				cookies++
			}
			if m[0] == 1 && !toTheirs && [16]byte(m[132:]) != [16]byte{} {
				proved++
			}
		}
		flood := func() {
			for range 300 {
				r.ours.Receive(nil, junk(r.pub[0]), nil)
			}
		}
		flood()
		r.sendTheirs(100, 1)
		for range 100 {
			time.Sleep(100 * time.Millisecond)
			flood()
			if r.peer.HasSession() {
				break
			}
		}
		r.sendOurs(100, 1)
		time.Sleep(time.Second)
		r.want(1, 1)
		if cookies == 0 || proved == 0 {
			t.Errorf("%d cookie replies, %d initiations with a cookie", cookies, proved)
		}
	})
}
