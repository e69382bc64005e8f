// Package stun is the codec of the STUN messages by which a node learns its public address:
// a Binding request and its success response (RFC 8489), with the one addition that a
// tailnet's servers insist on, the SOFTWARE attribute "tailnode" in requests
// (docs/protocol/stun.md). It does no I/O.
package stun

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net/netip"
)

// Wire constants, RFC 8489 §5, §14 and §18.
const (
	headerLen       = 20
	cookie          = 0x2112A442
	typeRequest     = 0x0001
	typeSuccess     = 0x0101
	attrMapped      = 0x0001 // §14.1
	attrXORMapped   = 0x0020 // §14.2
	attrXORMappedV0 = 0x8020 // the same under the number of an early draft; some servers send it
	attrSoftware    = 0x8022 // §14.14
	attrFingerprint = 0x8028 // §14.7
	fingerprintLen  = 8
	fingerprintXOR  = 0x5354554e
	familyV4        = 1
	familyV6        = 2

	// software is what tailnet servers look for, to be of no use to others' floods. That it
	// is also this project's name is a coincidence of the public protocol.
	software = "tailnode"

	// RequestLen is the length of every request that [AppendRequest] makes. A response is at
	// most four bytes longer, so that a server is of no use to amplify traffic.
	RequestLen = headerLen + 4 + len(software) + fingerprintLen
)

var (
	// ErrNotSTUN reports a message that is not STUN at all.
	ErrNotSTUN = errors.New("stun: not a STUN message")
	// ErrMalformed reports a message whose lengths or attributes are broken.
	ErrMalformed = errors.New("stun: malformed message")
	// ErrNotRequest reports a message other than a Binding request.
	ErrNotRequest = errors.New("stun: not a binding request")
	// ErrNotResponse reports a message other than a Binding success response.
	ErrNotResponse = errors.New("stun: not a binding success response")
	// ErrSoftware reports a request of a client that does not belong to a tailnet.
	ErrSoftware = errors.New("stun: request without the expected SOFTWARE")
	// ErrFingerprint reports a request whose FINGERPRINT is missing, not last, or wrong.
	ErrFingerprint = errors.New("stun: bad FINGERPRINT")
)

// TxID is a transaction ID.
type TxID [12]byte

// NewTxID returns a random transaction ID.
func NewTxID() (tx TxID) {
	rand.Read(tx[:])
	return tx
}

// Is reports whether b looks like a STUN message: two zero bits and the magic cookie (RFC 8489 §5).
func Is(b []byte) bool {
	return len(b) >= headerLen && b[0]&0xc0 == 0 && binary.BigEndian.Uint32(b[4:]) == cookie
}

// AppendRequest appends a Binding request, [RequestLen] bytes:
//
//	type 0x0001, length, cookie, transaction ID
//	SOFTWARE "tailnode"
//	FINGERPRINT
func AppendRequest(b []byte, tx TxID) []byte {
	start := len(b)
	b = appendHeader(b, typeRequest, RequestLen-headerLen, tx)
	b = binary.BigEndian.AppendUint16(b, attrSoftware)
	b = binary.BigEndian.AppendUint16(b, uint16(len(software)))
	b = append(b, software...)
	return appendFingerprint(b, start)
}

// ParseRequest parses a Binding request of a tailnet client.
func ParseRequest(b []byte) (tx TxID, err error) {
	typ, tx, attrs, err := parseHeader(b)
	if err != nil {
		return tx, err
	}
	if typ != typeRequest {
		return tx, ErrNotRequest
	}
	if len(b) != headerLen+len(attrs) {
		return tx, ErrMalformed
	}
	ours := false
	last, lastValue := uint16(0), []byte(nil)
	for len(attrs) > 0 {
		if last, lastValue, attrs, err = cutAttr(attrs); err != nil {
			return tx, err
		}
		ours = ours || last == attrSoftware && string(lastValue) == software
	}
	if !ours {
		return tx, ErrSoftware
	}
	if last != attrFingerprint || len(lastValue) != 4 ||
		binary.BigEndian.Uint32(lastValue) != fingerprint(b[:len(b)-fingerprintLen]) {
		return tx, ErrFingerprint
	}
	return tx, nil
}

// AppendResponse appends a Binding success response that tells addr to its owner, in an
// XOR-MAPPED-ADDRESS attribute and no other: clients of a tailnet ask for no FINGERPRINT,
// and an answer should not be longer than its request. An IPv4 address mapped
// into IPv6 is told as IPv4. An invalid addr appends nothing.
func AppendResponse(b []byte, tx TxID, addr netip.AddrPort) []byte {
	a := addr.Addr().Unmap()
	if !a.IsValid() {
		return b
	}
	family, n := byte(familyV4), 4
	if a.Is6() {
		family, n = familyV6, 16
	}
	b = appendHeader(b, typeSuccess, 4+4+n, tx)
	b = binary.BigEndian.AppendUint16(b, attrXORMapped)
	b = binary.BigEndian.AppendUint16(b, uint16(4+n))
	b = append(b, 0, family)
	b = binary.BigEndian.AppendUint16(b, addr.Port()^cookie>>16)
	start := len(b)
	b = append(b, a.AsSlice()...)
	xorAddr(b[start:], tx)
	return b
}

// ParseResponse parses a Binding success response. XOR-MAPPED-ADDRESS counts; MAPPED-ADDRESS
// only where that is missing, as of servers older than RFC 5389.
func ParseResponse(b []byte) (tx TxID, addr netip.AddrPort, err error) {
	typ, tx, attrs, err := parseHeader(b)
	if err != nil {
		return tx, addr, err
	}
	if typ != typeSuccess {
		return tx, addr, ErrNotResponse
	}
	var mapped netip.AddrPort
	for len(attrs) > 0 {
		var typ uint16
		var v []byte
		if typ, v, attrs, err = cutAttr(attrs); err != nil {
			return tx, addr, err
		}
		switch typ {
		case attrXORMapped, attrXORMappedV0:
			addr, err = parseAddr(v, tx, true)
		case attrMapped:
			mapped, err = parseAddr(v, tx, false)
		}
		if err != nil {
			return tx, netip.AddrPort{}, err
		}
	}
	if !addr.IsValid() {
		addr = mapped
	}
	if !addr.IsValid() {
		return tx, addr, ErrMalformed
	}
	return tx, addr, nil
}

func appendHeader(b []byte, typ uint16, length int, tx TxID) []byte {
	b = binary.BigEndian.AppendUint16(b, typ)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = binary.BigEndian.AppendUint32(b, cookie)
	return append(b, tx[:]...)
}

// parseHeader splits a message; bytes after its length are cut off.
func parseHeader(b []byte) (typ uint16, tx TxID, attrs []byte, err error) {
	if !Is(b) {
		return 0, tx, nil, ErrNotSTUN
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n%4 != 0 || n > len(b)-headerLen {
		return 0, tx, nil, ErrMalformed
	}
	return binary.BigEndian.Uint16(b), TxID(b[8:headerLen]), b[headerLen : headerLen+n], nil
}

// cutAttr splits off the first attribute (RFC 8489 §14: padded to four bytes).
func cutAttr(b []byte) (typ uint16, value, rest []byte, err error) {
	if len(b) < 4 {
		return 0, nil, nil, ErrMalformed
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	padded := 4 + (n+3)&^3
	if padded > len(b) {
		return 0, nil, nil, ErrMalformed
	}
	return binary.BigEndian.Uint16(b), b[4 : 4+n], b[padded:], nil
}

func parseAddr(v []byte, tx TxID, xor bool) (addr netip.AddrPort, err error) {
	n := 0
	if len(v) >= 4 {
		switch v[1] {
		case familyV4:
			n = 4
		case familyV6:
			n = 16
		}
	}
	if n == 0 || len(v) < 4+n {
		return addr, ErrMalformed
	}
	port := binary.BigEndian.Uint16(v[2:])
	var raw [16]byte
	ip := raw[:copy(raw[:], v[4:4+n])]
	if xor {
		port ^= cookie >> 16
		xorAddr(ip, tx)
	}
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port), nil
}

// xorAddr applies the cookie and the transaction ID, RFC 8489 §14.2.
func xorAddr(ip []byte, tx TxID) {
	var mask [16]byte
	binary.BigEndian.PutUint32(mask[:], cookie)
	copy(mask[4:], tx[:])
	for i := range ip {
		ip[i] ^= mask[i]
	}
}

func fingerprint(b []byte) uint32 { return crc32.ChecksumIEEE(b) ^ fingerprintXOR }

// appendFingerprint closes the message that starts at start; its length field already counts the attribute.
func appendFingerprint(b []byte, start int) []byte {
	fp := fingerprint(b[start:])
	b = binary.BigEndian.AppendUint16(b, attrFingerprint)
	b = binary.BigEndian.AppendUint16(b, 4)
	return binary.BigEndian.AppendUint32(b, fp)
}
