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
pub(crate) struct Op {
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
    pub(crate) fn start(f: impl FnOnce(*mut sys::tailnode_op, *mut sys::tailnode_error) -> c_int) -> Result<Op> {
        let mut op = sys::tailnode_op { id: 0 };
        let mut err = Raw::new();
        let code = f(&mut op, err.as_mut());
        err.check(code)?;
        Ok(Op { op, over: false })
    }

    pub(crate) async fn done(mut self) -> Result<Outcome> {
        let watch = self.watch()?;
        loop {
            let mut ready = watch.readable().await.map_err(|e| Error::from_io("waiting for the core", e))?;
            match self.take() {
                Some(result) => return result,
                None => ready.clear_ready(),
            }
        }
    }

    pub(crate) fn done_blocking(mut self) -> Result<Outcome> {
        loop {
            // Safety: both structs are ours, and the size is set.
            if let Some(result) = self.finish(|op, r, err| unsafe { sys::tailnode_op_wait(op, sys::TAILNODE_FOREVER, r, err) }) {
                return result;
            }
        }
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
        // Safety: both structs are ours, and the size is set.
        self.finish(|op, r, err| unsafe { sys::tailnode_op_take(op, r, err) })
    }

    fn finish(
        &mut self,
        f: impl FnOnce(sys::tailnode_op, *mut sys::tailnode_result, *mut sys::tailnode_error) -> c_int,
    ) -> Option<Result<Outcome>> {
        let mut r = sys::tailnode_result {
            size: size_of::<sys::tailnode_result>(),
            data: std::ptr::null_mut(),
            data_len: 0,
            fd: -1,
            local: Default::default(),
            remote: Default::default(),
        };
        let mut err = Raw::new();
        let code = f(self.op, &mut r, err.as_mut());
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
pub(crate) async fn run(f: impl Fn(*mut sys::tailnode_op, *mut sys::tailnode_error) -> c_int) -> Result<Outcome> {
    loop {
        match Op::start(&f) {
            Ok(op) => return op.done().await,
            // The core has hundreds of requests to take before this one, and takes them as fast as it can.
            Err(e) if full(&e) => tokio::task::yield_now().await,
            Err(e) => return Err(e),
        }
    }
}

/// The same for threads that may be blocked.
pub(crate) fn run_blocking(f: impl Fn(*mut sys::tailnode_op, *mut sys::tailnode_error) -> c_int) -> Result<Outcome> {
    loop {
        match Op::start(&f) {
            Ok(op) => return op.done_blocking(),
            Err(e) if full(&e) => std::thread::sleep(std::time::Duration::from_millis(1)),
            Err(e) => return Err(e),
        }
    }
}

fn full(e: &Error) -> bool {
    e.kind() == ErrorKind::Exhausted && e.raw_os_error() == Some(libc::EAGAIN)
}

pub(crate) fn c_string(what: &str, s: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(s).map_err(|_| Error::new(ErrorKind::InvalidArgument, format!("tailnode: {what} holds a NUL")))
}
