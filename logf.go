package tailnode

import (
	"bytes"
	"context"
	"log/slog"
	"strconv"
	"strings"
)

// logfHandler writes slog records to a printf-like function, a line each.
type logfHandler struct {
	logf   func(format string, args ...any)
	prefix []byte // the attributes of With, as text
	group  string
}

func (h logfHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h logfHandler) Handle(ctx context.Context, r slog.Record) error {
	var line bytes.Buffer
	var th slog.Handler = slog.NewTextHandler(&line, &slog.HandlerOptions{
		Level: slog.LevelDebug,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.MessageKey || a.Key == slog.LevelKey) {
				return slog.Attr{}
			}
			return a
		},
	})
	if h.group != "" {
		th = th.WithGroup(strings.TrimSuffix(h.group, "."))
	}
	if err := th.Handle(ctx, r); err != nil {
		return err
	}
	h.logf("%s: %s %s%s", r.Level, r.Message, h.prefix, bytes.TrimSpace(line.Bytes()))
	return nil
}

func (h logfHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	p := bytes.Clone(h.prefix)
	for _, a := range attrs {
		p = append(p, h.group...)
		p = append(p, attrText(a)...)
		p = append(p, ' ')
	}
	h.prefix = p
	return h
}

// attrText returns key=value, quoted where need be, as a line must not be broken by what control says.
func attrText(a slog.Attr) string {
	v := a.Value.Resolve().String()
	if v == "" || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r == '"' || r == '=' || !strconv.IsPrint(r) }) {
		v = strconv.Quote(v)
	}
	return a.Key + "=" + v
}

func (h logfHandler) WithGroup(name string) slog.Handler {
	h.group += name + "."
	return h
}
