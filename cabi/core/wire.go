//go:build linux

// Package core is the Go half of the C library: it serves the requests that the thin client sends over a
// socket, in its own process (libtailnode-core) or in a helper (tailnode-helper). The
// messages are described in docs/c-abi.md; their layouts are those of cabi/src/internal.h.
package core

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

type kind uint32

const (
	kNew kind = iota + 1
	kStart
	kUp
	kClose
	kStatus
	kAddresses
	kWhois
	kPing
	kDial
	kListen
	kListenPacket
	kWatch
	kLoopback
	kStats
	kMemoryLimit
	kMaxProcs
	kGCPercent
	kTrim
	kPressure
)

const (
	requestMagic  = 0x544e5131
	replyMagic    = 0x544e5231
	acceptedMagic = 0x544e4131

	requestHead = 128 // magic, kind, node, timeout, arg[8], strings, reserved, len[8]
	replyHead   = 56  // magic, code, errno, data length, local, remote
	addrSize    = 20
	maxStrings  = 8
	maxRequest  = 128<<10 + requestHead
)

var native = binary.NativeEndian

// request is one call of the host.
type request struct {
	kind    kind
	node    uint64
	timeout int64 // milliseconds; negative: none
	arg     [8]int64
	str     [maxStrings]string
}

// parseRequest reads one message:
//
//	0 magic u32, 4 kind u32, 8 node u64, 16 timeout i64, 24 arg i64×8, 88 strings u32,
//	92 reserved u32, 96 length u32×8, 128 the strings
func parseRequest(b []byte) (r request, err error) {
	if len(b) < requestHead || native.Uint32(b) != requestMagic {
		return r, fmt.Errorf("core: a message of %d bytes is not a request", len(b))
	}
	r.kind = kind(native.Uint32(b[4:]))
	r.node = native.Uint64(b[8:])
	r.timeout = int64(native.Uint64(b[16:]))
	for i := range r.arg {
		r.arg[i] = int64(native.Uint64(b[24+8*i:]))
	}
	n := native.Uint32(b[88:])
	if n > maxStrings {
		return r, fmt.Errorf("core: a request with %d strings", n)
	}
	rest := b[requestHead:]
	for i := range int(n) {
		l := native.Uint32(b[96+4*i:])
		if uint64(l) > uint64(len(rest)) {
			return r, fmt.Errorf("core: string %d of a request is cut", i)
		}
		r.str[i] = string(rest[:l])
		rest = rest[l:]
	}
	return r, nil
}

// hostEnd is the host's end of a pair until it has its own copy. It is noted as well: a child does not know of it.
type hostEnd int

// reply is the answer to a request.
type reply struct {
	code          int32
	errno         int32
	data          []byte // JSON, a struct, or the text of the error
	local, remote netip.AddrPort
	fd            hostEnd // to pass to the host, which closes it; -1: none
}

func (r *reply) appendHead(b []byte) []byte {
	b = native.AppendUint32(b, replyMagic)
	b = native.AppendUint32(b, uint32(r.code))
	b = native.AppendUint32(b, uint32(r.errno))
	b = native.AppendUint32(b, uint32(len(r.data)))
	b = appendAddr(b, r.local)
	return appendAddr(b, r.remote)
}

// appendAddr appends a tailnode_addr: the address (16 bytes), the port in the machine's order, the family (4, 6, or 0), one
// byte of nothing.
func appendAddr(b []byte, a netip.AddrPort) []byte {
	var ip [16]byte
	var family byte
	switch addr := a.Addr().Unmap(); {
	case addr.Is4():
		family = 4
		v4 := addr.As4()
		copy(ip[:], v4[:])
	case addr.Is6():
		family = 6
		ip = addr.As16()
	}
	b = append(b, ip[:]...)
	b = native.AppendUint16(b, a.Port())
	return append(b, family, 0)
}

// parseAddr is the reverse of appendAddr; the result is not valid where the bytes are not.
func parseAddr(b []byte) netip.AddrPort {
	if len(b) < addrSize {
		return netip.AddrPort{}
	}
	port := native.Uint16(b[16:])
	switch b[18] {
	case 4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), port)
	case 6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[:16])), port)
	}
	return netip.AddrPort{}
}
