use std::error::Error;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::TcpStream;

/// The reading half of [`TcpStream::split`].
#[derive(Debug)]
pub struct ReadHalf<'a>(&'a TcpStream);

/// The writing half of [`TcpStream::split`]. Dropping it does nothing.
#[derive(Debug)]
pub struct WriteHalf<'a>(&'a TcpStream);

/// The reading half of [`TcpStream::into_split`].
#[derive(Debug)]
pub struct OwnedReadHalf(Arc<TcpStream>);

/// The writing half of [`TcpStream::into_split`]. Dropping it sends a FIN, unless it is [forgotten](OwnedWriteHalf::forget).
#[derive(Debug)]
pub struct OwnedWriteHalf {
    inner: Arc<TcpStream>,
    shutdown_on_drop: bool,
}

pub(super) fn split(s: &mut TcpStream) -> (ReadHalf<'_>, WriteHalf<'_>) {
    (ReadHalf(s), WriteHalf(s))
}

pub(super) fn into_split(s: TcpStream) -> (OwnedReadHalf, OwnedWriteHalf) {
    let s = Arc::new(s);
    (OwnedReadHalf(s.clone()), OwnedWriteHalf { inner: s, shutdown_on_drop: true })
}

macro_rules! read_half {
    ($t:ty) => {
        impl $t {
            /// As [`TcpStream::peek`].
            ///
            /// # Errors
            ///
            /// Those of reading.
            ///
            /// # Cancel safety
            ///
            /// This method is cancel safe.
            pub async fn peek(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                self.stream().peek(buf).await
            }

            /// As [`TcpStream::readable`].
            ///
            /// # Errors
            ///
            /// If the runtime is shut down.
            ///
            /// # Cancel safety
            ///
            /// This method is cancel safe.
            pub async fn readable(&self) -> io::Result<()> {
                self.stream().readable().await
            }

            /// As [`TcpStream::try_read`].
            ///
            /// # Errors
            ///
            /// As [`TcpStream::try_read`].
            pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
                self.stream().try_read(buf)
            }
        }

        impl AsyncRead for $t {
            fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                self.stream().poll_read_shared(cx, buf)
            }
        }
    };
}

macro_rules! write_half {
    ($t:ty, |$this:ident| $done:expr) => {
        impl $t {
            /// As [`TcpStream::writable`].
            ///
            /// # Errors
            ///
            /// If the runtime is shut down.
            ///
            /// # Cancel safety
            ///
            /// This method is cancel safe.
            pub async fn writable(&self) -> io::Result<()> {
                self.stream().writable().await
            }

            /// As [`TcpStream::try_write`].
            ///
            /// # Errors
            ///
            /// As [`TcpStream::try_write`].
            pub fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
                self.stream().try_write(buf)
            }
        }

        impl AsyncWrite for $t {
            fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                self.stream().poll_write_shared(cx, buf)
            }

            fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
                self.stream().poll_write_vectored_shared(cx, bufs)
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }

            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                let result = self.stream().shutdown_write();
                if result.is_ok() {
                    let $this = self.get_mut();
                    $done
                }
                Poll::Ready(result)
            }
        }
    };
}

macro_rules! both {
    ($t:ty, |$this:ident| $stream:expr) => {
        impl $t {
            fn stream(&self) -> &TcpStream {
                let $this = self;
                $stream
            }

            /// The peer's address on the tailnet.
            ///
            /// # Errors
            ///
            /// None; the signature is that of `tokio::net`.
            pub fn peer_addr(&self) -> io::Result<SocketAddr> {
                self.stream().peer_addr()
            }

            /// This end's address on the tailnet.
            ///
            /// # Errors
            ///
            /// None; the signature is that of `tokio::net`.
            pub fn local_addr(&self) -> io::Result<SocketAddr> {
                self.stream().local_addr()
            }
        }
    };
}

both!(ReadHalf<'_>, |this| this.0);
both!(WriteHalf<'_>, |this| this.0);
both!(OwnedReadHalf, |this| &this.0);
both!(OwnedWriteHalf, |this| &this.inner);
read_half!(ReadHalf<'_>);
read_half!(OwnedReadHalf);
write_half!(WriteHalf<'_>, |_this| {});
write_half!(OwnedWriteHalf, |this| {
    this.shutdown_on_drop = false;
});

impl OwnedReadHalf {
    /// Puts the halves together again.
    ///
    /// # Errors
    ///
    /// Gives both back if they are not of the same stream.
    pub fn reunite(self, other: OwnedWriteHalf) -> Result<TcpStream, ReuniteError> {
        if !Arc::ptr_eq(&self.0, &other.inner) {
            return Err(ReuniteError(self, other));
        }
        other.forget();
        // Only the two halves share it, and the other one is gone.
        Ok(Arc::try_unwrap(self.0).expect("the halves are two"))
    }
}

impl OwnedWriteHalf {
    /// Puts the halves together again.
    ///
    /// # Errors
    ///
    /// Gives both back if they are not of the same stream.
    pub fn reunite(self, other: OwnedReadHalf) -> Result<TcpStream, ReuniteError> {
        other.reunite(self)
    }

    /// Drops the half without ending it: the connection ends when the other half is dropped as well.
    pub fn forget(mut self) {
        self.shutdown_on_drop = false;
    }
}

impl Drop for OwnedWriteHalf {
    fn drop(&mut self) {
        if self.shutdown_on_drop {
            let _ = self.inner.shutdown_write();
        }
    }
}

/// The halves of two different streams, which cannot be put together.
#[derive(Debug)]
pub struct ReuniteError(pub OwnedReadHalf, pub OwnedWriteHalf);

impl fmt::Display for ReuniteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the halves are not of the same stream")
    }
}

impl Error for ReuniteError {}
