package netstack

import (
	"encoding/binary"
	"math/bits"
)

// The Internet checksum (RFC 1071) over 64-bit words with end-around carry: a sum of big-endian 16-bit words modulo
// 65,535 may as well be taken 64 bits at a time and folded in the end.

// sum adds the words of b, padded with a zero byte if odd, to acc.
func sum(acc uint64, b []byte) uint64 {
	var c uint64
	for len(b) >= 8 {
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b), 0)
		acc += c
		b = b[8:]
	}
	return add(acc, tail(b))
}

// copySum copies src to dst, which is as long, and returns the sum of its words.
func copySum(dst, src []byte) uint64 {
	var acc, c uint64
	n := len(src)
	dst = dst[:n]
	i := 0
	for ; i+32 <= n; i += 32 {
		s, d := src[i:i+32:i+32], dst[i:i+32:i+32]
		w0 := binary.LittleEndian.Uint64(s[0:])
		w1 := binary.LittleEndian.Uint64(s[8:])
		w2 := binary.LittleEndian.Uint64(s[16:])
		w3 := binary.LittleEndian.Uint64(s[24:])
		binary.LittleEndian.PutUint64(d[0:], w0)
		binary.LittleEndian.PutUint64(d[8:], w1)
		binary.LittleEndian.PutUint64(d[16:], w2)
		binary.LittleEndian.PutUint64(d[24:], w3)
		acc, c = bits.Add64(acc, w0, 0)
		acc, c = bits.Add64(acc, w1, c)
		acc, c = bits.Add64(acc, w2, c)
		acc, c = bits.Add64(acc, w3, c)
		acc += c // cannot carry again: the sum before was at most 2^64-2 when c is 1
	}
	// Byte order does not matter to the sum but for a final swap (RFC 1071 §2 B).
	le := fold(acc)
	acc = uint64(le<<8 | le>>8)
	rest := src[i:]
	copy(dst[i:], rest)
	return sum(acc, rest)
}

func tail(b []byte) uint64 {
	var t uint64
	for i, x := range b {
		t |= uint64(x) << (56 - 8*i)
	}
	return t
}

func add(a, b uint64) uint64 {
	s, c := bits.Add64(a, b, 0)
	return s + c
}

// fold reduces a sum to 16 bits.
func fold(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s)
}
