package tailnode

import (
	"context"
	"encoding/json"
	"time"
)

// NetcheckOptions says how [LocalClient.Netcheck] is to look. The zero value is good.
type NetcheckOptions struct {
	Timeout   time.Duration // for answers; 0: three seconds
	NoPortMap bool          // do not ask the router whether it maps ports
}

// Netcheck finds out what the network is like that the node is in, over the node's own sockets: UDP, addresses as seen from outside,
// whether a NAT's mapping varies, hairpin, port mapping protocols, captive portals, and how far the relays are. It returns JSON in the form of
// upstream's "netcheck --format=json", where durations are nanoseconds and null is what is not known. It starts the server if need be, waits for
// the map of relays, and ends with ctx.
func (c *LocalClient) Netcheck(ctx context.Context, o NetcheckOptions) (json.RawMessage, error) {
	n, err := c.s.start("netcheck")
	if err != nil {
		return nil, err
	}
	r, err := n.Netcheck(ctx, o.Timeout, !o.NoPortMap)
	if err != nil {
		return nil, opError("netcheck", err)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, opError("netcheck", err)
	}
	return b, nil
}

// DERPMap returns the map of relays that control gave the node, as JSON in the form of upstream's
// tailcfg.DERPMap. It starts the server if need be, and waits for the map, at most as long as ctx.
func (c *LocalClient) DERPMap(ctx context.Context) (json.RawMessage, error) {
	n, err := c.s.start("DERP map")
	if err != nil {
		return nil, err
	}
	st, err := n.AwaitDERPMap(ctx)
	if err != nil {
		return nil, opError("DERP map", err)
	}
	b, err := json.Marshal(st.Netmap.DERPMap)
	if err != nil {
		return nil, opError("DERP map", err)
	}
	return b, nil
}
