//! Every future is dropped at each of its await points in turn: nothing is lost, nothing is left behind.

use std::future::{poll_fn, Future};
use std::net::SocketAddr;
use std::pin::pin;
use std::task::Poll;

use tailnode::http::Connector;
use tailnode::{runtime, Node, PingType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{alone, builder, descriptors, until, up, within, AGAIN};

/// Polls a future when it wants to be, `polls` times at most, and drops it: None if it is not done by then.
async fn give_up<F: Future>(f: F, polls: usize) -> Option<F::Output> {
    let mut f = pin!(f);
    let mut left = polls;
    poll_fn(|cx| {
        left -= 1;
        match f.as_mut().poll(cx) {
            Poll::Ready(v) => Poll::Ready(Some(v)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Gives what `f` makes up after one poll, after two, and so on until one is done.
async fn at_each_await<T, F: Future<Output = T>>(mut f: impl FnMut() -> F) -> T {
    for polls in 1.. {
        if let Some(done) = give_up(f(), polls).await {
            return done;
        }
    }
    unreachable!()
}

#[test]
fn at_every_await() {
    if !alone("cancel::at_every_await") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(within(async {
        let (a, b) = (up("rcancela").await, up("rcancelb").await);
        let listener = b.listen(":80").await.unwrap();
        // What the first of everything opens stays.
        everything(&a).await;
        let calls = idle(&a).await;
        let open = descriptors();
        for _ in 0..5 {
            everything(&a).await;
        }
        // Connections whose dialling was given up late are accepted and end.
        let mut last = a.dial("rcancelb:80").await.unwrap();
        last.write_all(b"last").await.unwrap();
        last.shutdown().await.unwrap();
        loop {
            let (mut conn, _) = at_each_await(|| listener.accept()).await.unwrap();
            let mut all = Vec::new();
            if conn.read_to_end(&mut all).await.is_ok() && all == b"last" {
                break;
            }
            assert!(all.is_empty());
        }
        drop(last);
        assert_eq!(idle(&a).await, calls);
        until("the descriptors are gone", || descriptors() <= open).await;

        // Data: a stream that is given up on all the time loses and repeats nothing.
        let mut conn = a.dial("gopeer:7").await.unwrap();
        for i in 0..2000u32 {
            let bytes = i.to_be_bytes();
            let mut sent = 0;
            while sent < 4 {
                sent += at_each_await_write(&mut conn, &bytes[sent..]).await;
            }
            let mut got = [0; 4];
            let mut have = 0;
            while have < 4 {
                for polls in 1.. {
                    let _ = give_up(conn.peek(&mut [0; 4]), 1).await;
                    if let Some(n) = give_up(conn.read(&mut got[have..]), polls).await {
                        have += n.unwrap();
                        break;
                    }
                }
            }
            assert_eq!(u32::from_be_bytes(got), i);
        }
        drop(conn);

        // Nodes: one that is given up at any point of its coming up is gone.
        for polls in 1..6 {
            let _ = give_up(builder("rcancelc").up(), polls).await;
        }
        until("the descriptors are gone", || descriptors() <= open).await;
        // Closing that is given up goes on, if it was not quick enough to be done.
        if let Some(done) = give_up(b.close(), 1).await {
            done.unwrap();
        }
        while listener.accept().await.is_ok() {}
        a.close().await.unwrap();
    }));
}

async fn at_each_await_write(conn: &mut tailnode::TcpStream, bytes: &[u8]) -> usize {
    for polls in 1.. {
        if let Some(n) = give_up(conn.write(bytes), polls).await {
            return n.unwrap();
        }
    }
    unreachable!()
}

/// Waits until the core has no other call in flight; isolated nodes count their own.
async fn idle(a: &Node) -> u64 {
    loop {
        let s = runtime::stats(a).await.unwrap();
        if s.calls_in_flight <= 1 {
            return s.calls_in_flight;
        }
        tokio::task::yield_now().await;
    }
}

async fn everything(a: &Node) {
    let peer: SocketAddr = a.dial("gopeer:7").await.unwrap().peer_addr().unwrap();
    at_each_await(|| a.up(None)).await.unwrap();
    at_each_await(|| a.status(true)).await.unwrap();
    at_each_await(|| a.addresses()).await.unwrap();
    at_each_await(|| a.whois(peer)).await.unwrap();
    at_each_await(|| a.ping(peer.ip(), PingType::Tsmp)).await.unwrap();
    at_each_await(|| a.loopback()).await.unwrap();
    at_each_await(|| a.listen(":0")).await.unwrap();
    at_each_await(|| a.listen_udp(":0")).await.unwrap();
    at_each_await(|| a.dial(peer)).await.unwrap();
    at_each_await(|| a.dial("rcancelb:80")).await.unwrap();
    at_each_await(|| tower_service::Service::call(&mut Connector::new(a), "http://gopeer:7/".parse().unwrap())).await.unwrap();
    let udp = at_each_await(|| a.dial_udp(peer)).await.unwrap();
    let mut buf = [0; 8];
    loop {
        at_each_await(|| udp.send(b"x")).await.unwrap();
        if let Ok(n) = tokio::time::timeout(AGAIN, at_recv(&udp, &mut buf)).await {
            assert_eq!(n, 1);
            break;
        }
    }
    let mut watch = at_each_await(|| a.watch()).await.unwrap();
    for polls in 1.. {
        if give_up(watch.next(), polls).await.is_some() {
            break;
        }
    }
    at_each_await(|| runtime::stats(a)).await.unwrap();
    at_each_await(|| runtime::trim(a)).await.unwrap();
    at_each_await(|| runtime::set_gc_percent(a, 100)).await.unwrap();
    at_each_await(|| runtime::set_memory_limit(a, None)).await.unwrap();
    at_each_await(|| runtime::set_max_procs(a, 2)).await.unwrap();
    at_each_await(|| runtime::memory_pressure(a, runtime::Pressure::None)).await.unwrap();
}

async fn at_recv(udp: &tailnode::UdpSocket, buf: &mut [u8]) -> usize {
    for polls in 1.. {
        if let Some(n) = give_up(udp.recv(buf), polls).await {
            return n.unwrap();
        }
    }
    unreachable!()
}
