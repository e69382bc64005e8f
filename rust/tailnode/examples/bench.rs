//! What the crate costs beside Go in process and the C library: the same as cabi/test/bench.c and cabi/gobench do, for `bench/` and for
//! cabi/testnet, whose node "gopeer" is the other end. `TAILNODE_TEST_MODE=isolated` measures a node in a process of its own.

use std::error::Error;
use std::time::{Duration, Instant};

use tailnode::Node;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const TRIPS: usize = 10_000;
const AT_ONCE: usize = 8;
const EACH: usize = 250;

async fn up(name: &str) -> Result<Node> {
    let isolated = std::env::var("TAILNODE_TEST_MODE").is_ok_and(|m| m == "isolated");
    let b = Node::builder().hostname(name).state_in_memory().ephemeral(true).isolated(isolated);
    Ok(b.up().await?)
}

fn gbits(bytes: usize, took: Duration) -> f64 {
    bytes as f64 * 8e-9 / took.as_secs_f64()
}

async fn send(node: &Node, total: usize) -> Result<f64> {
    let buf = vec![0; 256 << 10];
    let mut c = node.dial("gopeer:9").await?;
    c.write_all(&buf).await?;
    let began = Instant::now();
    for _ in 0..total / buf.len() {
        c.write_all(&buf).await?;
    }
    c.shutdown().await?;
    c.read_exact(&mut [0; 8]).await?; // the count of what arrived
    Ok(gbits(total, began.elapsed()))
}

async fn receive(node: &Node, total: usize) -> Result<f64> {
    let mut buf = vec![0; 256 << 10];
    let mut c = node.dial("gopeer:19").await?;
    let began = Instant::now();
    c.write_all(&(total as u64).to_be_bytes()).await?;
    let mut got = 0;
    while got < total {
        match c.read(&mut buf).await? {
            0 => return Err("less than asked for".into()),
            n => got += n,
        }
    }
    Ok(gbits(got, began.elapsed()))
}

/// Microseconds of round trips, sorted.
async fn trips(node: &Node) -> Result<Vec<f64>> {
    let mut c = node.dial("gopeer:7").await?;
    let mut took = Vec::with_capacity(TRIPS);
    for i in 0..TRIPS + 1000 {
        let began = Instant::now();
        c.write_all(b"x").await?;
        c.read_exact(&mut [0]).await?;
        if i >= 1000 {
            took.push(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// Connections a second, each with a byte, from a to b.
async fn connections(a: &Node, b: &Node) -> Result<f64> {
    let listener = b.listen(":80").await?;
    let accept = tokio::spawn(async move {
        for _ in 0..AT_ONCE * EACH + 1 {
            let (mut c, _) = listener.accept().await?;
            c.write_all(b"x").await?;
        }
        Ok::<_, std::io::Error>(())
    });
    a.dial("rbenchb:80").await?.read_exact(&mut [0]).await?;
    let began = Instant::now();
    let mut dialers = Vec::new();
    for _ in 0..AT_ONCE {
        let a = a.clone();
        dialers.push(tokio::spawn(async move {
            for _ in 0..EACH {
                a.dial("rbenchb:80").await?.read_exact(&mut [0]).await?;
            }
            Result::Ok(())
        }));
    }
    for d in dialers {
        d.await??;
    }
    let rate = (AT_ONCE * EACH) as f64 / began.elapsed().as_secs_f64();
    accept.await??;
    Ok(rate)
}

#[tokio::main]
async fn main() -> Result<()> {
    let total = std::env::args().nth(1).map_or(Ok(512), |a| a.parse::<usize>())? << 20;
    let a = up("rbencha").await?;
    let (send, receive, rtt) = (send(&a, total).await?, receive(&a, total).await?, trips(&a).await?);
    let b = up("rbenchb").await?;
    let rate = connections(&a, &b).await?;
    for (row, value) in [
        ("send, Gbit/s", send),
        ("receive, Gbit/s", receive),
        ("round trip of 1 byte, p50, us", rtt[TRIPS / 2]),
        ("round trip of 1 byte, p99, us", rtt[TRIPS * 99 / 100]),
        ("dialled, accepted and closed, 1/s", rate),
    ] {
        println!("Rust\t{row}\t{value:.2}");
    }
    a.close().await?;
    b.close().await?;
    Ok(())
}
