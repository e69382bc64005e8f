use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{ready, Context, Poll};

use futures_core::Stream;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

use super::{sock, TcpStream};
use crate::error::{Error, Result};

/// A TCP listener on the tailnet, like `tokio::net::TcpListener`. It comes from [`Node::listen`](crate::Node::listen).
///
/// Accepting is one `recvmsg(2)` on a socket and enters neither the C library nor Go. Dropping the listener closes the port
/// and the connections that nobody has accepted; it does not wait. The listener does not keep its node alive.
pub struct TcpListener {
    fd: AsyncFd<OwnedFd>,
    local: SocketAddr,
    /// Whether the connections come non-blocking: as the core was asked when it began to listen.
    nonblock: bool,
}

impl TcpListener {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr, nonblock: bool) -> Result<TcpListener> {
        let fd = sock::register(fd, Interest::READABLE).map_err(|e| Error::from_io("listen", e))?;
        Ok(TcpListener { fd, local, nonblock })
    }

    /// Waits for a connection, and returns it with the peer's address. Any number of tasks may accept from one listener.
    ///
    /// # Errors
    ///
    /// An error of kind [`NotConnected`](io::ErrorKind::NotConnected), with [`ErrorKind::Closed`](crate::ErrorKind::Closed) inside, once the node is closed: no
    /// further connection comes. `EMFILE` if the process has no descriptor left; the connection was closed, and the listener goes on.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, no connection is lost.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.accepted(self.fd.async_io(Interest::READABLE, |fd| sock::accept(fd, sock::NOW)).await?)
    }

    /// Polls for a connection. Of several tasks that call it, only the last one's waker is woken.
    ///
    /// # Errors
    ///
    /// As [`accept`](TcpListener::accept).
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(cx))?;
            match sock::accept(self.fd.get_ref(), sock::NOW) {
                Ok(got) => return Poll::Ready(self.accepted(got)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn accepted(&self, (fd, remote, local): (OwnedFd, SocketAddr, SocketAddr)) -> io::Result<(TcpStream, SocketAddr)> {
        if !self.nonblock {
            sock::set_nonblocking(&fd, true)?;
        }
        Ok((TcpStream::new(fd, local, remote)?, remote))
    }

    /// The connections as a stream, which ends when the node is closed. tonic's server takes it.
    pub fn into_incoming(self) -> Incoming {
        Incoming(self)
    }

    /// Turns it into the blocking type. Its descriptor stays non-blocking: see
    /// [`set_nonblocking`](crate::blocking::TcpListener::set_nonblocking).
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn into_std(self) -> io::Result<crate::blocking::TcpListener> {
        Ok(crate::blocking::TcpListener::new(self.fd.into_inner(), self.local, self.nonblock))
    }

    /// Makes one of the blocking type, whose descriptor is made non-blocking.
    ///
    /// # Errors
    ///
    /// If the reactor does not take it.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime with I/O enabled.
    pub fn from_std(listener: crate::blocking::TcpListener) -> io::Result<TcpListener> {
        listener.set_nonblocking(true)?;
        let (fd, local, nonblock) = listener.into_parts();
        Ok(TcpListener::new(fd, local, nonblock)?)
    }

    /// The address that it listens on, with the port that was chosen if 0 was asked for.
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpListener").field("addr", &self.local).field("fd", &self.fd.as_raw_fd()).finish()
    }
}

impl AsFd for TcpListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for TcpListener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The connections of a listener, from [`TcpListener::into_incoming`].
///
/// An error is that of one connection (`EMFILE` if the process has no descriptor left); the stream goes on, and ends when the node is closed.
#[derive(Debug)]
pub struct Incoming(TcpListener);

impl Stream for Incoming {
    type Item = io::Result<TcpStream>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<TcpStream>>> {
        Poll::Ready(match ready!(self.0.poll_accept(cx)) {
            Ok((stream, _)) => Some(Ok(stream)),
            Err(e) if e.kind() == io::ErrorKind::NotConnected => None,
            Err(e) => Some(Err(e)),
        })
    }
}

impl AsRef<TcpListener> for Incoming {
    fn as_ref(&self) -> &TcpListener {
        &self.0
    }
}
