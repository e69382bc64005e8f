//go:build linux

package core

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailnode/tailnode"
	program "github.com/tailnode/tailnode/internal/node"
)

// maxInFlight bounds the requests that are served at a time; more wait in the socket, and then in the host.
const maxInFlight = 1 << 16

// Flags of tailnode_options and of calls; they are those of the header.
const (
	flagEphemeral   = 1
	flagMemoryState = 2
	flagNonblock    = 1
)

// session serves one socket: a host's.
type session struct {
	s     *sock
	ctx   context.Context // ends with the socket
	mu    sync.Mutex
	nodes map[uint64]*node
	wg    sync.WaitGroup // requests, streams, listeners
	slots chan struct{}
	spare spare
}

// spare is a descriptor that is held only to be closed when there is no other: a request cannot be answered without the one that it brings.
type spare struct {
	mu   sync.Mutex
	held bool
	fd   int
}

func (p *spare) fill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.held {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		p.fd, p.held = fd, err == nil
	}
}

// keep takes fd over, in place of fill where a moment without one would be too long.
func (p *spare) keep(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held {
		unix.Close(fd)
	} else {
		p.fd, p.held = fd, true
	}
}

func (p *spare) free() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held {
		unix.Close(p.fd)
		p.held = false
	}
}

// node is one tailnode.Server of the host.
type node struct {
	srv    *tailnode.Server
	ctx    context.Context // ends when the node is closed
	cancel context.CancelFunc
	out    *sink
	open   func() (*tailnode.LocalClient, error)
	lacks  error // the core had no room for what the node was to have: it can only be closed

	mu      sync.Mutex
	closed  bool
	held    map[ender]struct{} // what the node carries for the host
	carried sync.WaitGroup     // the same, and goroutines beside it
}

// ender is something that a node carries for the host. abort ends it whatever the host does, and may be called at any time.
type ender interface{ abort() }

// hold takes e in, so that it ends with the node. It reports false, and e is the caller's to end, where the node is closed.
func (nd *node) hold(e ender) bool {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	if nd.closed {
		return false
	}
	nd.held[e] = struct{}{}
	nd.carried.Add(1)
	return true
}

// release is called when nothing of e runs any more.
func (nd *node) release(e ender) {
	nd.mu.Lock()
	delete(nd.held, e)
	nd.mu.Unlock()
	nd.carried.Done()
}

// Serve takes fd over, a SOCK_SEQPACKET socket to the thin client, and serves it until the other end closes. Then it closes
// all nodes and returns.
func Serve(fd int) error {
	s, err := newSock(fd)
	if err != nil {
		return err
	}
	program.HideEnvironment() // the client has looked, as the host has it now
	ctx, cancel := context.WithCancel(context.Background())
	se := &session{s: s, ctx: ctx, nodes: map[uint64]*node{}, slots: make(chan struct{}, maxInFlight)}
	err = se.loop()
	cancel()
	se.closeAll()
	se.wg.Wait()
	se.spare.free()
	s.Close()
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

var errNoDescriptor = fmt.Errorf("the core has no descriptor left: %w", unix.EMFILE)

// scramble is how long a request waits for a descriptor to come free.
const scramble = 100 * time.Millisecond

// take waits for a request and returns it with its descriptors. short: there was no room for them; then fds holds what
// there is by giving up the spare one, or in time.
func (se *session) take(buf, oob []byte) (rq request, fds []int, short bool, err error) {
	var head [8]byte // magic, kind
	var end time.Time
	for {
		n, got, lacks, err := se.s.peek(head[:], oob)
		if err != nil {
			return rq, nil, false, err
		}
		if fds = got; !lacks {
			break
		}
		for _, fd := range fds {
			unix.Close(fd)
		}
		fds = nil
		first := !short
		short = true
		if n == len(head) && kind(native.Uint32(head[4:])) == kNew {
			break // it has no answer, and may want two
		}
		if first {
			end = time.Now().Add(scramble)
			se.spare.free()
		} else if time.Now().After(end) {
			break
		} else {
			time.Sleep(time.Millisecond) // another thread of the process was faster
		}
	}
	n, err := se.s.receive(buf)
	if err == nil {
		rq, err = parseRequest(buf[:n])
		clear(buf[:n]) // there may be an auth key in it
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return rq, nil, false, err
	}
	return rq, fds, short, nil
}

func (se *session) loop() error {
	buf := make([]byte, maxRequest)
	oob := make([]byte, unix.CmsgSpace(4*4))
	for {
		se.spare.fill() // where the last request took it, and there is room again
		rq, fds, short, err := se.take(buf, oob)
		if err != nil {
			return err
		}
		if rq.kind == kNew {
			se.newNode(&rq, fds, short)
			continue
		}
		// The node is looked up here, in the order of the messages: what follows kClose finds none.
		se.mu.Lock()
		nd := se.nodes[rq.node]
		if rq.kind == kClose {
			delete(se.nodes, rq.node)
		}
		se.mu.Unlock()
		if len(fds) != 1 {
			for _, fd := range fds {
				unix.Close(fd)
			}
			fds = nil
		}
		if short && rq.kind != kClose {
			if fds != nil {
				rp := errorReply(errNoDescriptor) // for which there is room in a socket that is new
				unix.SendmsgN(fds[0], append(rp.appendHead(nil), rp.data...), nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				se.spare.keep(fds[0]) // the host does not wait for its end
			}
			continue
		}
		var to *sock
		if fds != nil {
			to, _ = newSock(fds[0])
		}
		if to == nil && rq.kind != kClose {
			continue
		}
		se.slots <- struct{}{}
		se.wg.Add(1)
		calls.Add(1)
		inFlight.Add(1)
		go func() {
			defer se.wg.Done()
			defer func() { <-se.slots }()
			defer inFlight.Add(-1)
			if to != nil {
				se.answer(&rq, nd, to)
			} else if nd != nil {
				nd.close() // whether or not anybody can be told
			}
			if short {
				se.spare.fill()
			}
		}()
	}
}

// defaults fills in what the host left open, from the name of its program and the directory of its user's configuration: this
// process may be a helper, and a runtime sees the environment as it was when its process started.
func defaults(srv *tailnode.Server, prog, config string) error {
	needsDir := srv.Dir == "" && srv.Store == nil
	if prog == "" {
		if srv.Hostname == "" || needsDir {
			return invalid("new", "the program's name is not known: set hostname and dir")
		}
		return nil
	}
	prog = program.ProgramName(prog)
	if srv.Hostname == "" {
		srv.Hostname = prog
	}
	if needsDir {
		if config == "" {
			return invalid("new", "there is no place for the state (neither $XDG_CONFIG_HOME nor $HOME names a directory): set dir")
		}
		srv.Dir = filepath.Join(config, "tailnode-"+prog)
	}
	return nil
}

func (se *session) newNode(rq *request, fds []int, short bool) {
	a := rq.arg
	out := newSink(fds, int(a[2]), a[3])
	ctx, cancel := context.WithCancel(se.ctx)
	srv := &tailnode.Server{
		Dir: rq.str[0], Hostname: rq.str[1], AuthKey: rq.str[2], ControlURL: rq.str[3],
		Ephemeral: a[0]&flagEphemeral != 0,
		Port:      uint16(a[1]),
		Logger:    out.logger(),
		UserLogf:  out.authURL,
	}
	if a[0]&flagMemoryState != 0 {
		srv.Store = tailnode.NewMemoryStore()
	}
	for t := range strings.SplitSeq(rq.str[4], ",") {
		if t = strings.TrimSpace(t); t != "" {
			srv.AdvertiseTags = append(srv.AdvertiseTags, t)
		}
	}
	var bad error
	if err := defaults(srv, rq.str[6], rq.str[7]); err != nil {
		bad = err
	}
	if pem := rq.str[5]; pem != "" {
		srv.RootCAs = x509.NewCertPool()
		if !srv.RootCAs.AppendCertsFromPEM([]byte(pem)) {
			bad = &tailnode.Error{Op: "new", Code: tailnode.CodeInvalidArgument, Err: errors.New("root_ca_pem holds no certificate")}
		}
	}
	setMemoryLimit(a[4])
	if a[5] != 0 {
		setGCPercent(int(a[5]))
	}
	setMaxProcs(int(a[6]))
	nd := &node{srv: srv, ctx: ctx, cancel: cancel, out: out, held: map[ender]struct{}{}}
	nd.open = func() (*tailnode.LocalClient, error) {
		if bad != nil {
			return nil, bad
		}
		return srv.LocalClient()
	}
	if short {
		nd.lacks = errNoDescriptor
	}
	openNodes.Add(1)
	se.mu.Lock()
	se.nodes[rq.node] = nd
	se.mu.Unlock()
}

// close ends the node and all that it carries: the host may hold descriptors for as long as it likes, half-closed or full.
func (nd *node) close() error {
	nd.cancel()
	nd.mu.Lock()
	nd.closed = true
	held := slices.Collect(maps.Keys(nd.held))
	nd.mu.Unlock()
	for _, e := range held {
		e.abort()
	}
	err := nd.srv.Close()
	nd.carried.Wait()
	nd.out.close()
	openNodes.Add(-1)
	return err
}

func (se *session) closeAll() {
	se.mu.Lock()
	nodes := se.nodes
	se.nodes = nil
	se.mu.Unlock()
	var wg sync.WaitGroup
	for _, nd := range nodes {
		wg.Go(func() { nd.close() })
	}
	wg.Wait()
}

// maxTimeout, in milliseconds, is longer than anybody waits.
const maxTimeout = 1 << 42

// waits reports whether the request has a time-out.
func (rq *request) waits() bool {
	return rq.kind == kUp || rq.kind == kWhois || rq.kind == kPing || rq.kind == kDial
}

// lastWords is how long an answer may wait for room after the host has ended.
const lastWords = 2 * time.Second

// answer serves one request. The other end of to being closed cancels it.
func (se *session) answer(rq *request, nd *node, to *sock) {
	// A node's own end cancels its calls by Close, with CodeClosed: not by this context.
	ctx, cancel := context.WithCancel(context.Background())
	watched := make(chan struct{})
	// When the host has ended, a fork of it may still hold the other end, and not read.
	defer context.AfterFunc(se.ctx, func() { to.f.SetWriteDeadline(time.Now().Add(lastWords)) })()
	go func() {
		defer close(watched)
		to.awaitEnd()
		if rq.kind != kClose {
			cancel()
		}
	}()
	opCtx, stop := ctx, func() {}
	if rq.waits() && rq.timeout >= 0 && rq.timeout < maxTimeout {
		opCtx, stop = context.WithTimeout(ctx, time.Duration(rq.timeout)*time.Millisecond)
	}
	rp := reply{fd: -1}
	var started func() // runs when the host has the descriptor
	err := errClosed
	if nd != nil {
		started, err = nd.do(opCtx, rq, &rp)
	}
	stop()
	if err != nil {
		rp = errorReply(err)
	}
	head := rp.appendHead(make([]byte, 0, replyHead+len(rp.data)))
	var rights []byte
	if rp.fd >= 0 {
		rights = unix.UnixRights(int(rp.fd))
	}
	// A host that goes on without reading cannot hold this up: closing its end fails the send.
	to.send(append(head, rp.data...), rights, true)
	if rp.fd >= 0 {
		rp.fd.close()
	}
	if started != nil {
		started()
	}
	to.Close()
	<-watched
	cancel()
}

var errClosed error = &tailnode.Error{Op: "call", Code: tailnode.CodeClosed, Err: net.ErrClosed}

func errorReply(err error) reply {
	rp := reply{code: int32(tailnode.CodeInternal), fd: -1, data: []byte(err.Error())}
	if e, ok := errors.AsType[*tailnode.Error](err); ok {
		rp.code = int32(e.Code)
	}
	if e, ok := errors.AsType[syscall.Errno](err); ok {
		rp.errno = int32(e)
		if e == unix.EMFILE || e == unix.ENFILE || e == unix.ENOBUFS || e == unix.ENOMEM {
			rp.code = int32(tailnode.CodeExhausted)
		}
	}
	return rp
}

func invalid(op, text string) error {
	return &tailnode.Error{Op: op, Code: tailnode.CodeInvalidArgument, Err: errors.New(text)}
}

// do serves one request of a node.
func (nd *node) do(ctx context.Context, rq *request, rp *reply) (started func(), err error) {
	if nd.lacks != nil && rq.kind != kClose {
		return nil, nd.lacks
	}
	switch rq.kind {
	case kClose:
		return nil, nd.close()
	case kStats:
		rp.data = runtimeStats()
		return nil, nil
	case kMemoryLimit:
		setMemoryLimit(rq.arg[0])
		return nil, nil
	case kMaxProcs:
		setMaxProcs(int(rq.arg[0]))
		return nil, nil
	case kGCPercent:
		setGCPercent(int(rq.arg[0]))
		return nil, nil
	case kTrim:
		trim()
		return nil, nil
	case kPressure:
		pressure(int(rq.arg[0]))
		return nil, nil
	case kAddresses:
		ip4, ip6 := nd.srv.TailscaleIPs()
		rp.local, rp.remote = netip.AddrPortFrom(ip4, 0), netip.AddrPortFrom(ip6, 0)
		return nil, nil
	}
	lc, err := nd.open()
	if err != nil {
		return nil, err
	}
	var v any
	switch rq.kind {
	case kStart:
		return nil, nil
	case kUp:
		_, err := nd.srv.Up(ctx)
		return nil, err
	case kStatus:
		if rq.arg[0] != 0 {
			v, err = lc.Status(ctx)
		} else {
			v, err = lc.StatusWithoutPeers(ctx)
		}
	case kWhois:
		v, err = lc.WhoIs(ctx, rq.str[0])
	case kPing:
		ip, perr := netip.ParseAddr(rq.str[0])
		if perr != nil {
			return nil, invalid("ping", "the address is not an IP address")
		}
		v, err = lc.Ping(ctx, ip, tailnode.PingType(rq.str[1]))
	case kDial:
		return nil, nd.dial(ctx, rq, rp)
	case kListen:
		return nd.listen(ctx, rq, rp)
	case kListenPacket:
		return nil, nd.listenPacket(ctx, rq, rp)
	case kWatch:
		return nil, nd.watch(lc, rq, rp)
	case kLoopback:
		return nil, nd.loopback(rp)
	default:
		return nil, &tailnode.Error{Op: "call", Code: tailnode.CodeUnsupported, Err: errors.New("this core is older than the library")}
	}
	if err != nil {
		return nil, err
	}
	rp.data, err = json.Marshal(v)
	return nil, err
}

// ServeInherited serves the descriptor that a helper process was started with.
func ServeInherited(fd int) error {
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_SEQPACKET {
		return os.NewSyscallError("getsockopt", errors.Join(err, errors.New("this program is started by libtailnode")))
	}
	return Serve(fd)
}

// Counters for tailnode_runtime_stats.
var calls, inFlight, openNodes, connections atomic.Int64
