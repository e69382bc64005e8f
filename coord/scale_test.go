package coord

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// BenchmarkJoin measures n nodes that join at once, register over Noise, open a map stream each and see all the others.
// Clients and server share the process, so the memory is that of both.
func BenchmarkJoin(b *testing.B) {
	for _, n := range []int{100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for range b.N {
				s := &Server{Dir: b.TempDir()}
				must(b, s.Start(b.Context()))
				k := newKey(b, s, AuthKeyOptions{Reusable: true})
				x := newCrowd(b, s, k, n, 64)
				x.settle(b)
				b.ReportMetric(float64(x.took.Milliseconds()), "ms-to-all-see-all")
				runtime.GC()
				var ms runtime.MemStats
				runtime.ReadMemStats(&ms)
				b.ReportMetric(float64(ms.HeapInuse+ms.StackInuse)/1e6, "MB-client+server")
				x.close()
				must(b, s.Close())
			}
		})
	}
}

// BenchmarkFanOut measures one change until every one of n nodes has read it.
func BenchmarkFanOut(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := &Server{}
			must(b, s.Start(b.Context()))
			k := newKey(b, s, AuthKeyOptions{Reusable: true})
			x := newCrowd(b, s, k, n, 64)
			x.settle(b)
			for b.Loop() {
				x.expect(n - 1)
				s.mu.Lock()
				s.woken = time.Time{} // a change after a quiet time: nothing to wait for
				nd := s.net.byKey[x.first]
				nd.live.Disco = key.NewDisco().Public()
				s.net.touch(nd, disco)
				s.changed()
				s.mu.Unlock()
				x.wait(b)
			}
			x.close()
			must(b, s.Close())
		})
	}
}

// crowd is n nodes whose streams count what they hear.
type crowd struct {
	n     int
	took  time.Duration
	start time.Time
	first key.NodePublic
	trs   []*http.Transport
	wg    sync.WaitGroup
	body  []interface{ Close() error }

	mu      sync.Mutex
	cond    *sync.Cond
	knowAll int // streams that know all others
	patches int // patches still to be heard
	err     error
}

// newCrowd has n nodes join, atOnce at a time.
func newCrowd(b testing.TB, s *Server, k string, n, atOnce int) *crowd {
	c := &crowd{n: n, start: time.Now()}
	c.cond = sync.NewCond(&c.mu)
	sem := make(chan struct{}, atOnce)
	for i := range n {
		p := newPeer(b, s, "crowd")
		p.compress = true
		c.trs = append(c.trs, p.tr)
		if i == 0 {
			c.first = p.key.Public()
		}
		c.wg.Go(func() {
			sem <- struct{}{}
			err := func() error {
				defer func() { <-sem }()
				var err error
				for range 20 { // as nodes do: where many join, some do not get through the handshake in time
					if _, err = p.registerRaw(tailcfg.RegisterRequest{Auth: &tailcfg.RegisterResponseAuth{AuthKey: k}}); err == nil {
						break
					}
				}
				return err
			}()
			if err == nil {
				err = c.listen(p)
			}
			if err != nil {
				c.mu.Lock()
				c.err = err
				c.cond.Broadcast()
				c.mu.Unlock()
			}
		})
	}
	return c
}

func (c *crowd) listen(p *peerNode) error {
	res, err := p.open(p.t.Context())
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.body = append(c.body, res.Body)
	c.mu.Unlock()
	known := map[tailcfg.NodeID]bool{}
	for {
		b, err := readBody(res.Body, true)
		if err != nil {
			return nil // closed
		}
		// Decoding JSON would cost more than all else that is measured: look for the IDs of whole nodes only.
		before := len(known)
		const mark = `,"StableID":`
		for rest := b; ; {
			i := bytes.Index(rest, []byte(mark))
			if i < 0 {
				break
			}
			j := bytes.LastIndexByte(rest[:i], ':')
			id, err := strconv.ParseInt(string(rest[j+1:i]), 10, 64)
			if err != nil {
				return err
			}
			known[tailcfg.NodeID(id)] = true
			rest = rest[i+len(mark):]
		}
		c.mu.Lock()
		if before < c.n && len(known) == c.n { // with itself
			c.knowAll++
		}
		if bytes.Contains(b, []byte(`"PeersChangedPatch"`)) && bytes.Contains(b, []byte(`"DiscoKey":`)) {
			c.patches--
		}
		c.cond.Broadcast()
		c.mu.Unlock()
	}
}

func (c *crowd) settle(b testing.TB) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.knowAll < c.n && c.err == nil {
		c.cond.Wait()
	}
	if c.err != nil {
		b.Fatal(c.err)
	}
	c.took = time.Since(c.start)
}

func (c *crowd) expect(n int) {
	c.mu.Lock()
	c.patches = n
	c.mu.Unlock()
}

func (c *crowd) wait(b testing.TB) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.patches > 0 && c.err == nil {
		c.cond.Wait()
	}
	if c.err != nil {
		b.Fatal(c.err)
	}
}

func (c *crowd) close() {
	c.mu.Lock()
	for _, r := range c.body {
		r.Close()
	}
	c.mu.Unlock()
	for _, tr := range c.trs {
		tr.CloseIdleConnections()
	}
	c.wg.Wait()
}

// TestCrowd is the same at a size that fits the suite: everybody ends up knowing everybody. The server gives up
// handshakes after ten seconds, in which a slow machine does not do sixty.
func TestCrowd(t *testing.T) {
	s := startServer(t, &Server{Dir: t.TempDir()})
	c := newCrowd(t, s, newKey(t, s, AuthKeyOptions{Reusable: true}), 60, 4)
	c.settle(t)
	c.close()
}
