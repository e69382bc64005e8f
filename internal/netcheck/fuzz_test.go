package netcheck

import "testing"

func FuzzSTUNResponse(f *testing.F) {
	f.Add(append([]byte{1, 1, 0, 12, 0x21, 0x12, 0xa4, 0x42, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, 0, 0x20, 0, 8, 0, 1, 1, 2, 3, 4, 5, 6))
	f.Add([]byte{1, 1, 0xff, 0xff, 0x21, 0x12, 0xa4, 0x42})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, ap, err := stunResponse(b); err == nil && !ap.Addr().IsValid() {
			t.Fatal("success without an address")
		}
	})
}
