package path

import (
	"container/heap"
	"net/netip"
	"slices"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// maxQueued bounds the discovery messages of one peer that wait for the owner: with all peers behind one
// queue, no peer may fill it.
const maxQueued = 16

type eventKind uint8

const (
	evDisco    eventKind = iota + 1 // src, pkt
	evPing                          // req
	evCancel                        // req
	evStun                          // src, pkt
	evBind                          // src, pkt: from a peer relay
	evEndpoint                      // p, relay, generation: this node's own relay has made an endpoint
)

// event is what the owner of the machines is told.
type event struct {
	kind eventKind
	p    *Peer
	src  Source
	pkt  []byte
	req  *pingRequest

	relay      *disco.RelayEndpoint
	generation uint32
	own        bool // it is for this node
}

// active is a peer with something going on.
type active struct {
	p      *Peer
	disco  key.DiscoPublic
	shared key.Shared
	mc     *machine
	info   *PeerInfo // whose endpoints the machine has
	at     time.Time // when the machine wants tick
	index  int       // in the heap

	wantsCall bool  // a call-me-maybe waits for fresh endpoints
	asks      []ask // peer relays that have been asked for an endpoint to this peer
	turn      int   // where to begin with the next ones
}

// owner holds what belongs to the Manager's goroutine alone.
type owner struct {
	m      *Manager
	active map[*Peer]*active
	due    dueHeap
	self   self
	peers  []*Peer // room for the Manager's list
	group  []*Peer // room for siblings
	plain  []byte  // room for a plaintext
	out    []byte  // room for a sealed message

	wrapped    []byte // room for one behind a Geneve header
	generation uint32 // of requests to peer relays
}

// discoIn checks the outside of a sealed message and queues a copy of it. The expensive part, opening the box,
// is the owner's, so that a flood of messages cannot hold up the data behind it.
func (m *Manager) discoIn(src Source, p *Peer, b []byte) {
	sender, _ := disco.Sender(b)
	if p == nil || p.info.Load().Disco != sender {
		// Unknown, or known with another disco key: a node that restarted and whose new key has not come from
		// control yet. Nothing else about the message can be believed.
		return
	}
	if len(b) > MaxPingSize {
		return
	}
	if p.queued.Add(1) > maxQueued {
		p.queued.Add(-1)
		return
	}
	select {
	case m.events <- event{kind: evDisco, p: p, src: src, pkt: append([]byte(nil), b...)}:
	default:
		p.queued.Add(-1)
	}
}

// loop owns the machines until Close.
func (m *Manager) loop() {
	o := &owner{m: m, active: make(map[*Peer]*active)}
	if u := m.cfg.UDP; u != nil {
		o.self.v4, o.self.v6 = u.Ports()
		o.self.fixed = m.cfg.FixedPort
	}
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	for {
		next := o.self.next()
		if len(o.due) > 0 && (next.IsZero() || o.due[0].at.Before(next)) {
			next = o.due[0].at
		}
		if !next.IsZero() {
			timer.Reset(max(0, time.Until(next)))
		} else {
			timer.Stop()
		}
		select {
		case <-m.done:
			return
		case ev := <-m.events:
			o.handle(time.Now(), ev)
		case <-m.wake:
			o.look(time.Now())
		case <-timer.C:
			o.tick(time.Now())
		}
	}
}

func (o *owner) handle(now time.Time, ev event) {
	switch ev.kind {
	case evPing:
		a := o.get(now, ev.p)
		if a == nil {
			close(ev.req.done)
			return
		}
		a.mc.ping(now, ev.req)
		o.run(now, a)
	case evCancel:
		if a := o.active[ev.p]; a != nil {
			a.mc.cancel(ev.req)
			o.run(now, a)
		}
	case evDisco:
		ev.p.queued.Add(-1)
		a := o.get(now, ev.p)
		if a == nil {
			return
		}
		plain, err := disco.Open(o.plain[:0], &a.shared, ev.pkt)
		if err != nil {
			o.m.log.Debug("path: discovery message does not open", "peer", ev.p.key.ShortString())
			o.run(now, a) // it may be new, and has to be forgotten in time
			return
		}
		o.plain = plain
		b, looks := o.message(now, a, ev.src, plain)
		if b != a && b != nil {
			o.run(now, b)
		}
		o.run(now, a)
		if f := o.m.cfg.Alive; f != nil && b != nil {
			f(b.p, looks)
		}
	case evStun:
		o.m.stunWant.Add(1)
		o.self.answer(now, ev.src.Addr, ev.pkt)
		o.tickSelf(now)
	case evBind:
		ev.p.queued.Add(-1)
		o.fromPeerRelay(now, ev)
	case evEndpoint:
		o.ownEndpoint(now, ev)
	}
}

// look takes what is to be done from the list of the Manager.
func (o *owner) look(now time.Time) {
	t := &o.m.todo
	t.mu.Lock()
	peers := t.peers
	t.peers = o.peers[:0]
	anew, changed := t.self, t.changed
	t.self, t.changed = false, false
	stun, local, mapped := t.stun, t.local, t.mapped
	t.mu.Unlock()
	if anew {
		o.setSelf(now, stun, local, mapped, changed)
	}
	for i, p := range peers {
		peers[i] = nil
		flags := p.flags.Swap(0)
		if flags&flagTraffic == 0 && o.active[p] == nil {
			continue
		}
		a := o.get(now, p)
		if a == nil {
			continue
		}
		if flags&flagTraffic != 0 {
			a.mc.sending(now, o.m.heard(p))
			o.keepFresh(now)
		}
		if flags&flagBulk != 0 {
			a.mc.bulk(now, o.sizeLimit(a))
		}
		if flags&flagFailed != 0 {
			a.mc.suspect(now)
		}
		if flags&flagRelayed != 0 {
			a.mc.relayed(now)
		}
		o.run(now, a)
	}
	if cap(peers) <= 1024 {
		o.peers = peers[:0]
	} else {
		o.peers = nil
	}
}

// heard returns when the path in use of p last showed life, zero for never.
func (m *Manager) heard(p *Peer) time.Time {
	if ns := p.heardAt.Load(); ns != 0 {
		return m.start.Add(time.Duration(ns))
	}
	return time.Time{}
}

// setSelf takes what is new about this node's own network.
func (o *owner) setSelf(now time.Time, servers []netip.AddrPort, local []netip.Addr, mapped []Endpoint, changed bool) {
	s := &o.self
	fresh := !slices.Equal(servers, s.servers) || changed
	s.servers, s.local, s.mapped = servers, local, mapped
	s.v4, s.v6 = o.m.cfg.UDP.Ports()
	if changed {
		s.public, s.fresh, s.silent = nil, time.Time{}, 0
		o.m.noAnswer.Store(false)
	}
	if fresh {
		s.endAt, s.settleAt = time.Time{}, time.Time{} // of a round with the servers or the network before
		o.probeSelf(now)
	}
	if s.endAt.IsZero() { // else when its answers are in: one report is better than two
		o.report()
		o.calls(now)
	}
	if changed {
		for _, a := range o.active {
			a.mc.changed(now)
			o.run(now, a)
		}
	}
}

// message acts on an authenticated message from the holder of a's disco key. Those that do not parse, and types
// that have no use here, are ignored: they may come from a newer node. It returns the peer that the message is from, another
// than a if several have the key, and whether the peer looks for paths to this node.
func (o *owner) message(now time.Time, a *active, src Source, plain []byte) (from *active, looks bool) {
	typ, version, body, err := disco.Split(plain)
	if err != nil {
		return a, false
	}
	way := via{region: uint16(src.Region), addr: src.Addr, vni: src.VNI}
	switch typ {
	case disco.TypePing:
		m, err := disco.ParsePing(body)
		if err != nil {
			return a, false
		}
		observed := src.Addr
		if src.Region != 0 {
			observed = netip.AddrPortFrom(derpMagic, uint16(src.Region))
		} else if a = o.sender(now, a, &m); a == nil {
			return nil, false
		}
		a.mc.gotPing(now, way, observed, &m)
		if src.Region == 0 && o.m.cfg.UDP != nil {
			a.p.pinged.Store(&route{hop: hop{src.Addr, src.VNI}, until: o.m.now() + int64(pingedFor)})
		}
		looks = true
	case disco.TypePong:
		m, err := disco.ParsePong(body)
		if err != nil {
			return a, false
		}
		rtt := o.gotPong(now, a, way, &m)
		if rtt == 0 && src.Region == 0 {
			for _, p := range o.siblings(a.disco) { // the ping may have been for another node with that key
				if b := o.active[p]; b != nil && b != a && b.disco == a.disco {
					if rtt = o.gotPong(now, b, way, &m); rtt > 0 {
						a = b
						break
					}
				}
			}
		}
		if c := a.mc.d.find(a.mc.d.best); c != nil && c.rtt > 0 {
			rtt = c.rtt
		}
		if rtt > 0 {
			a.p.rtt.Store(int64(rtt))
		}
	case disco.TypeCallMeMaybe:
		if src.Region != 0 && o.m.cfg.UDP != nil {
			a.mc.callMeMaybe(now, disco.ParseCallMeMaybe(version, body, nil).Endpoints)
			looks = true
		}
	case disco.TypeCallMeMaybeVia, disco.TypeAllocateRequest, disco.TypeAllocateResponse:
		if src.Region != 0 && o.m.cfg.UDP != nil {
			o.relayMessage(now, a, typ, version, body)
		}
	}
	return a, looks
}

// siblings returns the peers that have the disco key k. The slice is good until the next call.
func (o *owner) siblings(k key.DiscoPublic) []*Peer {
	o.group = o.group[:0]
	o.m.mu.RLock()
	for p := o.m.byDisco[k]; p != nil; p = p.sibling {
		o.group = append(o.group, p)
	}
	o.m.mu.RUnlock()
	return o.group
}

// sender returns which of the nodes with a's disco key has sent the ping m over UDP; nil for none. A ping without a node
// key, of a very old node, is taken for one of a.
func (o *owner) sender(now time.Time, a *active, m *disco.Ping) *active {
	if m.NodeKey.IsZero() || m.NodeKey == a.p.key {
		return a
	}
	for _, p := range o.siblings(a.disco) {
		if p.key == m.NodeKey {
			return o.get(now, p)
		}
	}
	return nil
}

// get returns the peer's active entry, making or renewing it as needed; nil if the peer has left
// or has no disco key.
func (o *owner) get(now time.Time, p *Peer) *active {
	k := p.info.Load().Disco
	a := o.active[p]
	if p.removed.Load() || k.IsZero() {
		if a != nil {
			o.drop(a)
		}
		return nil
	}
	if a == nil {
		a = &active{p: p, index: -1, mc: newMachine(now, randomTx)}
		o.active[p] = a
		p.active.Store(true)
	}
	if a.disco != k {
		if !a.disco.IsZero() {
			a.mc.changed(now) // it has started anew: nothing vouches for the path now
		}
		a.disco, a.shared = k, o.m.cfg.DiscoKey.Shared(k)
	}
	if info := p.info.Load(); info != a.info && o.m.cfg.UDP != nil {
		if a.info == nil || !slices.Equal(a.info.Endpoints, info.Endpoints) {
			a.mc.endpoints(now, info.Endpoints)
		}
		a.info = info
	}
	return a
}

// drop forgets a, failing whoever waits.
func (o *owner) drop(a *active) {
	for _, r := range a.mc.reqs {
		close(r.done)
	}
	a.mc.dropShakes()
	o.endShakes(a)
	delete(o.active, a.p)
	a.p.active.Store(false)
	a.p.route.Store(nil)
	a.p.why.Store(whyIdle)
	if a.index >= 0 {
		heap.Remove(&o.due, a.index)
	}
}

// tick runs the machines that are due.
func (o *owner) tick(now time.Time) {
	o.tickSelf(now)
	for len(o.due) > 0 && !o.due[0].at.After(now) {
		a := o.due[0]
		if o.get(now, a.p) == nil {
			continue
		}
		if a.mc.idle(now) {
			o.drop(a)
			continue
		}
		a.mc.dataHeard(o.m.heard(a.p))
		a.mc.tick(now)
		o.run(now, a)
	}
}

// run carries out a's actions and notes when it wants to be called again.
func (o *owner) run(now time.Time, a *active) {
	for i := range a.mc.acts {
		switch act := &a.mc.acts[i]; act.kind {
		case sendPing:
			m := disco.Ping{TxID: act.tx, NodeKey: o.m.cfg.NodeKey, Padding: act.pad}
			o.plain = m.Append(o.plain[:0])
			o.send(a, act.to)
		case sendPong:
			m := disco.Pong{TxID: act.tx, Src: act.src}
			o.plain = m.Append(o.plain[:0])
			o.send(a, act.to)
		case pingAnswer:
			act.req.done <- act.result // has room for one, and is answered once
		case sendCall:
			o.call(now, a)
		case setRoute:
			o.setRoute(now, a, act)
		case doubt:
			a.p.doubt.Store(int64(act.until.Sub(o.m.start)))
		case askRelays:
			o.askRelays(now, a)
		case sendVia:
			m := disco.CallMeMaybeVia{RelayEndpoint: act.shake.ep}
			o.plain = m.Append(o.plain[:0])
			o.send(a, via{})
		case sendBind, sendAnswer:
			o.sendBind(a, act)
		case shaking:
			o.setShake(a, act.shake, true)
		case shaken:
			o.setShake(a, act.shake, false)
		}
	}
	clear(a.mc.acts)
	a.mc.acts = a.mc.acts[:0]
	a.p.why.Store(a.why(now))
	a.at = a.mc.next()
	if a.index >= 0 {
		heap.Fix(&o.due, a.index)
	} else {
		heap.Push(&o.due, a)
	}
}

// setRoute puts a decision of the machine in force for the senders.
func (o *owner) setRoute(now time.Time, a *active, act *action) {
	old := a.p.route.Load()
	if !act.to.addr.IsValid() || a.p.removed.Load() {
		if old != nil {
			a.p.route.Store(nil)
			a.p.used.Store(0)          // the relay is taken into use anew
			o.self.fresh = time.Time{} // it may be our NAT that has changed its mind
			o.m.log.Debug("path: relayed", "peer", a.p.key.ShortString())
		}
		return
	}
	rt := &route{hop: act.to.hop(), until: int64(act.until.Sub(o.m.start)), since: now, size: act.size}
	same := old != nil && old.hop == rt.hop && now.Before(o.m.start.Add(time.Duration(old.until)))
	if same {
		rt.since = old.since
	}
	a.p.route.Store(rt)
	if same {
		return
	}
	if rt.vni == 0 {
		o.m.log.Debug("path: direct", "peer", a.p.key.ShortString(), "addr", rt.addr)
	} else {
		o.m.log.Debug("path: by peer relay", "peer", a.p.key.ShortString(), "relay", rt.addr, "vni", rt.vni)
	}
	if f := o.m.cfg.DirectUp; f != nil {
		f(a.p, a.p.region() != 0)
	}
}

// why says why there is no direct path.
func (a *active) why(now time.Time) uint32 {
	switch d := &a.mc.d; {
	case !d.inSession(now) && len(a.mc.reqs) == 0:
		return whyIdle
	case len(d.cands) == 0:
		return whyNoEndpoints
	case d.round <= len(firstRounds):
		return whySearching
	}
	return whyNoReply
}

// send seals o.plain for a's peer and transmits it. A failure is what the network might do as
// well; retries are the machine's.
func (o *owner) send(a *active, to via) {
	r := uint32(to.region)
	if r == 0 && !to.addr.IsValid() {
		if r = a.p.region(); r == 0 {
			return
		}
	}
	o.out = disco.Seal(o.out[:0], o.m.discoPK, &a.shared, o.plain)
	if r == 0 {
		if o.m.cfg.UDP != nil {
			o.sendTo(to.hop(), false, o.out) // not every candidate can be sent to
		}
		return
	}
	if err := o.m.cfg.Relay.Send(int(r), a.p.key, o.out, len(o.out)); err != nil {
		o.m.log.Debug("path: discovery message not sent", "peer", a.p.key.ShortString(), "region", r, "err", err)
	}
}

// dueHeap orders active peers by when they are due.
type dueHeap []*active

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *dueHeap) Push(x any) {
	a := x.(*active)
	a.index = len(*h)
	*h = append(*h, a)
}

func (h *dueHeap) Pop() any {
	old := *h
	a := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	a.index = -1
	return a
}
