package nat

import (
	"flag"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if who := os.Getenv(childEnv); who != "" {
		childMain(who) // does not return
	}
	flag.Parse()
	flag.Set("test.parallel", "8") // most of what happens here is waiting
	os.Exit(m.Run())
}
