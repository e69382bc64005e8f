package wg

import (
	"fmt"

	"github.com/tailnode/tailnode/internal/key"
)

// Receive works on one message that arrived from anywhere.
//
// For a data message it returns the IP packet in it, without padding. If dst is empty or shares
// memory with msg the packet lies in msg, from its byte 16 on; otherwise it lies at the start
// of dst, which must have len(msg)-32 bytes. The bytes of both beyond the packet may be
// changed. msg must be writable and is the caller's again when Receive returns.
//
// For an authentic message without a packet (a handshake message that was acted on, a
// keepalive, a cookie) plaintext is nil and the peer is not. For anything else err says why
// the message was dropped; none of these errors asks the caller to do anything.
//
// reply carries a cookie back to where msg came from; it may be nil. Answers to a handshake go to the
// peer's own Conduit. Receive runs to completion, handshakes included (about a third of a
// millisecond), and may be called by many goroutines at once.
func (d *Device) Receive(dst, msg []byte, reply Conduit) (plaintext []byte, p *Peer, err error) {
	if d.closed.Load() {
		return nil, nil, ErrClosed
	}
	if len(msg) < sizeKeepalive {
		return nil, nil, ErrMalformed
	}
	switch t := le.Uint32(msg); {
	case t == typeData:
		return d.receiveData(dst, msg)
	case t == typeInitiation && len(msg) == sizeInitiation:
		p, err = d.receiveInitiation((*[sizeInitiation]byte)(msg), reply)
	case t == typeResponse && len(msg) == sizeResponse:
		p, err = d.receiveResponse((*[sizeResponse]byte)(msg))
	case t == typeCookie && len(msg) == sizeCookie:
		p, err = d.receiveCookie((*[sizeCookie]byte)(msg))
	default:
		err = ErrMalformed
	}
	if err != nil {
		p = nil
	}
	return nil, p, err
}

func (d *Device) receiveData(dst, msg []byte) ([]byte, *Peer, error) {
	s := d.table.lookup(le.Uint32(msg[4:]))
	if s == nil || !s.acquire() {
		return nil, nil, ErrUnknownIndex
	}
	now := d.now()
	pkt, err := d.open(s, dst, msg, now)
	s.release()
	if err != nil {
		return nil, nil, err
	}
	p := s.peer
	if s.heard.Load() == 0 && s.heard.CompareAndSwap(0, now) {
		p.firstHeard(s, now)
	}
	p.received(now, len(msg))
	if s.initiator && now-s.created >= d.t.rejectAfterTime-d.t.keepaliveTimeout-d.t.rekeyTimeout &&
		s == p.current.Load() && now >= p.meet.next.Load() {
		// We only listen, so sending never renews the session (paper §6.2).
		p.handshake(now, true)
	}
	if len(pkt) == 0 {
		return nil, p, nil
	}
	if p.owed.Load() == 0 {
		p.owed.Store(now)
		d.sched.wakeBy(p, now+d.t.keepaliveTimeout)
	}
	pkt, err = trim(pkt)
	if err != nil {
		return nil, nil, err
	}
	return pkt, p, nil
}

// open authenticates, decrypts and counts msg. s is acquired.
func (d *Device) open(s *session, dst, msg []byte, now int64) ([]byte, error) {
	t := &d.t
	counter := le.Uint64(msg[8:])
	if counter >= t.rejectAfterMessages || now-s.created >= t.rejectAfterTime {
		return nil, ErrExpired
	}
	n := len(msg) - sizeKeepalive
	if len(dst) == 0 || overlap(dst, msg) {
		dst = msg[sizeHeader:]
	} else if len(dst) < n {
		return nil, ErrShortBuffer
	}
	le.PutUint32(msg[4:], 0) // with the counter, the nonce
	pkt, err := s.recv.Open(dst[:0:n], msg[4:16], msg[sizeHeader:], nil)
	le.PutUint32(msg[4:], s.index)
	if err != nil {
		return nil, ErrAuth
	}
	s.winMu.Lock()
	had := s.win.ring != nil
	ok := s.win.accept(counter)
	has := s.win.ring != nil
	s.winMu.Unlock()
	if !ok {
		return nil, ErrReplay
	}
	if has && !had {
		d.sched.wakeBy(s.peer, now+t.keepaliveTimeout)
	}
	return pkt, nil
}

// received notes that n bytes of an authentic message came.
func (p *Peer) received(now int64, n int) {
	p.rxBytes.Add(uint64(n))
	p.lastRx.Store(now)
	if p.unanswered.Load() != 0 {
		p.unanswered.Store(0)
	}
}

// firstHeard is called once, when the first message came on s: the other end has the session too.
func (p *Peer) firstHeard(s *session, now int64) {
	p.mu.Lock()
	p.doubts = 0
	promoted := p.promote(s, now)
	prev := p.previous != nil
	p.mu.Unlock()
	if prev {
		p.dev.sched.wakeBy(p, now+p.dev.t.keepaliveTimeout)
	}
	if promoted {
		p.dev.log.Debug("wg: session confirmed", "peer", p.pub.ShortString())
		p.flush(now, false)
		if f := p.dev.cfg.Handshaked; f != nil {
			f(p)
		}
	}
}

// trim cuts the padding off an IP packet, whose own header tells its length.
func trim(b []byte) ([]byte, error) {
	n := 0
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		if n = int(b[2])<<8 | int(b[3]); n < 20 {
			return nil, ErrMalformed
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		n = 40 + (int(b[4])<<8 | int(b[5]))
	default:
		return nil, ErrMalformed
	}
	if n > len(b) {
		return nil, ErrMalformed
	}
	return b[:n], nil
}

// admit asks the gate about a handshake message with a good MAC1, and gives out a cookie if it
// says so. It returns nil if the message is to be worked on.
func (d *Device) admit(id *identity, msg []byte, reply Conduit, now int64) error {
	var src []byte
	v := d.gate.admit(now, func() []byte {
		if s, ok := reply.(Sourcer); ok {
			src = s.AppendSource(make([]byte, 0, 48))
			src = src[:min(len(src), 48)]
		}
		return src
	}, func() bool { return d.cookies.checkMAC2(msg, src, now, d.t.cookieRefresh) })
	if v == work {
		return nil
	}
	if v == giveCookie && reply != nil {
		var out [sizeCookie]byte
		d.cookies.reply(&out, id, msg, src, now, d.t.cookieRefresh)
		reply.Send(out[:], len(out))
	}
	return ErrLoad
}

func (d *Device) receiveInitiation(msg *[sizeInitiation]byte, reply Conduit) (*Peer, error) {
	now := d.now()
	id := d.id.Load()
	if !id.checkMAC1(msg[:]) {
		return nil, ErrAuth
	}
	if err := d.admit(id, msg[:], reply, now); err != nil {
		return nil, err
	}
	var r responder
	defer r.wipe()
	if err := r.readStatic(msg, id); err != nil {
		return nil, err
	}
	pub := key.NodePublicFromRaw(r.static)
	p := d.Peer(pub)
	if p == nil {
		if p = d.unknown(pub, r, msg, id); p == nil {
			return nil, ErrUnknownPeer
		}
	}
	var out [sizeResponse]byte
	if err := p.accept(&r, msg, &out, id, now); err != nil {
		return nil, fmt.Errorf("wg: initiation: %w", err)
	}
	d.log.Debug("wg: handshake response", "peer", pub.ShortString())
	p.received(now, len(msg))
	p.transmit(out[:], now)
	d.sched.wakeBy(p, now+d.t.rejectAfterTime)
	return p, nil
}

// unknown asks Config.Unknown about the sender of a valid initiation. It works on a copy of r.
func (d *Device) unknown(pub key.NodePublic, r responder, msg *[sizeInitiation]byte, id *identity) *Peer {
	if d.cfg.Unknown == nil || r.static == id.pub {
		return nil
	}
	ss, err := dh(id.priv, &r.static)
	if err != nil {
		return nil
	}
	_, err = r.readTimestamp(msg, &ss)
	clear(ss[:])
	r.wipe()
	if err != nil || !d.cfg.Unknown(pub) {
		return nil
	}
	return d.Peer(pub)
}

// accept finishes reading an initiation of p and makes the response and the session.
func (p *Peer) accept(r *responder, msg *[sizeInitiation]byte, out *[sizeResponse]byte, id *identity, now int64) error {
	d := p.dev
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed.Load() || d.id.Load() != id {
		return ErrClosed
	}
	ss, err := p.staticStatic(id)
	if err != nil {
		return err
	}
	ts, err := r.readTimestamp(msg, ss)
	if err != nil {
		return err
	}
	if !ts.after(p.lastStamp) {
		return ErrReplay
	}
	if p.lastInitRx != 0 && now-p.lastInitRx < initiationSpacing {
		return ErrLoad
	}
	remote := r.sender
	index := d.table.reserve(p)
	k, err := r.respond(out, p.presharedKey(), newEphemeral(), index)
	if err != nil {
		d.table.cancel(index)
		return err
	}
	p.lastStamp, p.lastInitRx = ts, now
	pub := p.pub.Raw()
	p.putMACs(out[:], &pub, now)
	if p.next != nil {
		p.next.kill()
	}
	p.next = newSession(p, index, remote, false, now, &k)
	k.wipe()
	d.table.insert(p.next)
	return nil
}

func (d *Device) receiveResponse(msg *[sizeResponse]byte) (*Peer, error) {
	now := d.now()
	index := le.Uint32(msg[rReceiver:])
	p := d.table.handshake(index)
	if p == nil {
		return nil, ErrUnknownIndex
	}
	if !d.id.Load().checkMAC1(msg[:]) {
		return nil, ErrAuth
	}
	if err := p.finish(msg, index, now); err != nil {
		return nil, fmt.Errorf("wg: response: %w", err)
	}
	d.log.Debug("wg: handshake complete", "peer", p.pub.ShortString())
	p.received(now, len(msg))
	d.sched.wakeBy(p, now+d.t.rejectAfterTime)
	p.flush(now, true) // the responder may send only after it has heard from us (paper §5.4.5)
	if f := d.cfg.Handshaked; f != nil {
		f(p)
	}
	return p, nil
}

// finish reads the response to our initiation and makes the session.
func (p *Peer) finish(msg *[sizeResponse]byte, index uint32, now int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	hs := p.hs
	if hs == nil || hs.index != index || hs.id != p.dev.id.Load() || hs.bad >= maxBadResponses {
		return ErrUnknownIndex
	}
	k, err := hs.finish(msg, hs.id, p.presharedKey())
	if err != nil {
		hs.bad++
		return err
	}
	s := newSession(p, index, le.Uint32(msg[rSender:]), true, now, &k)
	s.rtt = now - p.meet.sentAt
	k.wipe()
	p.establish(s, now)
	hs.wipe()
	p.hs = nil
	return nil
}

func (d *Device) receiveCookie(msg *[sizeCookie]byte) (*Peer, error) {
	index := le.Uint32(msg[4:])
	p := d.table.handshake(index)
	if p == nil {
		s := d.table.lookup(index) // our response may have met the load
		if s == nil {
			return nil, ErrUnknownIndex
		}
		p = s.peer
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.hasMAC1 {
		return nil, ErrUnknownIndex
	}
	pub := p.pub.Raw()
	c, err := openCookie(msg, &pub, &p.lastMAC1)
	if err != nil {
		return nil, err
	}
	p.cookie = &cookieJar{cookie: c, at: d.now()}
	p.hasMAC1 = false // one cookie per message
	return p, nil
}
