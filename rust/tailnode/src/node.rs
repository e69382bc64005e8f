use std::ffi::{c_int, CStr, CString};
use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tailnode_sys as sys;

use crate::error::{Error, ErrorKind, Result};
use crate::net::{TcpListener, TcpStream, UdpSocket};
use crate::op::{self, c_string, Op, Outcome};
use crate::types::{Loopback, PingResult, PingType, Status, WhoIs};
use crate::watch::Watch;

/// The least severe lines that a node logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Everything.
    Debug,
    /// What happens in the normal course.
    Info,
    /// What may need attention.
    Warn,
    /// What failed.
    Error,
}

/// What a node is to be. It comes from [`Node::builder`].
#[must_use = "a builder does nothing until `up` or `start`"]
pub struct Builder {
    text: [Option<Vec<u8>>; 7],
    mode: u32,
    flags: u32,
    port: u16,
    log: Option<(OwnedFd, LogLevel)>,
    memory_limit: i64,
    gc_percent: i32,
    max_procs: i32,
    up_timeout: Option<Duration>,
}

const DIR: usize = 0;
const HOSTNAME: usize = 1;
const AUTH_KEY: usize = 2;
const CONTROL_URL: usize = 3;
const TAGS: usize = 4;
const ROOT_CA_PEM: usize = 5;
const HELPER: usize = 6;
const TEXT_NAMES: [&str; 7] = ["dir", "hostname", "auth_key", "control_url", "tags", "root_ca_pem", "helper"];

impl Builder {
    fn text(mut self, which: usize, value: impl Into<Vec<u8>>) -> Builder {
        self.text[which] = Some(value.into());
        self
    }

    fn flag(mut self, flag: u32, on: bool) -> Builder {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
        self
    }

    /// The directory of the state, made if need be (0700) and locked. Default: `tailnode-PROGRAM` in the user's configuration.
    pub fn dir(self, dir: impl AsRef<Path>) -> Builder {
        self.text(DIR, dir.as_ref().as_os_str().as_bytes())
    }

    /// Keeps the state in memory: the node is a new one in every process.
    pub fn state_in_memory(self) -> Builder {
        self.flag(sys::TAILNODE_STATE_MEMORY, true)
    }

    /// The name to ask for. Default: the program's.
    pub fn hostname(self, name: impl Into<String>) -> Builder {
        self.text(HOSTNAME, name.into())
    }

    /// The auth key. Default: `$TS_AUTHKEY`, `$TS_AUTH_KEY`, then interactive login.
    pub fn auth_key(self, key: impl Into<String>) -> Builder {
        self.text(AUTH_KEY, key.into())
    }

    /// The control server. Default: `$TS_CONTROL_URL`, then Tailscale's.
    pub fn control_url(self, url: impl Into<String>) -> Builder {
        self.text(CONTROL_URL, url.into())
    }

    /// The tags to ask for, such as `tag:web`.
    pub fn tags<S: AsRef<str>>(self, tags: impl IntoIterator<Item = S>) -> Builder {
        let all: Vec<String> = tags.into_iter().map(|t| t.as_ref().to_owned()).collect();
        self.text(TAGS, all.join(","))
    }

    /// Certificates, as PEM, that control and the relays are verified with instead of the system's.
    pub fn root_ca_pem(self, pem: impl Into<Vec<u8>>) -> Builder {
        self.text(ROOT_CA_PEM, pem)
    }

    /// The node leaves the tailnet when it is closed or gone.
    pub fn ephemeral(self, yes: bool) -> Builder {
        self.flag(sys::TAILNODE_EPHEMERAL, yes)
    }

    /// Runs the node in a helper process, which the library starts and ends. All else stays the same. Only without the feature `core` is there no Go runtime
    /// in this process, too.
    pub fn isolated(mut self, yes: bool) -> Builder {
        self.mode = if yes { sys::TAILNODE_ISOLATED } else { sys::TAILNODE_IN_PROCESS };
        self
    }

    /// The helper program of isolated mode. Default: `$TAILNODE_HELPER`, then `tailnode-helper` beside the library or the program,
    /// then where it was installed.
    pub fn helper(self, path: impl AsRef<Path>) -> Builder {
        self.text(HELPER, path.as_ref().as_os_str().as_bytes())
    }

    /// In isolated mode, the next call after the helper died starts another one, with the same identity.
    pub fn restart(self, yes: bool) -> Builder {
        self.flag(sys::TAILNODE_RESTART, yes)
    }

    /// The UDP port for direct traffic. Default: the system chooses.
    pub fn port(mut self, port: u16) -> Builder {
        self.port = port;
        self
    }

    /// Where the node logs to, as lines of text. A line that would block is dropped. Default: silent.
    pub fn log(mut self, to: impl Into<OwnedFd>, level: LogLevel) -> Builder {
        self.log = Some((to.into(), level));
        self
    }

    /// A soft limit, in bytes, on the memory of the Go runtime; in process, for all nodes of the process.
    pub fn memory_limit(mut self, bytes: u64) -> Builder {
        self.memory_limit = i64::try_from(bytes).unwrap_or(i64::MAX);
        self
    }

    /// How much Go's heap may grow, in percent, before the next collection; -1: only the memory limit counts.
    pub fn gc_percent(mut self, percent: i32) -> Builder {
        self.gc_percent = percent;
        self
    }

    /// How many threads may run Go code at a time.
    pub fn max_procs(mut self, n: i32) -> Builder {
        self.max_procs = n;
        self
    }

    /// How long [`up`](Builder::up) waits at most. Default: as long as it takes.
    pub fn up_timeout(mut self, limit: Duration) -> Builder {
        self.up_timeout = Some(limit);
        self
    }

    /// Makes the node and waits until it is on the tailnet. The first node of a process starts the Go runtime, on
    /// a thread of the library that lives for that time.
    ///
    /// # Errors
    ///
    /// Control's own words, at once, if it refuses the node ([`ErrorKind::AuthRefused`]); [`ErrorKind::Timeout`], which says what was
    /// missing, such as somebody who logs in or approves; the errors of the state and of the arguments.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the node.
    pub async fn up(self) -> Result<Node> {
        let limit = self.up_timeout;
        let node = self.start().await?;
        node.up(limit).await?;
        Ok(node)
    }

    /// Makes the node without waiting for the network. It connects when a call needs it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`]; [`ErrorKind::Unsupported`] if the core or the helper cannot be loaded.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the node.
    pub async fn start(self) -> Result<Node> {
        let (node, op) = self.make()?;
        op.done().await?;
        Ok(node)
    }

    /// [`up`](Builder::up) for threads that may be blocked.
    ///
    /// # Errors
    ///
    /// As [`up`](Builder::up).
    pub fn up_blocking(self) -> Result<crate::blocking::Node> {
        let limit = self.up_timeout;
        let node = self.start_blocking()?;
        node.up(limit)?;
        Ok(node)
    }

    /// [`start`](Builder::start) for threads that may be blocked: it waits for the Go runtime, not for the network.
    ///
    /// # Errors
    ///
    /// As [`start`](Builder::start).
    pub fn start_blocking(self) -> Result<crate::blocking::Node> {
        let (node, op) = self.make()?;
        op.done_blocking()?;
        Ok(node.into())
    }

    /// The node, and the operation that starts its core; it waits for nothing.
    fn make(self) -> Result<(Node, Op)> {
        sys::use_linked_core();
        let mut text: [Option<CString>; 7] = Default::default();
        for (i, t) in self.text.into_iter().enumerate() {
            text[i] = t.map(|t| c_string(TEXT_NAMES[i], t)).transpose()?;
        }
        let ptr = |i: usize| text[i].as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
        let options = sys::tailnode_options {
            size: size_of::<sys::tailnode_options>(),
            mode: self.mode,
            flags: self.flags,
            dir: ptr(DIR),
            hostname: ptr(HOSTNAME),
            auth_key: ptr(AUTH_KEY),
            control_url: ptr(CONTROL_URL),
            tags: ptr(TAGS),
            root_ca_pem: ptr(ROOT_CA_PEM),
            helper_path: ptr(HELPER),
            port: self.port.into(),
            log_level: match self.log.as_ref().map(|l| l.1) {
                Some(LogLevel::Debug) => sys::TAILNODE_LOG_DEBUG,
                Some(LogLevel::Warn) => sys::TAILNODE_LOG_WARN,
                Some(LogLevel::Error) => sys::TAILNODE_LOG_ERROR,
                Some(LogLevel::Info) | None => sys::TAILNODE_LOG_INFO,
            },
            log_fd: self.log.as_ref().map_or(0, |l| l.0.as_raw_fd()),
            log: None,
            auth_url: None,
            user: std::ptr::null_mut(),
            memory_limit: self.memory_limit,
            gc_percent: self.gc_percent,
            max_procs: self.max_procs,
        };
        let mut node = sys::tailnode_node { id: 0 };
        // Safety: the library copies what the options point to, which lives until after the call.
        let op = Op::start(|op, err| unsafe { sys::tailnode_new_start(&options, &mut node, op, err) })?;
        Ok((Node(Arc::new(Handle(node))), op))
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").finish_non_exhaustive() // there is a secret in it
    }
}

struct Handle(sys::tailnode_node);

/// Begins to close a node, without waiting.
fn begin_close(node: sys::tailnode_node) -> c_int {
    let mut op = sys::tailnode_op { id: 0 };
    // Safety: a handle that is closed gives a code. Giving the operation up does not stop the closing.
    unsafe {
        let code = sys::tailnode_close_start(node, &mut op, std::ptr::null_mut());
        if code == sys::TAILNODE_OK {
            sys::tailnode_op_cancel(op);
        }
        code
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let node = self.0;
        if begin_close(node) == sys::TAILNODE_EXHAUSTED {
            // No descriptor is left to carry the request, or the core is flooded: somebody else waits until that is over.
            let _ = std::thread::Builder::new().name("tailnode-close".into()).spawn(move || {
                while begin_close(node) == sys::TAILNODE_EXHAUSTED {
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
    }
}

/// A node of a tailnet in this program.
///
/// A clone is another handle to the same node, which runs until [`close`](Node::close), or until the last clone is dropped: its listeners
/// and connections end then, too. Dropping does not wait.
///
/// Futures of this type need a Tokio runtime with I/O enabled, and panic outside of one. They wait by descriptor: no call here
/// blocks a thread of the runtime.
#[derive(Clone)]
pub struct Node(Arc<Handle>);

pub(crate) fn millis(limit: Option<Duration>) -> i64 {
    // What is not zero does not become zero, which asks without waiting.
    limit.map_or(sys::TAILNODE_FOREVER, |d| i64::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX))
}

type OpPtr = *mut sys::tailnode_op;
type ErrPtr = *mut sys::tailnode_error;

/// How each call is started, for both [`op::run`] and [`op::run_blocking`].
///
/// Safety of all of them: the library checks the handle, copies the strings, and writes to op and err during the call only.
#[derive(Clone, Copy)]
pub(crate) struct Calls(pub(crate) sys::tailnode_node);

impl Calls {
    pub(crate) fn up(self, limit: Option<Duration>) -> impl Fn(OpPtr, ErrPtr) -> c_int {
        move |op, err| unsafe { sys::tailnode_up_start(self.0, millis(limit), op, err) }
    }

    pub(crate) fn close(self) -> impl Fn(OpPtr, ErrPtr) -> c_int {
        move |op, err| unsafe { sys::tailnode_close_start(self.0, op, err) }
    }

    pub(crate) fn status(self, peers: bool) -> impl Fn(OpPtr, ErrPtr) -> c_int {
        move |op, err| unsafe { sys::tailnode_status_start(self.0, peers.into(), op, err) }
    }

    pub(crate) fn addresses(self) -> impl Fn(OpPtr, ErrPtr) -> c_int {
        move |op, err| unsafe { sys::tailnode_addresses_start(self.0, op, err) }
    }

    pub(crate) fn whois(self, addr: impl Display) -> Result<impl Fn(OpPtr, ErrPtr) -> c_int> {
        let addr = c_string("the address", addr.to_string())?;
        Ok(move |op, err| unsafe { sys::tailnode_whois_start(self.0, addr.as_ptr(), sys::TAILNODE_FOREVER, op, err) })
    }

    pub(crate) fn ping(self, ip: IpAddr, kind: PingType, limit: Option<Duration>) -> Result<impl Fn(OpPtr, ErrPtr) -> c_int> {
        let ip = c_string("the address", ip.to_string())?;
        Ok(move |op, err| unsafe { sys::tailnode_ping_start(self.0, ip.as_ptr(), kind.as_c().as_ptr(), millis(limit), op, err) })
    }

    pub(crate) fn dial(
        self,
        network: &'static CStr,
        addr: impl Display,
        flags: u32,
        limit: Option<Duration>,
    ) -> Result<impl Fn(OpPtr, ErrPtr) -> c_int> {
        let addr = c_string("the address", addr.to_string())?;
        Ok(move |op, err| unsafe { sys::tailnode_dial_start(self.0, network.as_ptr(), addr.as_ptr(), flags, millis(limit), op, err) })
    }

    pub(crate) fn listen(self, addr: impl Display, flags: u32) -> Result<impl Fn(OpPtr, ErrPtr) -> c_int> {
        let addr = c_string("the address", addr.to_string())?;
        Ok(move |op, err| unsafe { sys::tailnode_listen_start(self.0, c"tcp".as_ptr(), addr.as_ptr(), flags, op, err) })
    }

    pub(crate) fn listen_udp(self, addr: impl Display, flags: u32) -> Result<impl Fn(OpPtr, ErrPtr) -> c_int> {
        let addr = c_string("the address", addr.to_string())?;
        Ok(move |op, err| unsafe { sys::tailnode_listen_packet_start(self.0, c"udp".as_ptr(), addr.as_ptr(), flags, op, err) })
    }

    pub(crate) fn loopback(self) -> impl Fn(OpPtr, ErrPtr) -> c_int {
        move |op, err| unsafe { sys::tailnode_loopback_start(self.0, op, err) }
    }

    pub(crate) fn watch(self, flags: u32) -> impl Fn(OpPtr, ErrPtr) -> c_int {
        move |op, err| unsafe { sys::tailnode_watch_start(self.0, flags, op, err) }
    }
}

impl Node {
    /// What a node is to be.
    pub fn builder() -> Builder {
        Builder {
            text: Default::default(),
            mode: sys::TAILNODE_IN_PROCESS,
            flags: 0,
            port: 0,
            log: None,
            memory_limit: 0,
            gc_percent: 0,
            max_procs: 0,
            up_timeout: None,
        }
    }

    pub(crate) fn raw(&self) -> sys::tailnode_node {
        self.0 .0
    }

    pub(crate) fn calls(&self) -> Calls {
        Calls(self.raw())
    }

    /// Waits until the node is on the tailnet, at most `limit`. A time-out does not stop the node.
    ///
    /// # Errors
    ///
    /// As [`Builder::up`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: the node goes on connecting.
    pub async fn up(&self, limit: Option<Duration>) -> Result<()> {
        op::run(self.calls().up(limit)).await.map(drop)
    }

    /// Takes the node off the tailnet and waits until nothing of it runs any more. Its waiting calls, its listeners and its connections end.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if it was closed before; what went wrong while closing.
    ///
    /// # Cancel safety
    ///
    /// Once polled, the node closes, whether the future is dropped or not.
    pub async fn close(&self) -> Result<()> {
        op::run(self.calls().close()).await.map(drop)
    }

    /// The node's state and, if `peers`, all of its peers.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`]; [`ErrorKind::CoreLost`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn status(&self, peers: bool) -> Result<Status> {
        op::run(self.calls().status(peers)).await?.json()
    }

    /// The node's addresses on the tailnet; `None` before it has any.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`]; [`ErrorKind::CoreLost`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn addresses(&self) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>)> {
        Ok(both_addresses(&op::run(self.calls().addresses()).await?))
    }

    /// Who has an address: an `IpAddr`, or the `SocketAddr` of a connection's peer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if no peer has it.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn whois(&self, addr: impl Display) -> Result<WhoIs> {
        op::run(self.calls().whois(addr)?).await?.json()
    }

    /// Pings the node that has an address, and waits for its answer as long as it takes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unreachable`] if no node has it.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: dropping the future ends the ping.
    pub async fn ping(&self, ip: IpAddr, kind: PingType) -> Result<PingResult> {
        op::run(self.calls().ping(ip, kind, None)?).await?.json()
    }

    /// Listens for TCP connections on an address such as `":80"`, or a `SocketAddr`; port 0 chooses one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AddressInUse`]; [`ErrorKind::InvalidArgument`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: dropping the future leaves no listener.
    pub async fn listen(&self, addr: impl Display) -> Result<TcpListener> {
        let mut got = op::run(self.calls().listen(addr, sys::TAILNODE_NONBLOCK)?).await?;
        TcpListener::new(got.fd()?, address(got.local)?, true)
    }

    /// Connects to `host:port` on the tailnet, where host is an address or a MagicDNS name, full or short; or to a `SocketAddr`. It never leaves the
    /// tailnet. It waits as long as it takes: `tokio::time::timeout` limits it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSuchHost`], [`ErrorKind::NotTailnet`], [`ErrorKind::Unreachable`], [`ErrorKind::Refused`], and the like.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: dropping the future gives the connection up, wherever it is.
    pub async fn dial(&self, addr: impl Display) -> Result<TcpStream> {
        let mut got = op::run(self.calls().dial(c"tcp", addr, sys::TAILNODE_NONBLOCK, None)?).await?;
        TcpStream::new(got.fd()?, address(got.local)?, address(got.remote)?).map_err(|e| Error::from_io("dial", e))
    }

    /// A UDP socket on an address such as `":53"`, or a `SocketAddr`, for datagrams from and to any peer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AddressInUse`]; [`ErrorKind::InvalidArgument`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: dropping the future leaves no socket.
    pub async fn listen_udp(&self, addr: impl Display) -> Result<UdpSocket> {
        let mut got = op::run(self.calls().listen_udp(addr, sys::TAILNODE_NONBLOCK)?).await?;
        UdpSocket::new(got.fd()?, address(got.local)?, None)
    }

    /// A UDP socket that is connected to `host:port` on the tailnet.
    ///
    /// # Errors
    ///
    /// As [`dial`](Node::dial).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: dropping the future leaves no socket.
    pub async fn dial_udp(&self, addr: impl Display) -> Result<UdpSocket> {
        let mut got = op::run(self.calls().dial(c"udp", addr, sys::TAILNODE_NONBLOCK, None)?).await?;
        UdpSocket::new(got.fd()?, address(got.local)?, Some(address(got.remote)?))
    }

    /// Serves SOCKS5 into the tailnet, and the LocalAPI's status, whois and ping, on a TCP port of this machine's loopback interface, for what cannot use
    /// this crate. The same answer every time.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`]; [`ErrorKind::CoreLost`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn loopback(&self) -> Result<Loopback> {
        Loopback::from_c(&op::run(self.calls().loopback()).await?.data)
    }

    /// The changes of the node's state and netmap, from its present state on. It starts the node if need be.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`]; [`ErrorKind::CoreLost`].
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn watch(&self) -> Result<Watch> {
        let mut got = op::run(self.calls().watch(sys::TAILNODE_NONBLOCK)).await?;
        Watch::new(got.fd()?)
    }
}

pub(crate) fn both_addresses(got: &Outcome) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let v4 = got.local.and_then(|a| if let IpAddr::V4(ip) = a.ip() { Some(ip) } else { None });
    let v6 = got.remote.and_then(|a| if let IpAddr::V6(ip) = a.ip() { Some(ip) } else { None });
    (v4, v6)
}

pub(crate) fn address(a: Option<SocketAddr>) -> Result<SocketAddr> {
    a.ok_or_else(|| Error::new(ErrorKind::Internal, "tailnode: the core gave no address"))
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Node").field(&self.raw().id).finish()
    }
}
