package tailnode

import (
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// The identifiers and capability types of a tailnet, as control gives them.
type (
	// NodePublic is a node's public key. Its text form is "nodekey:" and 64 hex digits.
	NodePublic = key.NodePublic
	// StableNodeID identifies a node for good.
	StableNodeID = tailcfg.StableNodeID
	// NodeID identifies a node within its control server.
	NodeID = tailcfg.NodeID
	// UserID identifies a user within its control server.
	UserID = tailcfg.UserID
	// NodeCapability names something a node is allowed or told to do.
	NodeCapability = tailcfg.NodeCapability
	// NodeCapMap holds node capabilities with their arguments.
	NodeCapMap = tailcfg.NodeCapMap
	// PeerCapability names something a peer is granted.
	PeerCapability = tailcfg.PeerCapability
	// PeerCapMap holds peer capabilities with their arguments, each a JSON text.
	PeerCapMap = tailcfg.PeerCapMap
	// RawMessage is a JSON value as text.
	RawMessage = tailcfg.RawMessage
	// PingType is a kind of ping.
	PingType string
)

// The kinds of ping.
const (
	// PingDisco asks the peer's path manager; the answer tells the path.
	PingDisco PingType = "disco"
	// PingTSMP asks the peer's node through WireGuard, below its IP stack.
	PingTSMP PingType = "TSMP"
	// PingICMP is an echo request to the peer's IP stack; the peer's access rules apply.
	PingICMP PingType = "ICMP"
)

// Status is the state of a [Server] and of the tailnet as it sees it. A Status is a copy: the
// caller may keep and change it. Its JSON form is that of upstream's status.
type Status struct {
	Version        string         // of this library
	TUN            bool           // false: there is no interface, only this process
	BackendState   string         // "NoState", "NeedsLogin", "NeedsMachineAuth", "Starting", "Running" or "Stopped"
	HaveNodeKey    bool           `json:",omitempty"`
	AuthURL        string         // to be visited by somebody to let the node in; empty otherwise
	TailscaleIPs   []netip.Addr   // of this node
	Self           *PeerStatus    // this node
	Health         []string       // what is wrong right now; empty if nothing is
	MagicDNSSuffix string         // such as "example.ts.net"
	CurrentTailnet *TailnetStatus // nil before the first netmap
	CertDomains    []string       // names for which control would help to get certificates
	Peer           map[NodePublic]*PeerStatus
	User           map[UserID]UserProfile
}

// TailnetStatus names the tailnet.
type TailnetStatus struct {
	Name            string
	MagicDNSSuffix  string
	MagicDNSEnabled bool
}

// PeerStatus is one node of the tailnet as this node sees it.
type PeerStatus struct {
	ID             StableNodeID
	NodeID         NodeID
	PublicKey      NodePublic
	HostName       string // what the host calls itself; not unique
	DNSName        string // MagicDNS name with the trailing dot
	OS             string
	UserID         UserID
	TailscaleIPs   []netip.Addr
	AllowedIPs     []netip.Prefix `json:",omitempty"`
	Tags           []string       `json:",omitempty"`
	PrimaryRoutes  []netip.Prefix `json:",omitempty"`
	Addrs          []string       // endpoints that the peer may be reached at
	CurAddr        string         // the endpoint in use; empty: by relay
	PeerRelay      string         // the peer relay in use, as "address:port:vni:number"; empty: none
	Relay          string         // code of the peer's home relay region
	RxBytes        int64          // of WireGuard messages from the peer
	TxBytes        int64          // of WireGuard messages to the peer
	Created        time.Time      // when the node joined
	LastSeen       time.Time      // when control last saw it; zero while it is online
	LastHandshake  time.Time      // of WireGuard with it; zero: none
	Online         bool           // connected to control
	ExitNode       bool
	ExitNodeOption bool       // it offers to be an exit node
	Active         bool       // there is a WireGuard session with it
	PeerAPIURL     []string   `json:",omitempty"`
	CapMap         NodeCapMap `json:",omitempty"`
	ShareeNode     bool       `json:",omitempty"`
	InNetworkMap   bool
	InMagicSock    bool       // the path manager knows it
	InEngine       bool       // WireGuard knows it: it has sent or was sent to
	Expired        bool       `json:",omitempty"`
	KeyExpiry      *time.Time `json:",omitempty"` // nil: never

	// Path says more of the way to a peer that has sent or been sent to, nil for others. It has
	// no counterpart upstream.
	Path *PathStatus `json:",omitempty"`
}

// PathStatus is the way that packets take to a peer.
type PathStatus struct {
	Endpoint     string        `json:",omitempty"` // address and port of a direct path; empty: by relay
	PeerRelay    string        `json:",omitempty"` // of a path by peer relay, as "address:port:vni:number"
	Region       string        `json:",omitempty"` // code of the relay region, of a path by relay
	RoundTrip    time.Duration // to the peer's path manager, last measured; 0: not yet
	Since        time.Time     `json:",omitzero"`  // when this path was taken into use
	WhyNotDirect string        `json:",omitempty"` // of a path by relay, of either kind
}

// IsTagged reports whether the node is owned by tags and not by a user.
func (p *PeerStatus) IsTagged() bool { return len(p.Tags) > 0 }

// HasCap reports whether the node has the capability.
func (p *PeerStatus) HasCap(c NodeCapability) bool { _, ok := p.CapMap[c]; return ok }

// Peers returns the keys of all peers in the order of their bytes.
func (s *Status) Peers() []NodePublic {
	ks := make([]NodePublic, 0, len(s.Peer))
	for k := range s.Peer {
		ks = append(ks, k)
	}
	sortKeys(ks)
	return ks
}

// PingResult is the answer to a ping.
type PingResult struct {
	IP             string  // the address that was pinged
	NodeIP         string  // the address of the node that has it: another one for a subnet route
	NodeName       string  // MagicDNS name without the domain
	Err            string  // not empty: what went wrong
	LatencySeconds float64 // round trip
	Endpoint       string  // the answer came directly from this address and port
	PeerRelay      string  // the answer came by this peer relay, as "address:port:vni:number"
	DERPRegionID   int     // the answer came by this relay region
	DERPRegionCode string  // its code
	PeerAPIPort    uint16  `json:",omitempty"`
	IsLocalIP      bool    `json:",omitempty"` // the address is this node's own
}

// WhoIsResponse says who an address belongs to.
type WhoIsResponse struct {
	Node        *Node
	UserProfile *UserProfile // for a tagged node, one that stands for its tags
	CapMap      PeerCapMap   // what the tailnet's policy grants the peer at this node
}

// Node is a node of the tailnet.
type Node struct {
	ID                NodeID
	StableID          StableNodeID
	Name              string // MagicDNS name with the trailing dot
	ComputedName      string // MagicDNS name without the domain
	User              UserID
	Key               NodePublic
	KeyExpiry         time.Time `json:",omitzero"` // zero: never
	Addresses         []netip.Prefix
	AllowedIPs        []netip.Prefix
	Hostinfo          Hostinfo
	Created           time.Time  `json:",omitzero"`
	Tags              []string   `json:",omitempty"`
	Online            *bool      `json:",omitempty"` // nil: unknown
	LastSeen          *time.Time `json:",omitempty"`
	MachineAuthorized bool       `json:",omitempty"`
	CapMap            NodeCapMap `json:",omitempty"`
	Expired           bool       `json:",omitempty"`
}

// IsTagged reports whether the node is owned by tags and not by a user.
func (n *Node) IsTagged() bool { return len(n.Tags) > 0 }

// Hostinfo is what a node tells of its host.
type Hostinfo struct {
	Hostname string `json:",omitempty"`
	OS       string `json:",omitempty"`
	App      string `json:",omitempty"`
}

// UserProfile is a user of the tailnet.
type UserProfile struct {
	ID            UserID
	LoginName     string // such as "alice@example.com"
	DisplayName   string
	ProfilePicURL string `json:",omitempty"`
}
