package tailnode

import (
	"github.com/tailnode/tailnode/internal/datapath"
	"github.com/tailnode/tailnode/internal/errcode"
)

// Limits bounds the memory and the concurrency of a [Server]. The zero value of each field is its default, which suits a
// server or a desktop; the defaults were chosen by measurement (docs/performance.md). It has no counterpart in tsnet.
//
// A Server holds some 3 MB of heap when idle, and no more than a few hundred bytes for each peer. Under load its payload
// takes, at most, TCPMemory + HandshakeMemory + Workers × 64 KiB + 256 KiB for each connection whose both directions are
// full + UDPMemory for each socket whose queue is + 1 MiB for each relay in use; Go's collector lets a heap grow to about twice what lives on it (GOGC).
type Limits struct {
	// TCPMemory is the ceiling, in bytes, for all that the buffers of TCP connections grow by beyond the 128 KiB that each
	// has in either direction; they grow only as far as the path's delay asks for. Less makes many bulk connections over long paths
	// slower, for they share it; more costs memory only while it is needed. 0: 32 MiB. The least is 64 KiB.
	TCPMemory int

	// ConnMemory is the size, in bytes, to which one connection's buffer in one direction may grow. One connection carries no
	// more than half of it in a round trip: with 8 MiB, 330 Mbit/s at 100 ms. 0: 8 MiB. The least is 128 KiB.
	ConnMemory int

	// UDPMemory is the size, in bytes, of each UDP socket's receive queue. Datagrams that find it full are lost: less loses more of a
	// burst that the program does not read at once. 0: 256 KiB. The least is 4 KiB.
	UDPMemory int

	// HandshakeMemory is how many bytes of packets may wait for handshakes with peers, all together; the oldest go
	// first, and are sent again by whoever sent them. 0: 4 MiB. The least is 64 KiB.
	HandshakeMemory int

	// Backlog is how many connections may wait for Accept, for each listener; what comes beyond is told by SYN cookies, or
	// tries again. 0: 1,024.
	Backlog int

	// Workers is how many goroutines may seal packets into buffers of 64 KiB at a time; whoever finds none left uses a small one of
	// its own, with a system call for each few packets. More than there are processors can only help senders that the kernel holds
	// up. 0: twice GOMAXPROCS. How many goroutines receive is not a choice: one for each socket, and GOMAXPROCS for TCP.
	Workers int

	// KeepMemory leaves it to the Go runtime when memory that a burst of traffic or a large netmap needed goes back to the system, which
	// takes minutes. Otherwise the Server runs the garbage collector, up to three times, when a burst has been over for ten seconds, unless
	// it has run by itself, and once when it has taken over a large netmap; neither if the program's heap is larger than 64 MiB.
	KeepMemory bool
}

// Bounds of Limits.
const (
	leastTCPMemory       = 64 << 10
	leastConnMemory      = 128 << 10
	leastUDPMemory       = 4 << 10
	leastHandshakeMemory = 64 << 10
	mostMemory           = 1 << 30 // of each, so that sums fit an int everywhere
	mostBacklog          = 65535
	mostWorkers          = 1024
)

// check returns l in the form of the layer below, or what is wrong with it.
func (l *Limits) check() (datapath.Limits, error) {
	for _, f := range []struct {
		name        string
		v           int
		least, most int
	}{
		{"TCPMemory", l.TCPMemory, leastTCPMemory, mostMemory},
		{"ConnMemory", l.ConnMemory, leastConnMemory, mostMemory},
		{"UDPMemory", l.UDPMemory, leastUDPMemory, mostMemory},
		{"HandshakeMemory", l.HandshakeMemory, leastHandshakeMemory, mostMemory},
		{"Backlog", l.Backlog, 1, mostBacklog},
		{"Workers", l.Workers, 1, mostWorkers},
	} {
		if f.v != 0 && (f.v < f.least || f.v > f.most) {
			return datapath.Limits{}, errcode.New(errcode.InvalidArgument,
				"Limits.%s is %d; it must be within %d and %d, or 0 for its default", f.name, f.v, f.least, f.most)
		}
	}
	return datapath.Limits{
		TCPMemory: l.TCPMemory, ConnMemory: l.ConnMemory, UDPMemory: l.UDPMemory, StageMemory: l.HandshakeMemory,
		Backlog: l.Backlog, Workers: l.Workers, KeepMemory: l.KeepMemory,
	}, nil
}
