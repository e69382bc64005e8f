package filter

import (
	"net/netip"
	"slices"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// Grants reports whether any rule grants the capability to anybody.
func (f *Filter) Grants(c tailcfg.PeerCapability) bool {
	return f != nil && slices.ContainsFunc(f.grants, func(r grantRule) bool {
		return slices.ContainsFunc(r, func(g grant) bool { return g.cap == c })
	})
}

// Granted reports whether the node at src has the capability at the address dst. It does not allocate.
func (f *Filter) Granted(src, dst netip.Addr, c tailcfg.PeerCapability) bool {
	if f == nil {
		return false
	}
	for i := f.grantSrc.Find(src); i >= 0; i = f.grantSrc.Parent(i) {
		for _, id := range f.grantIDs[f.grantSrc.Key(i)] {
			for _, g := range f.grants[id] {
				if g.cap == c && g.dst.Contains(dst) {
					return true
				}
			}
		}
	}
	return false
}
