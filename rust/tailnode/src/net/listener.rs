use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::task::{ready, Context, Poll};

use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

use super::{sock, TcpStream};
use crate::error::{Error, ErrorKind, Result};

/// A TCP listener on the tailnet, like `tokio::net::TcpListener`. It comes from [`Node::listen`](crate::Node::listen).
///
/// Accepting is one `recvmsg(2)` on a socket and enters neither the C library nor Go. Dropping the listener closes the port
/// and resets the connections that nobody has accepted; it does not wait. The listener does not keep its node alive.
pub struct TcpListener {
    fd: AsyncFd<OwnedFd>,
    local: SocketAddr,
}

impl TcpListener {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr) -> Result<TcpListener> {
        let fd = sock::register(fd, Interest::READABLE).map_err(|e| Error::from_io("listen", e))?;
        Ok(TcpListener { fd, local })
    }

    /// Waits for a connection, and returns it with the peer's address. Any number of tasks may accept from one listener.
    ///
    /// # Errors
    ///
    /// An error of kind [`NotConnected`](io::ErrorKind::NotConnected), with [`ErrorKind::Closed`] inside, once the node is closed: no
    /// further connection comes. `EMFILE` if the process has no descriptor left; the connection was reset, and the listener goes on.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, no connection is lost.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let got = self.fd.async_io(Interest::READABLE, sock::accept).await?;
        Self::accepted(got)
    }

    /// Polls for a connection. Of several tasks that call it, only the last one's waker is woken.
    ///
    /// # Errors
    ///
    /// As [`accept`](TcpListener::accept).
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(cx))?;
            match sock::accept(self.fd.get_ref()) {
                Ok(got) => return Poll::Ready(Self::accepted(got)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn accepted(got: Option<(OwnedFd, SocketAddr, SocketAddr)>) -> io::Result<(TcpStream, SocketAddr)> {
        let Some((fd, remote, local)) = got else {
            return Err(Error::new(ErrorKind::Closed, "tailnode: accept: the listener is closed").into());
        };
        Ok((TcpStream::new(fd, local, remote)?, remote))
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
