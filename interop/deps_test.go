package interop

import (
	_ "github.com/tailnode/tailnode/internal/key"
	_ "go.uber.org/goleak"
	_ "golang.zx2c4.com/wireguard/device"
	_ "tailscale.com/derp/derphttp"
	_ "tailscale.com/derp/derpserver"
	_ "tailscale.com/net/stun/stuntest"
	_ "tailscale.com/tsnet"
	_ "tailscale.com/tstest/integration/testcontrol"
)
