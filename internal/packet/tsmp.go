package packet

import (
	"encoding/binary"
	"net/netip"
	"strconv"

	"github.com/tailnode/tailnode/internal/key"
)

// The type bytes of TSMP (docs/protocol/tsmp.md).
const (
	tsmpReject = '!'
	tsmpPing   = 'p'
	tsmpPong   = 'o'
	tsmpDisco  = 'a'
)

// RejectReason says why a peer does not take a connection.
type RejectReason uint8

// The reasons in use.
const (
	RejectedByACL          RejectReason = 'A'
	RejectedByShieldsUp    RejectReason = 'S'
	RejectedByForwarding   RejectReason = 'F'
	RejectedByHostFirewall RejectReason = 'W'
	RejectedByTransitIP    RejectReason = 'T'
)

// String returns the reason in words.
func (r RejectReason) String() string {
	switch r {
	case RejectedByACL:
		return "the tailnet's access rules"
	case RejectedByShieldsUp:
		return "shields up"
	case RejectedByForwarding:
		return "IP forwarding is off"
	case RejectedByHostFirewall:
		return "the host's firewall"
	case RejectedByTransitIP:
		return "unknown transit address"
	}
	return "reason " + strconv.Itoa(int(r))
}

// Reject tells the initiator of a connection that it is refused, and why.
//
//	'!' | protocol | reason | source port (2) | destination port (2) | [flags]
//
// The IP addresses are those of the rejected flow the other way round.
type Reject struct {
	Proto       Proto          // of the refused packet: TCP or UDP
	Src, Dst    netip.AddrPort // of the refused packet
	Reason      RejectReason
	MaybeBroken bool // only a hint: the connection may still come about
}

// Reject returns the packet's rejection message, if it is one.
func (p *Parsed) Reject() (r Reject, ok bool) {
	m := p.tsmp(tsmpReject, tsmpLen)
	if m == nil {
		return Reject{}, false
	}
	r = Reject{
		Proto:  Proto(m[1]),
		Reason: RejectReason(m[2]),
		Src:    netip.AddrPortFrom(p.Dst.Addr(), binary.BigEndian.Uint16(m[3:5])),
		Dst:    netip.AddrPortFrom(p.Src.Addr(), binary.BigEndian.Uint16(m[5:7])),
	}
	r.MaybeBroken = len(m) > 7 && m[7]&1 != 0
	return r, true
}

// AppendReject appends the packet that tells r.Src of the rejection.
func AppendReject(b []byte, r Reject) ([]byte, error) {
	n := tsmpLen
	if r.MaybeBroken {
		n++
	}
	b, err := AppendIP(b, r.Dst.Addr(), r.Src.Addr(), TSMP, n)
	if err != nil {
		return b, err
	}
	b = append(b, tsmpReject, byte(r.Proto), byte(r.Reason))
	b = binary.BigEndian.AppendUint16(b, r.Src.Port())
	b = binary.BigEndian.AppendUint16(b, r.Dst.Port())
	if r.MaybeBroken {
		b = append(b, 1)
	}
	return b, nil
}

// TSMPPing returns the eight bytes of the packet's ping, if it is one.
//
//	'p' | data (8)
func (p *Parsed) TSMPPing() (data [8]byte, ok bool) {
	m := p.tsmp(tsmpPing, 9)
	if m == nil {
		return data, false
	}
	return [8]byte(m[1:9]), true
}

// AppendTSMPPing appends a ping packet.
func AppendTSMPPing(b []byte, src, dst netip.Addr, data [8]byte) ([]byte, error) {
	b, err := AppendIP(b, src, dst, TSMP, 9)
	if err != nil {
		return b, err
	}
	return append(append(b, tsmpPing), data[:]...), nil
}

// TSMPPong returns the packet's pong, if it is one: the data of the ping and the
// port of the sender's peer API, 0 if it has none.
//
//	'o' | data (8) | [peer API port (2)]
func (p *Parsed) TSMPPong() (data [8]byte, peerAPI uint16, ok bool) {
	m := p.tsmp(tsmpPong, 9)
	if m == nil {
		return data, 0, false
	}
	if len(m) >= 11 {
		peerAPI = binary.BigEndian.Uint16(m[9:11])
	}
	return [8]byte(m[1:9]), peerAPI, true
}

// AppendTSMPPong appends the packet that answers a ping.
func AppendTSMPPong(b []byte, src, dst netip.Addr, data [8]byte, peerAPI uint16) ([]byte, error) {
	b, err := AppendIP(b, src, dst, TSMP, 11)
	if err != nil {
		return b, err
	}
	b = append(append(b, tsmpPong), data[:]...)
	return binary.BigEndian.AppendUint16(b, peerAPI), nil
}

// TSMPDisco returns the disco key that the packet advertises, if it does. A
// zero key is no advertisement.
//
//	'a' | disco key (32)
func (p *Parsed) TSMPDisco() (k key.DiscoPublic, ok bool) {
	m := p.tsmp(tsmpDisco, 1+key.Size)
	if m == nil {
		return k, false
	}
	k = key.DiscoPublicFromRaw([key.Size]byte(m[1 : 1+key.Size]))
	return k, !k.IsZero()
}

// AppendTSMPDisco appends a packet that advertises a disco key.
func AppendTSMPDisco(b []byte, src, dst netip.Addr, k key.DiscoPublic) ([]byte, error) {
	b, err := AppendIP(b, src, dst, TSMP, 1+key.Size)
	if err != nil {
		return b, err
	}
	return k.AppendTo(append(b, tsmpDisco)), nil
}

// tsmp returns the packet's TSMP message if it is of type typ and has at least
// n bytes, else nil.
func (p *Parsed) tsmp(typ byte, n int) []byte {
	if p.Proto != TSMP {
		return nil
	}
	m := p.Payload()
	if len(m) < n || m[0] != typ {
		return nil
	}
	return m
}
