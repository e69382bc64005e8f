//! The system calls on the library's descriptors. None of them raises SIGPIPE, none enters the library, and none waits if its flags have [`NOW`].

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::task::{ready, Context, Poll};
use std::time::Duration;

use tailnode_sys as sys;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

use crate::error::{Error, ErrorKind};

/// The flag of calls that do not wait, whatever the mode of the descriptor.
pub(crate) const NOW: i32 = libc::MSG_DONTWAIT;

pub(crate) fn from_addr(a: &sys::tailnode_addr) -> Option<SocketAddr> {
    let ip = match a.family {
        4 => IpAddr::V4(Ipv4Addr::new(a.ip[0], a.ip[1], a.ip[2], a.ip[3])),
        6 => IpAddr::V6(Ipv6Addr::from(a.ip)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, a.port))
}

pub(crate) fn to_addr(a: SocketAddr) -> sys::tailnode_addr {
    let mut out = sys::tailnode_addr { port: a.port(), ..Default::default() };
    match a.ip() {
        IpAddr::V4(ip) => {
            out.ip[..4].copy_from_slice(&ip.octets());
            out.family = 4;
        }
        IpAddr::V6(ip) => {
            out.ip = ip.octets();
            out.family = 6;
        }
    }
    out
}

/// Gives a descriptor to the runtime's reactor.
///
/// # Panics
///
/// Outside of a Tokio runtime with I/O enabled.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // Safety: an OwnedFd is the same open descriptor for as long as it lives, and AsyncFd deregisters it before it goes.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

fn cvt(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

pub(crate) fn recv(fd: &impl AsRawFd, buf: &mut [MaybeUninit<u8>], flags: i32) -> io::Result<usize> {
    // Safety: the kernel writes at most buf.len() bytes.
    cvt(unsafe { libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), flags) })
}

pub(crate) fn send(fd: &impl AsRawFd, buf: &[u8], flags: i32) -> io::Result<usize> {
    // Safety: the kernel reads buf.len() bytes.
    cvt(unsafe { libc::send(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), flags | libc::MSG_NOSIGNAL) })
}

pub(crate) fn send_vectored(fd: &impl AsRawFd, bufs: &[io::IoSlice<'_>], flags: i32) -> io::Result<usize> {
    // Safety: zeroes are a valid msghdr; IoSlice has the layout of iovec.
    unsafe {
        let mut m: libc::msghdr = std::mem::zeroed();
        m.msg_iov = bufs.as_ptr().cast_mut().cast();
        m.msg_iovlen = bufs.len().min(1024) as _;
        cvt(libc::sendmsg(fd.as_raw_fd(), &m, flags | libc::MSG_NOSIGNAL))
    }
}

pub(crate) fn shutdown(fd: &impl AsRawFd, how: Shutdown) -> io::Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // Safety: no memory.
    cvt(unsafe { libc::shutdown(fd.as_raw_fd(), how) } as isize).map(drop)
}

/// SO_RCVTIMEO or SO_SNDTIMEO.
pub(crate) fn set_timeout(fd: &impl AsRawFd, which: i32, limit: Option<Duration>) -> io::Result<()> {
    if limit == Some(Duration::ZERO) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "cannot set a 0 duration timeout"));
    }
    let d = limit.unwrap_or_default();
    let mut tv = libc::timeval {
        tv_sec: libc::time_t::try_from(d.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: d.subsec_micros() as libc::suseconds_t,
    };
    if limit.is_some() && tv.tv_sec == 0 && tv.tv_usec == 0 {
        tv.tv_usec = 1; // zero would be no limit
    }
    // Safety: the kernel reads the size of a timeval.
    cvt(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, which, std::ptr::from_ref(&tv).cast(), size_of_val(&tv) as libc::socklen_t)
    } as isize)
    .map(drop)
}

pub(crate) fn timeout(fd: &impl AsRawFd, which: i32) -> io::Result<Option<Duration>> {
    let mut tv = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut len = size_of_val(&tv) as libc::socklen_t;
    // Safety: the kernel writes at most the size of a timeval.
    cvt(unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, which, std::ptr::from_mut(&mut tv).cast(), &mut len) } as isize)?;
    let d = Duration::new(tv.tv_sec as u64, tv.tv_usec as u32 * 1000);
    Ok((!d.is_zero()).then_some(d))
}

pub(crate) fn take_error(fd: &impl AsRawFd) -> io::Result<Option<io::Error>> {
    let mut e: i32 = 0;
    let mut len = size_of_val(&e) as libc::socklen_t;
    // Safety: the kernel writes at most the size of an int.
    cvt(
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, std::ptr::from_mut(&mut e).cast(), &mut len) } as isize
    )?;
    Ok((e != 0).then(|| io::Error::from_raw_os_error(e)))
}

pub(crate) fn set_nonblocking(fd: &impl AsRawFd, on: bool) -> io::Result<()> {
    let mut on = libc::c_int::from(on);
    // Safety: the kernel reads an int.
    cvt(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &mut on) } as isize).map(drop)
}

fn closed(what: &str) -> io::Error {
    Error::new(ErrorKind::Closed, format!("tailnode: {what} is closed")).into()
}

/// Whether the other end of a socket is gone: what tells the end from an empty datagram.
fn hung_up(fd: &impl AsRawFd) -> bool {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // Safety: one pollfd.
    unsafe { libc::poll(&mut p, 1, 0) == 1 && p.revents & (libc::POLLHUP | libc::POLLERR) != 0 }
}

/// One message of a listener: the connection and its addresses, remote then local.
pub(crate) fn accept(fd: &impl AsRawFd, flags: i32) -> io::Result<(OwnedFd, SocketAddr, SocketAddr)> {
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let mut control = Control([0; 64]);
    let mut m = MaybeUninit::<sys::tailnode_accepted>::zeroed();
    let mut iov = libc::iovec { iov_base: m.as_mut_ptr().cast(), iov_len: size_of::<sys::tailnode_accepted>() };
    // Safety: the kernel fills memory that lives here, and says how much; a struct of integers is valid whatever was written.
    let (n, m, got) = unsafe {
        let mut h: libc::msghdr = std::mem::zeroed();
        h.msg_iov = &mut iov;
        h.msg_iovlen = 1;
        h.msg_control = control.0.as_mut_ptr().cast();
        h.msg_controllen = libc::CMSG_SPACE(size_of::<i32>() as u32) as _;
        let n = match cvt(libc::recvmsg(fd.as_raw_fd(), &mut h, flags | libc::MSG_CMSG_CLOEXEC)) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => 0,
            r => r?,
        };
        let mut got = None;
        let c = libc::CMSG_FIRSTHDR(&h);
        if !c.is_null()
            && (*c).cmsg_level == libc::SOL_SOCKET
            && (*c).cmsg_type == libc::SCM_RIGHTS
            && (*c).cmsg_len as usize >= libc::CMSG_LEN(size_of::<i32>() as u32) as usize
        {
            got = Some(OwnedFd::from_raw_fd(libc::CMSG_DATA(c).cast::<i32>().read_unaligned()));
        }
        (n, m.assume_init(), got)
    };
    if n == 0 {
        return Err(closed("the listener"));
    }
    let (remote, local) = (from_addr(&m.remote), from_addr(&m.local));
    match (got, remote, local) {
        (Some(conn), Some(remote), Some(local)) if n == size_of_val(&m) && m.magic == sys::TAILNODE_ACCEPTED_MAGIC => {
            Ok((conn, remote, local))
        }
        // The kernel drops a descriptor for which there is no room; the connection is reset then.
        (None, Some(_), Some(_)) => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// One datagram of the peer that the socket is connected to, or of anyone, who then stands in front of it. What does not fit is cut.
pub(crate) fn recv_datagram(
    fd: &impl AsRawFd,
    peer: Option<SocketAddr>,
    buf: &mut [MaybeUninit<u8>],
    flags: i32,
) -> io::Result<(usize, SocketAddr)> {
    if let Some(peer) = peer {
        return match recv(fd, buf, flags) {
            // An empty datagram looks like the end, but for the hang-up.
            Ok(0) if hung_up(fd) => Err(closed("the socket")),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(closed("the socket")),
            r => Ok((r?, peer)),
        };
    }
    let mut a = sys::tailnode_addr::default();
    let mut iov = [
        libc::iovec { iov_base: std::ptr::from_mut(&mut a).cast(), iov_len: size_of_val(&a) },
        libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() },
    ];
    // Safety: the kernel writes into a and at most buf.len() bytes into buf.
    let n = unsafe {
        let mut h: libc::msghdr = std::mem::zeroed();
        h.msg_iov = iov.as_mut_ptr();
        h.msg_iovlen = 2;
        match cvt(libc::recvmsg(fd.as_raw_fd(), &mut h, flags)) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => 0,
            r => r?,
        }
    };
    match (n.checked_sub(size_of_val(&a)), from_addr(&a)) {
        (Some(n), Some(from)) => Ok((n, from)),
        _ if n == 0 => Err(closed("the socket")),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The largest payload of a UDP datagram over IPv4.
const MAX_DATAGRAM: usize = 65507;

pub(crate) fn send_datagram(
    fd: &impl AsRawFd,
    peer: Option<SocketAddr>,
    buf: &[u8],
    to: Option<SocketAddr>,
    flags: i32,
) -> io::Result<usize> {
    if buf.len() > MAX_DATAGRAM {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let a = match (peer, to) {
        (None, Some(to)) => to_addr(to),
        (Some(_), None) => return send(fd, buf, flags),
        (None, None) => return Err(io::ErrorKind::NotConnected.into()),
        (Some(_), Some(_)) => return Err(io::Error::from_raw_os_error(libc::EISCONN)),
    };
    // Safety: a struct of integers without padding, as bytes.
    let head = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&a).cast(), size_of_val(&a)) };
    let n = send_vectored(fd, &[io::IoSlice::new(head), io::IoSlice::new(buf)], flags)?;
    Ok(n.saturating_sub(head.len()))
}

/// Calls f until it does not say that it would wait, waiting for the reactor in between. full is how much f can move at most: less than
/// that on a stream means that the next call would wait.
macro_rules! polled {
    ($name:ident, $ready:ident) => {
        pub(crate) fn $name(
            fd: &AsyncFd<OwnedFd>,
            cx: &mut Context<'_>,
            full: usize,
            mut f: impl FnMut(&OwnedFd) -> io::Result<usize>,
        ) -> Poll<io::Result<usize>> {
            loop {
                let mut ready = ready!(fd.$ready(cx))?;
                match f(fd.get_ref()) {
                    Ok(n) => {
                        if 0 < n && n < full {
                            ready.clear_ready();
                        }
                        return Poll::Ready(Ok(n));
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Poll::Ready(Err(e)),
                }
            }
        }
    };
}

polled!(poll_read, poll_read_ready);
polled!(poll_write, poll_write_ready);

/// A buffer as one that the kernel may write.
pub(crate) fn uninit(buf: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // Safety: the functions above only ever write initialised bytes into it.
    unsafe { std::slice::from_raw_parts_mut(buf.as_mut_ptr().cast(), buf.len()) }
}
