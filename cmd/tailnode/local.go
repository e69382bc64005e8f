package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/tailnode/tailnode"
)

// A process that holds a node answers on a Unix socket in the node's directory, which is
// open to its user alone, so that "status", "ping" and "nc" in another terminal ask the node that runs.

const socketName = "tailnode.sock"

// joined is a node to ask things of: one in this process, or one behind a socket.
type joined interface {
	Status(ctx context.Context) (*tailnode.Status, error)
	Ping(ctx context.Context, ip netip.Addr, typ tailnode.PingType) (*tailnode.PingResult, error)
	WhoIs(ctx context.Context, addr string) (*tailnode.WhoIsResponse, error)
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
	DERPMap(ctx context.Context) (json.RawMessage, error)
	Netcheck(ctx context.Context, o tailnode.NetcheckOptions) (json.RawMessage, error)
}

type ownNode struct {
	*tailnode.Server
	*tailnode.LocalClient
}

// attach returns the node of the directory that the flags name: the one that another process
// holds, or else one that joins here. The function it returns lets go of it.
func (a *app) attach(ctx context.Context, c *cli.Command) (joined, func(), error) {
	dir, err := stateDir(c)
	if err != nil {
		return nil, nil, err
	}
	r := newRemoteNode(filepath.Join(dir, socketName))
	if _, err := r.Status(ctx); err == nil {
		return r, r.close, nil
	} else if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	s, err := a.newServer(c)
	if err != nil {
		return nil, nil, err
	}
	if _, err := a.up(ctx, c, s); err != nil {
		s.Close()
		return nil, nil, err
	}
	lc, err := s.LocalClient()
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	return ownNode{s, lc}, func() { s.Close() }, nil
}

// answer serves the socket for s until the function that it returns is called.
func (a *app) answer(s *tailnode.Server) (stop func()) {
	lc, err := s.LocalClient()
	if err != nil {
		return func() {}
	}
	path := filepath.Join(s.GetRootPath(), socketName)
	os.Remove(path) // left by a process that was killed: the directory's lock says that none runs
	ln, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintf(a.err, "note: \"tailnode status\" in another terminal will not find this node: %v\n", err)
		return func() {}
	}
	os.Chmod(path, 0o600)
	hs := &http.Server{Handler: socketHandler(ownNode{s, lc}), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { hs.Serve(ln); close(done) }()
	return func() { hs.Close(); <-done }
}

// wireError is an error on the socket.
type wireError struct {
	Op   string
	Code tailnode.Code
	Text string
}

func socketHandler(n ownNode) http.Handler {
	reply := func(w http.ResponseWriter, v any, err error) {
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			we := wireError{Text: err.Error()}
			if e, ok := errors.AsType[*tailnode.Error](err); ok {
				we = wireError{e.Op, e.Code, e.Err.Error()}
			}
			w.WriteHeader(http.StatusBadGateway)
			v = we
		}
		json.NewEncoder(w).Encode(v)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		st, err := n.Status(r.Context())
		reply(w, st, err)
	})
	mux.HandleFunc("GET /derpmap", func(w http.ResponseWriter, r *http.Request) {
		dm, err := n.DERPMap(r.Context())
		reply(w, dm, err)
	})
	mux.HandleFunc("GET /netcheck", func(w http.ResponseWriter, r *http.Request) {
		d, err := time.ParseDuration(cmp.Or(r.FormValue("wait"), "0s"))
		if err != nil {
			reply(w, nil, &tailnode.Error{Op: "netcheck", Code: tailnode.CodeInvalidArgument, Err: err})
			return
		}
		rep, err := n.Netcheck(r.Context(), tailnode.NetcheckOptions{Timeout: d, NoPortMap: r.FormValue("portmap") == "no"})
		reply(w, rep, err)
	})
	mux.HandleFunc("GET /whois", func(w http.ResponseWriter, r *http.Request) {
		who, err := n.WhoIs(r.Context(), r.FormValue("addr"))
		reply(w, who, err)
	})
	mux.HandleFunc("GET /ping", func(w http.ResponseWriter, r *http.Request) {
		ip, err := netip.ParseAddr(r.FormValue("ip"))
		if err != nil {
			reply(w, nil, &tailnode.Error{Op: "ping", Code: tailnode.CodeInvalidArgument, Err: err})
			return
		}
		pr, err := n.Ping(r.Context(), ip, tailnode.PingType(r.FormValue("type")))
		reply(w, pr, err)
	})
	mux.HandleFunc("GET /dial", func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		conn, err := n.Dial(ctx, r.FormValue("network"), r.FormValue("addr"))
		if err != nil {
			reply(w, nil, err)
			return
		}
		defer conn.Close()
		local, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer local.Close()
		local.SetDeadline(time.Time{})
		io.WriteString(local, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tailnode\r\n\r\n")
		splice(rw{buf.Reader, local}, conn)
	})
	return mux
}

// remoteNode is a node that another process holds.
type remoteNode struct {
	path string
	http *http.Client
}

func newRemoteNode(path string) *remoteNode {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &remoteNode{path, &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

func (r *remoteNode) close() { r.http.CloseIdleConnections() }

func (r *remoteNode) get(ctx context.Context, path string, q url.Values, v any) error {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://node"+path+"?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := r.http.Do(req)
	if err != nil {
		return cmp.Or(ctx.Err(), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return decodeWireError(resp.Body)
	}
	return json.NewDecoder(resp.Body).Decode(v)
}

func decodeWireError(body io.Reader) error {
	var we wireError
	if err := json.NewDecoder(body).Decode(&we); err != nil {
		return fmt.Errorf("the node that runs gave an answer that is not understood: %w", err)
	}
	if we.Code == 0 {
		return errors.New(we.Text)
	}
	return &tailnode.Error{Op: we.Op, Code: we.Code, Err: errors.New(we.Text)}
}

func (r *remoteNode) Status(ctx context.Context) (st *tailnode.Status, err error) {
	return st, r.get(ctx, "/status", nil, &st)
}

func (r *remoteNode) DERPMap(ctx context.Context) (dm json.RawMessage, err error) {
	return dm, r.get(ctx, "/derpmap", nil, &dm)
}

func (r *remoteNode) Netcheck(ctx context.Context, o tailnode.NetcheckOptions) (rep json.RawMessage, err error) {
	q := url.Values{"wait": {o.Timeout.String()}}
	if o.NoPortMap {
		q.Set("portmap", "no")
	}
	return rep, r.get(ctx, "/netcheck", q, &rep)
}

func (r *remoteNode) WhoIs(ctx context.Context, addr string) (w *tailnode.WhoIsResponse, err error) {
	return w, r.get(ctx, "/whois", url.Values{"addr": {addr}}, &w)
}

func (r *remoteNode) Ping(ctx context.Context, ip netip.Addr, typ tailnode.PingType) (p *tailnode.PingResult, err error) {
	return p, r.get(ctx, "/ping", url.Values{"ip": {ip.String()}, "type": {string(typ)}}, &p)
}

func (r *remoteNode) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", r.path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	q := url.Values{"network": {network}, "addr": {addr}}
	fmt.Fprintf(c, "GET /dial?%s HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: tailnode\r\n\r\n", q.Encode())
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		c.Close()
		return nil, cmp.Or(ctx.Err(), err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer c.Close()
		return nil, decodeWireError(resp.Body)
	}
	return &bufferedConn{c.(*net.UnixConn), br}, nil
}

// bufferedConn reads what came with the answer's header first.
type bufferedConn struct {
	*net.UnixConn
	r io.Reader
}

func (b *bufferedConn) Read(p []byte) (int, error) { return b.r.Read(p) }

// rw is a connection whose reads come from somewhere else.
type rw struct {
	io.Reader
	net.Conn
}

func (c rw) Read(p []byte) (int, error) { return c.Reader.Read(p) }
func (c rw) CloseWrite() error          { return closeWrite(c.Conn) }

type closeWriter interface{ CloseWrite() error }

// closeWrite ends the stream's one direction where there is such a thing, or else both.
func closeWrite(c io.Closer) error {
	if cw, ok := c.(closeWriter); ok {
		return cw.CloseWrite()
	}
	return c.Close()
}

// splice copies both ways between a and b, passing on each end of stream, until both have ended.
func splice(a, b io.ReadWriteCloser) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(a, b)
		closeWrite(a)
	}()
	io.Copy(b, a)
	closeWrite(b)
	<-done
}
