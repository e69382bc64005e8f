use std::fmt;
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{ready, Context, Poll};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};

use super::{sock, split, OwnedReadHalf, OwnedWriteHalf, ReadHalf, WriteHalf};

/// A TCP connection over the tailnet, like `tokio::net::TcpStream`. It comes from [`Node::dial`](crate::Node::dial) and
/// [`TcpListener::accept`](super::TcpListener::accept).
///
/// Reading and writing are `recv(2)` and `send(2)` on a Unix socket and enter neither the C library nor Go. The peer's FIN reads as end of file; a reset, and
/// the end of the node, read as [`ConnectionReset`](io::ErrorKind::ConnectionReset) after what came before. `shutdown` (of
/// `tokio::io::AsyncWriteExt`) sends a FIN, and reading goes on. Dropping the stream closes it without waiting: what was written is still sent, unless there is
/// something unread, which resets the connection.
pub struct TcpStream {
    fd: AsyncFd<OwnedFd>,
    local: SocketAddr,
    peer: SocketAddr,
}

impl TcpStream {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr, peer: SocketAddr) -> io::Result<TcpStream> {
        Ok(TcpStream { fd: sock::register(fd, Interest::READABLE | Interest::WRITABLE)?, local, peer })
    }

    /// This end's address on the tailnet.
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    /// The peer's address on the tailnet.
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }

    /// Waits until the stream is ready for one of what `interest` names. It may be so falsely: try, and wait again at
    /// [`WouldBlock`](io::ErrorKind::WouldBlock).
    ///
    /// # Errors
    ///
    /// If the runtime is shut down.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        Ok(self.fd.ready(interest).await?.ready())
    }

    /// Waits until there is something to read, or the end.
    ///
    /// # Errors
    ///
    /// If the runtime is shut down.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn readable(&self) -> io::Result<()> {
        self.fd.readable().await.map(drop)
    }

    /// Waits until there is room to write.
    ///
    /// # Errors
    ///
    /// If the runtime is shut down.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn writable(&self) -> io::Result<()> {
        self.fd.writable().await.map(drop)
    }

    /// Reads what is there, without waiting. 0: the peer has ended its half (or `buf` is empty).
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if there is nothing; otherwise those of reading.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.fd.try_io(Interest::READABLE, |fd| sock::recv(fd, sock::uninit(buf), sock::NOW))
    }

    /// Writes what there is room for, without waiting.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if there is no room; otherwise those of writing.
    pub fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        self.fd.try_io(Interest::WRITABLE, |fd| sock::send(fd, buf, sock::NOW))
    }

    /// Waits for data and copies it into `buf` without taking it from the stream. 0: the peer has ended its half.
    ///
    /// # Errors
    ///
    /// Those of reading.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn peek(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.fd.async_io(Interest::READABLE, |fd| sock::recv(fd, sock::uninit(buf), libc::MSG_PEEK | sock::NOW)).await
    }

    /// Polls for data and copies it into `buf` without taking it from the stream. Of several tasks that poll, only the last one's waker is woken.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn poll_peek(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        self.poll_recv(cx, buf, libc::MSG_PEEK)
    }

    /// Splits the stream into halves that borrow it, for use in one task.
    pub fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>) {
        split::split(self)
    }

    /// Splits the stream into halves that own it together, for use in two tasks. Dropping the write half ends that half of the connection.
    pub fn into_split(self) -> (OwnedReadHalf, OwnedWriteHalf) {
        split::into_split(self)
    }

    /// Turns it into the blocking type. Its descriptor stays non-blocking: see
    /// [`set_nonblocking`](crate::blocking::TcpStream::set_nonblocking).
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn into_std(self) -> io::Result<crate::blocking::TcpStream> {
        Ok(crate::blocking::TcpStream::new(self.fd.into_inner(), self.local, self.peer))
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
    pub fn from_std(stream: crate::blocking::TcpStream) -> io::Result<TcpStream> {
        stream.set_nonblocking(true)?;
        let (fd, local, peer) = stream.into_parts();
        TcpStream::new(fd, local, peer)
    }

    fn poll_recv(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>, flags: i32) -> Poll<io::Result<usize>> {
        // Safety: nothing initialised in there is made uninitialised: recv only ever writes.
        let room = unsafe { buf.unfilled_mut() };
        let full = if flags == 0 { room.len() } else { 0 };
        let n = ready!(sock::poll_read(&self.fd, cx, full, |fd| sock::recv(fd, room, flags | sock::NOW)))?;
        // Safety: recv has written n bytes.
        unsafe { buf.assume_init(n) };
        buf.advance(n);
        Poll::Ready(Ok(n))
    }

    pub(super) fn poll_read_shared(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_recv(cx, buf, 0).map_ok(drop)
    }

    pub(super) fn poll_write_shared(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        sock::poll_write(&self.fd, cx, buf.len(), |fd| sock::send(fd, buf, sock::NOW))
    }

    pub(super) fn poll_write_vectored_shared(&self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        // More than the system takes at once is no sign that it is full.
        let full = if bufs.len() <= 1024 { bufs.iter().map(|b| b.len()).sum() } else { 0 };
        sock::poll_write(&self.fd, cx, full, |fd| sock::send_vectored(fd, bufs, sock::NOW))
    }

    pub(super) fn shutdown_write(&self) -> io::Result<()> {
        sock::shutdown(self.fd.get_ref(), Shutdown::Write)
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_read_shared(cx, buf)
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_shared(cx, buf)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_shared(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing: nothing is kept back.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown_write())
    }
}

impl fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpStream").field("addr", &self.local).field("peer", &self.peer).field("fd", &self.fd.as_raw_fd()).finish()
    }
}

impl AsFd for TcpStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for TcpStream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The connection's descriptor: a non-blocking Unix stream socket.
impl From<TcpStream> for OwnedFd {
    fn from(s: TcpStream) -> OwnedFd {
        s.fd.into_inner()
    }
}
