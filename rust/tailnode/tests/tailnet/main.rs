//! End to end, on a tailnet of this program's own: Rust to Rust, to our node in Go, and to upstream's.
//!
//! `TAILNODE_TEST_MODE=isolated` runs it all with the nodes in helper processes.

mod blocking;
mod cancel;
mod common;
mod host;
mod sockets;
mod upstream;
mod web;
