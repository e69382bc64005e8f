package datapath

import (
	"net/netip"
	"sync"

	"github.com/tailnode/tailnode/internal/dns"
	"github.com/tailnode/tailnode/internal/netstack"
	"github.com/tailnode/tailnode/internal/packet"
)

// maxQueries bounds the DNS queries that wait for the resolver. More are lost, as datagrams are.
const maxQueries = 64

// resolver answers the DNS queries that this node sends to the tailnet's DNS address. The answers
// are made on a goroutine of its own, for WritePacket runs on that of the sender, which holds locks
// of the netstack. The goroutine begins with the first query and ends with close.
type resolver struct {
	e *Engine

	mu      sync.Mutex
	queries chan []byte // UDP packets; nil before the first
	closed  bool
	done    sync.WaitGroup
}

// isDNS reports whether a packet is for the tailnet's DNS.
func isDNS(h *packet.Parsed) bool {
	return h.Proto == packet.UDP && h.Dst.Port() == 53 && IsService(h.Dst.Addr())
}

// IsService reports whether a is one of the addresses at which a node asks its tailnet's DNS.
func IsService(a netip.Addr) bool { return a == dns.ServiceIP || a == dns.ServiceIP6 }

// ask takes a packet for which isDNS holds. It does not block.
func (r *resolver) ask(p *netstack.Packet) {
	buf := make([]byte, MTU)
	n := p.Next(buf)
	if n == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	if r.queries == nil {
		r.queries = make(chan []byte, maxQueries)
		r.done.Go(r.run)
	}
	select {
	case r.queries <- buf[:n]:
	default:
	}
}

func (r *resolver) run() {
	inbox := r.e.stack.NewInbox()
	var h packet.Parsed
	for b := range r.queries {
		if h.Decode(b) != nil || h.Proto != packet.UDP {
			continue
		}
		answer, _ := dns.Answer(h.Payload(), r.e.netmap.Load())
		if answer == nil {
			continue
		}
		if reply, err := packet.AppendUDP(nil, h.Dst, h.Src, answer); err == nil {
			inbox.Commit(reply)
			inbox.Flush()
		}
	}
}

// close ends the resolver and waits for it. It must be called before the stack is closed.
func (r *resolver) close() {
	r.mu.Lock()
	if !r.closed {
		r.closed = true
		if r.queries != nil {
			close(r.queries)
		}
	}
	r.mu.Unlock()
	r.done.Wait()
}
