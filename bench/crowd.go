package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"tailscale.com/control/controlbase"
	"tailscale.com/control/ts2021"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/zstdframe"
)

// crowd is many nodes that speak the coordination protocol, with upstream's Noise and types, and nothing else.
type crowd struct {
	url, authKey string
	control      key.MachinePublic
	n            int
	began        time.Time
	first        *lightNode
	stop         context.CancelFunc
	wg           sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change of what follows
	mark    []byte        // what a change has in it
	knowAll int           // nodes that know all
	heard   int           // nodes that have heard of the change
	err     error
}

func newCrowd(ctx context.Context, url, authKey string, n int) *crowd {
	ctx, stop := context.WithCancel(ctx)
	x := &crowd{url: url, authKey: authKey, n: n, began: time.Now(), stop: stop, changed: make(chan struct{})}
	x.control, x.err = fetchKey(ctx, url)
	sem := make(chan struct{}, 32)
	for i := range n {
		p := &lightNode{x: x, machine: key.NewMachine(), key: key.NewNode(), name: fmt.Sprintf("crowd-%d", i)}
		p.tr = &http.Transport{Protocols: new(http.Protocols), MaxConnsPerHost: 1, DialContext: p.dial}
		p.tr.Protocols.SetUnencryptedHTTP2(true)
		if i == 0 {
			x.first = p
		}
		x.wg.Go(func() {
			defer p.tr.CloseIdleConnections()
			sem <- struct{}{}
			err := p.register(ctx)
			if err == nil {
				err = p.update(ctx, key.NewDisco().Public())
			}
			<-sem
			if err == nil {
				err = p.listen(ctx)
			}
			if err != nil && ctx.Err() == nil {
				x.update(func() { x.err = err })
			}
		})
	}
	return x
}

func fetchKey(ctx context.Context, url string) (key.MachinePublic, error) {
	var k tailcfg.OverTLSPublicKeyResponse
	req, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("%s/key?v=%d", url, tailcfg.CurrentCapabilityVersion), nil)
	if err != nil {
		return key.MachinePublic{}, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return key.MachinePublic{}, err
	}
	defer res.Body.Close()
	err = json.NewDecoder(res.Body).Decode(&k)
	return k.PublicKey, err
}

// update changes what waiters wait for.
func (x *crowd) update(f func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	f()
	close(x.changed)
	x.changed = make(chan struct{})
}

func (x *crowd) wait(ctx context.Context, done func() bool) error {
	for {
		x.mu.Lock()
		ok, err, changed := done(), x.err, x.changed
		x.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%d nodes know all, %d have heard: %w", x.knowAll, x.heard, ctx.Err())
		}
	}
}

// change gives the first node a new disco key.
func (x *crowd) change(ctx context.Context) error {
	k := key.NewDisco().Public()
	x.mu.Lock()
	x.mark, x.heard = []byte(k.String()), 0
	x.mu.Unlock()
	return x.first.update(ctx, k)
}

func (x *crowd) close() {
	x.stop()
	x.wg.Wait()
}

type lightNode struct {
	x       *crowd
	machine key.MachinePrivate
	key     key.NodePrivate
	name    string
	tr      *http.Transport
}

func (p *lightNode) hostinfo() *tailcfg.Hostinfo {
	return &tailcfg.Hostinfo{Hostname: p.name, OS: "linux", IPNVersion: "bench"}
}

func (p *lightNode) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(p.x.url, "http://"))
	if err != nil {
		return nil, err
	}
	init, finish, err := controlbase.ClientDeferred(p.machine, p.x.control, uint16(tailcfg.CurrentCapabilityVersion))
	if err != nil {
		c.Close()
		return nil, err
	}
	fmt.Fprintf(c, "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n"+
		"X-Tailscale-Handshake: %s\r\nContent-Length: 0\r\n\r\n", base64.StdEncoding.EncodeToString(init))
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, nil)
	if err == nil && res.StatusCode != http.StatusSwitchingProtocols {
		err = errors.New(res.Status)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	nc, err := finish(ctx, &bufConn{c, br})
	if err != nil {
		c.Close()
		return nil, err
	}
	return &earlyConn{Conn: nc, br: bufio.NewReader(nc)}, nil
}

// bufConn reads what has come behind the HTTP answer first.
type bufConn struct {
	net.Conn
	br *bufio.Reader
}

func (c *bufConn) Read(b []byte) (int, error) { return c.br.Read(b) }

// earlyConn skips what a server may send before HTTP/2: a magic, four bytes of length, and JSON.
type earlyConn struct {
	net.Conn
	br   *bufio.Reader
	once sync.Once
	err  error
}

func (c *earlyConn) Read(b []byte) (int, error) {
	c.once.Do(func() {
		const magic = ts2021.EarlyPayloadMagic
		head, err := c.br.Peek(len(magic) + 4)
		if err != nil {
			c.err = err
		} else if string(head[:len(magic)]) == magic {
			_, c.err = c.br.Discard(len(head) + int(binary.BigEndian.Uint32(head[len(magic):])))
		}
	})
	if c.err != nil {
		return 0, c.err
	}
	return c.br.Read(b)
}

func (p *lightNode) post(ctx context.Context, path string, body any) (*http.Response, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, "POST", "http://control"+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	res, err := p.tr.RoundTrip(req)
	if err == nil && res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 200))
		res.Body.Close()
		err = fmt.Errorf("%s: %s: %s", path, res.Status, text)
	}
	return res, err
}

func (p *lightNode) register(ctx context.Context) error {
	res, err := p.post(ctx, "/machine/register", tailcfg.RegisterRequest{
		Version: tailcfg.CurrentCapabilityVersion, NodeKey: p.key.Public(), Hostinfo: p.hostinfo(),
		Auth: &tailcfg.RegisterResponseAuth{AuthKey: p.x.authKey},
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var r tailcfg.RegisterResponse
	if err := json.NewDecoder(res.Body).Decode(&r); err != nil {
		return err
	}
	if r.Error != "" || !r.MachineAuthorized {
		return fmt.Errorf("not registered: %s", r.Error)
	}
	return nil
}

// update tells the server of the node's disco key. Upstream's test server tells others of a new node when that has happened.
func (p *lightNode) update(ctx context.Context, k key.DiscoPublic) error {
	res, err := p.post(ctx, "/machine/map", tailcfg.MapRequest{
		Version: tailcfg.CurrentCapabilityVersion, NodeKey: p.key.Public(), DiscoKey: k, OmitPeers: true, Hostinfo: p.hostinfo(),
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

// listen follows the node's map stream.
func (p *lightNode) listen(ctx context.Context) error {
	res, err := p.post(ctx, "/machine/map", tailcfg.MapRequest{
		Version: tailcfg.CurrentCapabilityVersion, NodeKey: p.key.Public(), Hostinfo: p.hostinfo(), Stream: true, KeepAlive: true, Compress: "zstd",
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	known := make(map[int64]bool, p.x.n)
	var heard string // the last change that was
	var buf, plain []byte
	var size [4]byte
	for {
		if _, err := io.ReadFull(res.Body, size[:]); err != nil {
			return err
		}
		n := binary.LittleEndian.Uint32(size[:])
		if uint32(cap(buf)) < n {
			buf = make([]byte, n)
		}
		if _, err := io.ReadFull(res.Body, buf[:n]); err != nil {
			return err
		}
		if plain, err = zstdframe.AppendDecode(plain[:0], buf[:n]); err != nil {
			return err
		}
		before := len(known)
		wholeNodes(plain, func(id int64) { known[id] = true })
		p.x.mu.Lock()
		mark := p.x.mark
		p.x.mu.Unlock()
		news := p != p.x.first && mark != nil && heard != string(mark) && bytes.Contains(plain, mark)
		if news {
			heard = string(mark)
		}
		if all := before < p.x.n && len(known) == p.x.n; all || news { // with itself
			p.x.update(func() {
				if all {
					p.x.knowAll++
				}
				if news {
					p.x.heard++
				}
			})
		}
	}
}
