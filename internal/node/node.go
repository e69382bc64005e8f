// Package node is a tailnet node without its public face: it owns the state, the session
// with the coordination server, the netmap and the data path, and brings them up and down
// together. The root package and the command put names and types on top of it.
package node

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/control"
	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/errcode"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/netmap"
	"github.com/tailnode/tailnode/internal/path"
	"github.com/tailnode/tailnode/internal/portmap"
	"github.com/tailnode/tailnode/internal/state"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// DefaultControlURL is the coordination server of who names none.
const DefaultControlURL = "https://controlplane.tailscale.com"

// Config is what a Node is made of. Store and Hostname are required.
type Config struct {
	Store      state.Store
	Hostname   string
	AuthKey    string // used when the node is not registered yet
	ControlURL string // "" is DefaultControlURL
	Ephemeral  bool   // log out on Close
	Tags       []string
	Version    string // of this software, for the admin's list of machines
	// AuthURL is called once for each URL that somebody must visit to let the node in, one at a time. It may call Close.
	AuthURL func(url string)
	// Dial reaches control and relays over the host's network; nil is net.Dialer's.
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	RootCA *x509.CertPool // nil is the system's
	Port   uint16         // UDP port for direct paths; 0: the system chooses
	// PeerRelay, if not nil, has the node relay for others.
	PeerRelay *datapath.PeerRelay
	// NoPortMap keeps the node from asking the router for a port.
	NoPortMap bool
	Limits    datapath.Limits
	Logger    *slog.Logger // must not call Close
}

// State says how far a Node is.
type State int

// The states. The order is that of a first start.
const (
	Stopped State = iota
	Starting
	NeedsLogin
	NeedsApproval
	Running
	Failed // control refused the node for good; Status.Err has its words
)

// Status is a snapshot of a Node. Snapshots are immutable.
type Status struct {
	State   State
	AuthURL string      // somebody must visit it; only in NeedsLogin
	Err     error       // why there is no connection to control at the moment, or why the node failed
	Netmap  *netmap.Map // nil before the first; kept while control is away
	Health  []string    // what is wrong right now, in words, by control

	HomeRelay bool  // the connection to the home relay stands
	RelayErr  error // why it does not
}

// Node is a node of a tailnet. Its methods are safe for concurrent use.
type Node struct {
	cfg    Config
	log    *slog.Logger
	engine *datapath.Engine
	sess   *control.Session
	ports  *portmap.Client
	holes  *portmap.Client // ports's IPv6 twin
	disco  key.DiscoPrivate
	saved  saved

	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc
	wg     sync.WaitGroup

	urls     urls
	build    *netmap.Builder // belongs to the session's goroutine
	settling atomic.Bool     // settle is under way

	homeKick chan struct{} // capacity 1: choose the home relay again
	mapMu    sync.Mutex    // serialises portMapped; taken before mu

	mu      sync.Mutex
	status  Status
	changed chan struct{} // closed and replaced at every change of status
	host    tailcfg.Hostinfo
	eps     []path.Endpoint // where this node may be reached directly
	hasSess bool            // sess is there to be told of them

	closeOnce sync.Once
	closed    chan struct{} // closed when Close is done
}

// saved is what a node keeps between runs, beside the machine key.
type saved struct {
	ControlURL string
	NodeKey    key.NodePrivate
	OldNodeKey key.NodePublic    `json:",omitzero"` // what NodeKey replaces, until control has accepted it
	Registered bool              // control has accepted NodeKey before
	ControlKey key.MachinePublic `json:",omitzero"` // control's own key, to spare asking for it
}

// The names of the entries in the state store.
const (
	stateMachineKey = "machine-key"
	stateNode       = "node"
)

// Start makes a Node and begins to connect it. It does not wait for the network.
func Start(cfg Config) (*Node, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.ControlURL = strings.TrimRight(cmp.Or(cfg.ControlURL, DefaultControlURL), "/")
	if u, err := url.Parse(cfg.ControlURL); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, errcode.New(errcode.InvalidArgument, "the control URL %q is not of the form https://host or http://host:port", cfg.ControlURL)
	}
	for _, t := range cfg.Tags {
		if !strings.HasPrefix(t, "tag:") || len(t) == len("tag:") {
			return nil, errcode.New(errcode.InvalidArgument, "the tag %q is not of the form tag:name", t)
		}
	}
	machine, err := loadMachineKey(cfg.Store)
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg:      cfg,
		log:      cfg.Logger,
		disco:    key.NewDisco(),
		changed:  make(chan struct{}),
		closed:   make(chan struct{}),
		homeKick: make(chan struct{}, 1),
		status:   Status{State: Starting},
		urls:     urls{show: cfg.AuthURL},
		build:    netmap.NewBuilder(),
	}
	if err := n.loadNode(); err != nil {
		return nil, err
	}
	n.host = n.hostinfo()
	n.engine, err = datapath.New(datapath.Config{
		NodeKey:     n.saved.NodeKey,
		DiscoKey:    n.disco,
		Dial:        cfg.Dial,
		RootCAs:     cfg.RootCA,
		RelayState:  n.relayState,
		Port:        cfg.Port,
		PeerRelay:   cfg.PeerRelay,
		Endpoints:   n.setEndpoints,
		LinkChanged: n.linkChanged,
		Limits:      cfg.Limits,
		Logger:      cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	var tlsConf *tls.Config
	if cfg.RootCA != nil {
		tlsConf = &tls.Config{RootCAs: cfg.RootCA}
	}
	host := n.host
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.sess, err = control.NewSession(control.SessionConfig{
		ServerURL:  cfg.ControlURL,
		MachineKey: machine,
		NodeKey:    n.saved.NodeKey,
		DiscoKey:   n.disco.Public(),
		OldNodeKey: n.saved.OldNodeKey,
		Registered: n.saved.Registered,
		ControlKey: n.saved.ControlKey,
		AuthKey:    cfg.AuthKey,
		Ephemeral:  cfg.Ephemeral,
		Hostinfo:   &host,
		Dial:       cfg.Dial,
		TLSConfig:  tlsConf,
		Handler:    (*handler)(n),
		Logger:     cfg.Logger,
	})
	if err != nil {
		n.cancel()
		n.engine.Close()
		return nil, err
	}
	n.startPortMap()
	n.startEndpoints()
	n.wg.Go(n.chooseHome)
	n.sess.Start()
	return n, nil
}

func loadMachineKey(st state.Store) (k key.MachinePrivate, err error) {
	b, err := st.ReadState(stateMachineKey)
	if errors.Is(err, fs.ErrNotExist) {
		k = key.NewMachine()
		text, _ := k.MarshalText()
		if err := st.WriteState(stateMachineKey, text); err != nil {
			return k, StateError(err)
		}
		return k, nil
	}
	if err != nil {
		return k, StateError(err)
	}
	if err := k.UnmarshalText(b); err != nil || k.IsZero() {
		return k, errcode.New(errcode.StateCorrupt, "the state's entry %q is not a key; it was left as it is", stateMachineKey)
	}
	return k, nil
}

func (n *Node) loadNode() error {
	b, err := n.cfg.Store.ReadState(stateNode)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return StateError(err)
	default:
		if json.Unmarshal(b, &n.saved) != nil || n.saved.NodeKey.IsZero() {
			return errcode.New(errcode.StateCorrupt, "the state's entry %q cannot be read; it was left as it is", stateNode)
		}
	}
	if n.saved.ControlURL != n.cfg.ControlURL {
		// A node key belongs to one tailnet: another control server gets another key.
		return n.save(saved{ControlURL: n.cfg.ControlURL, NodeKey: key.NewNode()})
	}
	return nil
}

// save makes s what is saved, or after an error leaves what was.
func (n *Node) save(s saved) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := n.cfg.Store.WriteState(stateNode, b); err != nil {
		return StateError(err)
	}
	n.saved = s
	return nil
}

// StateError gives an error of a Store its code.
func StateError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, state.ErrCorrupt), errors.Is(err, state.ErrVersion):
		return errcode.With(errcode.StateCorrupt, err)
	case errors.Is(err, state.ErrLocked):
		return errcode.With(errcode.StateLocked, err)
	}
	return errcode.With(errcode.StateIO, err)
}

func (n *Node) hostinfo() tailcfg.Hostinfo {
	return tailcfg.Hostinfo{
		IPNVersion:      n.cfg.Version,
		OS:              osName(),
		Hostname:        n.cfg.Hostname,
		GoArch:          runtime.GOARCH,
		GoVersion:       runtime.Version(),
		NoLogsNoSupport: true,
		Userspace:       tailcfg.True,
		UserspaceRouter: tailcfg.True,
		RequestTags:     n.cfg.Tags,
		PeerRelay:       n.cfg.PeerRelay != nil,
	}
}

// osName returns the operating system in control's spelling.
func osName() string {
	if runtime.GOOS == "darwin" {
		return "macOS"
	}
	return runtime.GOOS
}

// Engine returns the data path. It belongs to the Node.
func (n *Node) Engine() *datapath.Engine { return n.engine }

// NodeKey returns the public node key in use.
func (n *Node) NodeKey() key.NodePublic {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.saved.NodeKey.Public()
}

// Status returns the current status and a channel that is closed when it has changed.
func (n *Node) Status() (Status, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.status, n.changed
}

// update changes the status and wakes who waits for that.
func (n *Node) update(f func(*Status)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(&n.status)
	close(n.changed)
	n.changed = make(chan struct{})
}

// errNodeClosed is the error of calls that Close ended.
var errNodeClosed = errcode.With(errcode.Closed, fmt.Errorf("the server is closed: %w", net.ErrClosed))

// Await blocks until done says so or gives an error, ctx ends, or the node is closed.
func (n *Node) Await(ctx context.Context, done func(Status) (bool, error)) (Status, error) {
	for {
		st, changed := n.Status()
		if n.ctx.Err() != nil {
			return st, errNodeClosed
		}
		if ok, err := done(st); ok || err != nil {
			return st, err
		}
		select {
		case <-changed:
		case <-n.ctx.Done():
			return st, errNodeClosed
		case <-ctx.Done():
			return st, why(ctx, st)
		}
	}
}

// why says what was missing when ctx ended: "deadline exceeded" alone helps nobody. The code is that of ctx's end, whatever
// kept the call waiting.
func why(ctx context.Context, st Status) error {
	err := missing(context.Cause(ctx), st)
	switch cause := context.Cause(ctx); {
	case errcode.Of(cause) != 0:
		return err
	case errors.Is(cause, context.DeadlineExceeded), ctx.Err() == context.DeadlineExceeded:
		return errcode.With(errcode.Timeout, err)
	}
	return errcode.With(errcode.Canceled, err)
}

func missing(err error, st Status) error {
	switch {
	case errors.Is(st.Err, context.Canceled), errors.Is(st.Err, context.DeadlineExceeded): // not the caller's
		return fmt.Errorf("%w (%v)", err, st.Err)
	case st.Err != nil:
		return fmt.Errorf("%w (%w)", err, st.Err)
	case st.State == NeedsLogin && st.AuthURL != "":
		return fmt.Errorf("%w while waiting for somebody to visit %s", err, st.AuthURL)
	case st.State == NeedsApproval:
		return fmt.Errorf("%w while waiting for an administrator to approve this machine", err)
	case st.State != Running:
		return fmt.Errorf("%w before control answered", err)
	}
	return err
}

// AwaitRunning blocks until the node is on the tailnet, control refuses it, ctx ends, or the
// node is closed.
func (n *Node) AwaitRunning(ctx context.Context) (Status, error) {
	return n.Await(ctx, func(st Status) (bool, error) {
		if st.State == Failed {
			return false, st.Err
		}
		return st.State == Running, nil
	})
}

// logoutTimeout is how long Close of an ephemeral node tries to tell control.
const logoutTimeout = 3 * time.Second

// Close takes the node off the tailnet and frees everything it holds but the Store. It is
// idempotent, and every call of it returns when that is done.
func (n *Node) Close() {
	n.closeOnce.Do(func() {
		defer close(n.closed)
		n.engine.Part() // before the logout: from a node that is not in the netmap any more peers take nothing, not even a reset
		st, _ := n.Status()
		if n.cfg.Ephemeral && st.Netmap != nil {
			ctx, cancel := context.WithTimeout(context.Background(), logoutTimeout)
			if err := n.sess.Logout(ctx); err != nil {
				n.log.Warn("logout failed; control will remove the ephemeral node by itself", "err", err)
			}
			cancel()
		}
		n.cancel()
		n.sess.Close()
		n.urls.close()
		n.ports.Close()
		n.holes.Close()
		n.engine.Close()
		n.wg.Wait()
		n.update(func(s *Status) { *s = Status{State: Stopped, Err: errNodeClosed} })
	})
	<-n.closed
}
