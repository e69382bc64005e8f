// Package tailcfg holds the messages that a node and its coordination server exchange,
// as Go types with their JSON encoding. It does no I/O and decides nothing.
//
// The messages and what each field means are described in docs/protocol/control.md; the
// comments here only say what a reader of this code needs. JSON field names are the Go
// names unless a tag says otherwise. Unknown fields are ignored in both directions, so a
// newer peer may send more than is listed.
package tailcfg

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

// CapabilityVersion is the number by which a node says which behaviour a server may expect of it.
type CapabilityVersion int

// CurrentCapabilityVersion is the version that this node advertises. The table in
// docs/protocol/control.md says for every version above 100 what it asks of a node
// and how this one answers.
const CurrentCapabilityVersion CapabilityVersion = 125

// What concerns peer relays.
const (
	// PeerCapabilityRelay lets a peer allocate endpoints on the relay that is the destination.
	PeerCapabilityRelay PeerCapability = "tailscale.com/cap/relay"
	// PeerCapabilityRelayTarget lets the destination allocate endpoints on the relay that the peer is.
	PeerCapabilityRelayTarget PeerCapability = "tailscale.com/cap/relay-target"
	// NodeAttrDisableRelayServer and NodeAttrDisableRelayClient keep a node from being a relay, and from using any.
	NodeAttrDisableRelayServer NodeCapability = "disable-relay-server"
	NodeAttrDisableRelayClient NodeCapability = "disable-relay-client"
)

// The identifiers that control allocates. All are positive; zero means none.
type (
	NodeID       int64  // a node, within one control server
	StableNodeID string // a node, for good
	UserID       int64  // a user
	LoginID      int64  // a login of a user
)

type (
	// NodeCapability names something the node itself is allowed or told to do.
	NodeCapability string
	// PeerCapability names something that a peer is granted at a destination.
	PeerCapability string
	// RawMessage is a JSON value kept as text, for applications to parse.
	RawMessage string
	// NodeCapMap holds a node's capabilities with their arguments.
	NodeCapMap map[NodeCapability][]RawMessage
	// PeerCapMap holds a peer's capabilities with their arguments.
	PeerCapMap map[PeerCapability][]RawMessage
)

// MarshalJSON writes the value as it is; the empty message is null.
func (m RawMessage) MarshalJSON() ([]byte, error) {
	if m == "" {
		return []byte("null"), nil
	}
	return []byte(m), nil
}

// UnmarshalJSON keeps the value as text.
func (m *RawMessage) UnmarshalJSON(b []byte) error {
	*m = RawMessage(b)
	return nil
}

// OptBool is a boolean that may be unset: the empty string, "true" or "false". In JSON it is
// null, true or false.
type OptBool string

// The two set values.
const (
	True  OptBool = "true"
	False OptBool = "false"
)

// Bool returns the OptBool that is set to v.
func Bool(v bool) OptBool {
	if v {
		return True
	}
	return False
}

// Get returns the value and whether it is set.
func (b OptBool) Get() (v, ok bool) { return b == True, b == True || b == False }

// MarshalJSON writes null, true or false.
func (b OptBool) MarshalJSON() ([]byte, error) {
	if _, ok := b.Get(); !ok {
		return []byte("null"), nil
	}
	return []byte(b), nil
}

// UnmarshalJSON reads null, true or false, bare or as a string.
func (b *OptBool) UnmarshalJSON(j []byte) error {
	switch string(j) {
	case "true", `"true"`:
		*b = True
	case "false", `"false"`:
		*b = False
	case "null", `""`, `"unset"`:
		*b = ""
	default:
		return fmt.Errorf("tailcfg: want true, false or null for an optional boolean")
	}
	return nil
}

// Key exchange and registration.

// PublicKeyResponse answers GET /key?v=N.
type PublicKeyResponse struct {
	LegacyPublicKey key.MachinePublic `json:"legacyPublicKey"` // of the protocol before Noise; unused
	PublicKey       key.MachinePublic `json:"publicKey"`
}

// EarlyNoise is what the server sends on a new Noise channel ahead of HTTP/2.
type EarlyNoise struct {
	NodeKeyChallenge key.ChallengePublic `json:"nodeKeyChallenge"`
}

// RegisterRequest is the body of POST /machine/register.
type RegisterRequest struct {
	Version          CapabilityVersion
	NodeKey          key.NodePublic
	OldNodeKey       key.NodePublic        // the key being replaced, or zero
	Auth             *RegisterResponseAuth `json:",omitempty"`
	Expiry           time.Time             // zero: control decides; in the past: log out
	Followup         string                // the AuthURL being waited for: the answer comes once it was visited
	Hostinfo         *Hostinfo
	Ephemeral        bool       `json:",omitempty"`
	NodeKeySignature []byte     `json:",omitempty"` // tailnet lock
	Timestamp        *time.Time `json:",omitempty"`
	Tailnet          string     `json:",omitempty"`
}

// RegisterResponseAuth carries the credential of a registration.
type RegisterResponseAuth struct {
	AuthKey string `json:",omitempty"`
}

// RegisterResponse answers a RegisterRequest.
type RegisterResponse struct {
	User              User
	Login             Login
	NodeKeyExpired    bool   // the node must register with a new node key
	MachineAuthorized bool   // false: an administrator has yet to approve the machine
	AuthURL           string // not empty: somebody must visit it; register again with it as Followup
	NodeKeySignature  []byte `json:",omitempty"`
	Error             string // not empty: refused, and these are the words for the user
}

// User is a user as the registration answer names them.
type User struct {
	ID            UserID
	DisplayName   string
	ProfilePicURL string    `json:",omitzero"`
	Created       time.Time `json:",omitzero"`
}

// Login is a user's login at an identity provider.
type Login struct {
	ID            LoginID
	Provider      string
	LoginName     string
	DisplayName   string
	ProfilePicURL string `json:",omitzero"`
}

// Hosts.

// Hostinfo is what a node tells of itself.
type Hostinfo struct {
	IPNVersion      string         `json:",omitzero"`
	BackendLogID    string         `json:",omitzero"`
	OS              string         `json:",omitzero"`
	OSVersion       string         `json:",omitzero"`
	Container       OptBool        `json:",omitzero"`
	Distro          string         `json:",omitzero"`
	DistroVersion   string         `json:",omitzero"`
	App             string         `json:",omitzero"`
	Package         string         `json:",omitzero"`
	Hostname        string         `json:",omitzero"`
	ShieldsUp       bool           `json:",omitzero"`
	ShareeNode      bool           `json:",omitzero"`
	NoLogsNoSupport bool           `json:",omitzero"`
	WireIngress     bool           `json:",omitzero"`
	IngressEnabled  bool           `json:",omitzero"`
	Machine         string         `json:",omitzero"`
	GoArch          string         `json:",omitzero"`
	GoVersion       string         `json:",omitzero"`
	RoutableIPs     []netip.Prefix `json:",omitempty"`
	RequestTags     []string       `json:",omitempty"`
	Services        []Service      `json:",omitempty"`
	NetInfo         *NetInfo       `json:",omitzero"`
	SSHHostKeys     []string       `json:"sshHostKeys,omitempty"`
	Userspace       OptBool        `json:",omitzero"`
	UserspaceRouter OptBool        `json:",omitzero"`
	AppConnector    OptBool        `json:",omitzero"`
	ServicesHash    string         `json:",omitzero"`
	PeerRelay       bool           `json:",omitzero"`
	StateEncrypted  OptBool        `json:",omitzero"`
	Location        *Location      `json:",omitzero"`
}

// Location is where a node says it is.
type Location struct {
	Country     string  `json:",omitempty"`
	CountryCode string  `json:",omitempty"`
	City        string  `json:",omitempty"`
	CityCode    string  `json:",omitempty"`
	Latitude    float64 `json:",omitempty"`
	Longitude   float64 `json:",omitempty"`
	Priority    int     `json:",omitempty"`
}

// Service is one service that a node advertises. Proto "peerapi4" and "peerapi6" give
// the port of its peer API.
type Service struct {
	Proto       string
	Port        uint16
	Description string `json:",omitempty"`
}

// NetInfo is what a node found out about its network.
type NetInfo struct {
	MappingVariesByDestIP OptBool            `json:",omitzero"`
	WorkingIPv6           OptBool            `json:",omitzero"`
	OSHasIPv6             OptBool            `json:",omitzero"`
	WorkingUDP            OptBool            `json:",omitzero"`
	WorkingICMPv4         OptBool            `json:",omitzero"`
	HavePortMap           bool               `json:",omitzero"`
	UPnP                  OptBool            `json:",omitzero"`
	PMP                   OptBool            `json:",omitzero"`
	PCP                   OptBool            `json:",omitzero"`
	PreferredDERP         int                `json:",omitzero"` // region ID of the home relay
	LinkType              string             `json:",omitzero"`
	DERPLatency           map[string]float64 `json:",omitempty"` // "REGION-v4" or "REGION-v6" to seconds
	FirewallMode          string             `json:",omitzero"`
}

// The map.

// MapRequest is the body of POST /machine/map.
type MapRequest struct {
	Version                 CapabilityVersion
	Compress                string `json:",omitzero"` // "zstd" or ""
	KeepAlive               bool   `json:",omitzero"`
	NodeKey                 key.NodePublic
	DiscoKey                key.DiscoPublic
	Stream                  bool             `json:",omitzero"`
	Hostinfo                *Hostinfo        // with Stream and a version of 68 or later the server ignores it
	MapSessionHandle        string           `json:",omitzero"`
	MapSessionSeq           int64            `json:",omitzero"`
	Endpoints               []netip.AddrPort `json:",omitempty"`
	EndpointTypes           []EndpointType   `json:",omitempty"`
	TKAHead                 string           `json:",omitzero"`
	ReadOnly                bool             `json:",omitzero"`
	OmitPeers               bool             `json:",omitzero"`
	DebugFlags              []string         `json:",omitempty"`
	ConnectionHandleForTest string           `json:",omitzero"`
}

// EndpointType says where an endpoint comes from.
type EndpointType int

// The endpoint types.
const (
	EndpointUnknown        EndpointType = 0
	EndpointLocal          EndpointType = 1
	EndpointSTUN           EndpointType = 2
	EndpointPortmapped     EndpointType = 3
	EndpointSTUN4LocalPort EndpointType = 4 // STUN address with the local port: hard NATs with a static mapping
	EndpointExplicitConf   EndpointType = 5
)

// MapResponse is one frame of the map stream. The first is whole; in the later ones a
// field's zero value means "unchanged" unless its comment says otherwise.
type MapResponse struct {
	MapSessionHandle  string            `json:",omitempty"`
	Seq               int64             `json:",omitempty"`
	KeepAlive         bool              `json:",omitempty"` // true: nothing but PingRequest, PopBrowserURL and ControlTime may be set
	PingRequest       *PingRequest      `json:",omitempty"`
	PopBrowserURL     string            `json:",omitempty"`
	Node              *Node             `json:",omitempty"`
	DERPMap           *DERPMap          `json:",omitempty"`
	Peers             []*Node           `json:",omitempty"` // the whole set, sorted by ID; the next three are deltas on it
	PeersChanged      []*Node           `json:",omitempty"`
	PeersRemoved      []NodeID          `json:",omitempty"`
	PeersChangedPatch []*PeerChange     `json:",omitempty"`
	PeerSeenChange    map[NodeID]bool   `json:",omitempty"` // true: seen now; false: LastSeen is to be cleared
	OnlineChange      map[NodeID]bool   `json:",omitempty"`
	DNSConfig         *DNSConfig        `json:",omitempty"`
	Domain            string            `json:",omitempty"`
	CollectServices   OptBool           `json:",omitempty"`
	PacketFilter      *[]FilterRule     `json:",omitempty"` // nil or absent: unchanged; empty: block all
	PacketFilters     PacketFilterDelta `json:",omitempty"`
	UserProfiles      []UserProfile     `json:",omitempty"` // added or changed; never the whole set
	Health            *[]string         `json:",omitempty"` // nil: unchanged; empty: healthy
	DisplayMessages   DisplayMessages   `json:",omitempty"`
	ControlTime       *time.Time        `json:",omitempty"`
	TKAInfo           *TKAInfo          `json:",omitempty"`
	Debug             *Debug            `json:",omitempty"`
	ControlDialPlan   *ControlDialPlan  `json:",omitempty"`
	ClientVersion     *ClientVersion    `json:",omitempty"`

	// EachPeer, if not nil, stands in the place of Peers where they are many: it decodes them one at a time and calls f with each, until
	// f or decoding fails. The node is good for the call only; its strings and capabilities stay.
	EachPeer func(f func(*Node) error) error `json:"-"`
}

// PacketFilterDelta holds named packet filters. A nil list removes the name; the name "*" with
// a nil list removes all names first, whatever else the delta holds.
type PacketFilterDelta map[string][]FilterRule

// DisplayMessages holds control's messages by ID. A nil message removes the ID; the ID "*"
// with nil removes all first.
type DisplayMessages map[string]*DisplayMessage

// DisplayMessage is a message from control to the user.
type DisplayMessage struct {
	Title               string
	Text                string
	Severity            string                       // "high", "medium" or "low"
	ImpactsConnectivity bool                         `json:",omitempty"`
	PrimaryAction       *struct{ URL, Label string } `json:",omitempty"`
}

// Node is a node of the tailnet as control describes it.
type Node struct {
	ID                            NodeID
	StableID                      StableNodeID
	Name                          string // fully qualified, with the trailing dot
	User                          UserID
	Sharer                        UserID `json:",omitzero"`
	Key                           key.NodePublic
	KeyExpiry                     time.Time         `json:",omitzero"` // zero: never
	KeySignature                  []byte            `json:",omitempty"`
	Machine                       key.MachinePublic `json:",omitzero"`
	DiscoKey                      key.DiscoPublic   `json:",omitzero"`
	Addresses                     []netip.Prefix
	AllowedIPs                    []netip.Prefix    `json:",omitzero"` // nil: the same as Addresses
	Endpoints                     []netip.AddrPort  `json:",omitempty"`
	LegacyDERPString              string            `json:"DERP,omitzero"` // "127.3.3.40:REGION"; HomeDERP supersedes it
	HomeDERP                      int               `json:",omitzero"`
	Hostinfo                      *Hostinfo         `json:",omitzero"`
	Created                       time.Time         `json:",omitzero"`
	Cap                           CapabilityVersion `json:",omitzero"`
	Tags                          []string          `json:",omitempty"`
	PrimaryRoutes                 []netip.Prefix    `json:",omitempty"`
	LastSeen                      *time.Time        `json:",omitempty"`
	Online                        *bool             `json:",omitempty"` // nil: unknown
	MachineAuthorized             bool              `json:",omitempty"`
	Capabilities                  []NodeCapability  `json:",omitempty"` // superseded by CapMap
	CapMap                        NodeCapMap        `json:",omitempty"`
	UnsignedPeerAPIOnly           bool              `json:",omitzero"`
	ComputedName                  string            `json:",omitzero"`
	ComputedNameWithHost          string            `json:",omitzero"`
	Expired                       bool              `json:",omitzero"`
	SelfNodeV4MasqAddrForThisPeer *netip.Addr       `json:",omitzero"`
	SelfNodeV6MasqAddrForThisPeer *netip.Addr       `json:",omitzero"`
	IsWireGuardOnly               bool              `json:",omitzero"`
	IsJailed                      bool              `json:",omitzero"`
}

// derpMagicIP is the address in a legacy DERP endpoint, whose port is the region.
var derpMagicIP = netip.AddrFrom4([4]byte{127, 3, 3, 40})

// DERPMagicIP is the address that stands for "by relay" where an IP address is wanted; the
// port beside it is the region ID.
func DERPMagicIP() netip.Addr { return derpMagicIP }

// HomeRegion returns the region of n's home relay from HomeDERP or, failing that, from the
// legacy form; 0 means unknown.
func (n *Node) HomeRegion() int {
	if n.HomeDERP != 0 {
		return n.HomeDERP
	}
	ap, err := netip.ParseAddrPort(n.LegacyDERPString)
	if err != nil || ap.Addr() != derpMagicIP {
		return 0
	}
	return int(ap.Port())
}

// PeerChange patches a peer that the node already knows. Zero means unchanged.
type PeerChange struct {
	NodeID       NodeID
	DERPRegion   int               `json:",omitzero"`
	Cap          CapabilityVersion `json:",omitzero"`
	CapMap       NodeCapMap        `json:",omitempty"`
	Endpoints    []netip.AddrPort  `json:",omitempty"`
	Key          *key.NodePublic   `json:",omitzero"`
	KeySignature []byte            `json:",omitempty"`
	DiscoKey     *key.DiscoPublic  `json:",omitzero"`
	Online       *bool             `json:",omitzero"`
	LastSeen     *time.Time        `json:",omitzero"`
	KeyExpiry    *time.Time        `json:",omitzero"`
}

// UserProfile is a user as other users see them.
type UserProfile struct {
	ID            UserID
	LoginName     string
	DisplayName   string
	ProfilePicURL string `json:",omitzero"`
}

// FilterRule allows what it matches. SrcIPs and NetPortRange.IP hold an address, a prefix, a
// range "a-b", or "*"; SrcIPs also "cap:NAME", which matches peers that have the node capability.
type FilterRule struct {
	SrcIPs   []string
	SrcBits  []int          `json:",omitempty"` // deprecated: prefix lengths beside SrcIPs
	DstPorts []NetPortRange `json:",omitempty"`
	IPProto  []int          `json:",omitempty"` // empty: TCP, UDP, ICMP and ICMPv6
	CapGrant []CapGrant     `json:",omitempty"` // grants capabilities; allows no packets
}

// FilterAllowAll is the rule set that lets everything in.
var FilterAllowAll = []FilterRule{{
	SrcIPs:   []string{"*"},
	DstPorts: []NetPortRange{{IP: "*", Ports: PortRange{0, 65535}}},
}}

// NetPortRange is a set of ports at a set of addresses.
type NetPortRange struct {
	IP    string
	Bits  *int `json:",omitempty"` // deprecated
	Ports PortRange
}

// PortRange is an inclusive range of ports.
type PortRange struct{ First, Last uint16 }

// Contains reports whether p is in the range.
func (r PortRange) Contains(p uint16) bool { return r.First <= p && p <= r.Last }

// CapGrant grants peer capabilities at destinations of the node.
type CapGrant struct {
	Dsts   []netip.Prefix
	Caps   []PeerCapability `json:",omitempty"` // superseded by CapMap
	CapMap PeerCapMap       `json:",omitempty"`
}

// DNSConfig is the tailnet's DNS.
type DNSConfig struct {
	Resolvers         []*Resolver            `json:",omitempty"`
	Routes            map[string][]*Resolver `json:",omitempty"` // suffix to resolvers; none: answered by MagicDNS
	FallbackResolvers []*Resolver            `json:",omitempty"`
	Domains           []string               `json:",omitempty"` // search domains, the tailnet's own first
	Proxied           bool                   `json:",omitzero"`  // MagicDNS is on
	Nameservers       []netip.Addr           `json:",omitempty"`
	CertDomains       []string               `json:",omitempty"`
	ExtraRecords      []DNSRecord            `json:",omitempty"`
}

// Resolver is a DNS server: an address, an address with port, or an https:// URL.
type Resolver struct {
	Addr                string       `json:",omitempty"`
	BootstrapResolution []netip.Addr `json:",omitempty"`
	UseWithExitNode     bool         `json:",omitempty"`
}

// DNSRecord is a record that MagicDNS answers beside the nodes' names. Type "" means A or
// AAAA after Value.
type DNSRecord struct {
	Name  string
	Type  string `json:",omitzero"`
	Value string
}

// PingRequest asks the node to prove that it is there: without Types by fetching URL, with
// Types by pinging IP in these ways and posting a PingResponse to URL.
type PingRequest struct {
	URL        string
	URLIsNoise bool       `json:",omitzero"`
	Log        bool       `json:",omitzero"`
	Types      string     `json:",omitzero"` // comma-separated: "TSMP", "ICMP", "disco", "peerapi", "c2n"
	IP         netip.Addr `json:",omitzero"`
	Payload    []byte     `json:",omitempty"` // for "c2n": an HTTP request
}

// PingResponse is what the node posts to PingRequest.URL.
type PingResponse struct {
	Type           string
	IP             string  `json:",omitempty"`
	NodeIP         string  `json:",omitempty"`
	NodeName       string  `json:",omitempty"`
	Err            string  `json:",omitempty"`
	LatencySeconds float64 `json:",omitempty"`
	Endpoint       string  `json:",omitempty"`
	PeerRelay      string  `json:",omitempty"`
	DERPRegionID   int     `json:",omitempty"`
	DERPRegionCode string  `json:",omitempty"`
	PeerAPIPort    uint16  `json:",omitempty"`
	IsLocalIP      bool    `json:",omitempty"`
}

// Debug is what remains of control's remote settings.
type Debug struct {
	SleepSeconds   float64 `json:",omitempty"`
	DisableLogTail bool    `json:",omitempty"`
	Exit           *int    `json:",omitempty"` // ignored: a library does not end its host
}

// ClientVersion says whether there is a newer client. This node only shows it.
type ClientVersion struct {
	RunningLatest        bool   `json:",omitempty"`
	LatestVersion        string `json:",omitempty"`
	UrgentSecurityUpdate bool   `json:",omitempty"`
	Notify               bool   `json:",omitempty"`
	NotifyURL            string `json:",omitempty"`
	NotifyText           string `json:",omitempty"`
}

// ControlDialPlan tells by which addresses to reach control next time.
type ControlDialPlan struct{ Candidates []ControlIPCandidate }

// ControlIPCandidate is one of them; a higher Priority is preferred.
type ControlIPCandidate struct {
	IP                netip.Addr `json:",omitzero"`
	ACEHost           string     `json:",omitempty"`
	DialStartDelaySec float64    `json:",omitempty"`
	DialTimeoutSec    float64    `json:",omitempty"`
	Priority          int        `json:",omitempty"`
}

// TKAInfo is control's view of tailnet lock.
type TKAInfo struct {
	Head     string `json:",omitempty"`
	Disabled bool   `json:",omitempty"`
}

// interface checks
var (
	_ json.Marshaler   = OptBool("")
	_ json.Unmarshaler = (*OptBool)(nil)
	_ json.Marshaler   = RawMessage("")
	_ json.Unmarshaler = (*RawMessage)(nil)
)
