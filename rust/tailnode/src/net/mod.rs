//! Sockets of the tailnet, shaped like those of `tokio::net`.

mod listener;
pub(crate) mod sock;
mod split;
mod stream;
mod udp;

pub use listener::{Incoming, TcpListener};
pub use split::{OwnedReadHalf, OwnedWriteHalf, ReadHalf, ReuniteError, WriteHalf};
pub use stream::TcpStream;
pub use udp::UdpSocket;
