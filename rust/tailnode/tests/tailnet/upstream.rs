//! Rust and upstream's tsnet, both ways.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{root, to_join, up, within};

/// interop/rustpeer, which runs upstream's node. It ends with its standard input.
fn peer() -> Child {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rustpeer");
    let go = std::env::var_os("GO").unwrap_or_else(|| "go".into());
    let status = Command::new(go)
        .args(["build", "-o"])
        .arg(&out)
        .arg("./rustpeer")
        .current_dir(root().join("interop"))
        .env("CGO_ENABLED", "0")
        .status()
        .expect("Go builds upstream's node");
    assert!(status.success(), "go build ./rustpeer");
    let (control, key) = to_join();
    Command::new(&out)
        .env("TS_CONTROL_URL", control)
        .env("TS_AUTHKEY", key)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("upstream's node starts")
}

#[tokio::test(flavor = "multi_thread")]
async fn to_upstream_and_back() {
    let mut child = tokio::task::spawn_blocking(peer).await.unwrap();
    let (tx, mut lines) = tokio::sync::mpsc::unbounded_channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|l| tx.send(l)));
    within(async {
        assert_eq!(lines.recv().await.expect("upstream's node comes up"), "up");
        let a = up("rupstream").await;
        let listener = a.listen(":80").await.unwrap();

        // We dial: 8 MB there and back with both halves at work, then the end, both ways.
        const LEN: usize = 8 << 20;
        let (mut r, mut w) = a.dial("tspeer:7").await.unwrap().into_split();
        let sender = tokio::spawn(async move {
            let buf: Vec<u8> = (0..64 << 10).map(|i| (i % 251) as u8).collect();
            for _ in 0..LEN / buf.len() {
                w.write_all(&buf).await.unwrap();
            }
            w.shutdown().await.unwrap();
            w
        });
        let mut all = Vec::new();
        r.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), LEN);
        assert!(all.iter().enumerate().all(|(i, b)| *b == (i % (64 << 10) % 251) as u8));
        drop(sender.await.unwrap());

        // Upstream's dials: it is told where, and prints what it hears.
        let me = a.addresses().await.unwrap().0.unwrap();
        writeln!(child.stdin.as_mut().unwrap(), "dial {me}:80").unwrap();
        let (mut conn, from) = listener.accept().await.unwrap();
        let who = a.whois(from).await.unwrap();
        assert_eq!(who.node.computed_name, "tspeer");
        conn.write_all(b"hello, upstream\n").await.unwrap();
        conn.shutdown().await.unwrap();
        let mut heard = String::new();
        conn.read_to_string(&mut heard).await.unwrap(); // it answers after our end
        assert_eq!(heard, "heard 16 bytes");
        assert_eq!(lines.recv().await.unwrap(), "hello, upstream");

        // Refused and reset are told apart.
        let e = a.dial("tspeer:9999").await.unwrap_err();
        assert_eq!(e.kind(), tailnode::ErrorKind::Refused, "{e}");
        drop(child.stdin.take());
        a.close().await.unwrap();
    })
    .await;
    child.wait().unwrap();
}
