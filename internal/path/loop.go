package path

import (
	"container/heap"
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
)

// maxQueued bounds the discovery messages of one peer that wait for the owner: with all peers behind one
// queue, no peer may fill it.
const maxQueued = 16

type eventKind uint8

const (
	evDisco  eventKind = iota + 1 // src, pkt
	evPing                        // req
	evCancel                      // req
)

// event is what the owner of the machines is told.
type event struct {
	kind eventKind
	p    *Peer
	src  Source
	pkt  []byte
	req  *pingRequest
}

// active is a peer with something going on.
type active struct {
	p      *Peer
	disco  key.DiscoPublic
	shared key.Shared
	mc     *machine
	at     time.Time // when the machine wants tick
	index  int       // in the heap
}

// owner holds what belongs to the Manager's goroutine alone.
type owner struct {
	m      *Manager
	active map[*Peer]*active
	due    dueHeap
	plain  []byte // room for a plaintext
	out    []byte // room for a sealed message
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
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	for {
		if len(o.due) > 0 {
			timer.Reset(max(0, time.Until(o.due[0].at)))
		} else {
			timer.Stop()
		}
		select {
		case <-m.done:
			return
		case ev := <-m.events:
			o.handle(time.Now(), ev)
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
			return
		}
		o.plain = plain
		o.message(now, a, ev.src, plain)
		o.run(now, a)
	}
}

// message acts on an authenticated message. Those that do not parse, and types that have no use here,
// are ignored: they may come from a newer node.
func (o *owner) message(now time.Time, a *active, src Source, plain []byte) {
	typ, _, body, err := disco.Split(plain)
	if err != nil {
		return
	}
	from := via{region: uint16(src.Region), addr: src.Addr}
	switch typ {
	case disco.TypePing:
		if m, err := disco.ParsePing(body); err == nil {
			observed := src.Addr
			if src.Region != 0 {
				observed = netip.AddrPortFrom(derpMagic, uint16(src.Region))
			}
			a.mc.gotPing(now, from, observed, &m)
		}
	case disco.TypePong:
		if m, err := disco.ParsePong(body); err == nil {
			if rtt := a.mc.gotPong(now, from, &m); rtt > 0 {
				a.p.rtt.Store(int64(rtt))
			}
		}
	}
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
	}
	if a.disco != k {
		a.disco, a.shared = k, o.m.cfg.DiscoKey.Shared(k)
	}
	return a
}

// drop forgets a, failing whoever waits.
func (o *owner) drop(a *active) {
	for _, r := range a.mc.reqs {
		close(r.done)
	}
	delete(o.active, a.p)
	if a.index >= 0 {
		heap.Remove(&o.due, a.index)
	}
}

// tick runs the machines that are due.
func (o *owner) tick(now time.Time) {
	for len(o.due) > 0 && !o.due[0].at.After(now) {
		a := o.due[0]
		if o.get(now, a.p) == nil {
			continue
		}
		if a.mc.idle(now) {
			o.drop(a)
			continue
		}
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
		}
	}
	clear(a.mc.acts)
	a.mc.acts = a.mc.acts[:0]
	a.at = a.mc.next()
	if a.index >= 0 {
		heap.Fix(&o.due, a.index)
	} else {
		heap.Push(&o.due, a)
	}
}

// send seals o.plain for a's peer and transmits it. A failure is what the network might do as
// well; retries are the machine's.
func (o *owner) send(a *active, to via) {
	r := uint32(to.region)
	if r == 0 {
		r = a.p.region()
	}
	if r == 0 {
		return
	}
	o.out = disco.Seal(o.out[:0], o.m.discoPK, &a.shared, o.plain)
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
