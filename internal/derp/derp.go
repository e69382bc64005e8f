// Package derp is the wire format of DERP, the relay protocol of a tailnet: typed frames
// on a stream, addressed by node key. docs/protocol/derp.md describes the protocol; this
// package has its frames, and the buffers that move many of them per system call. It
// opens no connection: client and server below it do.
//
// Every frame is
//
//	type     1 byte
//	length   4 bytes, big-endian: of the payload alone
//	payload
//
// and a connection goes
//
//	server → client   ServerKey
//	client → server   ClientInfo    (sealed for the server key: proves the node key)
//	server → client   ServerInfo    (sealed for the node key)
//	                  then any frames, both ways
package derp

import (
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// Version is the protocol version both sides announce.
const Version = 2

// Sizes on the wire.
const (
	HeaderLen  = 5                      // type and length
	MaxPacket  = 64 << 10               // a relayed packet, without keys
	MaxPayload = MaxPacket + 2*key.Size // the longest payload of a frame we know
	maxSkip    = 1 << 20                // the longest frame of an unknown type that is skipped
	maxInfo    = 16 << 10               // ClientInfo and ServerInfo
)

// Magic opens the ServerKey frame: "DERP" and U+1F511.
const Magic = "DERP\xf0\x9f\x94\x91"

// KeepAlive is how often a server speaks on an idle connection; it adds up to [KeepAliveJitter].
const (
	KeepAlive       = 60 * time.Second
	KeepAliveJitter = 5 * time.Second
)

// Header names of the HTTP upgrade, docs/protocol/derp.md#http.
const (
	FastStartHeader = "Derp-Fast-Start"
	IdealNodeHeader = "Ideal-Node"
)

// MetaCertPrefix begins the common name of the certificate that carries the relay's key.
const MetaCertPrefix = "derpkey"

// FrameType says what a frame's payload is.
type FrameType byte

// The frame types.
const (
	ServerKey     FrameType = 0x01 // magic, 32 B key, ignored rest
	ClientInfoT   FrameType = 0x02 // 32 B node key, 24 B nonce, box of JSON
	ServerInfoT   FrameType = 0x03 // 24 B nonce, box of JSON
	SendPacket    FrameType = 0x04 // 32 B destination, packet
	RecvPacket    FrameType = 0x05 // 32 B source, packet
	KeepAliveT    FrameType = 0x06 // empty
	NotePreferred FrameType = 0x07 // 1 B: 1 if this relay is the client's home
	PeerGone      FrameType = 0x08 // 32 B key, 1 B reason (absent: 0)
	PeerPresent   FrameType = 0x09 // 32 B key, then 16 B address and 2 B port, then 1 B flags
	ForwardPacket FrameType = 0x0a // 32 B source, 32 B destination, packet (mesh)
	WatchConns    FrameType = 0x10 // empty (mesh)
	ClosePeer     FrameType = 0x11 // 32 B key (mesh)
	Ping          FrameType = 0x12 // 8 B
	Pong          FrameType = 0x13 // 8 B, those of the ping
	Health        FrameType = 0x14 // text; empty: healthy again
	Restarting    FrameType = 0x15 // 4 B reconnect in, 4 B try for: milliseconds
)

var typeNames = map[FrameType]string{
	ServerKey: "ServerKey", ClientInfoT: "ClientInfo", ServerInfoT: "ServerInfo", SendPacket: "SendPacket",
	RecvPacket: "RecvPacket", KeepAliveT: "KeepAlive", NotePreferred: "NotePreferred", PeerGone: "PeerGone",
	PeerPresent: "PeerPresent", ForwardPacket: "ForwardPacket", WatchConns: "WatchConns", ClosePeer: "ClosePeer",
	Ping: "Ping", Pong: "Pong", Health: "Health", Restarting: "Restarting",
}

// String returns the frame type's name, or its number for one that is not known.
func (t FrameType) String() string {
	if s, ok := typeNames[t]; ok {
		return s
	}
	return "frame 0x" + hex.EncodeToString([]byte{byte(t)})
}

func (t FrameType) known() bool {
	return t >= ServerKey && t <= ForwardPacket || t >= WatchConns && t <= Restarting
}

// Reasons of a PeerGone frame.
const (
	GoneDisconnected byte = 0x00 // it was connected to this relay and left
	GoneNotHere      byte = 0x01 // this relay does not know it
)

// Flags of a PeerPresent frame.
const (
	PresentRegular  byte = 1 << 0
	PresentMesh     byte = 1 << 1
	PresentProber   byte = 1 << 2
	PresentNotIdeal byte = 1 << 3
)

var (
	// ErrTooLarge reports a frame longer than the protocol allows.
	ErrTooLarge = errors.New("derp: frame too large")
	// ErrShort reports a payload shorter than its frame type needs.
	ErrShort = errors.New("derp: frame too short")
	// ErrGreeting reports that what should be a relay does not open like one.
	ErrGreeting = errors.New("derp: not a DERP greeting")
	// ErrInfo reports a client or server info that does not authenticate or parse.
	ErrInfo = errors.New("derp: bad info frame")
)

// AppendHeader appends a frame header for a payload of n bytes.
func AppendHeader(b []byte, t FrameType, n int) []byte {
	return append(b, byte(t), byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

// AppendFrame appends a whole frame.
func AppendFrame(b []byte, t FrameType, payload []byte) []byte {
	return append(AppendHeader(b, t, len(payload)), payload...)
}

// AppendPacket appends a SendPacket (k is the destination) or RecvPacket (k is the source) frame.
func AppendPacket(b []byte, t FrameType, k key.NodePublic, packet []byte) []byte {
	b = AppendHeader(b, t, key.Size+len(packet))
	return append(k.AppendTo(b), packet...)
}

// CutKey splits a payload that begins with a node key.
func CutKey(payload []byte) (k key.NodePublic, rest []byte, err error) {
	if len(payload) < key.Size {
		return k, nil, ErrShort
	}
	return key.NodePublicFromRaw([key.Size]byte(payload)), payload[key.Size:], nil
}

// AppendServerKey appends the relay's greeting.
func AppendServerKey(b []byte, k key.NodePublic) []byte {
	b = append(AppendHeader(b, ServerKey, len(Magic)+key.Size), Magic...)
	return k.AppendTo(b)
}

// ParseServerKey parses the greeting's payload; what follows the key is for the future.
func ParseServerKey(p []byte) (key.NodePublic, error) {
	if len(p) < len(Magic)+key.Size || string(p[:len(Magic)]) != Magic {
		return key.NodePublic{}, ErrGreeting
	}
	return key.NodePublicFromRaw([key.Size]byte(p[len(Magic):])), nil
}

// ClientInfo is what a client says about itself.
type ClientInfo struct {
	MeshKey     string `json:"meshKey,omitempty"`
	Version     int    `json:"version,omitempty"`
	CanAckPings bool
	IsProber    bool   `json:",omitempty"`
	AppName     string `json:",omitempty"`
}

// AppendClientInfo appends the frame by which the holder of priv proves its node key to the relay.
func AppendClientInfo(b []byte, priv key.NodePrivate, server key.NodePublic, info ClientInfo) ([]byte, error) {
	msg, err := json.Marshal(info)
	if err != nil {
		return b, fmt.Errorf("derp: client info: %w", err)
	}
	box := priv.Seal(server, msg)
	b = AppendHeader(b, ClientInfoT, key.Size+len(box))
	return append(priv.Public().AppendTo(b), box...), nil
}

// ParseClientInfo authenticates and parses the payload of a ClientInfo frame.
func ParseClientInfo(priv key.NodePrivate, p []byte) (client key.NodePublic, info ClientInfo, err error) {
	client, box, err := CutKey(p)
	if err != nil {
		return client, info, err
	}
	if len(p) > maxInfo {
		return client, info, ErrTooLarge
	}
	msg, err := priv.Open(client, box)
	if err != nil {
		return client, info, fmt.Errorf("%w: %w", ErrInfo, err)
	}
	if err := json.Unmarshal(msg, &info); err != nil {
		return client, info, fmt.Errorf("%w: %w", ErrInfo, err)
	}
	return client, info, nil
}

// ServerInfo is what a relay says about itself. The token bucket, if not zero, is what it
// accepts from this client, framing included.
type ServerInfo struct {
	Version                   int `json:"version,omitempty"`
	TokenBucketBytesPerSecond int `json:",omitempty"`
	TokenBucketBytesBurst     int `json:",omitempty"`
}

// AppendServerInfo appends a ServerInfo frame sealed for client.
func AppendServerInfo(b []byte, priv key.NodePrivate, client key.NodePublic, info ServerInfo) ([]byte, error) {
	msg, err := json.Marshal(info)
	if err != nil {
		return b, fmt.Errorf("derp: server info: %w", err)
	}
	return AppendFrame(b, ServerInfoT, priv.Seal(client, msg)), nil
}

// ParseServerInfo authenticates and parses the payload of a ServerInfo frame.
func ParseServerInfo(priv key.NodePrivate, server key.NodePublic, p []byte) (info ServerInfo, err error) {
	if len(p) > maxInfo {
		return info, ErrTooLarge
	}
	msg, err := priv.Open(server, p)
	if err != nil {
		return info, fmt.Errorf("%w: %w", ErrInfo, err)
	}
	if err := json.Unmarshal(msg, &info); err != nil {
		return info, fmt.Errorf("%w: %w", ErrInfo, err)
	}
	return info, nil
}

// AppendNotePreferred appends a NotePreferred frame.
func AppendNotePreferred(b []byte, home bool) []byte {
	v := byte(0)
	if home {
		v = 1
	}
	return append(AppendHeader(b, NotePreferred, 1), v)
}

// AppendPeerGone appends a PeerGone frame.
func AppendPeerGone(b []byte, peer key.NodePublic, reason byte) []byte {
	return append(peer.AppendTo(AppendHeader(b, PeerGone, key.Size+1)), reason)
}

// ParsePeerGone parses the payload of a PeerGone frame; the reason may be missing.
func ParsePeerGone(p []byte) (peer key.NodePublic, reason byte, err error) {
	peer, rest, err := CutKey(p)
	if len(rest) > 0 {
		reason = rest[0]
	}
	return peer, reason, err
}

// AppendPeerPresent appends a PeerPresent frame.
func AppendPeerPresent(b []byte, peer key.NodePublic, addr netip.AddrPort, flags byte) []byte {
	b = peer.AppendTo(AppendHeader(b, PeerPresent, key.Size+16+2+1))
	a := addr.Addr().As16()
	b = append(b, a[:]...)
	b = binary.BigEndian.AppendUint16(b, addr.Port())
	return append(b, flags)
}

// ParsePeerPresent parses the payload of a PeerPresent frame; all but the key may be missing.
func ParsePeerPresent(p []byte) (peer key.NodePublic, addr netip.AddrPort, flags byte, err error) {
	peer, rest, err := CutKey(p)
	if err != nil || len(rest) < 18 {
		return peer, addr, 0, err
	}
	addr = netip.AddrPortFrom(netip.AddrFrom16([16]byte(rest)).Unmap(), binary.BigEndian.Uint16(rest[16:]))
	if len(rest) > 18 {
		flags = rest[18]
	}
	return peer, addr, flags, nil
}

// AppendPing appends a Ping frame, or with t = [Pong] the answer to one.
func AppendPing(b []byte, t FrameType, data [8]byte) []byte {
	return append(AppendHeader(b, t, 8), data[:]...)
}

// ParsePing parses the payload of a Ping or Pong frame; what follows the 8 bytes is for the future.
func ParsePing(p []byte) (data [8]byte, err error) {
	if len(p) < 8 {
		return data, ErrShort
	}
	return [8]byte(p), nil
}

// AppendRestarting appends a Restarting frame; both durations are rounded down to milliseconds.
func AppendRestarting(b []byte, reconnectIn, tryFor time.Duration) []byte {
	b = AppendHeader(b, Restarting, 8)
	b = binary.BigEndian.AppendUint32(b, uint32(reconnectIn.Milliseconds()))
	return binary.BigEndian.AppendUint32(b, uint32(tryFor.Milliseconds()))
}

// ParseRestarting parses the payload of a Restarting frame.
func ParseRestarting(p []byte) (reconnectIn, tryFor time.Duration, err error) {
	if len(p) < 8 {
		return 0, 0, ErrShort
	}
	return time.Duration(binary.BigEndian.Uint32(p)) * time.Millisecond,
		time.Duration(binary.BigEndian.Uint32(p[4:])) * time.Millisecond, nil
}

// LooksLikeDisco reports whether a packet is a disco message, by its magic "TS💬".
func LooksLikeDisco(p []byte) bool {
	return len(p) >= 6+key.Size+24 && string(p[:6]) == "TS\xf0\x9f\x92\xac"
}

// MetaCert returns the relay key and protocol version that a certificate chain of TLS 1.3
// carries (docs/protocol/derp.md#fast-start); ok is false if it carries none.
func MetaCert(chain []*x509.Certificate) (server key.NodePublic, version int, ok bool) {
	for _, c := range chain {
		digits, is := strings.CutPrefix(c.Subject.CommonName, MetaCertPrefix)
		if !is || len(digits) != 2*key.Size {
			continue
		}
		var raw [key.Size]byte
		if _, err := hex.Decode(raw[:], []byte(digits)); err != nil || c.SerialNumber.BitLen() > 8 {
			continue
		}
		server, version = key.NodePublicFromRaw(raw), int(c.SerialNumber.Int64())
		return server, version, !server.IsZero() && version > 0
	}
	return server, 0, false
}
