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

fn root() -> PathBuf {
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

/// Fails a test that hangs.
pub async fn within<F: std::future::Future>(f: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), f).await.expect("the test hangs")
}
