package datapath

// Limits bounds what an Engine holds. A field that is 0 has its default.
type Limits struct {
	TCPMemory   int // bytes that TCP buffers grow by, all together: netstack.Config.BufferBudget
	ConnMemory  int // bytes that one direction of a connection grows to: netstack.Config.MaxBuffer
	UDPMemory   int // bytes of a UDP socket's receive queue: netstack.Config.UDPBuffer
	StageMemory int // bytes of packets that wait for handshakes: wg.Config.StageBytes
	Backlog     int // connections that wait for Accept: netstack.Config.Backlog
	Workers     int // goroutines with a batch buffer at a time: wg.Config.Workers
	// KeepMemory leaves it to the Go runtime when memory that a burst of traffic needed is given back, see reclaim.
	KeepMemory bool
}
