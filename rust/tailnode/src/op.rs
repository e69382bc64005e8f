//! Calls that wait: started in the C library, awaited by a descriptor, cancelled by being dropped.

use std::ffi::{c_int, CString};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tailnode_sys as sys;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

use crate::error::{Error, ErrorKind, Raw, Result};
use crate::net::sock;

/// What an operation yields.
pub(crate) struct Outcome {
    pub(crate) data: Vec<u8>,
    fd: Option<OwnedFd>,
    pub(crate) local: Option<SocketAddr>,
    pub(crate) remote: Option<SocketAddr>,
}

impl Outcome {
    /// The descriptor of an operation that yields one.
    pub(crate) fn fd(&mut self) -> Result<OwnedFd> {
        // The core sent one, but this process had no room for it.
        self.fd.take().ok_or_else(|| Error::new(ErrorKind::Exhausted, "tailnode: too many open files"))
    }

    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.data).map_err(|e| Error::new(ErrorKind::Internal, format!("tailnode: the answer of the core: {e}")))
    }
}

/// An operation in flight. Dropping it cancels it, without blocking.
struct Op {
    op: sys::tailnode_op,
    over: bool,
}

impl Drop for Op {
    fn drop(&mut self) {
        if !self.over {
            // Safety: a handle that is over gives a code.
            unsafe { sys::tailnode_op_cancel(self.op) };
        }
    }
}

impl Op {
    fn start(f: impl FnOnce(*mut sys::tailnode_op, *mut sys::tailnode_error) -> c_int) -> Result<Op> {
        let mut op = sys::tailnode_op { id: 0 };
        let mut err = Raw::new();
        let code = f(&mut op, err.as_mut());
        err.check(code)?;
        Ok(Op { op, over: false })
    }

    /// A descriptor of our own, which the library's end of the operation does not close under the reactor.
    fn watch(&self) -> Result<AsyncFd<OwnedFd>> {
        // Safety: self keeps the operation, and with it its descriptor, alive.
        let fd = unsafe { BorrowedFd::borrow_raw(sys::tailnode_op_fd(self.op)) };
        if fd.as_raw_fd() < 0 {
            return Err(Error::new(ErrorKind::Closed, "tailnode: the operation is over"));
        }
        fd.try_clone_to_owned().and_then(|fd| sock::register(fd, Interest::READABLE)).map_err(|e| Error::from_io("waiting for the core", e))
    }

    /// None: not yet.
    fn take(&mut self) -> Option<Result<Outcome>> {
        let mut r = sys::tailnode_result {
            size: size_of::<sys::tailnode_result>(),
            data: std::ptr::null_mut(),
            data_len: 0,
            fd: -1,
            local: Default::default(),
            remote: Default::default(),
        };
        let mut err = Raw::new();
        // Safety: both structs are ours, and size is set.
        let code = unsafe { sys::tailnode_op_take(self.op, &mut r, err.as_mut()) };
        if code == sys::TAILNODE_PENDING {
            return None;
        }
        self.over = true;
        if let Err(e) = err.check(code) {
            return Some(Err(e));
        }
        let mut data = Vec::new();
        if !r.data.is_null() {
            // Safety: the library gave data_len bytes, which are ours to free.
            unsafe {
                data.extend_from_slice(std::slice::from_raw_parts(r.data.cast::<u8>(), r.data_len));
                sys::tailnode_free(r.data.cast());
            }
        }
        // Safety: the descriptor is ours from now on.
        let fd = (r.fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(r.fd) });
        Some(Ok(Outcome { data, fd, local: sock::from_addr(&r.local), remote: sock::from_addr(&r.remote) }))
    }
}

/// Starts an operation and waits for what it yields. Dropping the future cancels the operation.
pub(crate) async fn run(f: impl FnOnce(*mut sys::tailnode_op, *mut sys::tailnode_error) -> c_int) -> Result<Outcome> {
    let mut op = Op::start(f)?;
    let watch = op.watch()?;
    loop {
        let mut ready = watch.readable().await.map_err(|e| Error::from_io("waiting for the core", e))?;
        match op.take() {
            Some(result) => return result,
            None => ready.clear_ready(),
        }
    }
}

/// Runs a call that has no form that waits by descriptor on a thread of its own. If the future is dropped the call still runs to its end, and
/// its result is dropped there.
pub(crate) async fn on_thread<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (tx, rx) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("tailnode".into())
        .spawn(move || drop(tx.send(f())))
        .map_err(|e| Error::from_io("starting a thread", e))?;
    rx.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "tailnode: the thread of the call panicked")))
}

pub(crate) fn c_string(what: &str, s: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(s).map_err(|_| Error::new(ErrorKind::InvalidArgument, format!("tailnode: {what} holds a NUL")))
}
