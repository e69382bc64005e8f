use std::io;
use std::mem::{offset_of, MaybeUninit};
use std::os::fd::OwnedFd;

use tailnode_sys as sys;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;

use crate::error::{Error, ErrorKind, Result};
use crate::net::sock;

/// Where a node stands.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is not connected and does not try.
    Stopped,
    /// It connects.
    Starting,
    /// Somebody must visit the auth URL.
    NeedsLogin,
    /// An administrator must approve the machine.
    NeedsApproval,
    /// It is on the tailnet.
    Running,
}

/// A change.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The state, and what is wrong, if anything. The first event of every watch.
    State(State, String),
    /// Peers, names or addresses changed: [`Node::status`](crate::Node::status) has them.
    Netmap,
    /// Somebody must visit this URL.
    AuthUrl(String),
}

/// The changes of a node, from [`Node::watch`](crate::Node::watch). It does not keep its node alive.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

const HEAD: usize = offset_of!(sys::tailnode_event, text);

impl Watch {
    pub(crate) fn new(fd: OwnedFd) -> Result<Watch> {
        Ok(Watch(sock::register(fd, Interest::READABLE).map_err(|e| Error::from_io("watch", e))?))
    }

    /// Waits for the next change; `None` once the node is closed. Who is slow misses intermediate states, never the last.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::CoreLost`] if the helper process that ran the node has ended.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped before it completes, no change is lost.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        let mut buf = EMPTY;
        loop {
            let got = self.0.async_io(Interest::READABLE, |fd| sock::recv(fd, &mut buf, sock::NOW)).await;
            match event(got, &buf) {
                Some(result) => return result,
                None => continue, // of a kind that is newer than this crate
            }
        }
    }
}

pub(crate) type Buffer = [MaybeUninit<u8>; size_of::<sys::tailnode_event>()];
pub(crate) const EMPTY: Buffer = [MaybeUninit::zeroed(); size_of::<sys::tailnode_event>()];

/// What a message tells; a zeroed buffer that recv has written to. `None`: nothing that is known here.
pub(crate) fn event(got: io::Result<usize>, buf: &Buffer) -> Option<Result<Option<Event>>> {
    Some(match got {
        Ok(0) => Ok(None),
        Ok(n) => {
            // Safety: all of it is initialised from the start, and n is not more than there is.
            let bytes: &[u8] = unsafe { std::slice::from_raw_parts(buf.as_ptr().cast(), n.min(buf.len())) };
            Ok(Some(parse(bytes)?))
        }
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
            Err(Error::new(ErrorKind::CoreLost, "tailnode: the process that ran the node has ended"))
        }
        Err(e) => Err(Error::from_io("watch", e)),
    })
}

fn parse(b: &[u8]) -> Option<Event> {
    let u32_at = |i: usize| Some(u32::from_ne_bytes(b.get(i..i + 4)?.try_into().ok()?));
    let text = String::from_utf8_lossy(b.get(HEAD..)?).into_owned();
    Some(match u32_at(0)? {
        sys::TAILNODE_EVENT_STATE => Event::State(
            match u32_at(4)? {
                sys::TAILNODE_STATE_STARTING => State::Starting,
                sys::TAILNODE_STATE_NEEDS_LOGIN => State::NeedsLogin,
                sys::TAILNODE_STATE_NEEDS_APPROVAL => State::NeedsApproval,
                sys::TAILNODE_STATE_RUNNING => State::Running,
                _ => State::Stopped,
            },
            text,
        ),
        sys::TAILNODE_EVENT_NETMAP => Event::Netmap,
        sys::TAILNODE_EVENT_AUTH_URL => Event::AuthUrl(text),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u32, state: u32, text: &str) -> Vec<u8> {
        let mut b = Vec::new();
        for v in [kind, state, text.len() as u32, 0] {
            b.extend_from_slice(&v.to_ne_bytes());
        }
        b.extend_from_slice(text.as_bytes());
        b
    }

    #[test]
    fn events() {
        assert_eq!(parse(&message(1, 4, "")), Some(Event::State(State::Running, String::new())));
        assert_eq!(parse(&message(1, 2, "log in")), Some(Event::State(State::NeedsLogin, "log in".into())));
        assert_eq!(parse(&message(2, 4, "")), Some(Event::Netmap));
        assert_eq!(parse(&message(3, 2, "https://x")), Some(Event::AuthUrl("https://x".into())));
        assert_eq!(parse(&message(9, 4, "")), None);
        assert_eq!(parse(&[1, 0, 0, 0]), None);
        assert_eq!(parse(&[]), None);
    }
}
