package portmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// NAT-PMP (RFC 6886 §3) and PCP (RFC 6887 §7, §11.1) live on the same port of the router; the first byte tells them
// apart. All numbers are big-endian.
//
//	PMP address request   00 00
//	PMP address reply     00 80 result:2 epoch:4 address:4
//	PMP mapping request   00 01 0000 internal:2 suggested:2 lifetime:4
//	PMP mapping reply     00 81 result:2 epoch:4 internal:2 external:2 lifetime:4
//	PCP request           02 op 0000 lifetime:4 client:16 …
//	PCP reply             02 80|op 00 result:1 lifetime:4 epoch:4 zero:12 …
//	PCP MAP, both         … nonce:12 protocol:1 zero:3 internal:2 external:2 address:16
//
// A request with lifetime 0 deletes the mapping.
const (
	pxpPort = 5351

	pmpVersion = 0
	pcpVersion = 2
	opReply    = 0x80

	pmpOpAddress = 0
	pmpOpMapUDP  = 1

	pcpOpAnnounce = 0
	pcpOpMap      = 1
	pcpHeaderLen  = 24
	pcpMapLen     = pcpHeaderLen + 36
	pcpMaxLen     = 1100 // RFC 6887 §7

	protoUDP = 17

	resultUnsupportedVersion = 1
)

var (
	// ErrNoService reports a network without a router that maps ports.
	ErrNoService = errors.New("portmap: no service")
	// ErrDisabled reports a Client that is turned off.
	ErrDisabled = errors.New("portmap: turned off")
	// ErrRefused reports a router that will not map.
	ErrRefused = errors.New("portmap: refused by the router")
	// ErrUseless reports a mapping that would be of no use: no public address, no port, no lifetime.
	ErrUseless = errors.New("portmap: the router offers a mapping of no use")

	errMalformed = errors.New("portmap: malformed message")
	errVersion   = errors.New("portmap: the router does not speak this version")
)

// pxpReply is a reply of either protocol. Which fields count follows from version and op.
type pxpReply struct {
	version, op uint8
	result      uint16
	epoch       uint32
	lifetime    uint32
	nonce       [12]byte
	protocol    uint8
	internal    uint16
	external    netip.AddrPort // PMP: the address or the port, whichever the op gives
}

func appendPMPAddress(b []byte) []byte { return append(b, pmpVersion, pmpOpAddress) }

func appendPMPMap(b []byte, internal, suggested uint16, lifetime uint32) []byte {
	b = append(b, pmpVersion, pmpOpMapUDP, 0, 0)
	b = binary.BigEndian.AppendUint16(b, internal)
	b = binary.BigEndian.AppendUint16(b, suggested)
	return binary.BigEndian.AppendUint32(b, lifetime)
}

func appendPCPHeader(b []byte, op uint8, lifetime uint32, self netip.Addr) []byte {
	b = append(b, pcpVersion, op, 0, 0)
	b = binary.BigEndian.AppendUint32(b, lifetime)
	a := self.As16()
	return append(b, a[:]...)
}

func appendPCPAnnounce(b []byte, self netip.Addr) []byte {
	return appendPCPHeader(b, pcpOpAnnounce, 0, self)
}

// appendPCPMap asks for suggested, whose address may be unspecified and whose port may be 0.
func appendPCPMap(b []byte, self netip.Addr, nonce [12]byte, internal uint16, suggested netip.AddrPort, lifetime uint32) []byte {
	b = appendPCPHeader(b, pcpOpMap, lifetime, self)
	b = append(b, nonce[:]...)
	b = append(b, protoUDP, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, internal)
	b = binary.BigEndian.AppendUint16(b, suggested.Port())
	a := netip.IPv4Unspecified().As16() // the family that is wanted, RFC 6887 §11.1
	if suggested.Addr().IsValid() {
		a = suggested.Addr().As16()
	}
	return append(b, a[:]...)
}

// parsePXP parses a reply of either protocol.
func parsePXP(b []byte) (r pxpReply, err error) {
	if len(b) < 4 || b[1]&opReply == 0 {
		return r, errMalformed
	}
	r.version, r.op = b[0], b[1]&^opReply
	switch r.version {
	case pmpVersion:
		if len(b) > 16 {
			return r, errMalformed
		}
		r.result = binary.BigEndian.Uint16(b[2:])
		if r.result != 0 {
			// An error may be as short as this. It is also what a NAT-PMP router answers a PCP request, RFC 6887 appendix A.
			if len(b) >= 8 {
				r.epoch = binary.BigEndian.Uint32(b[4:])
			}
			return r, nil
		}
		switch {
		case r.op == pmpOpAddress && len(b) == 12:
			r.external = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[8:])), 0)
		case r.op == pmpOpMapUDP && len(b) == 16:
			r.internal = binary.BigEndian.Uint16(b[8:])
			r.external = netip.AddrPortFrom(netip.Addr{}, binary.BigEndian.Uint16(b[10:]))
			r.lifetime = binary.BigEndian.Uint32(b[12:])
		default:
			return r, errMalformed
		}
		r.epoch = binary.BigEndian.Uint32(b[4:])
		return r, nil
	case pcpVersion:
		if len(b) < pcpHeaderLen || len(b) > pcpMaxLen || len(b)%4 != 0 {
			return r, errMalformed
		}
		r.result = uint16(b[3])
		r.lifetime = binary.BigEndian.Uint32(b[4:])
		r.epoch = binary.BigEndian.Uint32(b[8:])
		if r.op == pcpOpMap {
			if len(b) < pcpMapLen {
				return r, errMalformed
			}
			m := b[pcpHeaderLen:]
			r.nonce = [12]byte(m)
			r.protocol = m[12]
			r.internal = binary.BigEndian.Uint16(m[16:])
			r.external = netip.AddrPortFrom(netip.AddrFrom16([16]byte(m[20:])).Unmap(), binary.BigEndian.Uint16(m[18:]))
		}
		return r, nil
	}
	return r, errVersion
}

// resultError tells a result code in words. Zero is nil.
func (r *pxpReply) resultError() error {
	if r.result == 0 {
		return nil
	}
	if r.result == resultUnsupportedVersion {
		return errVersion
	}
	name := "NAT-PMP"
	if r.version == pcpVersion {
		name = "PCP"
	}
	return fmt.Errorf("%w: %s result %d", ErrRefused, name, r.result)
}

// epoch is a router's clock, which counts the seconds since it lost its mappings (RFC 6886 §3.6, RFC 6887 §8.5).
type epoch struct {
	server uint32
	at     time.Time
}

// next takes the epoch of a later reply and reports whether the router has lost its mappings since.
func (e epoch) next(server uint32, now time.Time) (lost bool) {
	if e.at.IsZero() {
		return false
	}
	if int64(server) < int64(e.server)-1 {
		return true
	}
	// Both clocks may run a sixteenth apart and be rounded.
	c, s := int64(now.Sub(e.at)/time.Second), int64(server)-int64(e.server)
	return c+2 < s-s/16 || s+2 < c-c/16
}

// reserved are ranges that IsPrivate does not know and that no packet from the Internet is sent to.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"), // RFC 6598: behind the carrier's NAT; also a tailnet's own addresses
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("240.0.0.0/4"),
}

// global6 holds the IPv6 addresses that are routed on the Internet.
var global6 = netip.MustParsePrefix("2000::/3")

// public reports whether a can be reached from the Internet by a mapping.
func public(a netip.Addr) bool {
	if !a.Is4() || a.IsPrivate() || !a.IsGlobalUnicast() {
		return false
	}
	for _, p := range reserved {
		if p.Contains(a) {
			return false
		}
	}
	return true
}
