package matrix

import (
	"io"
	"log"
	"os"
	"testing"
)

// There is no goroutine check here: upstream's nodes leave goroutines behind their Close. Ours is
// checked by the root package's own tests.
func TestMain(m *testing.M) {
	if os.Getenv("INTEROP_VERBOSE") == "" {
		log.SetOutput(io.Discard) // upstream's STUN server logs to the standard logger
	}
	os.Exit(m.Run())
}
