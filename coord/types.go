package coord

import (
	"encoding/json"
	"errors"
	"net/netip"
	"time"
)

// Errors that the methods of [Server] and [Admin] wrap; find them with errors.Is.
var (
	ErrNotFound   = errors.New("not found")
	ErrExists     = errors.New("already exists")
	ErrInvalid    = errors.New("invalid argument")
	ErrNotAllowed = errors.New("not allowed") // also what a relay's admission gets
	ErrClosed     = errors.New("server is not running")
)

// DefaultUser is the user that exists from the start. Auth keys and logins that name no user are its.
const DefaultUser = "default"

// TaggedUser owns the nodes that have tags; a tagged node belongs to nobody in particular.
const TaggedUser = "tagged-devices"

// AuthKeyOptions says what an auth key is good for. The zero value is a key of the default
// user that admits one node and expires in 90 days.
type AuthKeyOptions struct {
	User          string        // "" = [DefaultUser]
	Reusable      bool          // admits any number of nodes
	Ephemeral     bool          // its nodes are removed soon after they go away
	Preauthorized bool          // its nodes need no approval where [Server.RequireMachineApproval] asks for it
	Tags          []string      // "tag:name"; its nodes have these tags, no user and no key expiry
	Expiry        time.Duration // how long the key may be used; 0 = 90 days
	Description   string
}

// AuthKey is what the server remembers of an auth key. The secret is not part of it.
type AuthKey struct {
	ID            string
	User          string
	Reusable      bool     `json:",omitempty"`
	Ephemeral     bool     `json:",omitempty"`
	Preauthorized bool     `json:",omitempty"`
	Tags          []string `json:",omitempty"`
	Description   string   `json:",omitempty"`
	Created       time.Time
	Expires       time.Time
	Uses          int       // registrations that it allowed
	LastUsed      time.Time `json:",omitzero"`
	Revoked       bool      `json:",omitempty"`
}

// User is a person, or whatever stands for one, to whom nodes belong.
type User struct {
	Name        string // the login name, as peers see it
	DisplayName string
	Created     time.Time
}

// Node is a node of the tailnet, as of the call that returned it.
type Node struct {
	ID         string // stable; what the methods take. They also take the name.
	Name       string // the label: "web" of "web.tailnode.internal."
	FQDN       string // with the trailing dot
	User       string
	Tags       []string `json:",omitempty"`
	Addrs      []netip.Addr
	Key        string // "nodekey:…"
	MachineKey string // "mkey:…"
	Online     bool
	LastSeen   time.Time `json:",omitzero"` // when its map stream last ended; zero while it is online or never was
	Created    time.Time
	Expiry     time.Time `json:",omitzero"` // of the node key; zero = never
	Expired    bool      `json:",omitempty"`
	Ephemeral  bool      `json:",omitempty"`
	Approved   bool
	Hostname   string           `json:",omitempty"` // as the node gives it
	OS         string           `json:",omitempty"`
	Version    string           `json:",omitempty"`
	CapVersion int              `json:",omitempty"`
	HomeRegion int              `json:",omitempty"`
	Endpoints  []netip.AddrPort `json:",omitempty"`
}

// Login is an interactive login that waits for approval.
type Login struct {
	ID          string // the last part of the URL that the node shows
	URL         string
	Hostname    string
	OS          string
	MachineKey  string
	NodeKey     string
	RequestTags []string `json:",omitempty"`
	Ephemeral   bool     `json:",omitempty"`
	Created     time.Time
	Expires     time.Time
}

// ApproveOptions completes a login.
type ApproveOptions struct {
	User string   // "" = [DefaultUser]
	Tags []string // the node gets these tags instead of a user; nil = those it asked for
}

// Region is a place with one or more relays, in the order in which nodes try them.
type Region struct {
	ID    int    // 1 to 65535
	Code  string // short: "ams"
	Name  string // for people: "Amsterdam"
	Nodes []Relay

	// NoHome keeps nodes from choosing the region as their home.
	NoHome bool `json:",omitempty"`
}

// Relay is one relay of a [Region].
type Relay struct {
	Name     string // unique: "1a"
	HostName string
	IPv4     string `json:",omitempty"` // "" = resolve HostName; "none" = not over IPv4
	IPv6     string `json:",omitempty"`
	DERPPort int    `json:",omitempty"` // 0 = 443
	STUNPort int    `json:",omitempty"` // 0 = 3478, -1 = none
	STUNOnly bool   `json:",omitempty"`
	// CertName is the name in the relay's certificate if it is not HostName, or with the prefix
	// "sha256-raw:" the hex SHA-256 of the certificate itself.
	CertName string `json:",omitempty"`
	// InsecureForTests makes nodes accept any certificate, and plain HTTP.
	InsecureForTests bool   `json:",omitempty"`
	CanPort80        bool   `json:",omitempty"`
	STUNTestIP       string `json:",omitempty"`
}

// Filter is what the nodes let in. A nil *Filter lets everything in from every node of the tailnet.
type Filter struct {
	Rules  []FilterRule `json:",omitempty"` // empty: nothing comes in
	Grants []Grant      `json:",omitempty"`
}

// FilterRule allows packets.
type FilterRule struct {
	Src   []string // addresses, prefixes, ranges "a-b", or "*"
	Dst   []string // the same
	Ports []string // "80", "8000-8999" or "*"; empty = all
	Proto []string // "tcp", "udp", "icmp", "icmpv6", "sctp" or a number; empty = tcp, udp, icmp and icmpv6
}

// CapRelay is the capability to use a node as a peer relay: a grant of it lets the nodes of Src use the relays among
// the nodes of Dst. Sources that are ranges are not possible for it.
const CapRelay = "tailscale.com/cap/relay"

// Grant gives peers capabilities, which applications read with WhoIs. It allows no packets. [CapRelay] is one that
// nodes themselves read.
type Grant struct {
	Src  []string // as in [FilterRule]
	Dst  []string // addresses, prefixes or "*"
	Caps map[string][]json.RawMessage
}

// Message is a notice that nodes show to their users.
type Message struct {
	ID       string
	Title    string
	Text     string
	Severity string // "high", "medium" or "low"
}

// PingResult is a node's answer to [Server.Ping].
type PingResult struct {
	Type      string        `json:",omitempty"`
	RTT       time.Duration // for the empty kind: until the server had the answer; else as the node measured it
	Err       string        `json:",omitempty"`
	Endpoint  string        `json:",omitempty"`
	RegionID  int           `json:",omitempty"`
	NodeName  string        `json:",omitempty"`
	NodeIP    string        `json:",omitempty"`
	IsLocalIP bool          `json:",omitempty"`
}
