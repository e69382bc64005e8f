package nat

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if kind := os.Getenv(childEnv); kind != "" {
		childMain(kind) // does not return
	}
	os.Exit(m.Run())
}
