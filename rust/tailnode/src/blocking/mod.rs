//! The same for threads that may be blocked, with the types of `std::net`: no Tokio runtime is needed.
//!
//! ```no_run
//! use std::io::Write;
//!
//! # fn f() -> std::io::Result<()> {
//! let node = tailnode::Node::builder().hostname("hello").up_blocking()?;
//! for stream in node.listen(":80")?.incoming() {
//!     let mut stream = stream?;
//!     let who = node.whois(stream.peer_addr()?)?;
//!     writeln!(stream, "hello, {}", who.user_profile.login_name)?;
//! }
//! # Ok(()) }
//! ```
//!
//! Every call that waits ends with [`ErrorKind::Closed`](crate::ErrorKind::Closed) when another thread closes the node. Sockets turn into those for Tokio, and
//! back, with their `from_std` and `into_std`.

mod net;

use std::fmt::{self, Display};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

pub use net::{Incoming, TcpListener, TcpStream, UdpSocket};

use crate::error::Result;
use crate::net::sock;
use crate::node::{address, both_addresses, Builder};
use crate::types::{Loopback, PingResult, PingType, Status, WhoIs};
use crate::watch::{event, Event, EMPTY};
use crate::{op, runtime};

/// A node of a tailnet in this program, for threads that may be blocked. It comes from [`Builder::up_blocking`].
///
/// A clone is another handle to the same node. It turns into a [`tailnode::Node`](crate::Node) and back by `into`.
#[derive(Clone)]
pub struct Node(crate::Node);

impl From<crate::Node> for Node {
    fn from(n: crate::Node) -> Node {
        Node(n)
    }
}

impl From<Node> for crate::Node {
    fn from(n: Node) -> crate::Node {
        n.0
    }
}

impl Node {
    /// What a node is to be.
    pub fn builder() -> Builder {
        crate::Node::builder()
    }

    /// Waits until the node is on the tailnet, at most `limit`. A time-out does not stop the node.
    ///
    /// # Errors
    ///
    /// As [`Builder::up`].
    pub fn up(&self, limit: Option<Duration>) -> Result<()> {
        op::run_blocking(self.0.calls().up(limit)).map(drop)
    }

    /// Takes the node off the tailnet and waits until nothing of it runs any more. Its waiting calls, its listeners and its connections end.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) if it was closed before; what went wrong while closing.
    pub fn close(&self) -> Result<()> {
        op::run_blocking(self.0.calls().close()).map(drop)
    }

    /// The node's state and, if `peers`, all of its peers.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::status`](crate::Node::status).
    pub fn status(&self, peers: bool) -> Result<Status> {
        op::run_blocking(self.0.calls().status(peers))?.json()
    }

    /// The node's addresses on the tailnet; `None` before it has any.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::addresses`](crate::Node::addresses).
    pub fn addresses(&self) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>)> {
        Ok(both_addresses(&op::run_blocking(self.0.calls().addresses())?))
    }

    /// Who has an address: an `IpAddr`, or the `SocketAddr` of a connection's peer.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::whois`](crate::Node::whois).
    pub fn whois(&self, addr: impl Display) -> Result<WhoIs> {
        op::run_blocking(self.0.calls().whois(addr)?)?.json()
    }

    /// Pings the node that has an address, and waits for its answer at most `limit`.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::ping`](crate::Node::ping), and [`ErrorKind::Timeout`](crate::ErrorKind::Timeout).
    pub fn ping(&self, ip: IpAddr, kind: PingType, limit: Option<Duration>) -> Result<PingResult> {
        op::run_blocking(self.0.calls().ping(ip, kind, limit)?)?.json()
    }

    /// Listens for TCP connections on an address such as `":80"`, or a `SocketAddr`; port 0 chooses one.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::listen`](crate::Node::listen).
    pub fn listen(&self, addr: impl Display) -> Result<TcpListener> {
        let mut got = op::run_blocking(self.0.calls().listen(addr, 0)?)?;
        Ok(TcpListener::new(got.fd()?, address(got.local)?, false))
    }

    /// Connects to `host:port` on the tailnet. It waits as long as it takes.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::dial`](crate::Node::dial).
    pub fn dial(&self, addr: impl Display) -> Result<TcpStream> {
        self.dial_within(addr, None)
    }

    /// Connects to `host:port` on the tailnet within a time.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::dial`](crate::Node::dial), and [`ErrorKind::Timeout`](crate::ErrorKind::Timeout).
    pub fn dial_timeout(&self, addr: impl Display, limit: Duration) -> Result<TcpStream> {
        self.dial_within(addr, Some(limit))
    }

    fn dial_within(&self, addr: impl Display, limit: Option<Duration>) -> Result<TcpStream> {
        let mut got = op::run_blocking(self.0.calls().dial(c"tcp", addr, 0, limit)?)?;
        Ok(TcpStream::new(got.fd()?, address(got.local)?, address(got.remote)?))
    }

    /// A UDP socket on an address such as `":53"`, or a `SocketAddr`, for datagrams from and to any peer.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::listen_udp`](crate::Node::listen_udp).
    pub fn listen_udp(&self, addr: impl Display) -> Result<UdpSocket> {
        let mut got = op::run_blocking(self.0.calls().listen_udp(addr, 0)?)?;
        Ok(UdpSocket::new(got.fd()?, address(got.local)?, None))
    }

    /// A UDP socket that is connected to `host:port` on the tailnet.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::dial`](crate::Node::dial).
    pub fn dial_udp(&self, addr: impl Display) -> Result<UdpSocket> {
        let mut got = op::run_blocking(self.0.calls().dial(c"udp", addr, 0, None)?)?;
        Ok(UdpSocket::new(got.fd()?, address(got.local)?, Some(address(got.remote)?)))
    }

    /// Serves SOCKS5 into the tailnet, and the LocalAPI's status, whois and ping, on a TCP port of this machine's loopback interface.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::loopback`](crate::Node::loopback).
    pub fn loopback(&self) -> Result<Loopback> {
        Loopback::from_c(&op::run_blocking(self.0.calls().loopback())?.data)
    }

    /// The changes of the node's state and netmap, from its present state on. It starts the node if need be.
    ///
    /// # Errors
    ///
    /// As [`tailnode::Node::watch`](crate::Node::watch).
    pub fn watch(&self) -> Result<Watch> {
        Ok(Watch(op::run_blocking(self.0.calls().watch(0))?.fd()?))
    }

    /// What the Go runtime that runs the node uses now.
    ///
    /// # Errors
    ///
    /// As [`runtime::stats`].
    pub fn runtime_stats(&self) -> Result<runtime::Stats> {
        Ok(runtime::Stats::from_c(&op::run_blocking(runtime::start_stats(&self.0))?.data))
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The changes of a node, from [`Node::watch`]. The iterator waits for the next one, and ends when the node is closed; who is slow misses
/// intermediate states, never the last. It does not keep its node alive.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Iterator for Watch {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        let mut buf = EMPTY;
        loop {
            let got = sock::recv(&self.0, &mut buf, 0);
            if got.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::Interrupted) {
                continue;
            }
            if let Some(result) = event(got, &buf) {
                return result.transpose();
            } // else of a kind that is newer than this crate
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
