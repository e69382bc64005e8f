package wg

// The replay window follows RFC 6479: a ring of words, of which one is always being refilled.
const (
	ringBits   = 8192
	ringWords  = ringBits / 64
	windowSize = ringBits - 64 // how far behind the newest a message may be
)

// window remembers which counters of a session were received. In order, it is two numbers:
// the ring exists only from the first gap on, and collapse gives it back when the session
// has gone quiet. The zero value has seen nothing. It has no lock of its own.
type window struct {
	next  uint64 // the highest counter received, plus 1
	floor uint64 // counters below it are refused
	ring  *[ringWords]uint64
}

// stale reports whether c is refused whatever the ring says.
func (w *window) stale(c uint64) bool {
	return c < w.floor || (w.next > windowSize && c < w.next-windowSize)
}

// seen reports whether accept would refuse c.
func (w *window) seen(c uint64) bool {
	if w.stale(c) {
		return true
	}
	if c >= w.next {
		return false
	}
	if w.ring == nil {
		return true // no gap: all from floor to next were received
	}
	return w.ring[c/64%ringWords]&(1<<(c%64)) != 0
}

// accept notes that c was received and reports whether it is the first time. The caller has
// authenticated the message: a forged one must not move the window.
func (w *window) accept(c uint64) bool {
	if w.seen(c) {
		return false
	}
	if w.ring == nil {
		if c == w.next {
			w.next++
			return true
		}
		w.open()
	}
	if c >= w.next {
		// Words that the window moves into hold bits of 8,192 counters ago.
		last := (w.next - 1) / 64
		if w.next == 0 {
			last = 0
		}
		if n := c/64 - last; n >= ringWords {
			clear(w.ring[:])
		} else {
			for i := uint64(1); i <= n; i++ {
				w.ring[(last+i)%ringWords] = 0
			}
		}
		w.next = c + 1
	}
	w.ring[c/64%ringWords] |= 1 << (c % 64)
	return true
}

// open makes the ring, in which everything from floor to next was received.
func (w *window) open() {
	w.ring = new([ringWords]uint64)
	lo := w.floor
	if w.next > windowSize {
		lo = max(lo, w.next-windowSize)
	}
	for c := lo; c < w.next; {
		if c%64 == 0 && w.next-c >= 64 {
			w.ring[c/64%ringWords] = ^uint64(0)
			c += 64
			continue
		}
		w.ring[c/64%ringWords] |= 1 << (c % 64)
		c++
	}
}

// collapse gives the ring back. Counters not received so far are refused from now on.
func (w *window) collapse() {
	w.ring, w.floor = nil, w.next
}
