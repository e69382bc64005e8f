package coord

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net/http"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tailnode/tailnode/coord/internal/alloc"
	"github.com/tailnode/tailnode/coord/internal/channel"
	"github.com/tailnode/tailnode/coord/internal/throttle"
	"github.com/tailnode/tailnode/internal/coordstore"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	// minCap is the oldest version served: from it on the map stream and the updates of a node are
	// separate requests.
	minCap          = 68
	capNamedFilters = 81

	maxRegisterBody = 64 << 10
	maxLogins       = 1000 // logins waiting for approval
	maxLoginsFrom   = 100  // those from one address
	loginLifetime   = 15 * time.Minute
	loginRetry      = time.Minute // when to ask again if there are too many
	keyPrefix       = "tnkey-auth-"
	maxNodes        = 100_000
)

// outcome is what became of an interactive login.
type outcome int

const (
	loginPending outcome = iota
	loginApproved
	loginRejected
	loginExpired
)

// login is an interactive login. The server's mutex guards it.
type login struct {
	id      string
	machine key.MachinePublic
	req     *registration
	created time.Time
	expires time.Time
	outcome outcome
	done    chan struct{} // closed when outcome is no longer pending
}

func (l *login) finish(o outcome) {
	if l.outcome == loginPending {
		l.outcome = o
		close(l.done)
	}
}

// registration is the part of a request that makes a node.
type registration struct {
	tailcfg.RegisterRequest
	from netip.Prefix // whom the request counts against
}

func (r *registration) hostname() string {
	if r.Hostinfo == nil {
		return ""
	}
	return r.Hostinfo.Hostname
}

func (r *registration) requestTags() []string {
	if r.Hostinfo == nil {
		return nil
	}
	return r.Hostinfo.RequestTags
}

// refusal is an error whose text is for the user at the node.
type refusal string

func (e refusal) Error() string { return string(e) }

// busy is an error that passes with time. Clients take a refusal for final.
type busy string

func (e busy) Error() string { return string(e) }

// serveRegister answers POST /machine/register (docs/protocol/control.md § POST /machine/register).
func (s *Server) serveRegister(w http.ResponseWriter, r *http.Request) {
	from := remoteIP(r)
	if wait := s.failures.Blocked(from, time.Now()); wait > 0 {
		tooMany(w, wait, "too many refused registrations from this address; wait a little")
		return
	}
	req := new(registration)
	if !readJSON(w, r, maxRegisterBody, &req.RegisterRequest) {
		s.failures.Failed(from, time.Now())
		return
	}
	switch {
	case req.Version < minCap:
		http.Error(w, fmt.Sprintf("this client is too old: it speaks version %d, and this server %d and later", req.Version, minCap), http.StatusBadRequest)
		return
	case req.NodeKey.IsZero():
		http.Error(w, "no node key", http.StatusBadRequest)
		return
	}
	req.from = throttle.Group(from)
	resp, err := s.register(r, channel.Machine(r), req)
	if b, ok := err.(busy); ok {
		s.log.Info("registration put off", "from", from, "host", req.hostname(), "reason", string(b))
		tooMany(w, loginRetry, string(b))
		return
	}
	if err != nil {
		text, ok := err.(refusal)
		if !ok {
			s.log.Error("register", "err", err)
			http.Error(w, "the server could not store the registration", http.StatusInternalServerError)
			return
		}
		s.failures.Failed(from, time.Now())
		s.log.Info("registration refused", "from", from, "host", req.hostname(), "reason", string(text))
		resp = &tailcfg.RegisterResponse{Error: string(text)}
	}
	if resp != nil {
		writeJSON(w, resp)
	}
}

// tooMany asks the client to wait.
func tooMany(w http.ResponseWriter, wait time.Duration, why string) {
	w.Header().Set("Retry-After", strconv.Itoa(int(wait/time.Second)+1))
	http.Error(w, why, http.StatusTooManyRequests)
}

// register decides on a registration. A nil response without an error means that the client went away.
func (s *Server) register(r *http.Request, m key.MachinePublic, req *registration) (*tailcfg.RegisterResponse, error) {
	if req.Followup != "" {
		if ok, err := s.awaitLogin(r, m, req); !ok || err != nil {
			return nil, err
		}
	}
	now := time.Now()
	if err := s.lock(); err != nil {
		return nil, err
	}
	resp, wait, err := s.registerLocked(m, req, now)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := wait.Wait(); err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) registerLocked(m key.MachinePublic, req *registration, now time.Time) (*tailcfg.RegisterResponse, coordstore.Ticket, error) {
	t := s.net
	var none coordstore.Ticket
	n := t.byKey[req.NodeKey]
	if n != nil && n.rec.Machine != m {
		return nil, none, refusal("this node key belongs to another machine")
	}
	logout := !req.Expiry.IsZero() && req.Expiry.Before(now)
	switch {
	case n == nil && logout: // it is gone already
		return &tailcfg.RegisterResponse{NodeKeyExpired: true}, s.store.Stage(), nil
	case n != nil && logout:
		s.log.Info("node logged out", "node", n.rec.Name)
		if n.rec.Ephemeral {
			return &tailcfg.RegisterResponse{NodeKeyExpired: true}, s.drop(n), nil
		}
		wait := s.expire(n, now)
		resp := s.answer(n, now)
		return resp, wait, nil
	case n != nil && n.expired(now):
		return s.answer(n, now), none, nil // says so; the client comes back with a new key
	case n != nil: // a client that starts again
		changes := []coordstore.Change{}
		if e := req.Expiry; !e.IsZero() && (n.rec.KeyExpiry.IsZero() || e.Before(n.rec.KeyExpiry)) {
			n.rec.KeyExpiry, n.told = e.UTC(), false
			t.touch(n, keyExpiry)
			s.due(e)
			changes = append(changes, n.put())
		}
		if s.report(n, req.Version, req.Hostinfo) {
			changes = append(changes, n.put(), n.putLive())
		}
		s.changed()
		return s.answer(n, now), s.store.Stage(changes...), nil // if nothing changed, its first registration must still be stored
	}

	if req.Auth != nil && req.Auth.AuthKey != "" {
		k, err := s.checkKey(req.Auth.AuthKey, now)
		if err != nil {
			return nil, none, err
		}
		if want := req.requestTags(); !subset(want, k.Tags) {
			return nil, none, refusal(fmt.Sprintf("requested tags %v are not among those of the auth key", want))
		}
		owner := k.UserID
		if len(k.Tags) > 0 {
			owner = taggedUserID
		}
		n, changes, err := s.admit(m, req, admission{owner: owner, tags: k.Tags, ephemeral: k.Ephemeral || req.Ephemeral,
			approved: k.Preauthorized || !s.RequireMachineApproval, key: k.ID}, now)
		if err != nil {
			return nil, none, err
		}
		k.Uses++
		k.LastUsed = now
		wait := s.store.Stage(append(changes, coordstore.Put(coordstore.AuthKeys, k.ID, k))...)
		return s.answer(n, now), wait, nil
	}

	// Somebody has to vouch for it.
	pending, same := 0, 0
	for _, l := range s.logins {
		if l.outcome != loginPending {
			continue
		}
		if l.machine == m && l.req.NodeKey == req.NodeKey {
			return &tailcfg.RegisterResponse{AuthURL: s.loginURL(l.id)}, none, nil
		}
		pending++
		if l.req.from == req.from {
			same++
		}
	}
	if pending >= maxLogins {
		return nil, none, busy("too many logins are waiting for approval; try again later")
	}
	if same >= maxLoginsFrom {
		return nil, none, busy("too many logins from this address are waiting for approval; try again later")
	}
	for _, tag := range req.requestTags() {
		if !validTag(tag) {
			return nil, none, refusal(fmt.Sprintf("%q is not a tag", tag))
		}
	}
	l := &login{id: alloc.ID(16), machine: m, req: req, created: now, expires: now.Add(loginLifetime), done: make(chan struct{})}
	s.logins[l.id] = l
	s.due(l.expires)
	s.log.Info("login waits for approval", "host", req.hostname(), "id", l.id)
	return &tailcfg.RegisterResponse{AuthURL: s.loginURL(l.id)}, none, nil
}

func (s *Server) loginURL(id string) string { return s.base + "/register/" + id }

// awaitLogin blocks until the login that req follows up is decided. It returns false if the
// client went away. A login that is not known is no error: registering again gives a new one.
func (s *Server) awaitLogin(r *http.Request, m key.MachinePublic, req *registration) (bool, error) {
	if err := s.lock(); err != nil {
		return false, err
	}
	l := s.logins[path.Base(req.Followup)]
	if l != nil && (l.machine != m || l.req.NodeKey != req.NodeKey) {
		l = nil
	}
	s.mu.Unlock()
	if l == nil {
		return true, nil
	}
	select {
	case <-l.done:
	case <-r.Context().Done():
		return false, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.outcome == loginRejected {
		return false, refusal("the login was rejected")
	}
	return true, nil
}

// answer makes the response to a node that is known.
func (s *Server) answer(n *node, now time.Time) *tailcfg.RegisterResponse {
	resp := &tailcfg.RegisterResponse{MachineAuthorized: n.rec.Approved, NodeKeyExpired: n.expired(now)}
	if u := s.net.users[n.rec.User]; u != nil {
		resp.User = tailcfg.User{ID: u.ID, DisplayName: u.DisplayName, Created: u.Created}
		resp.Login = tailcfg.Login{ID: tailcfg.LoginID(u.ID), Provider: "tailnode", LoginName: u.Name, DisplayName: u.DisplayName}
	}
	return resp
}

// admission says as what a node comes in.
type admission struct {
	owner     tailcfg.UserID
	tags      []string
	ephemeral bool
	approved  bool
	key       string // auth key ID
}

// admit makes the node that req asks for, or gives the machine's node of the same owner the new node
// key. It returns the writes; the mutex is held.
func (s *Server) admit(m key.MachinePublic, req *registration, a admission, now time.Time) (*node, []coordstore.Change, error) {
	t := s.net
	var expiry time.Time
	if s.expiry > 0 && len(a.tags) == 0 {
		expiry = now.Add(s.expiry).UTC().Truncate(time.Second)
	}
	if e := req.Expiry; e.After(now) && (expiry.IsZero() || e.Before(expiry)) {
		expiry = e.UTC()
	}

	if n := t.machineNode(m, a.owner); n != nil {
		if n.stream != nil {
			n.stream.end() // it belongs to the old key
		}
		delete(t.byKey, n.rec.Key)
		n.rec.Key = req.NodeKey
		t.byKey[n.rec.Key] = n
		what := []aspect{nodeKey, keyExpiry}
		if expiry.IsZero() || n.told || !slices.Equal(n.rec.Tags, a.tags) {
			what = append(what, whole) // a patch cannot say these
		}
		n.rec.KeyExpiry, n.told = expiry, false
		n.rec.Tags = slices.Clone(a.tags)
		n.rec.Ephemeral = a.ephemeral
		n.rec.AuthKey = a.key
		if a.approved {
			n.rec.Approved = true
		}
		n.gone = now
		s.report(n, req.Version, req.Hostinfo)
		t.touch(n, what...)
		s.schedule(n, now)
		s.changed()
		s.log.Info("node logged in again", "node", n.rec.Name)
		return n, []coordstore.Change{n.put(), n.putLive()}, nil
	}

	if len(t.nodes) >= maxNodes {
		return nil, nil, refusal("the tailnet is full")
	}
	v4, err := alloc.NextIPv4(s.p4, t.srv.LastIPv4, func(a netip.Addr) bool { return t.byAddr[a] != nil })
	if err != nil {
		return nil, nil, refusal("the tailnet has no free address left")
	}
	n := &node{gone: now}
	n.rec = nodeRec{
		ID: t.srv.NextNode, Stable: tailcfg.StableNodeID("n" + alloc.ID(10)), Machine: m, Key: req.NodeKey,
		Name: alloc.FreeName(alloc.Label(req.hostname()), func(s string) bool { return t.byName[s] != nil }),
		User: a.owner, Tags: slices.Clone(a.tags), IPv4: v4, IPv6: alloc.PairIPv6(s.p6, v4), Created: now.UTC().Truncate(time.Second),
		KeyExpiry: expiry, Ephemeral: a.ephemeral, Approved: a.approved, AuthKey: a.key,
	}
	t.srv.NextNode++
	t.srv.LastIPv4 = v4
	n.live.Cap = req.Version
	n.live.Hostinfo = req.Hostinfo
	t.add(n)
	s.schedule(n, now)
	s.changed()
	s.log.Info("node joined", "node", n.rec.Name, "ip", v4, "ephemeral", a.ephemeral, "tags", a.tags)
	return n, []coordstore.Change{n.put(), n.putLive(), coordstore.Put(coordstore.Meta, metaServer, &t.srv)}, nil
}

// schedule arranges for what will happen to n by itself.
func (s *Server) schedule(n *node, now time.Time) {
	if e := n.rec.KeyExpiry; !e.IsZero() {
		s.due(e)
	}
	if n.rec.Ephemeral && n.stream == nil {
		s.due(now.Add(s.ephemera))
	}
}

// expire makes n's key expire now. The mutex is held.
func (s *Server) expire(n *node, now time.Time) coordstore.Ticket {
	n.rec.KeyExpiry = now.Add(-time.Second).UTC().Truncate(time.Second)
	n.told = true
	s.net.touch(n, whole, keyExpiry)
	s.changed()
	return s.store.Stage(n.put())
}

// report takes over what a node tells of itself and reports whether it changed anything. The mutex is held.
func (s *Server) report(n *node, ver tailcfg.CapabilityVersion, hi *tailcfg.Hostinfo) bool {
	t, did := s.net, false
	if ver != 0 && ver != n.live.Cap {
		n.live.Cap = ver
		t.touch(n, capVer)
		did = true
	}
	if hi == nil {
		return did
	}
	old := n.live.Hostinfo
	n.live.Hostinfo = hi
	if ni := hi.NetInfo; ni != nil && ni.PreferredDERP > 0 && ni.PreferredDERP < 1<<16 && ni.PreferredDERP != n.live.HomeDERP {
		n.live.HomeDERP = ni.PreferredDERP
		t.touch(n, homeDERP)
		did = true
	}
	if old == nil || old.Hostname != hi.Hostname {
		if base := alloc.Label(hi.Hostname); !n.rec.FixedName && base != n.rec.Name && !alloc.IsNumbered(n.rec.Name, base) {
			s.rename(n, alloc.FreeName(base, func(s string) bool { return t.byName[s] != nil && t.byName[s] != n }))
		}
		t.touch(n, whole)
		did = true
	} else if old.OS != hi.OS || old.ShieldsUp != hi.ShieldsUp || !slices.Equal(old.Services, hi.Services) {
		t.touch(n, whole)
		did = true
	}
	return did
}

// rename gives n a name that is free. The mutex is held.
func (s *Server) rename(n *node, name string) {
	t := s.net
	delete(t.byName, n.rec.Name)
	n.rec.Name = name
	t.byName[name] = n
	t.touch(n, whole)
}

// checkKey finds the auth key whose secret is given.
func (s *Server) checkKey(secret string, now time.Time) (*authKeyRec, error) {
	hash := sha256.Sum256([]byte(secret))
	id := AuthKeyID(secret)
	k := s.net.keys[id]
	var want []byte
	if k != nil {
		want = k.Hash
	} else {
		want = make([]byte, len(hash)) // no secret has this hash, and no answer comes sooner
	}
	if subtle.ConstantTimeCompare(hash[:], want) != 1 || k == nil {
		return nil, refusal("invalid auth key: not known to this server")
	}
	switch {
	case k.Revoked:
		return nil, refusal("invalid auth key: " + id + " was revoked")
	case !now.Before(k.Expires):
		return nil, refusal("invalid auth key: " + id + " expired at " + k.Expires.UTC().Format(time.RFC3339))
	case !k.Reusable && k.Uses > 0:
		return nil, refusal("invalid auth key: " + id + " was used already and is good for one node")
	}
	return k, nil
}

// AuthKeyID returns the ID of the auth key with this secret, by which [Server.RevokeAuthKey]
// knows it, or an empty string if secret does not look like one of this server's.
func AuthKeyID(secret string) string {
	rest, ok := strings.CutPrefix(secret, keyPrefix)
	id, _, ok2 := strings.Cut(rest, "-")
	if !ok || !ok2 {
		return ""
	}
	return id
}

func subset(a, b []string) bool {
	for _, x := range a {
		if !slices.Contains(b, x) {
			return false
		}
	}
	return true
}
