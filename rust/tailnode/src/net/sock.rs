//! The system calls on the library's descriptors. None of them waits, none raises SIGPIPE, none enters the library.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::task::{ready, Context, Poll};

use tailnode_sys as sys;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

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

pub(crate) fn recv(fd: &OwnedFd, buf: &mut [MaybeUninit<u8>], flags: i32) -> io::Result<usize> {
    // Safety: the kernel writes at most buf.len() bytes.
    cvt(unsafe { libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), flags | libc::MSG_DONTWAIT) })
}

pub(crate) fn send(fd: &OwnedFd, buf: &[u8]) -> io::Result<usize> {
    // Safety: the kernel reads buf.len() bytes.
    cvt(unsafe { libc::send(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

pub(crate) fn send_vectored(fd: &OwnedFd, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
    // Safety: zeroes are a valid msghdr; IoSlice has the layout of iovec.
    unsafe {
        let mut m: libc::msghdr = std::mem::zeroed();
        m.msg_iov = bufs.as_ptr().cast_mut().cast();
        m.msg_iovlen = bufs.len().min(1024) as _;
        cvt(libc::sendmsg(fd.as_raw_fd(), &m, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL))
    }
}

pub(crate) fn shutdown_write(fd: &OwnedFd) -> io::Result<()> {
    // Safety: no memory.
    if unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether the other end of a socket is gone: what tells the end from an empty datagram.
pub(crate) fn hung_up(fd: &OwnedFd) -> bool {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // Safety: one pollfd.
    unsafe { libc::poll(&mut p, 1, 0) == 1 && p.revents & (libc::POLLHUP | libc::POLLERR) != 0 }
}

/// One message of a listener: the connection and its addresses, remote then local. `Ok(None)`: the listener has ended.
pub(crate) fn accept(fd: &OwnedFd) -> io::Result<Option<(OwnedFd, SocketAddr, SocketAddr)>> {
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
        let n = cvt(libc::recvmsg(fd.as_raw_fd(), &mut h, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC))?;
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
        return Ok(None);
    }
    let (remote, local) = (from_addr(&m.remote), from_addr(&m.local));
    match (got, remote, local) {
        (Some(conn), Some(remote), Some(local)) if n == size_of_val(&m) && m.magic == sys::TAILNODE_ACCEPTED_MAGIC => {
            Ok(Some((conn, remote, local)))
        }
        // The kernel drops a descriptor for which there is no room; the connection is reset then.
        (None, Some(_), Some(_)) => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A datagram with its peer in front. `Ok(None)`: the socket has ended. What does not fit is cut.
pub(crate) fn recv_from(fd: &OwnedFd, buf: &mut [MaybeUninit<u8>], flags: i32) -> io::Result<Option<(usize, SocketAddr)>> {
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
        cvt(libc::recvmsg(fd.as_raw_fd(), &mut h, flags | libc::MSG_DONTWAIT))?
    };
    match (n.checked_sub(size_of_val(&a)), from_addr(&a)) {
        (Some(n), Some(from)) => Ok(Some((n, from))),
        _ if n == 0 => Ok(None),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

pub(crate) fn send_to(fd: &OwnedFd, buf: &[u8], to: SocketAddr) -> io::Result<usize> {
    let a = to_addr(to);
    let n = send_vectored(
        fd,
        &[
            // Safety: a struct of integers without padding, as bytes.
            io::IoSlice::new(unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&a).cast(), size_of_val(&a)) }),
            io::IoSlice::new(buf),
        ],
    )?;
    Ok(n.saturating_sub(size_of_val(&a)))
}

/// Calls f until it does not say that it would wait, waiting for the reactor in between. full is how much f can move at most: less than
/// that on a stream means that the next call would wait.
pub(crate) fn poll_read(
    fd: &AsyncFd<OwnedFd>,
    cx: &mut Context<'_>,
    full: usize,
    mut f: impl FnMut(&OwnedFd) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        let mut ready = ready!(fd.poll_read_ready(cx))?;
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

/// The same for writing.
pub(crate) fn poll_write(
    fd: &AsyncFd<OwnedFd>,
    cx: &mut Context<'_>,
    full: usize,
    mut f: impl FnMut(&OwnedFd) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        let mut ready = ready!(fd.poll_write_ready(cx))?;
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

/// A buffer as one that the kernel may write.
pub(crate) fn uninit(buf: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // Safety: the functions above only ever write initialised bytes into it.
    unsafe { std::slice::from_raw_parts_mut(buf.as_mut_ptr().cast(), buf.len()) }
}
