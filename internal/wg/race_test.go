package wg

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/tailnode/tailnode/internal/key"
)

// pipe is a Conduit to a device's queue of messages, as a socket would be.
type pipe chan []byte

func (c pipe) Send(b []byte, seg int) error {
	for ; len(b) > 0; b = b[min(seg, len(b)):] {
		select {
		case c <- bytes.Clone(b[:min(seg, len(b))]):
		default: // lost
		}
	}
	return nil
}

// TestCloseRacesEverything closes devices amid traffic, handshakes, changes of keys and of peers.
func TestCloseRacesEverything(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	for range rounds {
		in := [2]pipe{make(pipe, 256), make(pipe, 256)}
		var devs [2]*Device
		for i := range devs {
			devs[i] = newDevice(t, func(c *Config) { c.Handshaked = func(p *Peer) { p.Stats() } })
		}
		var peers [2]*Peer
		for i := range devs {
			peers[i], _ = devs[i].AddPeer(devs[1-i].Public(), in[1-i], nil)
		}
		stop := make(chan struct{})
		arrived := make(chan struct{}, 1)
		var readers, writers sync.WaitGroup
		for i := range devs {
			for range 2 {
				readers.Go(func() {
					n := 0
					for {
						select {
						case m := <-in[i]:
							if pkt, _, err := devs[i].Receive(nil, m, in[1-i]); err == nil && pkt != nil {
								if n++; n == 20 {
									select {
									case arrived <- struct{}{}:
									default:
									}
								}
							} else if err != nil && !oneOf(err) {
								t.Error(err)
							}
						case <-stop:
							return
						}
					}
				})
			}
			for n := range uint32(3) {
				writers.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						if err := peers[i].Send(src(ip4(1280, n), ip4(1280, n), ip4(64, n))); errors.Is(err, ErrClosed) {
							return
						}
					}
				})
			}
		}
		<-arrived
		var closers sync.WaitGroup
		closers.Go(func() {
			k := key.NewNode()
			if err := devs[0].SetPrivateKey(k); err != nil && !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
			if p, err := devs[1].AddPeer(k.Public(), in[0], nil); err == nil {
				p.Rekey()
				p.Remove()
			}
		})
		for i := range devs {
			closers.Go(devs[i].Close)
			closers.Go(devs[i].Close)
		}
		closers.Wait()
		close(stop)
		writers.Wait()
		readers.Wait()
		for _, d := range devs {
			if d.table.live != 0 || len(d.table.pending) != 0 || len(d.sched.heap) != 0 || d.stage.bytes != 0 || len(d.pool.free) != 0 || d.pool.out != 0 {
				t.Errorf("left after Close: %d sessions, %d handshakes, %d deadlines, %d bytes, %d buffers",
					d.table.live, len(d.table.pending), len(d.sched.heap), d.stage.bytes, len(d.pool.free)+d.pool.out)
			}
		}
	}
}
