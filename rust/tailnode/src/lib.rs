//! A node of a tailnet inside a program, with the types of `tokio::net`: the process joins a Tailscale-compatible tailnet, gets its addresses and
//! its name, and then listens and dials. No daemon, no root.
//!
//! ```no_run
//! use tokio::io::AsyncWriteExt;
//!
//! # async fn f() -> std::io::Result<()> {
//! // The auth key comes from $TS_AUTHKEY, the control server from $TS_CONTROL_URL, if they are set.
//! let node = tailnode::Node::builder().hostname("hello").up().await?;
//! let listener = node.listen(":80").await?;
//! loop {
//!     let (mut stream, peer) = listener.accept().await?;
//!     let who = node.whois(peer).await?;
//!     tokio::spawn(async move {
//!         let name = who.user_profile.login_name;
//!         let _ = stream.write_all(format!("hello, {name}\n").as_bytes()).await;
//!     });
//! }
//! # }
//! ```
//!
//! # What it costs
//!
//! The node is written in Go. It runs in this process ([the default](Builder)), or in a helper process ([`Builder::isolated`]), and the two speak over
//! sockets in either case. Accepting, reading and writing are system calls on ordinary descriptors, which Tokio's reactor watches: they enter neither Go nor
//! C. Calls that wait ([`Node::dial`], [`Node::up`], ...) wait by descriptor as well, and are cancelled by dropping
//! their future. Nothing uses Tokio's blocking pool, and no `Drop` waits.
//!
//! # HTTP and gRPC
//!
//! With the feature `axum08` a [`TcpListener`] is what `axum::serve` takes; with `hyper1` there is a connector for hyper's and tonic's clients; with `tonic014`
//! tonic's server takes [`TcpListener::into_incoming`]. The crate's examples show each.
//!
//! # Errors
//!
//! Calls on a [`Node`] give an [`Error`], whose [`ErrorKind`] has the codes of the C library; sockets give [`std::io::Error`], as in `tokio::net`.
//! The former turns into the latter by `?`.
//!
//! # Fork
//!
//! In the child of a fork without exec every call gives [`ErrorKind::Forked`]. `std::process::Command` is safe at any time.
#![warn(rustdoc::broken_intra_doc_links)]

pub mod blocking;
mod error;
#[cfg(any(feature = "axum08", feature = "hyper1", feature = "tonic014"))]
pub mod http;
pub mod net;
mod node;
mod op;
pub mod runtime;
mod types;
mod watch;

pub use error::{Error, ErrorKind, Result};
pub use net::{TcpListener, TcpStream, UdpSocket};
pub use node::{Builder, LogLevel, Node};
pub use types::{CapMap, Hostinfo, Loopback, NodeInfo, PeerStatus, PingResult, PingType, Status, TailnetStatus, UserProfile, WhoIs};
pub use watch::{Event, State, Watch};
