package netstack

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestSmallWrites: writes of mixed sizes in bursts arrive whole and in order, whatever the receiver's pace, up to a
// close right behind the last.
func TestSmallWrites(t *testing.T) {
	p := newPair(t, nil)
	l := listen(t, p.b, "[::]:80")
	var wg sync.WaitGroup
	for seed := range uint64(8) {
		c, d := connect(t, p.a, l, b4)
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 9))
			var sent bytes.Buffer
			done := make(chan []byte)
			go func() {
				var got bytes.Buffer
				b := make([]byte, 3000)
				if seed%2 == 1 {
					b = b[:60] // slow, so that the sender's buffer fills
				}
				for {
					n, err := d.Read(b)
					got.Write(b[:n])
					if err != nil {
						if err != io.EOF {
							t.Error(err)
						}
						done <- got.Bytes()
						return
					}
				}
			}()
			for sent.Len() < 4<<20 {
				b := make([]byte, 1+r.IntN([]int{10, 1000, 9000}[r.IntN(3)]))
				for i := range b {
					b[i] = byte(sent.Len() + i)
				}
				b[0] = byte(r.Uint32())
				sent.Write(b)
				if n, err := c.Write(b); n != len(b) || err != nil {
					t.Error(n, err)
					return
				}
			}
			if seed%3 == 0 {
				closeWrite(t, c)
			} else {
				c.Close()
			}
			if got := <-done; !bytes.Equal(got, sent.Bytes()) {
				t.Errorf("%d: %d bytes arrived of %d, or not the same", seed, len(got), sent.Len())
			}
		})
	}
	wg.Wait()
}

// TestGatheredReachesPeer: what was gathered leaves by itself, with nobody writing, reading or closing after it.
func TestGatheredReachesPeer(t *testing.T) {
	p := newPair(t, nil)
	l := listen(t, p.b, "[::]:80")
	c, d := connect(t, p.a, l, b6)
	d.SetDeadline(time.Now().Add(5 * time.Minute))
	for range 500 {
		for range 3 {
			if _, err := c.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
		b := make([]byte, 9)
		if _, err := io.ReadFull(d, b); err != nil || string(b) != "abcabcabc" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	closeWrite(t, c)
	for range 3 {
		if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("small write after CloseWrite: %v", err)
		}
	}
	c.(*conn).abort()
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("small write after abort: %v", err)
	}
}

// TestNoHole: should the stack not take what was gathered, the connection ends, at both ends.
func TestNoHole(t *testing.T) {
	p := newPair(t, nil)
	l := listen(t, p.b, "[::]:80")
	cc, d := connect(t, p.a, l, b4)
	c := cc.(*conn)
	none := new(budget) // of which the buffer cannot be stretched
	none.init(0, 0)
	c.sm.Lock()
	c.wgrow.b = none
	c.sm.Unlock()
	for failed := false; !failed; {
		c.sm.Lock()
		for b := make([]byte, 64<<10); ; {
			if _, err := c.pushLocked(b); err != nil {
				break // full, for the peer reads nothing; unless it has acknowledged something by the next line
			}
		}
		c.buf = gatherBuffers.Get().(*[gatherMax + smallWrite]byte)
		c.pend = append(c.buf[:0], "gathered"...)
		c.flushLocked()
		failed = c.failed
		c.sm.Unlock()
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
	if _, err := io.Copy(io.Discard, d); !errors.Is(err, ErrReset) {
		t.Errorf("the peer reads %v", err)
	}
}
