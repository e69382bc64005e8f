package tailnode

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"
)

func TestLogf(t *testing.T) {
	var got string
	l := slog.New(logfHandler{logf: func(f string, a ...any) { got = fmt.Sprintf(f, a...) }})
	for _, c := range []struct {
		log  func()
		want string
	}{
		{func() { l.Info("hello") }, "INFO: hello "},
		{func() { l.Debug("hello", "n", 1, "s", "two words") }, `DEBUG: hello n=1 s="two words"`},
		{func() { l.With("peer", "a b").Warn("gone", "err", errors.New("line\nbreak")) }, `WARN: gone peer="a b" err="line\nbreak"`},
		{func() { l.WithGroup("g").With("k", 1).Error("x", "y", 2) }, "ERROR: x g.k=1 g.y=2"},
		{func() { l.WithGroup("g").WithGroup("h").Error("x", "y", 2) }, "ERROR: x g.h.y=2"},
	} {
		c.log()
		if got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}
