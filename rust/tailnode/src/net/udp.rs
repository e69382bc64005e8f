use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::task::{ready, Context, Poll};

use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, ReadBuf};

use super::sock;
use crate::error::{Error, Result};

/// A UDP socket on the tailnet, like `tokio::net::UdpSocket`. It comes from [`Node::listen_udp`](crate::Node::listen_udp), for
/// datagrams from and to any peer, or from [`Node::dial_udp`](crate::Node::dial_udp), connected to one.
///
/// Each call sends or receives one datagram. Nothing here enters the C library or Go. Dropping the socket closes it
/// without waiting.
pub struct UdpSocket {
    fd: AsyncFd<OwnedFd>,
    local: SocketAddr,
    peer: Option<SocketAddr>,
}

impl UdpSocket {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr, peer: Option<SocketAddr>) -> Result<UdpSocket> {
        let fd = sock::register(fd, Interest::READABLE | Interest::WRITABLE).map_err(|e| Error::from_io("udp", e))?;
        Ok(UdpSocket { fd, local, peer })
    }

    /// The address that it is bound to.
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    /// The peer that it is connected to.
    ///
    /// # Errors
    ///
    /// [`NotConnected`](io::ErrorKind::NotConnected) for a socket of [`Node::listen_udp`](crate::Node::listen_udp).
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.peer.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn receive(&self, fd: &OwnedFd, buf: &mut [u8], flags: i32) -> io::Result<(usize, SocketAddr)> {
        sock::recv_datagram(fd, self.peer, sock::uninit(buf), flags | sock::NOW)
    }

    fn transmit(&self, fd: &OwnedFd, buf: &[u8], to: Option<SocketAddr>) -> io::Result<usize> {
        sock::send_datagram(fd, self.peer, buf, to, sock::NOW)
    }

    /// Receives one datagram, and returns its length and where it came from. What does not fit in `buf` is cut.
    ///
    /// # Errors
    ///
    /// [`NotConnected`](io::ErrorKind::NotConnected), with [`ErrorKind::Closed`](crate::ErrorKind::Closed) inside, once the node is closed.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, no datagram is lost.
    pub async fn recv_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.fd.async_io(Interest::READABLE, |fd| self.receive(fd, buf, 0)).await
    }

    /// The same without taking the datagram from the socket.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdpSocket::recv_from).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe.
    pub async fn peek_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.fd.async_io(Interest::READABLE, |fd| self.receive(fd, buf, libc::MSG_PEEK)).await
    }

    /// Sends one datagram to `target`.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` for more than 65,507 bytes, `EISCONN` for a connected socket. What happens to the datagram on its way is not
    /// told, as with every UDP socket.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, the datagram was not sent.
    pub async fn send_to(&self, buf: &[u8], target: SocketAddr) -> io::Result<usize> {
        self.fd.async_io(Interest::WRITABLE, |fd| self.transmit(fd, buf, Some(target))).await
    }

    /// Receives one datagram of the peer that the socket is connected to (or of anyone, if it is not).
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdpSocket::recv_from).
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, no datagram is lost.
    pub async fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.recv_from(buf).await?.0)
    }

    /// Sends one datagram to the peer that the socket is connected to.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` for more than 65,507 bytes, [`NotConnected`](io::ErrorKind::NotConnected) for a socket without a peer.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, the datagram was not sent.
    pub async fn send(&self, buf: &[u8]) -> io::Result<usize> {
        self.fd.async_io(Interest::WRITABLE, |fd| self.transmit(fd, buf, None)).await
    }

    /// Receives a datagram that is there, without waiting.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if there is none; otherwise as [`recv_from`](UdpSocket::recv_from).
    pub fn try_recv_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.fd.try_io(Interest::READABLE, |fd| self.receive(fd, buf, 0))
    }

    /// Sends a datagram if there is room, without waiting.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if there is none; otherwise as [`send_to`](UdpSocket::send_to).
    pub fn try_send_to(&self, buf: &[u8], target: SocketAddr) -> io::Result<usize> {
        self.fd.try_io(Interest::WRITABLE, |fd| self.transmit(fd, buf, Some(target)))
    }

    /// Polls for a datagram. Of several tasks that poll, only the last one's waker is woken.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdpSocket::recv_from).
    pub fn poll_recv_from(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<SocketAddr>> {
        let mut from = None;
        let room = buf.initialize_unfilled();
        let n = ready!(sock::poll_read(&self.fd, cx, 0, |fd| {
            let (n, addr) = self.receive(fd, room, 0)?;
            from = Some(addr);
            Ok(n)
        }))?;
        buf.advance(n);
        Poll::Ready(Ok(from.expect("set with the length")))
    }

    /// Polls for room and sends one datagram. Of several tasks that poll, only the last one's waker is woken.
    ///
    /// # Errors
    ///
    /// As [`send_to`](UdpSocket::send_to).
    pub fn poll_send_to(&self, cx: &mut Context<'_>, buf: &[u8], target: SocketAddr) -> Poll<io::Result<usize>> {
        sock::poll_write(&self.fd, cx, 0, |fd| self.transmit(fd, buf, Some(target)))
    }

    /// Turns it into the blocking type. Its descriptor stays non-blocking: see
    /// [`set_nonblocking`](crate::blocking::UdpSocket::set_nonblocking).
    ///
    /// # Errors
    ///
    /// None; the signature is that of `tokio::net`.
    pub fn into_std(self) -> io::Result<crate::blocking::UdpSocket> {
        Ok(crate::blocking::UdpSocket::new(self.fd.into_inner(), self.local, self.peer))
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
    pub fn from_std(socket: crate::blocking::UdpSocket) -> io::Result<UdpSocket> {
        socket.set_nonblocking(true)?;
        let (fd, local, peer) = socket.into_parts();
        Ok(UdpSocket::new(fd, local, peer)?)
    }

    /// Waits until there may be a datagram.
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

    /// Waits until there may be room to send.
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
}

impl fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpSocket").field("addr", &self.local).field("peer", &self.peer).field("fd", &self.fd.as_raw_fd()).finish()
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
