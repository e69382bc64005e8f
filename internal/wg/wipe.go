package wg

import (
	"crypto/cipher"
	"reflect"
	"unsafe"

	"golang.org/x/crypto/chacha20poly1305"
)

// The cipher keeps its key where the language does not let us at it, and a session's keys
// must not outlive it (paper §6.1). The key lies in a structure that holds 32 bytes and
// nothing else; canWipe makes sure of that, once, and a test makes sure of canWipe.
var canWipe = func() bool {
	a, err := chacha20poly1305.New(make([]byte, 32))
	if err != nil {
		return false // a mode of the runtime that forbids the cipher; NewDevice fails then
	}
	t := reflect.TypeOf(a)
	return t.Kind() == reflect.Pointer && t.Elem().Kind() == reflect.Struct &&
		t.Elem().NumField() == 1 && t.Elem().Field(0).Type == reflect.TypeFor[[32]byte]()
}()

// wipeAEAD overwrites the key in a, which newAEAD made and nobody uses any more.
func wipeAEAD(a cipher.AEAD) {
	if a == nil || !canWipe {
		return
	}
	type iface struct{ _, data unsafe.Pointer }
	k := (*[32]byte)((*iface)(unsafe.Pointer(&a)).data)
	clear(k[:])
}

// overlap reports whether a and b share memory.
func overlap(a, b []byte) bool {
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	a0, b0 := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return a0 < b0+uintptr(len(b)) && b0 < a0+uintptr(len(a))
}
