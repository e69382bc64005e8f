// Package interop proves tailnode against what it must be compatible with: Tailscale's own
// client, coordination test server and relay, and wireguard-go. It is a module of its own so
// that those packages stay out of everything that a user links.
package interop
