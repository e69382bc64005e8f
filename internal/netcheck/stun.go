package netcheck

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net/netip"
)

const stunPort = 3478

var errNotSTUN = errors.New("netcheck: not a STUN binding response")

func newTx() (tx txID) { rand.Read(tx[:]); return tx }

// stunRequest returns a binding request (RFC 8489 §5, §14.14: a SOFTWARE attribute is optional).
func stunRequest(tx txID) []byte {
	b := []byte{0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42}
	return append(b, tx[:]...)
}

// stunResponse reads a success response's XOR-MAPPED-ADDRESS (RFC 8489 §14.2).
func stunResponse(b []byte) (tx txID, ap netip.AddrPort, err error) {
	if len(b) < 20 || b[0] != 1 || b[1] != 1 || binary.BigEndian.Uint32(b[4:]) != 0x2112a442 {
		return tx, ap, errNotSTUN
	}
	cookie := [16]byte(b[4:20])
	tx = txID(b[8:])
	n := int(binary.BigEndian.Uint16(b[2:]))
	if b = b[20:]; n > len(b) {
		return tx, ap, errNotSTUN
	}
	b = b[:n]
	for len(b) >= 4 {
		t, n := binary.BigEndian.Uint16(b), int(binary.BigEndian.Uint16(b[2:]))
		b = b[4:]
		if n > len(b) {
			break
		}
		if v := b[:n]; t == 0x20 && n >= 8 {
			family, size := v[1], 4
			port := binary.BigEndian.Uint16(v[2:]) ^ 0x2112
			v = v[4:]
			if family == 1 || family == 2 && len(v) >= 16 {
				if family == 2 {
					size = 16
				}
				var a [16]byte
				for i := range size {
					a[i] = v[i] ^ cookie[i]
				}
				addr, _ := netip.AddrFromSlice(a[:size])
				return tx, netip.AddrPortFrom(addr, port), nil
			}
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return tx, ap, errNotSTUN
}
