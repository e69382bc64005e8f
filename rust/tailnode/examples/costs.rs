//! What a node adds to a program: threads, memory, descriptors, time to start and to close, and the price of a call. On cabi/testnet, as bench.rs;
//! `TAILNODE_TEST_MODE=isolated` measures a node in a process of its own. docs/rust.md has the figures.

use std::error::Error;
use std::time::Instant;

use tailnode::{runtime, Node, TcpStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn builder(name: &str) -> tailnode::Builder {
    let isolated = std::env::var("TAILNODE_TEST_MODE").is_ok_and(|m| m == "isolated");
    Node::builder().hostname(name).state_in_memory().ephemeral(true).isolated(isolated)
}

/// Threads, descriptors, and resident memory in MB of this process.
fn host() -> Result<(usize, usize, f64)> {
    let count = |dir: &str| Ok::<_, std::io::Error>(std::fs::read_dir(dir)?.count());
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kb = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).and_then(|l| l.split_whitespace().next()).unwrap_or("0");
    Ok((count("/proc/self/task")?, count("/proc/self/fd")?, kb.parse::<f64>()? / 1000.0))
}

async fn show(what: &str, node: Option<&Node>) -> Result<()> {
    let (threads, fds, rss) = host()?;
    print!("{what:<28} threads {threads:3}  descriptors {fds:4}  RSS {rss:5.1} MB");
    match node {
        Some(n) => {
            let s = runtime::stats(n).await?;
            println!(
                "  of which Go: {:5.1} MB, {} threads, {} GC cycles, longest pause {} us",
                s.total as f64 / 1e6,
                s.threads,
                s.gc_cycles,
                s.gc_pause_max_ns / 1000
            );
        }
        None => println!(),
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    show("before the node", None).await?;
    let began = Instant::now();
    let a = builder("rcosts").start().await?;
    let started = began.elapsed();
    a.up(None).await?;
    println!("started in {started:?}, on the tailnet after {:?}", began.elapsed());
    show("with the node", Some(&a)).await?;

    let mut calls = Vec::new();
    for _ in 0..1000 {
        let began = Instant::now();
        a.addresses().await?;
        calls.push(began.elapsed());
    }
    calls.sort();
    println!("a call: p50 {:?}, p99 {:?}", calls[500], calls[990]);

    for count in [10, 1000] {
        let mut open: Vec<TcpStream> = Vec::new();
        for _ in 0..count {
            let mut c = a.dial("gopeer:7").await?;
            c.write_all(&[7; 1024]).await?;
            c.read_exact(&mut [0; 1024]).await?;
            open.push(c);
        }
        show(&format!("with {count} connections used"), Some(&a)).await?;
    }
    runtime::trim(&a).await?;
    show("after them, trimmed", Some(&a)).await?;
    let began = Instant::now();
    a.close().await?;
    println!("closed in {:?}", began.elapsed());
    show("after close", None).await
}
