package coord

import (
	"net/netip"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// The records as they lie in the database.

// metaKeys of the Meta bucket.
const (
	metaServer = "server"
	metaFilter = "filter"
)

type serverRec struct {
	Key      key.MachinePrivate // the Noise key by which nodes know this server
	Created  time.Time
	NextNode tailcfg.NodeID // IDs are never given out twice
	NextUser tailcfg.UserID
	LastIPv4 netip.Addr // allocation goes on after it
}

type userRec struct {
	ID          tailcfg.UserID
	Name        string
	DisplayName string
	Created     time.Time
}

type authKeyRec struct {
	AuthKey
	UserID tailcfg.UserID
	Hash   []byte // SHA-256 of the whole key
}

type nodeRec struct {
	ID        tailcfg.NodeID
	Stable    tailcfg.StableNodeID
	Machine   key.MachinePublic
	Key       key.NodePublic
	Name      string
	FixedName bool `json:",omitempty"` // set by an administrator: does not follow the host name
	User      tailcfg.UserID
	Tags      []string `json:",omitempty"`
	IPv4      netip.Addr
	IPv6      netip.Addr
	Created   time.Time
	KeyExpiry time.Time          `json:",omitzero"`
	Ephemeral bool               `json:",omitempty"`
	Approved  bool               `json:",omitempty"`
	AuthKey   string             `json:",omitempty"` // ID of the one that admitted it
	Filter    *Filter            `json:",omitempty"`
	Caps      tailcfg.NodeCapMap `json:",omitempty"`
}

// liveRec is what the node last reported.
type liveRec struct {
	Cap       tailcfg.CapabilityVersion
	Hostinfo  *tailcfg.Hostinfo // never changed in place
	Disco     key.DiscoPublic
	Endpoints []netip.AddrPort
	HomeDERP  int
	LastSeen  time.Time `json:",omitzero"`
}
