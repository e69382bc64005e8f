package tailnode

import (
	"context"
	"encoding/json"

	"github.com/tailnode/tailnode/internal/node"
)

// DERPMap returns the map of relays that control gave the node, as JSON in the form of upstream's
// tailcfg.DERPMap. It starts the server if need be, and waits for the map, at most as long as ctx.
func (c *LocalClient) DERPMap(ctx context.Context) (json.RawMessage, error) {
	n, err := c.s.start("DERP map")
	if err != nil {
		return nil, err
	}
	have := func(st node.Status) (bool, error) { return st.Netmap != nil && st.Netmap.DERPMap != nil, nil }
	st, err := n.Await(ctx, have)
	if err != nil {
		return nil, opError("DERP map", err)
	}
	b, err := json.Marshal(st.Netmap.DERPMap)
	if err != nil {
		return nil, opError("DERP map", err)
	}
	return b, nil
}
