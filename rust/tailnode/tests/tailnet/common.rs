//! A tailnet that exists for one test binary: cabi/testnet (a coordination server, a relay and a Go node) as a child process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use tailnode::{Builder, Node};

struct Testnet {
    control_url: String,
    auth_key: String,
    // The child ends when its standard input does, which is when this process ends.
    _child: Child,
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn program() -> PathBuf {
    if let Some(p) = std::env::var_os("TAILNODE_TESTNET") {
        return p.into();
    }
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("testnet");
    let go = std::env::var_os("GO").unwrap_or_else(|| "go".into());
    let status = Command::new(go)
        .args(["build", "-o"])
        .arg(&out)
        .arg("./cabi/testnet")
        .current_dir(root())
        .env("CGO_ENABLED", "0")
        .status()
        .expect("Go builds the test network");
    assert!(status.success(), "go build ./cabi/testnet");
    out
}

fn testnet() -> &'static Testnet {
    static NET: OnceLock<Testnet> = OnceLock::new();
    NET.get_or_init(|| {
        let mut child = Command::new(program())
            .args(["sh", "-c", "printf '%s\\n' \"$TS_CONTROL_URL\" \"$TS_AUTHKEY\"; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test network starts");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut line = || lines.next().expect("the test network came up").unwrap();
        Testnet { control_url: line(), auth_key: line(), _child: child }
    })
}

/// The control server and the auth key, for other programs to join.
pub fn to_join() -> (&'static str, &'static str) {
    let net = testnet();
    (&net.control_url, &net.auth_key)
}

/// Runs a test in a process of its own, for what concerns the whole process: true in that process. false: it has run, and it passed.
pub fn alone(name: &str) -> bool {
    if std::env::var("TAILNODE_TEST_ALONE").is_ok_and(|v| v == name) {
        return true;
    }
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("TAILNODE_TEST_ALONE", name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{name}: {}\n{text}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    assert!(text.contains("1 passed"), "{name} is the name of no test:\n{text}");
    false
}

/// The descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Waits until something holds.
pub async fn until(what: &str, mut f: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if f() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await; // nothing tells of it
    }
    panic!("it never came to be that {what}");
}

pub fn isolated() -> bool {
    std::env::var("TAILNODE_TEST_MODE").is_ok_and(|m| m == "isolated")
}

pub fn builder(hostname: &str) -> Builder {
    let net = testnet();
    Node::builder()
        .hostname(hostname)
        .control_url(&net.control_url)
        .auth_key(&net.auth_key)
        .state_in_memory()
        .isolated(isolated())
        .up_timeout(Duration::from_secs(60))
}

pub async fn up(hostname: &str) -> Node {
    builder(hostname).up().await.unwrap()
}

/// How long a test may take before it is taken to hang. The machine may be slow, and have more to do.
pub const HANG: Duration = Duration::from_secs(600);

/// How long a datagram may take before it is sent again.
pub const AGAIN: Duration = Duration::from_secs(1);

/// Fails a test that hangs.
pub async fn within<F: std::future::Future>(f: F) -> F::Output {
    tokio::time::timeout(HANG, f).await.expect("the test hangs")
}
