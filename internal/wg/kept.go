package wg

import "time"

// kept holds copies of the first packets sent to a peer since it fell silent, and of TCP SYNs. If the peer turns out to have started
// anew they went nowhere, and most likely begin something that its new life should hear of: a connection, whose SYN would come
// again after a second, or a question. It is guarded by Peer.sendMu.
type kept struct {
	buf []byte
	n   [keptPackets]uint16 // lengths of the packets in buf
	len int
	at  int64 // when the first was kept
}

const (
	keptPackets = 8
	keptBytes   = 4096
	// keptAfter is how long a peer has been silent when packets begin to be kept: while data flows it never is, and
	// nothing is copied.
	keptAfter = int64(5 * time.Millisecond)
	// keptFor is how old the first one may get.
	keptFor = int64(2 * time.Second)
)

// wants reports whether a packet sent now, when the peer was last heard at heard, is to be kept.
func (k *kept) wants(now, heard int64) bool {
	if k.len > 0 && (k.at < heard || now-k.at > keptFor) {
		k.clear()
	}
	return now-heard >= keptAfter && k.room()
}

func (k *kept) room() bool { return k.len < keptPackets && len(k.buf) < keptBytes }

// isSYN reports whether an IP packet is a TCP SYN.
func isSYN(b []byte) bool {
	at := 40
	switch {
	case len(b) >= 40 && b[0]>>4 == 4 && b[9] == 6:
		at = int(b[0]&15) * 4
	case len(b) < 60 || b[0]>>4 != 6 || b[6] != 6:
		return false
	}
	return len(b) >= at+20 && b[at+13]&0x12 == 0x02 // RFC 9293 §3.1: SYN and not ACK
}

// maxSYN is the length of the longest SYN, of IPv6 and with all the options there can be.
const maxSYN = 40 + 60

// add keeps a copy of b, if there is room for it, and reports whether it is the first.
func (k *kept) add(b []byte, now int64) (first bool) {
	if k.len == keptPackets || len(k.buf)+len(b) > keptBytes {
		return false
	}
	if first = k.len == 0; first {
		k.at = now
	}
	k.buf = append(k.buf, b...)
	k.n[k.len] = uint16(len(b))
	k.len++
	return first
}

func (k *kept) clear() {
	clear(k.buf)
	k.buf, k.len = k.buf[:0], 0
}

// drop forgets everything, and the room for it.
func (k *kept) drop() {
	clear(k.buf)
	k.buf, k.len = nil, 0
}

// take returns the packets that were not answered, and keeps none of them.
func (k *kept) take(now, heard int64) Source {
	if k.len > 0 && (k.at < heard || now-k.at > keptFor) {
		k.clear()
	}
	s := &keptSource{kept: *k}
	k.buf, k.len = nil, 0
	return s
}

// tidy gives the room back once the packets are too old, and returns when to come again, or never.
func (k *kept) tidy(now int64) int64 {
	if k.buf == nil {
		return never
	}
	if at := k.at + keptFor; now < at {
		return at
	}
	k.drop()
	return never
}

type keptSource struct {
	kept
	i int
}

// Next implements Source.
func (s *keptSource) Next(dst []byte) int {
	if s.i >= s.len {
		return 0
	}
	n := int(s.n[s.i])
	s.i++
	copy(dst, s.buf[:n])
	clear(s.buf[:n])
	s.buf = s.buf[n:]
	return n
}
