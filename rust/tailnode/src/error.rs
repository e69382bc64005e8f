use std::ffi::CStr;
use std::{fmt, io};

use tailnode_sys as sys;

/// The result of a call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $code:ident, $text:literal;)*) => {
        /// What went wrong. The discriminants are the codes of the C library and of the Go package, and never change.
        #[non_exhaustive]
        #[repr(i32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorKind {
            $($(#[$doc])* $name = sys::$code,)*
        }

        impl ErrorKind {
            /// Every kind that this version knows.
            pub const ALL: &'static [ErrorKind] = &[$(ErrorKind::$name),*];

            /// The kind of a code; [`ErrorKind::Internal`] for a number that is none.
            pub fn from_code(code: i32) -> ErrorKind {
                match code {
                    $(sys::$code => ErrorKind::$name,)*
                    _ => ErrorKind::Internal,
                }
            }

            /// The name that Go, C and Rust have in common, such as `"auth refused"`.
            pub fn name(self) -> &'static str {
                match self {
                    $(ErrorKind::$name => $text,)*
                }
            }
        }
    };
}

kinds! {
    /// A fault in tailnode itself.
    Internal = TAILNODE_INTERNAL, "internal";
    /// An argument cannot be used; the message says which and why.
    InvalidArgument = TAILNODE_INVALID_ARGUMENT, "invalid argument";
    /// The call does not fit the state.
    InvalidState = TAILNODE_INVALID_STATE, "invalid state";
    /// The node or the listener is closed.
    Closed = TAILNODE_CLOSED, "closed";
    /// The operation was cancelled.
    Canceled = TAILNODE_CANCELED, "canceled";
    /// A time-out passed; the message says what was missing.
    Timeout = TAILNODE_TIMEOUT, "timeout";
    /// Control refused the auth key or the node; the message is control's own.
    AuthRefused = TAILNODE_AUTH_REFUSED, "auth refused";
    /// Reserved: somebody must visit the auth URL. Calls that wait for it end with [`Timeout`](Self::Timeout), which says so.
    NeedsLogin = TAILNODE_NEEDS_LOGIN, "needs login";
    /// Reserved: an administrator must approve the machine. See [`Timeout`](Self::Timeout).
    NeedsApproval = TAILNODE_NEEDS_APPROVAL, "needs approval";
    /// This node's key, or the peer's, has expired.
    KeyExpired = TAILNODE_KEY_EXPIRED, "key expired";
    /// Reserved: there is no connection to the control server. See [`Timeout`](Self::Timeout).
    ControlUnreachable = TAILNODE_CONTROL_UNREACHABLE, "control unreachable";
    /// Reserved: what answered does not speak the control protocol correctly. See [`Timeout`](Self::Timeout).
    ControlProtocol = TAILNODE_CONTROL_PROTOCOL, "control protocol";
    /// The state is torn or another program's; it was left as it is.
    StateCorrupt = TAILNODE_STATE_CORRUPT, "state corrupt";
    /// Another process uses the state directory.
    StateLocked = TAILNODE_STATE_LOCKED, "state locked";
    /// The state could not be read or written.
    StateIo = TAILNODE_STATE_IO, "state i/o";
    /// The address or name is not on the tailnet.
    NotTailnet = TAILNODE_NOT_TAILNET, "not on the tailnet";
    /// No node of the tailnet has this name.
    NoSuchHost = TAILNODE_NO_SUCH_HOST, "no such host";
    /// No node of the tailnet has this address, or no way leads to it.
    Unreachable = TAILNODE_UNREACHABLE, "unreachable";
    /// The peer refused the connection.
    Refused = TAILNODE_REFUSED, "refused";
    /// The peer reset the connection.
    Reset = TAILNODE_RESET, "reset";
    /// Something listens on that port already.
    AddressInUse = TAILNODE_ADDRESS_IN_USE, "address in use";
    /// No peer has the address that was asked for.
    NotFound = TAILNODE_NOT_FOUND, "not found";
    /// The network, the mode or the option is not offered.
    Unsupported = TAILNODE_UNSUPPORTED, "unsupported";
    /// A limit of this node or of the process was reached.
    Exhausted = TAILNODE_EXHAUSTED, "exhausted";
    /// There is nothing to take yet. No call of this crate gives it.
    Pending = TAILNODE_PENDING, "pending";
    /// This process is a fork of the one that has the node.
    Forked = TAILNODE_FORKED, "forked";
    /// The helper process that ran the node has ended.
    CoreLost = TAILNODE_CORE_LOST, "core lost";
}

impl ErrorKind {
    /// The code, as C and Go have it.
    pub fn code(self) -> i32 {
        self as i32
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An error: its [`ErrorKind`], a message without secrets, and the error of the operating system behind it, if there is one.
///
/// It becomes an [`io::Error`] by `?`, which keeps it as its inner error.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    os: i32,
    message: Box<str>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, os: 0, message: message.into().into_boxed_str() }
    }

    pub(crate) fn from_io(what: &str, e: io::Error) -> Error {
        let os = e.raw_os_error().unwrap_or(0);
        let kind = match os {
            libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN => ErrorKind::Exhausted,
            _ => ErrorKind::Internal,
        };
        Error { kind, os, message: format!("tailnode: {what}: {e}").into() }
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The `errno` behind it, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        (self.os != 0).then_some(self.os)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({:?})", self.message, self.kind)
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    fn from(e: Error) -> io::Error {
        use io::ErrorKind as K;
        let kind = match e.kind {
            ErrorKind::InvalidArgument => K::InvalidInput,
            ErrorKind::Closed => K::NotConnected,
            ErrorKind::Timeout => K::TimedOut,
            ErrorKind::AuthRefused | ErrorKind::NeedsLogin | ErrorKind::NeedsApproval | ErrorKind::KeyExpired => K::PermissionDenied,
            ErrorKind::StateCorrupt => K::InvalidData,
            ErrorKind::NotTailnet | ErrorKind::Unreachable | ErrorKind::ControlUnreachable => K::HostUnreachable,
            ErrorKind::NoSuchHost | ErrorKind::NotFound => K::NotFound,
            ErrorKind::Refused => K::ConnectionRefused,
            ErrorKind::Reset => K::ConnectionReset,
            ErrorKind::AddressInUse => K::AddrInUse,
            ErrorKind::Unsupported => K::Unsupported,
            ErrorKind::CoreLost => K::ConnectionAborted,
            _ => K::Other,
        };
        io::Error::new(kind, e)
    }
}

/// Where the C library writes its error.
pub(crate) struct Raw(sys::tailnode_error);

impl Raw {
    pub(crate) fn new() -> Raw {
        Raw(sys::tailnode_error { code: 0, sys_errno: 0, message: [0; 504] })
    }

    pub(crate) fn as_mut(&mut self) -> *mut sys::tailnode_error {
        &mut self.0
    }

    /// The error of a call that returned code.
    pub(crate) fn check(&self, code: i32) -> Result<()> {
        if code == sys::TAILNODE_OK {
            return Ok(());
        }
        // Safety: c_char and u8 have the same layout.
        let bytes: &[u8] = unsafe { std::slice::from_raw_parts(self.0.message.as_ptr().cast(), self.0.message.len()) };
        let text = CStr::from_bytes_until_nul(bytes).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let kind = ErrorKind::from_code(code);
        let message = if text.is_empty() { format!("tailnode: {kind}") } else { text };
        Err(Error { kind, os: self.0.sys_errno, message: message.into() })
    }
}
