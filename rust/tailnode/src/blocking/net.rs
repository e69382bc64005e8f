use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::net::sock;

/// What all sockets have.
macro_rules! common {
    ($t:ident { $($extra:ident),* }) => {
        impl $t {
            /// The address of this end on the tailnet; of a listener, with the port that was chosen if 0 was asked for.
            ///
            /// # Errors
            ///
            /// None; the signature is that of `std::net`.
            pub fn local_addr(&self) -> io::Result<SocketAddr> {
                Ok(self.local)
            }

            /// Another descriptor of the same socket.
            ///
            /// # Errors
            ///
            /// `EMFILE` if the process has no descriptor left.
            pub fn try_clone(&self) -> io::Result<$t> {
                Ok($t { fd: self.fd.try_clone()?, local: self.local, $($extra: self.$extra),* })
            }

            /// Whether calls that would wait give [`WouldBlock`](io::ErrorKind::WouldBlock) instead. It holds for all clones.
            ///
            /// # Errors
            ///
            /// Those of `ioctl(2)`.
            pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
                sock::set_nonblocking(&self.fd, on)
            }

            /// The error of the socket that nobody has seen yet, which it clears.
            ///
            /// # Errors
            ///
            /// Those of `getsockopt(2)`.
            pub fn take_error(&self) -> io::Result<Option<io::Error>> {
                sock::take_error(&self.fd)
            }
        }

        impl AsFd for $t {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.fd.as_fd()
            }
        }

        impl AsRawFd for $t {
            fn as_raw_fd(&self) -> RawFd {
                self.fd.as_raw_fd()
            }
        }

        /// The Unix socket behind it.
        impl From<$t> for OwnedFd {
            fn from(s: $t) -> OwnedFd {
                s.fd
            }
        }
    };
}

/// The time-outs of sockets that transfer data.
macro_rules! timeouts {
    ($t:ident) => {
        impl $t {
            /// How long reading may wait; `None`: as long as it takes. After that it gives [`WouldBlock`](io::ErrorKind::WouldBlock).
            ///
            /// # Errors
            ///
            /// [`InvalidInput`](io::ErrorKind::InvalidInput) for zero.
            pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
                sock::set_timeout(&self.fd, libc::SO_RCVTIMEO, limit)
            }

            /// How long writing may wait; `None`: as long as it takes. After that it gives [`WouldBlock`](io::ErrorKind::WouldBlock).
            ///
            /// # Errors
            ///
            /// [`InvalidInput`](io::ErrorKind::InvalidInput) for zero.
            pub fn set_write_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
                sock::set_timeout(&self.fd, libc::SO_SNDTIMEO, limit)
            }

            /// How long reading may wait.
            ///
            /// # Errors
            ///
            /// Those of `getsockopt(2)`.
            pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
                sock::timeout(&self.fd, libc::SO_RCVTIMEO)
            }

            /// How long writing may wait.
            ///
            /// # Errors
            ///
            /// Those of `getsockopt(2)`.
            pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
                sock::timeout(&self.fd, libc::SO_SNDTIMEO)
            }
        }
    };
}

/// A TCP connection over the tailnet, like `std::net::TcpStream`.
///
/// The peer's FIN reads as end of file; a reset, and the end of the node, read as [`ConnectionReset`](io::ErrorKind::ConnectionReset) after what
/// came before. Dropping it closes it without waiting: what was written is still sent, unless there is something unread, which resets the connection.
pub struct TcpStream {
    fd: OwnedFd,
    local: SocketAddr,
    peer: SocketAddr,
}

common!(TcpStream { peer });
timeouts!(TcpStream);

impl TcpStream {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr, peer: SocketAddr) -> TcpStream {
        TcpStream { fd, local, peer }
    }

    pub(crate) fn into_parts(self) -> (OwnedFd, SocketAddr, SocketAddr) {
        (self.fd, self.local, self.peer)
    }

    /// The peer's address on the tailnet.
    ///
    /// # Errors
    ///
    /// None; the signature is that of `std::net`.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }

    /// Ends one half of the connection or both, for all clones. [`Shutdown::Write`] sends a FIN, and reading goes on.
    ///
    /// # Errors
    ///
    /// Those of `shutdown(2)`.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        sock::shutdown(&self.fd, how)
    }

    /// Waits for data and copies it into `buf` without taking it from the stream. 0: the peer has ended its half.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn peek(&self, buf: &mut [u8]) -> io::Result<usize> {
        sock::recv(&self.fd, sock::uninit(buf), libc::MSG_PEEK)
    }
}

impl Read for &TcpStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        sock::recv(&self.fd, sock::uninit(buf), 0)
    }
}

impl Write for &TcpStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        sock::send(&self.fd, buf, 0)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        sock::send_vectored(&self.fd, bufs, 0)
    }

    /// Does nothing: nothing is kept back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for TcpStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buf)
    }
}

impl Write for TcpStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&*self).write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpStream").field("addr", &self.local).field("peer", &self.peer).field("fd", &self.fd.as_raw_fd()).finish()
    }
}

/// A TCP listener on the tailnet, like `std::net::TcpListener`. Any number of threads may accept from one.
///
/// Dropping it closes the port and the connections that nobody has accepted. It does not keep its node alive.
pub struct TcpListener {
    fd: OwnedFd,
    local: SocketAddr,
    /// Whether the connections come non-blocking: as the core was asked when it began to listen.
    nonblock: bool,
}

common!(TcpListener { nonblock });

impl TcpListener {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr, nonblock: bool) -> TcpListener {
        TcpListener { fd, local, nonblock }
    }

    pub(crate) fn into_parts(self) -> (OwnedFd, SocketAddr, bool) {
        (self.fd, self.local, self.nonblock)
    }

    /// Waits for a connection, and returns it with the peer's address. The connection blocks, whether the listener does or not.
    ///
    /// # Errors
    ///
    /// An error of kind [`NotConnected`](io::ErrorKind::NotConnected), with [`ErrorKind::Closed`](crate::ErrorKind::Closed) inside, once the node is
    /// closed. `EMFILE` if the process has no descriptor left; the connection was closed, and the listener goes on.
    pub fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        loop {
            match sock::accept(&self.fd, 0) {
                Ok((fd, peer, local)) => {
                    if self.nonblock {
                        sock::set_nonblocking(&fd, false)?;
                    }
                    return Ok((TcpStream { fd, local, peer }, peer));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The connections as an iterator, which ends when the node is closed.
    pub fn incoming(&self) -> Incoming<'_> {
        Incoming(self)
    }
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpListener").field("addr", &self.local).field("fd", &self.fd.as_raw_fd()).finish()
    }
}

/// The connections of a listener, from [`TcpListener::incoming`].
///
/// Unlike that of `std::net` it ends: with the node.
#[derive(Debug)]
pub struct Incoming<'a>(&'a TcpListener);

impl Iterator for Incoming<'_> {
    type Item = io::Result<TcpStream>;

    fn next(&mut self) -> Option<io::Result<TcpStream>> {
        match self.0.accept() {
            Ok((stream, _)) => Some(Ok(stream)),
            Err(e) if e.kind() == io::ErrorKind::NotConnected => None,
            Err(e) => Some(Err(e)),
        }
    }
}

impl<'a> IntoIterator for &'a TcpListener {
    type Item = io::Result<TcpStream>;
    type IntoIter = Incoming<'a>;

    fn into_iter(self) -> Incoming<'a> {
        self.incoming()
    }
}

/// A UDP socket on the tailnet, like `std::net::UdpSocket`: from [`Node::listen_udp`](super::Node::listen_udp), for datagrams from and to any peer,
/// or from [`Node::dial_udp`](super::Node::dial_udp), connected to one. Each call sends or receives one datagram.
pub struct UdpSocket {
    fd: OwnedFd,
    local: SocketAddr,
    peer: Option<SocketAddr>,
}

common!(UdpSocket { peer });
timeouts!(UdpSocket);

impl UdpSocket {
    pub(crate) fn new(fd: OwnedFd, local: SocketAddr, peer: Option<SocketAddr>) -> UdpSocket {
        UdpSocket { fd, local, peer }
    }

    pub(crate) fn into_parts(self) -> (OwnedFd, SocketAddr, Option<SocketAddr>) {
        (self.fd, self.local, self.peer)
    }

    /// The peer that it is connected to.
    ///
    /// # Errors
    ///
    /// [`NotConnected`](io::ErrorKind::NotConnected) for a socket of [`Node::listen_udp`](super::Node::listen_udp).
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.peer.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Receives one datagram, and returns its length and where it came from. What does not fit in `buf` is cut.
    ///
    /// # Errors
    ///
    /// [`NotConnected`](io::ErrorKind::NotConnected), with [`ErrorKind::Closed`](crate::ErrorKind::Closed) inside, once the node is closed.
    pub fn recv_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        sock::recv_datagram(&self.fd, self.peer, sock::uninit(buf), 0)
    }

    /// The same without taking the datagram from the socket.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdpSocket::recv_from).
    pub fn peek_from(&self, buf: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        sock::recv_datagram(&self.fd, self.peer, sock::uninit(buf), libc::MSG_PEEK)
    }

    /// Receives one datagram of the peer that the socket is connected to (or of anyone, if it is not).
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdpSocket::recv_from).
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.recv_from(buf)?.0)
    }

    /// The same without taking the datagram from the socket.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdpSocket::recv_from).
    pub fn peek(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.peek_from(buf)?.0)
    }

    /// Sends one datagram to `target`.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` for more than 65,507 bytes, `EISCONN` for a connected socket.
    pub fn send_to(&self, buf: &[u8], target: SocketAddr) -> io::Result<usize> {
        sock::send_datagram(&self.fd, self.peer, buf, Some(target), 0)
    }

    /// Sends one datagram to the peer that the socket is connected to.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` for more than 65,507 bytes, [`NotConnected`](io::ErrorKind::NotConnected) for a socket without a peer.
    pub fn send(&self, buf: &[u8]) -> io::Result<usize> {
        sock::send_datagram(&self.fd, self.peer, buf, None, 0)
    }
}

impl fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpSocket").field("addr", &self.local).field("peer", &self.peer).field("fd", &self.fd.as_raw_fd()).finish()
    }
}
