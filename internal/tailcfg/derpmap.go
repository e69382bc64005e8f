package tailcfg

import "net/netip"

// DERPMap lists the relays of the tailnet.
type DERPMap struct {
	HomeParams         *DERPHomeParams     `json:",omitempty"`
	Regions            map[int]*DERPRegion // in a delta: nil removes, absent leaves
	OmitDefaultRegions bool                `json:"omitDefaultRegions,omitempty"`
}

// DERPHomeParams steers the choice of the home region.
type DERPHomeParams struct {
	RegionScore map[int]float64 `json:",omitempty"` // factor on the measured latency; 0 means none
}

// DERPRegion is a place with one or more relays, in the order to try them.
type DERPRegion struct {
	RegionID        int
	RegionCode      string
	RegionName      string
	Latitude        float64 `json:",omitempty"`
	Longitude       float64 `json:",omitempty"`
	Avoid           bool    `json:",omitempty"` // deprecated
	NoMeasureNoHome bool    `json:",omitempty"` // neither probe it nor make it home; use it to reach peers
	Nodes           []*DERPNode
}

// DERPNode is one relay.
type DERPNode struct {
	Name     string
	RegionID int
	HostName string
	// CertName is the name expected in the certificate if not HostName. With the prefix
	// "sha256-raw:" it is the hex SHA-256 of the DER certificate itself.
	CertName string `json:",omitempty"`
	IPv4     string `json:",omitempty"` // address to dial; "none" disables the family
	IPv6     string `json:",omitempty"`
	STUNPort int    `json:",omitempty"` // 0: 3478; -1: no STUN
	STUNOnly bool   `json:",omitempty"`
	DERPPort int    `json:",omitempty"` // 0: 443
	// InsecureForTests turns certificate verification off. Only tests set it.
	InsecureForTests bool   `json:",omitempty"`
	STUNTestIP       string `json:",omitempty"`
	CanPort80        bool   `json:",omitempty"`
}

// DERPAdmitClientRequest asks an admission hook whether a relay may serve a client.
type DERPAdmitClientRequest struct {
	NodePublic string // text form
	Source     netip.Addr
}

// DERPAdmitClientResponse answers it.
type DERPAdmitClientResponse struct{ Allow bool }
