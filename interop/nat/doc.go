// Package nat runs our node and upstream's tsnet in real network namespaces, behind routers that translate and filter
// with nftables, and says which path each pair finds, how soon, and what a transfer suffers when the path is cut, rebound or moved.
// It needs Linux, root, ip and nft, and skips without them. All traffic stays inside the namespaces.
package nat
