// Package disco is the codec of path discovery messages: how two nodes, and a node and a
// peer relay, find out which UDP paths work. It does no I/O and keeps no state.
//
// A sealed message, see docs/protocol/disco.md:
//
//	offset size
//	0      6    magic 54 53 f0 9f 92 ac ("TS" and U+1F4AC)
//	6      32   sender's disco public key
//	38     24   nonce
//	62     16+n NaCl box (X25519, XSalsa20, Poly1305) of the plaintext, its tag first
//
// and the plaintext in the box:
//
//	0      1    message type
//	1      1    message version, 0
//	2      n    body by type; a receiver ignores bytes beyond those it knows
//
// The type's parser takes the body, so that reading a message allocates nothing but a list
// of endpoints where one is carried.
package disco

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// Magic is the first six bytes of every sealed message.
const Magic = "TS\xf0\x9f\x92\xac"

const (
	// HeaderLen is the length of what stands before the nonce: magic and sender.
	HeaderLen = len(Magic) + key.Size
	nonceLen  = 24
	tagLen    = 16
	// Overhead is how much longer a sealed message is than its plaintext.
	Overhead = HeaderLen + nonceLen + tagLen
	// PlainHeaderLen is the length of type and version.
	PlainHeaderLen = 2

	// TxIDLen is the length of a ping's transaction ID.
	TxIDLen = 12
	// PingLen is the length of a ping's body with the node key and without padding.
	PingLen = TxIDLen + key.Size
	pongLen = TxIDLen + addrPortLen

	addrPortLen = 16 + 2
	commonLen   = 4 + 4 + key.Size + ChallengeLen
	allocReqLen = 2*key.Size + 4
	endpointLen = 3*key.Size + 8 + 4 + 8 + 8

	// ChallengeLen is the length of a peer relay's challenge.
	ChallengeLen = 32

	// MaxEndpoints is how many endpoints are read from one message. Further ones are
	// ignored: an honest node has a few, and each one read costs probes.
	MaxEndpoints = 64
)

// Type says what a message is.
type Type byte

// The message types.
const (
	TypePing                  Type = 1
	TypePong                  Type = 2
	TypeCallMeMaybe           Type = 3
	TypeBindEndpoint          Type = 4 // client to peer relay
	TypeBindEndpointChallenge Type = 5 // peer relay to client
	TypeBindEndpointAnswer    Type = 6 // client to peer relay
	TypeCallMeMaybeVia        Type = 7
	TypeAllocateRequest       Type = 8
	TypeAllocateResponse      Type = 9
)

// String returns the type's name.
func (t Type) String() string {
	switch t {
	case TypePing:
		return "ping"
	case TypePong:
		return "pong"
	case TypeCallMeMaybe:
		return "call-me-maybe"
	case TypeBindEndpoint:
		return "bind-endpoint"
	case TypeBindEndpointChallenge:
		return "bind-endpoint-challenge"
	case TypeBindEndpointAnswer:
		return "bind-endpoint-answer"
	case TypeCallMeMaybeVia:
		return "call-me-maybe-via"
	case TypeAllocateRequest:
		return "allocate-endpoint-request"
	case TypeAllocateResponse:
		return "allocate-endpoint-response"
	}
	return "unknown"
}

var (
	// ErrShort reports a message that ends before its fields do.
	ErrShort = errors.New("disco: message too short")
	// ErrNotDisco reports a packet without the magic.
	ErrNotDisco = errors.New("disco: not a disco message")
	// ErrVersion reports a message of a known type in a version whose body is not known.
	ErrVersion = errors.New("disco: unknown message version")
)

// TxID identifies a ping and the pong that answers it. It is random, so that a pong
// proves its sender received the ping.
type TxID [TxIDLen]byte

// Is reports whether packet b has the form of a sealed message. It says nothing of its
// authenticity.
func Is(b []byte) bool {
	return len(b) >= Overhead && string(b[:len(Magic)]) == Magic
}

// Sender returns the disco key that packet b names as its sender, unauthenticated until
// [Open] succeeds with that key. ok is what [Is] reports.
func Sender(b []byte) (k key.DiscoPublic, ok bool) {
	if !Is(b) {
		return k, false
	}
	return key.DiscoPublicFromRaw([key.Size]byte(b[len(Magic):])), true
}

// Seal appends to dst the sealed form of plaintext. from is the sender's public key and
// shared the box key of the sender and the receiver.
func Seal(dst []byte, from key.DiscoPublic, shared *key.Shared, plaintext []byte) []byte {
	dst = append(dst, Magic...)
	dst = from.AppendTo(dst)
	return shared.AppendSeal(dst, plaintext)
}

// Open appends to dst the plaintext of packet b, or returns [ErrNotDisco] or [key.ErrOpen].
// dst's spare room must not overlap b.
func Open(dst []byte, shared *key.Shared, b []byte) ([]byte, error) {
	if !Is(b) {
		return dst, ErrNotDisco
	}
	return shared.AppendOpen(dst, b[HeaderLen:])
}

// Split returns the parts of a plaintext. body is what the parsers take; of a type that is
// not known the message is to be ignored.
func Split(plaintext []byte) (t Type, version byte, body []byte, err error) {
	if len(plaintext) < PlainHeaderLen {
		return 0, 0, nil, ErrShort
	}
	return Type(plaintext[0]), plaintext[1], plaintext[PlainHeaderLen:], nil
}

func header(dst []byte, t Type) []byte { return append(dst, byte(t), 0) }

// Ping asks for a Pong by the path on which it travels.
//
//	0   12 transaction ID
//	12  32 sender's node key (absent in messages of very old nodes)
//	44  n  padding, zero
type Ping struct {
	TxID TxID
	// NodeKey is the sender's, by its own word; whoever reads it must check that the
	// node of that key has the disco key that sealed the message.
	NodeKey key.NodePublic
	Padding int // bytes of padding, to learn whether packets of that size pass
}

// Append appends the plaintext.
func (m *Ping) Append(dst []byte) []byte {
	dst = append(header(dst, TypePing), m.TxID[:]...)
	if !m.NodeKey.IsZero() {
		dst = m.NodeKey.AppendTo(dst)
	}
	return appendZeros(dst, m.Padding)
}

// ParsePing reads a ping's body.
func ParsePing(body []byte) (m Ping, err error) {
	if len(body) < TxIDLen {
		return m, ErrShort
	}
	m.TxID = TxID(body)
	body = body[TxIDLen:]
	if len(body) >= key.Size {
		m.NodeKey = key.NodePublicFromRaw([key.Size]byte(body))
		body = body[key.Size:]
	}
	m.Padding = len(body)
	return m, nil
}

// Pong answers a Ping.
//
//	0   12 transaction ID of the ping
//	12  18 address and port from which the ping came
type Pong struct {
	TxID TxID
	Src  netip.AddrPort
}

// Append appends the plaintext.
func (m *Pong) Append(dst []byte) []byte {
	dst = append(header(dst, TypePong), m.TxID[:]...)
	return appendAddrPort(dst, m.Src)
}

// ParsePong reads a pong's body.
func ParsePong(body []byte) (m Pong, err error) {
	if len(body) < pongLen {
		return m, ErrShort
	}
	m.TxID = TxID(body)
	m.Src = addrPort(body[TxIDLen:])
	return m, nil
}

// CallMeMaybe goes over a relay and asks its receiver to ping the sender's endpoints: the
// sender has just sent pings itself, so that its NAT and firewall let the answers in.
//
//	0   18 × n  the sender's endpoints
type CallMeMaybe struct {
	Endpoints []netip.AddrPort
}

// Append appends the plaintext.
func (m *CallMeMaybe) Append(dst []byte) []byte {
	return appendAddrPorts(header(dst, TypeCallMeMaybe), m.Endpoints)
}

// ParseCallMeMaybe reads the body of a call-me-maybe, appending to eps. A body that is not a whole number of
// endpoints holds none, as upstream has it: the message alone already means something.
func ParseCallMeMaybe(version byte, body []byte, eps []netip.AddrPort) CallMeMaybe {
	if version != 0 || len(body)%addrPortLen != 0 {
		return CallMeMaybe{Endpoints: eps}
	}
	return CallMeMaybe{Endpoints: addrPorts(eps, body)}
}

// BindCommon is the body of the three messages with which a client binds itself to an
// endpoint of a peer relay: the client's [TypeBindEndpoint], the relay's
// [TypeBindEndpointChallenge], the client's [TypeBindEndpointAnswer]. The three are of one length,
// so that the relay amplifies nothing.
//
//	0   4  VNI
//	4   4  generation
//	8   32 disco key of the other client
//	40  32 challenge
type BindCommon struct {
	// VNI is the virtual network identifier, which must equal that of the Geneve header
	// around the message.
	VNI uint32
	// Generation is chosen by the client, nonzero, new for each handshake.
	Generation uint32
	// RemoteKey is the disco key of the client at the other end of the endpoint.
	RemoteKey key.DiscoPublic
	// Challenge is set by the relay and echoed in the answer.
	Challenge [ChallengeLen]byte
}

// Append appends the plaintext of the message of type t, one of the three.
func (m *BindCommon) Append(dst []byte, t Type) []byte {
	dst = binary.BigEndian.AppendUint32(header(dst, t), m.VNI)
	dst = binary.BigEndian.AppendUint32(dst, m.Generation)
	dst = m.RemoteKey.AppendTo(dst)
	return append(dst, m.Challenge[:]...)
}

// ParseBind reads the body of any of the three.
func ParseBind(body []byte) (m BindCommon, err error) {
	if len(body) < commonLen {
		return m, ErrShort
	}
	m.VNI = binary.BigEndian.Uint32(body)
	m.Generation = binary.BigEndian.Uint32(body[4:])
	m.RemoteKey = key.DiscoPublicFromRaw([key.Size]byte(body[8:]))
	m.Challenge = [ChallengeLen]byte(body[8+key.Size:])
	return m, nil
}

// AllocateRequest goes over DERP to a peer relay and asks for an endpoint for two clients.
//
//	0   32 × 2 disco keys of the clients
//	64  4      generation
type AllocateRequest struct {
	// Clients are the disco keys of the two; the sender's must be one of them.
	Clients    [2]key.DiscoPublic
	Generation uint32 // echoed by the response
}

// Append appends the plaintext.
func (m *AllocateRequest) Append(dst []byte) []byte {
	dst = header(dst, TypeAllocateRequest)
	dst = m.Clients[0].AppendTo(dst)
	dst = m.Clients[1].AppendTo(dst)
	return binary.BigEndian.AppendUint32(dst, m.Generation)
}

// ParseAllocateRequest reads its body.
func ParseAllocateRequest(version byte, body []byte) (m AllocateRequest, err error) {
	if version != 0 {
		return m, ErrVersion
	}
	if len(body) < allocReqLen {
		return m, ErrShort
	}
	m.Clients[0] = key.DiscoPublicFromRaw([key.Size]byte(body))
	m.Clients[1] = key.DiscoPublicFromRaw([key.Size]byte(body[key.Size:]))
	m.Generation = binary.BigEndian.Uint32(body[2*key.Size:])
	return m, nil
}

// RelayEndpoint is what a peer relay has allocated.
//
//	0   32     disco key of the relay
//	32  32 × 2 disco keys of the clients
//	96  8      Lamport ID
//	104 4      VNI
//	108 8      bind lifetime, nanoseconds
//	116 8      steady state lifetime, nanoseconds
//	124 18 × n addresses of the relay, at least one
type RelayEndpoint struct {
	Server  key.DiscoPublic
	Clients [2]key.DiscoPublic
	// LamportID orders the allocations of one relay for one pair: the greatest is the newest.
	LamportID uint64
	VNI       uint32
	// BindLifetime is how long an endpoint stays allocated before both clients have bound.
	BindLifetime time.Duration
	// SteadyStateLifetime is how long it stays afterwards without traffic.
	SteadyStateLifetime time.Duration
	Addrs               []netip.AddrPort
}

func (m *RelayEndpoint) append(dst []byte) []byte {
	dst = m.Server.AppendTo(dst)
	dst = m.Clients[0].AppendTo(dst)
	dst = m.Clients[1].AppendTo(dst)
	dst = binary.BigEndian.AppendUint64(dst, m.LamportID)
	dst = binary.BigEndian.AppendUint32(dst, m.VNI)
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.BindLifetime))
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.SteadyStateLifetime))
	return appendAddrPorts(dst, m.Addrs)
}

func parseRelayEndpoint(b []byte) (m RelayEndpoint, err error) {
	if len(b) < endpointLen+addrPortLen || (len(b)-endpointLen)%addrPortLen != 0 {
		return m, ErrShort
	}
	m.Server = key.DiscoPublicFromRaw([key.Size]byte(b))
	m.Clients[0] = key.DiscoPublicFromRaw([key.Size]byte(b[key.Size:]))
	m.Clients[1] = key.DiscoPublicFromRaw([key.Size]byte(b[2*key.Size:]))
	b = b[3*key.Size:]
	m.LamportID = binary.BigEndian.Uint64(b)
	m.VNI = binary.BigEndian.Uint32(b[8:])
	m.BindLifetime = time.Duration(binary.BigEndian.Uint64(b[12:]))
	m.SteadyStateLifetime = time.Duration(binary.BigEndian.Uint64(b[20:]))
	m.Addrs = addrPorts(nil, b[28:])
	return m, nil
}

// AllocateResponse answers an AllocateRequest: the request's generation (4 bytes), then the endpoint.
type AllocateResponse struct {
	Generation uint32
	RelayEndpoint
}

// Append appends the plaintext.
func (m *AllocateResponse) Append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint32(header(dst, TypeAllocateResponse), m.Generation)
	return m.RelayEndpoint.append(dst)
}

// ParseAllocateResponse reads its body.
func ParseAllocateResponse(version byte, body []byte) (m AllocateResponse, err error) {
	if version != 0 {
		return m, ErrVersion
	}
	if len(body) < 4 {
		return m, ErrShort
	}
	m.Generation = binary.BigEndian.Uint32(body)
	m.RelayEndpoint, err = parseRelayEndpoint(body[4:])
	return m, err
}

// CallMeMaybeVia goes over DERP and asks its receiver to bind to a peer relay's endpoint, as the
// sender does, so that the two meet there.
type CallMeMaybeVia struct{ RelayEndpoint }

// Append appends the plaintext.
func (m *CallMeMaybeVia) Append(dst []byte) []byte {
	return m.RelayEndpoint.append(header(dst, TypeCallMeMaybeVia))
}

// ParseCallMeMaybeVia reads its body.
func ParseCallMeMaybeVia(version byte, body []byte) (m CallMeMaybeVia, err error) {
	if version != 0 {
		return m, ErrVersion
	}
	m.RelayEndpoint, err = parseRelayEndpoint(body)
	return m, err
}

// An address and port are 16 bytes, IPv4 in IPv6-mapped form, and 2 bytes of port.

func appendAddrPort(dst []byte, ap netip.AddrPort) []byte {
	var a [16]byte // an invalid address is written as ::
	if ap.Addr().IsValid() {
		a = ap.Addr().As16()
	}
	return binary.BigEndian.AppendUint16(append(dst, a[:]...), ap.Port())
}

func appendAddrPorts(dst []byte, aps []netip.AddrPort) []byte {
	for _, ap := range aps {
		dst = appendAddrPort(dst, ap)
	}
	return dst
}

// addrPort reads from b, which is long enough.
func addrPort(b []byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)).Unmap(), binary.BigEndian.Uint16(b[16:]))
}

func addrPorts(dst []netip.AddrPort, b []byte) []netip.AddrPort {
	n := min(len(b)/addrPortLen, MaxEndpoints)
	if n > 0 && cap(dst)-len(dst) < n {
		dst = append(make([]netip.AddrPort, 0, len(dst)+n), dst...)
	}
	for ; n > 0; n-- {
		dst = append(dst, addrPort(b))
		b = b[addrPortLen:]
	}
	return dst
}

func appendZeros(dst []byte, n int) []byte {
	for n > 0 {
		var zero [128]byte
		k := min(n, len(zero))
		dst = append(dst, zero[:k]...)
		n -= k
	}
	return dst
}
