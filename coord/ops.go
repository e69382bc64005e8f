package coord

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailnode/tailnode/coord/internal/alloc"
	"github.com/tailnode/tailnode/internal/coordstore"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

func notFound(what, name string) error {
	return fmt.Errorf("coord: %s %q: %w", what, name, ErrNotFound)
}

// commit waits for t, with the mutex released.
func commit(t coordstore.Ticket) error {
	if err := t.Wait(); err != nil {
		return fmt.Errorf("coord: %w", err)
	}
	return nil
}

// CreateAuthKey makes an auth key and returns its secret, which is what a node presents. It is durable when
// the call returns. The server keeps only a hash: the secret cannot be had again.
func (s *Server) CreateAuthKey(o AuthKeyOptions) (string, error) {
	for _, t := range o.Tags {
		if !validTag(t) {
			return "", fmt.Errorf("coord: %w: tag %q (want tag:name, of a-z, 0-9 and dashes)", ErrInvalid, t)
		}
	}
	if o.Expiry < 0 || len(o.Tags) > 64 || len(o.Description) > 1000 {
		return "", fmt.Errorf("coord: %w: auth key options", ErrInvalid)
	}
	if err := s.lock(); err != nil {
		return "", err
	}
	u := s.net.userByName(o.User)
	if u == nil || u.ID == taggedUserID {
		s.mu.Unlock()
		return "", notFound("user", o.User)
	}
	id := alloc.ID(8)
	secret := keyPrefix + id + "-" + alloc.ID(25)
	hash := sha256.Sum256([]byte(secret))
	now := time.Now().UTC().Truncate(time.Second)
	k := &authKeyRec{AuthKey: AuthKey{
		ID: id, User: u.Name, Reusable: o.Reusable, Ephemeral: o.Ephemeral, Preauthorized: o.Preauthorized,
		Tags: slices.Clone(o.Tags), Description: o.Description, Created: now, Expires: time.Now().Add(cmp.Or(o.Expiry, DefaultAuthKeyExpiry)).UTC(),
	}, UserID: u.ID, Hash: hash[:]}
	s.net.keys[id] = k
	t := s.store.Stage(coordstore.Put(coordstore.AuthKeys, id, k))
	s.log.Info("auth key created", "id", id, "user", u.Name, "tags", o.Tags)
	s.mu.Unlock()
	if err := commit(t); err != nil {
		return "", err
	}
	return secret, nil
}

// ListAuthKeys returns all auth keys, revoked and used ones too, the oldest first.
func (s *Server) ListAuthKeys() ([]AuthKey, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	out := make([]AuthKey, 0, len(s.net.keys))
	for _, k := range s.net.keys {
		a := k.AuthKey
		a.Tags = slices.Clone(a.Tags)
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b AuthKey) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.ID, b.ID))
	})
	return out, nil
}

// RevokeAuthKey makes an auth key useless. Nodes that it admitted stay.
func (s *Server) RevokeAuthKey(id string) error {
	if err := s.lock(); err != nil {
		return err
	}
	k := s.net.keys[id]
	if k == nil {
		s.mu.Unlock()
		return notFound("auth key", id)
	}
	k.Revoked = true
	t := s.store.Stage(coordstore.Put(coordstore.AuthKeys, id, k))
	s.mu.Unlock()
	return commit(t)
}

// CreateUser adds a user. The name is what peers see as the login name.
func (s *Server) CreateUser(name, displayName string) error {
	if name == "" || len(name) > 254 || len(displayName) > 254 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return fmt.Errorf("coord: %w: user name %q", ErrInvalid, name)
	}
	if err := s.lock(); err != nil {
		return err
	}
	if s.net.userByName(name) != nil {
		s.mu.Unlock()
		return fmt.Errorf("coord: user %q: %w", name, ErrExists)
	}
	u := &userRec{ID: s.net.srv.NextUser, Name: name, DisplayName: cmp.Or(displayName, name), Created: time.Now().UTC().Truncate(time.Second)}
	s.net.srv.NextUser++
	s.net.setUser(u)
	s.changed()
	t := s.store.Stage(s.putUser(u), coordstore.Put(coordstore.Meta, metaServer, &s.net.srv))
	s.mu.Unlock()
	return commit(t)
}

// ListUsers returns the users in the order in which they were made.
func (s *Server) ListUsers() ([]User, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	recs := make([]*userRec, 0, len(s.net.users))
	for _, u := range s.net.users {
		recs = append(recs, u)
	}
	slices.SortFunc(recs, func(a, b *userRec) int { return cmp.Compare(a.ID, b.ID) })
	var out []User
	for _, u := range recs {
		out = append(out, User{u.Name, u.DisplayName, u.Created})
	}
	return out, nil
}

// Nodes returns all nodes, in the order in which they joined.
func (s *Server) Nodes() ([]Node, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	all := make([]*node, 0, len(s.net.nodes))
	for _, n := range s.net.nodes {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b *node) int { return cmp.Compare(a.rec.ID, b.rec.ID) })
	out, now := make([]Node, len(all)), time.Now()
	for i, n := range all {
		out[i] = s.net.info(n, s.domain, now)
	}
	return out, nil
}

// Node returns the node with this stable ID or name.
func (s *Server) Node(id string) (Node, error) {
	if err := s.lock(); err != nil {
		return Node{}, err
	}
	defer s.mu.Unlock()
	n := s.net.find(id)
	if n == nil {
		return Node{}, notFound("node", id)
	}
	return s.net.info(n, s.domain, time.Now()), nil
}

// edit runs f on a node with the mutex held and waits for the write that f returns.
func (s *Server) edit(id string, f func(n *node) (coordstore.Ticket, error)) error {
	if err := s.lock(); err != nil {
		return err
	}
	n := s.net.find(id)
	if n == nil {
		s.mu.Unlock()
		return notFound("node", id)
	}
	t, err := f(n)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return commit(t)
}

// DeleteNode removes a node (by stable ID or name). It is told that its key has expired; its
// addresses and name become free.
func (s *Server) DeleteNode(id string) error {
	return s.edit(id, func(n *node) (coordstore.Ticket, error) { return s.drop(n), nil })
}

// ExpireNode makes a node's key expire now. The node keeps its identity and has to log in again.
func (s *Server) ExpireNode(id string) error {
	return s.edit(id, func(n *node) (coordstore.Ticket, error) { return s.expire(n, time.Now()), nil })
}

// SetNodeExpiry sets when a node's key expires; the zero time means never.
func (s *Server) SetNodeExpiry(id string, at time.Time) error {
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		n.rec.KeyExpiry, n.told = at.UTC(), false
		s.net.touch(n, whole)
		if !at.IsZero() {
			s.due(at)
		} else {
			n.rec.KeyExpiry = time.Time{}
		}
		s.changed()
		return s.store.Stage(n.put()), nil
	})
}

// ApproveNode lets in a node that waits for it ([Server.RequireMachineApproval]).
func (s *Server) ApproveNode(id string) error {
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		n.rec.Approved = true
		s.net.touch(n, whole)
		s.changed()
		return s.store.Stage(n.put()), nil
	})
}

// RenameNode gives a node a name of its own, one DNS label. An empty name lets it follow the host name again.
func (s *Server) RenameNode(id, name string) error {
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		t := s.net
		taken := func(s string) bool { return t.byName[s] != nil && t.byName[s] != n }
		switch {
		case name == "":
			host := ""
			if n.live.Hostinfo != nil {
				host = n.live.Hostinfo.Hostname
			}
			n.rec.FixedName = false
			s.rename(n, alloc.FreeName(alloc.Label(host), taken))
		case alloc.Label(name) != name:
			return coordstore.Ticket{}, fmt.Errorf("coord: %w: node name %q (want one DNS label, such as %q)", ErrInvalid, name, alloc.Label(name))
		case taken(name):
			return coordstore.Ticket{}, fmt.Errorf("coord: node %q: %w", name, ErrExists)
		default:
			n.rec.FixedName = true
			s.rename(n, name)
		}
		s.changed()
		return s.store.Stage(n.put()), nil
	})
}

// SetTags replaces a node's tags. A node with tags belongs to [TaggedUser] from then on and its key does
// not expire. The last tag cannot be taken away: let the node log in as a user instead.
func (s *Server) SetTags(id string, tags []string) error {
	for _, t := range tags {
		if !validTag(t) {
			return fmt.Errorf("coord: %w: tag %q", ErrInvalid, t)
		}
	}
	if len(tags) == 0 || len(tags) > 64 {
		return fmt.Errorf("coord: %w: want 1 to 64 tags", ErrInvalid)
	}
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		n.rec.Tags = slices.Clone(tags)
		n.rec.User = taggedUserID
		if !n.expired(time.Now()) {
			n.rec.KeyExpiry = time.Time{}
		}
		s.net.touch(n, whole)
		s.changed()
		return s.store.Stage(n.put()), nil
	})
}

// SetNodeCaps sets the capabilities that a node is told it has, each with its arguments.
func (s *Server) SetNodeCaps(id string, caps map[string][]json.RawMessage) error {
	m := tailcfg.NodeCapMap{}
	for c, args := range caps {
		vals := []tailcfg.RawMessage{}
		for _, a := range args {
			if !json.Valid(a) {
				return fmt.Errorf("coord: %w: argument of capability %q", ErrInvalid, c)
			}
			vals = append(vals, tailcfg.RawMessage(a))
		}
		m[tailcfg.NodeCapability(c)] = vals
	}
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		n.rec.Caps = m
		s.net.touch(n, whole)
		s.changed()
		return s.store.Stage(n.put()), nil
	})
}

// SetFilter sets what nodes let in, for all nodes that have no filter of their own. Nil lets in everything from
// every node of the tailnet.
func (s *Server) SetFilter(f *Filter) error {
	rules, err := f.rules()
	if err != nil {
		return err
	}
	if err := s.lock(); err != nil {
		return err
	}
	t := s.net
	t.seq++
	t.filter, t.rules, t.ruleSeq = f, rules, t.seq
	c := coordstore.Del(coordstore.Meta, metaFilter)
	if f != nil {
		c = coordstore.Put(coordstore.Meta, metaFilter, f)
	}
	s.changed()
	ticket := s.store.Stage(c)
	s.mu.Unlock()
	return commit(ticket)
}

// SetNodeFilter gives one node a filter of its own; nil takes it away again.
func (s *Server) SetNodeFilter(id string, f *Filter) error {
	if _, err := f.rules(); err != nil {
		return err
	}
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		n.rec.Filter = f
		s.net.touchSelf(n)
		s.changed()
		return s.store.Stage(n.put()), nil
	})
}

// SetMessages sets the notices that a node shows to its user; none means that all is well. They are
// forgotten when the server stops.
func (s *Server) SetMessages(id string, msgs ...Message) error {
	for _, m := range msgs {
		if m.ID == "" || m.ID == "*" {
			return fmt.Errorf("coord: %w: message ID %q", ErrInvalid, m.ID)
		}
	}
	return s.edit(id, func(n *node) (coordstore.Ticket, error) {
		n.messages = slices.Clone(msgs)
		s.net.touchSelf(n)
		s.changed()
		return coordstore.Ticket{}, nil
	})
}

// SetRelays replaces the relays that nodes are told of. They are not stored: [Server.Relays] counts at the
// next start.
func (s *Server) SetRelays(regions []Region) error {
	dm, err := derpMap(regions)
	if err != nil {
		return err
	}
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	t := s.net
	for id := range t.derp.Regions {
		t.derpGone[id] = true
	}
	t.seq++
	t.derp, t.derpSeq = dm, t.seq
	s.changed()
	return nil
}

// PendingLogins returns the interactive logins that wait for approval, the oldest first.
func (s *Server) PendingLogins() ([]Login, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	out := []Login{}
	for _, l := range s.logins {
		if l.outcome != loginPending {
			continue
		}
		p := Login{ID: l.id, URL: s.loginURL(l.id), Hostname: l.req.hostname(), MachineKey: l.machine.String(), NodeKey: l.req.NodeKey.String(),
			RequestTags: slices.Clone(l.req.requestTags()), Ephemeral: l.req.Ephemeral, Created: l.created, Expires: l.expires}
		if l.req.Hostinfo != nil {
			p.OS = l.req.Hostinfo.OS
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Login) int { return a.Created.Compare(b.Created) })
	return out, nil
}

// loginID takes an ID or the whole URL.
func loginID(s string) string { return s[strings.LastIndexByte(s, '/')+1:] }

// ApproveLogin completes an interactive login: id is its ID or the URL that the node shows. The
// node is stored when the call returns, and goes on by itself.
func (s *Server) ApproveLogin(id string, o ApproveOptions) error {
	for _, t := range o.Tags {
		if !validTag(t) {
			return fmt.Errorf("coord: %w: tag %q", ErrInvalid, t)
		}
	}
	if err := s.lock(); err != nil {
		return err
	}
	t, err := s.approve(loginID(id), o, time.Now())
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return commit(t)
}

func (s *Server) approve(id string, o ApproveOptions, now time.Time) (coordstore.Ticket, error) {
	var none coordstore.Ticket
	l := s.logins[id]
	if l == nil || l.outcome != loginPending {
		return none, notFound("login", id)
	}
	u := s.net.userByName(o.User)
	if u == nil || u.ID == taggedUserID {
		return none, notFound("user", o.User)
	}
	if n := s.net.byKey[l.req.NodeKey]; n != nil {
		return none, fmt.Errorf("coord: the node key of login %s is in use: %w", id, ErrExists)
	}
	a := admission{owner: u.ID, tags: o.Tags, ephemeral: l.req.Ephemeral, approved: true}
	if a.tags == nil {
		a.tags = l.req.requestTags()
	}
	if len(a.tags) > 0 {
		a.owner = taggedUserID
	}
	_, changes, err := s.admit(l.machine, l.req, a, now)
	if err != nil {
		return none, fmt.Errorf("coord: %w", err)
	}
	t := s.store.Stage(changes...)
	l.finish(loginApproved)
	return t, nil
}

// RejectLogin refuses an interactive login. The node is told.
func (s *Server) RejectLogin(id string) error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	l := s.logins[loginID(id)]
	if l == nil || l.outcome != loginPending {
		return notFound("login", id)
	}
	l.finish(loginRejected)
	return nil
}

// AdmitRelayClient reports whether a relay should serve a client: nil if nodeKey is a
// node of this tailnet whose key has not expired, else an error that wraps [ErrNotAllowed]. It does not
// block, and fits a relay's admission hook.
func (s *Server) AdmitRelayClient(nodeKey [32]byte, source netip.Addr) error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	n := s.net.byKey[key.NodePublicFromRaw(nodeKey)]
	if n == nil || n.blind(time.Now()) {
		return fmt.Errorf("coord: relay client from %v: %w", source, ErrNotAllowed)
	}
	return nil
}

// serveAdmit is the same over HTTP, as relays ask with a verification URL.
func (s *Server) serveAdmit(w http.ResponseWriter, r *http.Request) {
	var req struct {
		NodePublic key.NodePublic
		Source     netip.Addr
	}
	if readJSON(w, r, 4<<10, &req) {
		writeJSON(w, tailcfg.DERPAdmitClientResponse{Allow: s.AdmitRelayClient(req.NodePublic.Raw(), req.Source) == nil})
	}
}

// validTag reports whether t is tag:name, of a-z, 0-9 and dashes.
func validTag(t string) bool {
	name, ok := strings.CutPrefix(t, "tag:")
	if !ok || name == "" || len(name) > 63 || name[0] < 'a' || name[0] > 'z' {
		return false
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
