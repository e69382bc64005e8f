package tailnode_test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"testing"

	"github.com/tailnode/tailnode"
)

// TestCodes holds the list of codes against testdata/vectors/codes.json, which the other faces
// of the library are held against too.
func TestCodes(t *testing.T) {
	b, err := os.ReadFile("testdata/vectors/codes.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Codes []struct {
			Code int
			Name string
		}
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	for i, c := range v.Codes {
		if c.Code != i+1 {
			t.Errorf("code %d stands in place %d", c.Code, i+1)
		}
		if got := tailnode.Code(c.Code).String(); got != c.Name {
			t.Errorf("code %d is %q, the list says %q", c.Code, got, c.Name)
		}
	}
	if last := int(tailnode.CodeCoreLost); len(v.Codes) != last {
		t.Errorf("the list has %d codes, the package %d", len(v.Codes), last)
	}
}

func TestErrorIsNetError(t *testing.T) {
	s := &tailnode.Server{Hostname: "x", Store: tailnode.NewMemoryStore(), ControlURL: "http://127.0.0.1:1"}
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 1)
	defer cancel()
	_, err := s.Up(ctx)
	ne, ok := errors.AsType[net.Error](err)
	if !ok || !ne.Timeout() {
		t.Errorf("%v is not a net.Error that timed out", err)
	}
	if !errors.Is(tailnode.ErrStateNotExist, fs.ErrNotExist) {
		t.Error("ErrStateNotExist is not fs.ErrNotExist")
	}
}
