package coord

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tailnode/tailnode/coord/internal/mapframe"
	"github.com/tailnode/tailnode/internal/coordstore"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// How changes reach the nodes.
//
// The tailnet has one sequence number, which every change raises. A node remembers for each aspect
// of itself the number of its last change, and all nodes hang in one list, the last changed first.
// A map stream is a cursor: the number up to which it has told its node everything. To catch up it
// walks the list from the front to the first node that is not newer than the cursor. So there is no
// queue that could fill up for a slow node, several changes of one node melt into one, and a change
// costs the same however many streams there are; what it costs to send, each stream pays for itself.
//
// Streams are woken together, at most once per interval, so that most of them stand at the same
// cursor and one encoded frame serves them all.

// aspect is a part of a node that changes by itself.
type aspect int

const (
	whole     aspect = iota // anything that the aspects below do not say
	endpoints               //
	homeDERP                //
	disco                   //
	nodeKey                 //
	online                  //
	keyExpiry               //
	capVer                  //
	aspects
)

// node is one node. The tailnet's mutex guards it.
type node struct {
	rec  nodeRec
	live liveRec

	stream *stream   // the map stream in progress
	gone   time.Time // when the last one ended, or the server started
	told   bool      // peers know that the key has expired

	seq     [aspects]uint64
	top     uint64 // the highest of seq: what the list is sorted by
	selfSeq uint64 // the last change that matters to the node itself only
	newer   *node  // the list; nil at the front
	older   *node

	peer     []byte         // JSON as peers get it; nil: to be made
	messages []Message      // shown to the node's user
	pings    []*pendingPing // to be sent
}

// removal remembers a node that is gone from the others' view.
type removal struct {
	seq uint64
	id  tailcfg.NodeID
}

// maxRemovals bounds the removals remembered. A stream that is further behind gets the whole map again.
const maxRemovals = 4096

// tailnet is the state. The server's mutex guards it; methods that end in nothing special
// expect it held.
type tailnet struct {
	srv     serverRec
	users   map[tailcfg.UserID]*userRec
	userSeq map[tailcfg.UserID]uint64
	keys    map[string]*authKeyRec
	nodes   map[tailcfg.NodeID]*node
	byKey   map[key.NodePublic]*node
	byName  map[string]*node
	byAddr  map[netip.Addr]*node

	byMachine map[key.MachinePublic][]*node // several users may log in on one machine

	seq      uint64
	newest   *node // front of the list of changes
	removed  []removal
	forgot   uint64 // removals up to this number are forgotten
	derp     *tailcfg.DERPMap
	derpSeq  uint64
	derpGone map[int]bool // regions that were there once
	filter   *Filter
	rules    []tailcfg.FilterRule
	ruleSeq  uint64
	frames   map[frameKey]*mapframe.Frame // deltas that several streams can use
}

func newTailnet() *tailnet {
	return &tailnet{
		users: map[tailcfg.UserID]*userRec{}, userSeq: map[tailcfg.UserID]uint64{}, keys: map[string]*authKeyRec{},
		nodes: map[tailcfg.NodeID]*node{}, byKey: map[key.NodePublic]*node{}, byName: map[string]*node{},
		byAddr: map[netip.Addr]*node{}, frames: map[frameKey]*mapframe.Frame{}, rules: tailcfg.FilterAllowAll,
		derpGone: map[int]bool{}, byMachine: map[key.MachinePublic][]*node{},
	}
}

// load reads everything that st holds.
func (t *tailnet) load(st *coordstore.Store, now time.Time) error {
	err := st.Load(coordstore.Meta, func(k string, v []byte) error {
		switch k {
		case metaServer:
			return json.Unmarshal(v, &t.srv)
		case metaFilter:
			if err := json.Unmarshal(v, &t.filter); err != nil {
				return err
			}
			rules, err := t.filter.rules()
			t.rules = rules
			return err
		}
		return nil
	})
	if err == nil {
		err = st.Load(coordstore.Users, func(_ string, v []byte) error {
			u := new(userRec)
			if err := json.Unmarshal(v, u); err != nil {
				return err
			}
			t.users[u.ID] = u
			return nil
		})
	}
	if err == nil {
		err = st.Load(coordstore.AuthKeys, func(id string, v []byte) error {
			k := new(authKeyRec)
			t.keys[id] = k
			return json.Unmarshal(v, k)
		})
	}
	if err == nil {
		err = st.Load(coordstore.Nodes, func(_ string, v []byte) error {
			n := &node{gone: now}
			if err := json.Unmarshal(v, &n.rec); err != nil {
				return err
			}
			if n.rec.ID <= 0 || n.rec.ID >= t.srv.NextNode || n.rec.Name == "" || !n.rec.IPv4.Is4() || !n.rec.IPv6.Is6() {
				return errors.New("incomplete")
			}
			if t.byKey[n.rec.Key] != nil || t.byName[n.rec.Name] != nil || t.byAddr[n.rec.IPv4] != nil || t.nodes[n.rec.ID] != nil {
				return fmt.Errorf("node %d: key, name or address is another node's too", n.rec.ID)
			}
			t.add(n)
			return nil
		})
	}
	if err == nil {
		err = st.Load(coordstore.Live, func(id string, v []byte) error {
			i, err := strconv.ParseInt(id, 10, 64)
			if err != nil {
				return err
			}
			if n := t.nodes[tailcfg.NodeID(i)]; n != nil {
				return json.Unmarshal(v, &n.live)
			}
			return nil // its node was removed in the same breath
		})
	}
	return err
}

// add puts n into the indexes and announces it.
func (t *tailnet) add(n *node) {
	t.nodes[n.rec.ID] = n
	t.byKey[n.rec.Key] = n
	t.byName[n.rec.Name] = n
	t.byAddr[n.rec.IPv4] = n
	t.byAddr[n.rec.IPv6] = n
	t.byMachine[n.rec.Machine] = append(t.byMachine[n.rec.Machine], n)
	t.touch(n, whole)
}

// remove takes n out and tells its peers.
func (t *tailnet) remove(n *node) {
	delete(t.nodes, n.rec.ID)
	delete(t.byKey, n.rec.Key)
	delete(t.byName, n.rec.Name)
	delete(t.byAddr, n.rec.IPv4)
	delete(t.byAddr, n.rec.IPv6)
	if l := slices.DeleteFunc(t.byMachine[n.rec.Machine], func(x *node) bool { return x == n }); len(l) > 0 {
		t.byMachine[n.rec.Machine] = l
	} else {
		delete(t.byMachine, n.rec.Machine)
	}
	t.unlink(n)
	t.hide(n)
}

// hide tells the peers that n is gone.
func (t *tailnet) hide(n *node) {
	t.seq++
	t.removed = append(t.removed, removal{t.seq, n.rec.ID})
	if len(t.removed) > maxRemovals {
		half := len(t.removed) / 2
		t.forgot = t.removed[half-1].seq
		t.removed = slices.Delete(t.removed, 0, half)
	}
}

// touch records a change of n in the aspects given and moves it to the front of the list.
func (t *tailnet) touch(n *node, what ...aspect) {
	t.seq++
	for _, a := range what {
		n.seq[a] = t.seq
	}
	n.top = t.seq
	n.peer = nil
	t.unlink(n)
	n.older = t.newest
	if t.newest != nil {
		t.newest.newer = n
	}
	t.newest = n
}

// touchSelf records a change that only n itself gets to see.
func (t *tailnet) touchSelf(n *node) {
	t.seq++
	n.selfSeq = t.seq
}

func (t *tailnet) unlink(n *node) {
	if n.newer != nil {
		n.newer.older = n.older
	} else if t.newest == n {
		t.newest = n.older
	}
	if n.older != nil {
		n.older.newer = n.newer
	}
	n.newer, n.older = nil, nil
}

// setUser stores a user and announces the profile.
func (t *tailnet) setUser(u *userRec) {
	t.seq++
	t.users[u.ID] = u
	t.userSeq[u.ID] = t.seq
}

func (t *tailnet) userByName(name string) *userRec {
	if name == "" {
		name = DefaultUser
	}
	for _, u := range t.users {
		if u.Name == name {
			return u
		}
	}
	return nil
}

// find returns the node with the stable ID or name s, or nil.
func (t *tailnet) find(s string) *node {
	for _, n := range t.nodes {
		if string(n.rec.Stable) == s {
			return n
		}
	}
	name, _, _ := strings.Cut(strings.ToLower(s), ".")
	return t.byName[name]
}

// machineNode returns the node of machine m that belongs to user, or nil.
func (t *tailnet) machineNode(m key.MachinePublic, user tailcfg.UserID) *node {
	for _, n := range t.byMachine[m] {
		if n.rec.User == user {
			return n
		}
	}
	return nil
}

// expired reports whether n's node key has expired.
func (n *node) expired(now time.Time) bool {
	return !n.rec.KeyExpiry.IsZero() && !now.Before(n.rec.KeyExpiry)
}

// visible reports whether peers see n at all.
func (n *node) visible() bool { return n.rec.Approved }

// blind reports whether n sees no peers, and none of the tailnet's users and rules: it is not approved, or not any more.
func (n *node) blind(now time.Time) bool { return !n.rec.Approved || n.expired(now) }

func (n *node) liveKey() string { return strconv.FormatInt(int64(n.rec.ID), 10) }

// put makes the changes that store n's identity; putLive those for what it reported.
func (n *node) put() coordstore.Change {
	rec := n.rec // encoded before the lock is left
	return coordstore.Put(coordstore.Nodes, n.nodeKey(), &rec)
}

func (n *node) putLive() coordstore.Change {
	rec := n.live
	return coordstore.Put(coordstore.Live, n.liveKey(), &rec)
}

// nodeKey is the record's key: the ID in a form that sorts.
func (n *node) nodeKey() string { return fmt.Sprintf("%016x", int64(n.rec.ID)) }

// wire returns n as a peer sees it, or as n itself does.
func (t *tailnet) wire(n *node, domain string, self bool, now time.Time) *tailcfg.Node {
	addrs := []netip.Prefix{netip.PrefixFrom(n.rec.IPv4, 32), netip.PrefixFrom(n.rec.IPv6, 128)}
	w := &tailcfg.Node{
		ID:                n.rec.ID,
		StableID:          n.rec.Stable,
		Name:              n.rec.Name + "." + domain + ".",
		User:              n.rec.User,
		Key:               n.rec.Key,
		KeyExpiry:         n.rec.KeyExpiry,
		Machine:           n.rec.Machine,
		DiscoKey:          n.live.Disco,
		Addresses:         addrs,
		AllowedIPs:        addrs, // nil would do from version 112 on
		Endpoints:         n.live.Endpoints,
		HomeDERP:          n.live.HomeDERP,
		Created:           n.rec.Created,
		Cap:               n.live.Cap,
		Tags:              n.rec.Tags,
		MachineAuthorized: n.rec.Approved,
		Expired:           n.expired(now),
		CapMap:            n.rec.Caps,
	}
	if n.live.HomeDERP != 0 {
		w.LegacyDERPString = netip.AddrPortFrom(tailcfg.DERPMagicIP(), uint16(n.live.HomeDERP)).String()
	}
	isOnline := n.stream != nil
	w.Online = &isOnline
	if !isOnline && !n.live.LastSeen.IsZero() {
		seen := n.live.LastSeen
		w.LastSeen = &seen
	}
	if hi := n.live.Hostinfo; hi != nil {
		if self {
			w.Hostinfo = hi
		} else { // what peers need: no versions, no keys, no latencies
			w.Hostinfo = &tailcfg.Hostinfo{OS: hi.OS, Hostname: hi.Hostname, Services: hi.Services, ShieldsUp: hi.ShieldsUp, Location: hi.Location}
		}
	} else {
		w.Hostinfo = &tailcfg.Hostinfo{}
	}
	return w
}

// peerJSON returns n as peers see it, encoded.
func (t *tailnet) peerJSON(n *node, domain string, now time.Time) []byte {
	if n.peer == nil {
		b, err := json.Marshal(t.wire(n, domain, false, now))
		if err != nil {
			return nil // cannot be: every field was decoded from JSON or made here
		}
		n.peer = b
	}
	return n.peer
}

func (t *tailnet) profile(u *userRec) tailcfg.UserProfile {
	return tailcfg.UserProfile{ID: u.ID, LoginName: u.Name, DisplayName: u.DisplayName}
}

// info makes the public view of n.
func (t *tailnet) info(n *node, domain string, now time.Time) Node {
	out := Node{
		ID: string(n.rec.Stable), Name: n.rec.Name, FQDN: n.rec.Name + "." + domain + ".", Tags: slices.Clone(n.rec.Tags),
		Addrs: []netip.Addr{n.rec.IPv4, n.rec.IPv6}, Key: n.rec.Key.String(), MachineKey: n.rec.Machine.String(),
		Online: n.stream != nil, Created: n.rec.Created, Expiry: n.rec.KeyExpiry, Expired: n.expired(now),
		Ephemeral: n.rec.Ephemeral, Approved: n.rec.Approved, CapVersion: int(n.live.Cap), HomeRegion: n.live.HomeDERP,
		Endpoints: slices.Clone(n.live.Endpoints),
	}
	if !out.Online {
		out.LastSeen = n.live.LastSeen
	}
	if u := t.users[n.rec.User]; u != nil {
		out.User = u.Name
	}
	if hi := n.live.Hostinfo; hi != nil {
		out.Hostname, out.OS, out.Version = hi.Hostname, hi.OS, hi.IPNVersion
	}
	return out
}
