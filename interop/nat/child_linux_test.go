package nat

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"tailscale.com/envknob"

	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/interop/harness"
	"github.com/tailnode/tailnode/relay"
)

// childEnv says what a process that is this test binary run again is to be: "ours", "upstream" or "server".
const childEnv = "TAILNODE_NAT_CHILD"

// A child takes requests from its standard input and answers on its standard output, one JSON value per line, several
// at a time. It ends with its standard input.
type request struct {
	ID   int
	Op   string
	Args json.RawMessage `json:",omitempty"`
}

type reply struct {
	ID     int
	Err    string          `json:",omitempty"`
	Result json.RawMessage `json:",omitempty"`
}

type (
	relayArgs struct{ Host, Dir string }
	relayInfo struct {
		ID                   int
		IPv4, IPv6, CertName string
	}
	coordArgs struct {
		Addr, URL string
		Relays    []relayInfo
	}
	upArgs struct {
		Hostname, Control, AuthKey, Dir string
		Port                            uint16
		PeerRelay                       *uint16
		Env                             []string // of the process
	}
	// grantArgs lets the nodes of Src use the peer relay that Dst is.
	grantArgs struct{ Src, Dst []string }
	upResult  struct{ IP4, IP6 string }
	// peerPath is how a node reaches a peer: directly at Addr, or by a relay if that is empty.
	peerPath struct {
		Addr   string
		Relay  string
		Online bool

		PeerRelay string // by that, if not empty
	}
	probeArgs struct {
		IP   string
		Wait time.Duration // for a direct path

		PeerRelay bool // not for that, but for one by a peer relay
	}
	probeResult struct {
		Began  time.Time     // the dial
		Dial   time.Duration // until connected
		Direct time.Time     // since when the path is direct; zero: not in time
		Path   peerPath
	}
	sendArgs struct {
		IP   string
		Size int64
	}
	streamArgs struct {
		IP   string
		Rate int // bytes a second
	}
	// received is what the receiving side says of a transfer.
	received struct {
		Bytes  int64
		Sum    []byte
		Stalls []stall
	}
	// change is when the path to a peer became another.
	change struct {
		At   time.Time
		Addr string // "": a relay
	}
	stall struct {
		At  time.Time
		For time.Duration
	}
	sendResult struct {
		received
		Took time.Duration
		Same bool // the receiver's bytes are the sender's
	}
)

const (
	// port is where every node listens.
	port = "7777"
	// stallFrom is from when on silence counts as a stall.
	stallFrom = 100 * time.Millisecond
)

// child is the state of a child process.
type child struct {
	who   string
	logf  func(string, ...any)
	node  harness.Node
	relay *relay.Server
	coord *coord.Server
	pcp   *pinholes

	mu      sync.Mutex
	streams map[int]*stream
	next    int
	changes []change
}

func childMain(who string) {
	// Importing the harness keeps upstream from direct paths; they are what this is about.
	envknob.Setenv("TS_DEBUG_NEVER_DIRECT_UDP", "false")
	c := &child{who: who, streams: map[int]*stream{}, logf: func(string, ...any) {}}
	if os.Getenv("INTEROP_VERBOSE") == "" {
		log.SetOutput(io.Discard) // some of upstream's lines go there
	}
	if os.Getenv("INTEROP_VERBOSE") != "" {
		c.logf = func(f string, args ...any) {
			fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05.000 ")+f+"\n", args...)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	out := json.NewEncoder(os.Stdout)
	var mu sync.Mutex
	var wg sync.WaitGroup
	in := json.NewDecoder(os.Stdin)
	for {
		var r request
		if in.Decode(&r) != nil {
			break
		}
		wg.Go(func() {
			res, err := c.do(ctx, r)
			a := reply{ID: r.ID}
			if err != nil {
				a.Err = err.Error()
			} else {
				a.Result, _ = json.Marshal(res)
			}
			mu.Lock()
			out.Encode(a)
			mu.Unlock()
		})
	}
	cancel()
	time.AfterFunc(40*time.Second, func() { os.Exit(3) }) // whatever hangs
	if c.node != nil {
		c.node.Close()
	}
	if c.coord != nil {
		c.coord.Close()
	}
	if c.relay != nil {
		c.relay.Close()
	}
	os.Exit(0)
}

func (c *child) do(ctx context.Context, r request) (any, error) {
	switch r.Op {
	case "relay":
		return with(r, func(a relayArgs) (any, error) {
			c.relay = &relay.Server{Addr: ":443", STUNAddr: ":3478", Hostname: a.Host, Dir: a.Dir}
			if err := c.relay.Start(ctx); err != nil {
				return nil, err
			}
			return relayInfo{CertName: c.relay.Node().CertName}, nil
		})
	case "coord":
		return with(r, func(a coordArgs) (any, error) { return nil, c.startCoord(ctx, a) })
	case "proxy":
		return with(r, func(addr string) (any, error) { return nil, c.proxy(addr) })
	case "pcp":
		return nil, c.servePCP()
	case "pinholes":
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.Clone(c.pcp.asks), nil
	case "authkey":
		return c.coord.CreateAuthKey(coord.AuthKeyOptions{})
	case "grant":
		return with(r, func(a []grantArgs) (any, error) { return nil, c.grant(a) })
	case "up":
		return with(r, func(a upArgs) (any, error) { return c.up(ctx, a) })
	case "path":
		return with(r, func(ip string) (any, error) { return c.path(ctx, ip) })
	case "probe":
		return with(r, func(a probeArgs) (any, error) { return c.probe(ctx, a) })
	case "await":
		return with(r, func(a probeArgs) (any, error) { return c.await(ctx, a) })
	case "watch":
		return with(r, func(ip string) (any, error) { go c.watch(ctx, ip); return nil, nil })
	case "changes":
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.changes, nil
	case "send":
		return with(r, func(a sendArgs) (any, error) {
			s, err := c.stream(ctx, a.IP, 0, a.Size)
			if err != nil {
				return nil, err
			}
			return s.wait()
		})
	case "stream":
		return with(r, func(a streamArgs) (any, error) {
			s, err := c.stream(ctx, a.IP, a.Rate, 0)
			if err != nil {
				return nil, err
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.next++
			c.streams[c.next] = s
			return c.next, nil
		})
	case "stop":
		return with(r, func(id int) (any, error) {
			c.mu.Lock()
			s := c.streams[id]
			c.mu.Unlock()
			if s == nil {
				return nil, errors.New("no such stream")
			}
			close(s.stop)
			return s.wait()
		})
	}
	return nil, fmt.Errorf("unknown operation %q", r.Op)
}

func with[A any](r request, f func(A) (any, error)) (any, error) {
	var a A
	if err := json.Unmarshal(r.Args, &a); err != nil {
		return nil, err
	}
	return f(a)
}

func (c *child) startCoord(ctx context.Context, a coordArgs) error {
	c.coord = &coord.Server{Addr: a.Addr, URL: a.URL}
	for _, r := range a.Relays {
		c.coord.Relays = append(c.coord.Relays, coord.Region{
			ID: r.ID, Code: fmt.Sprintf("r%d", r.ID), Name: fmt.Sprintf("relay %d", r.ID),
			Nodes: []coord.Relay{{
				Name: fmt.Sprintf("%da", r.ID), HostName: r.IPv4, IPv4: r.IPv4, IPv6: r.IPv6,
				DERPPort: 443, STUNPort: 3478, CertName: r.CertName,
			}},
		})
	}
	return c.coord.Start(ctx)
}

// grant replaces the grants; everybody may reach everybody.
func (c *child) grant(grants []grantArgs) error {
	f := &coord.Filter{Rules: []coord.FilterRule{{Src: []string{"*"}, Dst: []string{"*"}}}}
	for _, g := range grants {
		f.Grants = append(f.Grants, coord.Grant{Src: g.Src, Dst: g.Dst, Caps: map[string][]json.RawMessage{coord.CapRelay: nil}})
	}
	return c.coord.SetFilter(f)
}

// proxy serves CONNECT at addr.
func (c *child) proxy(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "CONNECT alone", http.StatusMethodNotAllowed)
			return
		}
		far, err := net.DialTimeout("tcp", r.Host, 5*time.Second)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer far.Close()
		near, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer near.Close()
		io.WriteString(near, "HTTP/1.1 200 OK\r\n\r\n")
		go func() {
			io.Copy(far, buf)
			far.Close()
		}()
		io.Copy(near, far)
	}))
	return nil
}

func (c *child) up(ctx context.Context, a upArgs) (any, error) {
	mk := harness.OurNode
	if c.who == "upstream" {
		mk = harness.UpstreamNode
	}
	n, err := mk(harness.NodeConfig{Hostname: a.Hostname, ControlURL: a.Control, AuthKey: a.AuthKey, Dir: a.Dir, Logf: c.logf, Port: a.Port, PeerRelay: a.PeerRelay})
	if err != nil {
		return nil, err
	}
	c.node = n
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := n.Up(ctx); err != nil {
		return nil, err
	}
	ln, err := n.Listen("tcp", ":"+port)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	v4, v6 := n.Addrs()
	return upResult{v4.String(), v6.String()}, nil
}

func (c *child) path(ctx context.Context, ip string) (peerPath, error) {
	st, err := c.node.Status(ctx)
	if err != nil {
		return peerPath{}, err
	}
	for _, p := range st.Peers {
		for _, a := range p.Addrs {
			if a.String() == ip {
				return peerPath{p.Direct, p.Relay, p.Online, p.PeerRelay}, nil
			}
		}
	}
	return peerPath{}, fmt.Errorf("no peer %s", ip)
}

// serve handles one connection: 'e' echoes, 's' swallows and then says what came.
func serve(c net.Conn) {
	defer c.Close()
	var op [1]byte
	if _, err := io.ReadFull(c, op[:]); err != nil {
		return
	}
	if op[0] == 'e' {
		io.Copy(c, c)
		return
	}
	var r received
	h, b, last := sha256.New(), make([]byte, 64<<10), time.Now()
	for {
		n, err := c.Read(b)
		h.Write(b[:n])
		r.Bytes += int64(n)
		now := time.Now()
		if d := now.Sub(last); d >= stallFrom {
			r.Stalls = append(r.Stalls, stall{last, d})
		}
		last = now
		if err != nil {
			if err != io.EOF {
				return
			}
			break
		}
	}
	r.Sum = h.Sum(nil)
	json.NewEncoder(c).Encode(r)
}

func (c *child) dial(ctx context.Context, ip string, op byte) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := c.node.Dial(ctx, "tcp", net.JoinHostPort(ip, port))
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte{op}); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// probe connects, and keeps a little traffic going for somewhat longer than it waits for a direct path.
func (c *child) probe(ctx context.Context, a probeArgs) (any, error) {
	r := probeResult{Began: time.Now()}
	conn, err := c.dial(ctx, a.IP, 'e')
	if err != nil {
		return nil, err
	}
	r.Dial = time.Since(r.Began)
	over := time.After(a.Wait + time.Second)
	conn.SetDeadline(time.Now().Add(a.Wait + 30*time.Second))
	go io.Copy(io.Discard, conn)
	go func() {
		defer conn.Close()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		msg := make([]byte, 32)
		for {
			if _, err := conn.Write(msg); err != nil {
				return
			}
			select {
			case <-tick.C:
			case <-over:
				return
			}
		}
	}()
	w, err := c.await(ctx, a)
	r.Direct, r.Path = w.Direct, w.Path
	return r, err
}

// await waits until the path to a peer is direct.
func (c *child) await(ctx context.Context, a probeArgs) (r probeResult, err error) {
	began := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if time.Since(began) > 2*time.Second {
			tick.Reset(100 * time.Millisecond)
		}
		if r.Path, err = c.path(ctx, a.IP); err != nil {
			return r, err
		}
		now := time.Now()
		if !a.PeerRelay && r.Path.Addr != "" || a.PeerRelay && r.Path.PeerRelay != "" {
			r.Direct = now
			return r, nil
		}
		if now.Sub(began) > a.Wait {
			return r, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
}

// watch notes the changes of the path to a peer.
func (c *child) watch(ctx context.Context, ip string) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := change{}
	for {
		if p, err := c.path(ctx, ip); err == nil && (p.Addr != last.Addr || last.At.IsZero()) {
			last = change{time.Now(), p.Addr}
			c.mu.Lock()
			c.changes = append(c.changes, last)
			c.mu.Unlock()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// stream is a transfer in progress.
type stream struct {
	conn net.Conn
	stop chan struct{}
	done chan struct{}
	res  sendResult
	err  error
}

// stream sends size bytes, or without a size until it is stopped, at a rate, or without one as fast as it goes.
func (c *child) stream(ctx context.Context, ip string, rate int, size int64) (*stream, error) {
	conn, err := c.dial(ctx, ip, 's')
	if err != nil {
		return nil, err
	}
	s := &stream{conn: conn, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		defer conn.Close()
		s.err = s.run(rate, size)
	}()
	return s, nil
}

func (s *stream) wait() (any, error) {
	select {
	case <-s.done:
		return s.res, s.err
	case <-time.After(2 * time.Minute):
		s.conn.Close()
		return nil, errors.New("the transfer does not end")
	}
}

func (s *stream) run(rate int, size int64) error {
	began := time.Now()
	h, rnd, b := sha256.New(), rand.NewChaCha8([32]byte{byte(began.UnixNano())}), make([]byte, 16<<10)
	sent, err := s.write(h, rnd, b, began, rate, size)
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", sent, err)
	}
	if err := s.conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return err
	}
	if err := json.NewDecoder(s.conn).Decode(&s.res.received); err != nil {
		return fmt.Errorf("the receiver's report: %w", err)
	}
	s.res.Took = time.Since(began)
	s.res.Same = s.res.Bytes == sent && string(s.res.Sum) == string(h.Sum(nil))
	return nil
}

func (s *stream) write(h hash.Hash, rnd io.Reader, b []byte, began time.Time, rate int, size int64) (sent int64, err error) {
	for size == 0 || sent < size {
		n := len(b)
		if size > 0 {
			n = int(min(int64(n), size-sent))
		}
		rnd.Read(b[:n])
		h.Write(b[:n])
		if _, err := s.conn.Write(b[:n]); err != nil {
			return sent, err
		}
		sent += int64(n)
		var pace <-chan time.Time
		if rate > 0 {
			if d := time.Duration(sent)*time.Second/time.Duration(rate) - time.Since(began); d > 0 {
				pace = time.After(d)
			} else {
				began = began.Add(-d) // what a stall has held up is not made up for in a burst
			}
		}
		if pace == nil {
			select {
			case <-s.stop:
				return sent, nil
			default:
				continue
			}
		}
		select {
		case <-s.stop:
			return sent, nil
		case <-pace:
		}
	}
	return sent, nil
}
