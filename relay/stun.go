package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/tailnode/tailnode/internal/stun"
)

// stunServer answers Binding requests of tailnet clients and nothing else. One request gets one
// answer, at most four bytes longer than itself: it is of no use to amplify a flood.
type stunServer struct {
	pc       *net.UDPConn
	log      *slog.Logger
	answered atomic.Uint64
}

func listenSTUN(ctx context.Context, addr string, log *slog.Logger) (*stunServer, error) {
	pc, err := new(net.ListenConfig).ListenPacket(ctx, "udp", addr)
	if err != nil {
		return nil, fmt.Errorf("relay: STUN: %w", err)
	}
	return &stunServer{pc: pc.(*net.UDPConn), log: log}, nil
}

func (s *stunServer) serve() {
	in := make([]byte, 1500)
	out := make([]byte, 0, 64)
	for {
		n, from, err := s.pc.ReadFromUDPAddrPort(in)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // of an earlier answer, as a rule
			s.log.Debug("relay: STUN read", "err", err)
			time.Sleep(time.Millisecond)
			continue
		}
		tx, err := stun.ParseRequest(in[:n])
		if err != nil {
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		out = stun.AppendResponse(out[:0], tx, from)
		if _, err := s.pc.WriteToUDPAddrPort(out, from); err == nil {
			s.answered.Add(1)
		}
	}
}
