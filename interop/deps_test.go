package interop

import (
	_ "golang.zx2c4.com/wireguard/device"
	_ "tailscale.com/derp/derphttp"
	_ "tailscale.com/derp/derpserver"
	_ "tailscale.com/net/stun/stuntest"
	_ "tailscale.com/tsnet"
	_ "tailscale.com/tstest/integration/testcontrol"
	_ "github.com/tailnode/tailnode/internal/key"
	_ "go.uber.org/goleak"
)
