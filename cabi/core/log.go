//go:build linux

package core

import (
	"bytes"
	"context"
	"log/slog"

	"golang.org/x/sys/unix"
)

// Bits of the request for a new node: what the descriptor that came with it is for.
const (
	logFrames = 1 // records, for the host's log callback
	logLines  = 2 // text lines
	authFrame = 4 // the socket for callbacks, whichever there are
)

// Types of message on the socket for callbacks.
const (
	frameLog     = 1
	frameAuthURL = 2
	maxFrameText = 16<<10 - 1
)

// sink is where a node's diagnostics and its login URL go. It never blocks: what finds no room is dropped.
type sink struct {
	frames int // a socket, or -1
	lines  int // a descriptor of the host's choice, or -1
	mode   int64
	level  slog.Level
}

// newSink takes fds over: the socket first, where mode asks for it, then the descriptor for lines.
func newSink(fds []int, level int, mode int64) *sink {
	k := &sink{frames: -1, lines: -1, mode: mode, level: slog.Level(level)}
	take := func(to *int) {
		if len(fds) > 0 {
			*to, fds = fds[0], fds[1:]
		}
	}
	if mode&authFrame != 0 {
		take(&k.frames)
	}
	if mode&logLines != 0 {
		take(&k.lines)
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return k
}

// close is called when nothing of the node runs any more.
func (k *sink) close() {
	if k.frames >= 0 {
		unix.Shutdown(k.frames, unix.SHUT_RDWR) // a fork of the host may hold a copy: this is the end all the same
	}
	for _, fd := range []int{k.frames, k.lines} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (k *sink) frame(typ uint32, level int32, text []byte) {
	if k.frames < 0 {
		return
	}
	b := native.AppendUint32(make([]byte, 0, 8+len(text)), typ)
	b = native.AppendUint32(b, uint32(level))
	b = append(b, text[:min(len(text), maxFrameText)]...)
	unix.SendmsgN(k.frames, b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
}

// authURL is the node's UserLogf, which is called with the URL alone.
func (k *sink) authURL(_ string, args ...any) {
	if len(args) > 0 {
		if url, ok := args[len(args)-1].(string); ok {
			k.frame(frameAuthURL, 0, []byte(url))
		}
	}
}

func (k *sink) logger() *slog.Logger {
	if k.frames < 0 && k.lines < 0 || k.mode&(logFrames|logLines) == 0 {
		return nil
	}
	return slog.New(&handler{k: k, text: slog.NewTextHandler(discard{}, nil)})
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

// handler formats each record by itself, so that no lock is held over a write.
type handler struct {
	k    *sink
	text slog.Handler
	with []func(slog.Handler) slog.Handler
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.k.level }

func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	var buf bytes.Buffer
	var t slog.Handler = slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: h.k.level})
	for _, f := range h.with {
		t = f(t)
	}
	if err := t.Handle(ctx, r); err != nil {
		return err
	}
	b := buf.Bytes()
	if h.k.mode&logFrames != 0 {
		h.k.frame(frameLog, int32(r.Level), bytes.TrimSuffix(b, []byte("\n")))
		return nil
	}
	// The descriptor is shared with the host, whose choice it is whether it blocks: poll first, and write no more than a pipe takes whole.
	p := [1]unix.PollFd{{Fd: int32(h.k.lines), Events: unix.POLLOUT}}
	if n, _ := unix.Poll(p[:], 0); n == 1 && p[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) == 0 {
		if len(b) > 4096 {
			b = append(b[:4095], '\n')
		}
		unix.Write(h.k.lines, b)
	}
	return nil
}

func (h *handler) WithAttrs(as []slog.Attr) slog.Handler {
	return h.add(func(t slog.Handler) slog.Handler { return t.WithAttrs(as) })
}

func (h *handler) WithGroup(name string) slog.Handler {
	return h.add(func(t slog.Handler) slog.Handler { return t.WithGroup(name) })
}

func (h *handler) add(f func(slog.Handler) slog.Handler) slog.Handler {
	return &handler{k: h.k, with: append(h.with[:len(h.with):len(h.with)], f)}
}
