package wg

import "sync/atomic"

// meeting decides when initiations go to one peer. It is a pure machine: events and the time come in,
// what it returns says whether to send one now, and at says when it wants due. It is guarded by
// Peer.mu, but for next, which the hot path reads.
//
// The paper (§6.4) repeats an initiation after REKEY_TIMEOUT, which suits a tunnel that is up for
// weeks. On a tailnet packets wait for the first handshake, and the first initiation is lost as often as not,
// because one of the two has only just started: it is not at its relay yet, or control has told
// one of them of the other a moment early. What is known of the loss decides how long the next waits:
//
//	nothing                             firstRetry, doubling up to REKEY_TIMEOUT
//	a relay says that nobody is there   lostRetry, doubling up to REKEY_TIMEOUT
//	no way to send it at all            as for nothing; any sign of the peer sends the next at once
//	the peer shows itself               at once, unless the last may still be under way
//	the peer looks for us, and nothing  callBack: its own initiation may be under way; an upstream
//	of ours asks for a session          peer would send the next after 5 s
//
// An initiation too many does little harm: the responder takes the one with the latest timestamp, so
// that it costs a round trip at most.
type meeting struct {
	next     atomic.Int64 // none before then; of a session, the pace of its renewal
	retryAt  int64        // when to send the next without being asked; 0: not
	giveUpAt int64        // when to stop that
	callAt   int64        // when to begin because the peer looks for us; 0: not
	sentAt   int64        // the last that was sent
	slow     int          // sent since the last handshake, not taken for lost
	quick    int          // ... known to be lost
	lost     bool         // the last is known to be lost
	counted  bool         // the last is one of slow
}

// want is told that something asks for a session, and reports whether to send an initiation.
func (m *meeting) want(t *timing, now int64) bool {
	m.giveUpAt = now + t.rekeyAttemptTime
	return m.ready(now)
}

// ready reports whether an initiation may be sent; if not, one is due as soon as it may.
func (m *meeting) ready(now int64) bool {
	if at := m.next.Load(); now < at {
		if m.retryAt == 0 {
			m.retryAt = at
		}
		return false
	}
	return true
}

// sent is told that an initiation leaves. With a session in use nothing waits, and the paper's time stands.
func (m *meeting) sent(t *timing, now int64, session bool) {
	m.sentAt, m.lost, m.callAt, m.counted = now, false, 0, !session
	wait := t.rekeyTimeout
	if !session {
		wait = backoff(t.firstRetry, m.slow, t.rekeyTimeout)
		m.slow++
	}
	m.next.Store(now + wait)
	m.retryAt = now + wait + jitter(min(t.jitter, wait/4))
}

// backoff returns first doubled n times, and no more than most.
func backoff(first int64, n int, most int64) int64 {
	if n > 16 {
		return most
	}
	return min(first<<n, most)
}

// spare takes the last initiation, of whose end something is known now, out of what makes the next wait longer.
func (m *meeting) spare() {
	if m.counted {
		m.counted = false
		m.slow--
	}
}

// waiting reports whether an initiation has been sent that is without an answer, and packets wait for that.
func (m *meeting) waiting(session bool) bool { return m.retryAt != 0 && m.sentAt != 0 && !session }

// failed is told that the last initiation could not be sent.
func (m *meeting) failed(session bool) {
	if m.waiting(session) {
		m.lost = true
	}
}

// gone is told that a relay has nobody to hand messages to.
func (m *meeting) gone(t *timing, now int64, session bool) {
	if !m.waiting(session) || m.lost {
		return
	}
	m.lost = true
	wait := backoff(t.lostRetry, m.quick, t.rekeyTimeout)
	m.quick++
	m.spare()
	m.next.Store(now + wait)
	m.retryAt = now + wait
}

// alive is told of an authentic sign of the peer, whose round trip is rtt, 0 if that is not known. It reports whether
// to send an initiation.
func (m *meeting) alive(t *timing, now, rtt int64, session bool) bool {
	if !m.waiting(session) || now >= m.giveUpAt {
		return false
	}
	if !m.lost && now-m.sentAt < max(t.spacing, 3*rtt) {
		return false
	}
	m.spare()
	m.next.Store(now)
	return true
}

// wanted is told that the peer looks for us.
func (m *meeting) wanted(t *timing, now int64, session bool) {
	if !session && m.retryAt == 0 && m.callAt == 0 {
		m.callAt = now + t.callBack
	}
}

// renew is told that the peer has started anew. What is known of the initiations before says nothing of the next.
func (m *meeting) renew() {
	m.next.Store(0)
	m.slow, m.quick, m.lost, m.counted = 0, 0, false, false
}

// done is told that there is a session.
func (m *meeting) done() {
	m.retryAt, m.callAt, m.sentAt = 0, 0, 0
	m.slow, m.quick, m.lost, m.counted = 0, 0, false, false
}

// reset forgets everything.
func (m *meeting) reset() {
	m.done()
	m.next.Store(0)
}

// at returns when due has something to say, or never.
func (m *meeting) at() int64 {
	at := int64(never)
	if m.retryAt != 0 {
		at = m.retryAt
	}
	if m.callAt != 0 {
		at = min(at, m.callAt)
	}
	return at
}

// due does what its time has come for.
func (m *meeting) due(t *timing, now int64, session bool) (initiate, gaveUp bool) {
	if m.retryAt != 0 && now >= m.retryAt {
		m.retryAt = 0
		if gaveUp = now >= m.giveUpAt; gaveUp {
			m.sentAt = 0
		}
		initiate = !gaveUp
	}
	if m.callAt != 0 && now >= m.callAt {
		m.callAt = 0
		if !session {
			m.giveUpAt = max(m.giveUpAt, now+t.rekeyAttemptTime)
			initiate = true
		}
	}
	return initiate, gaveUp
}
