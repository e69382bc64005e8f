//! What holds without a tailnet: the codes, and what may cross threads.

use std::io;
use std::path::Path;

use tailnode::net::{OwnedReadHalf, OwnedWriteHalf};
use tailnode::{Builder, Error, ErrorKind, Node, Status, TcpListener, TcpStream, UdpSocket, Watch, WhoIs};

/// ErrorKind is the list that Go and C have.
#[test]
fn codes_are_those_of_the_vectors() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/vectors/codes.json");
    let v: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let codes = v["Codes"].as_array().unwrap();
    assert_eq!(codes.len(), ErrorKind::ALL.len());
    for c in codes {
        let (code, name) = (c["Code"].as_i64().unwrap() as i32, c["Name"].as_str().unwrap());
        let kind = ErrorKind::from_code(code);
        assert_eq!((kind.code(), kind.name()), (code, name));
    }
    assert_eq!(ErrorKind::from_code(-1), ErrorKind::Internal);
}

/// And the header's: every code that is an error has a kind.
#[test]
fn codes_are_those_of_the_header() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cabi/include/tailnode.h");
    let header = std::fs::read_to_string(path).unwrap();
    let list = header.split("typedef enum tailnode_code {").nth(1).unwrap().split('}').next().unwrap();
    let mut seen = 0;
    for line in list.lines().map(str::trim).filter(|l| l.starts_with("TAILNODE_")) {
        let (name, rest) = line.split_once(" = ").unwrap();
        let code: i32 = rest.split([',', ' ']).next().unwrap().parse().unwrap();
        if name == "TAILNODE_OK" {
            continue;
        }
        let kind = ErrorKind::from_code(code);
        assert_eq!(kind.code(), code, "{name}");
        assert_eq!(format!("{kind:?}").to_uppercase(), name["TAILNODE_".len()..].replace('_', ""));
        seen += 1;
    }
    assert_eq!(seen, ErrorKind::ALL.len());
}

/// Every crate that this one pulls in, for whatever system or feature, or for its tests, may be used under terms that ask for no more than a notice.
#[test]
fn licences() {
    const FINE: [&str; 9] =
        ["MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "Unicode-3.0", "Unlicense", "LLVM-exception"];
    let out = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--all-features", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let all: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = all["packages"].as_array().unwrap();
    assert!(packages.len() > 10);
    for p in packages {
        let (name, licence) = (&p["name"], p["license"].as_str().unwrap_or_default());
        let names: Vec<_> = licence.split([' ', '/', '(', ')']).filter(|w| !matches!(*w, "" | "OR" | "AND" | "WITH")).collect();
        assert!(!names.is_empty() && names.iter().all(|n| FINE.contains(n)), "{name}: {licence:?}");
    }
}

#[test]
fn send_and_sync() {
    fn both<T: Send + Sync + 'static>() {}
    both::<Node>();
    both::<Builder>();
    both::<TcpListener>();
    both::<TcpStream>();
    both::<OwnedReadHalf>();
    both::<OwnedWriteHalf>();
    both::<tailnode::net::ReadHalf<'static>>();
    both::<tailnode::net::WriteHalf<'static>>();
    both::<tailnode::net::Incoming>();
    both::<tailnode::Loopback>();
    both::<tailnode::Event>();
    both::<tailnode::http::Connector>();
    both::<tailnode::http::PeerAddr>();
    both::<UdpSocket>();
    both::<Watch>();
    both::<Error>();
    fn send<T: Send>(_: &T) {}
    fn futures(n: &Node, l: &TcpListener) {
        send(&n.dial("x:1"));
        send(&n.listen(":1"));
        send(&n.status(true));
        send(&n.close());
        send(&l.accept());
        send(&n.listen_udp(":1"));
        send(&n.dial_udp("x:1"));
        send(&n.whois("x"));
        send(&n.ping([100, 64, 0, 1].into(), tailnode::PingType::Disco));
        send(&n.watch());
        send(&n.loopback());
        send(&n.addresses());
        send(&tailnode::runtime::trim(n));
        send(&tailnode::runtime::stats(n));
        send(&Node::builder().up());
    }
    let _ = futures;
}

#[test]
fn json_of_go() {
    // Nulls for empty slices, fields that are missing, fields that are new.
    let s: Status = serde_json::from_str(
        r#"{"BackendState":"Running","TailscaleIPs":["100.64.0.1","fd7a::1"],"Self":{"ID":"n1","HostName":"a","CapMap":{"c":null,"d":[1]}},
            "Health":null,"Peer":{"nodekey:00":{"Online":true,"KeyExpiry":null}},"User":{"7":{"LoginName":"x@y"}},"New":{"x":1}}"#,
    )
    .unwrap();
    assert_eq!(s.tailscale_ips.len(), 2);
    assert!(s.peer["nodekey:00"].online);
    assert_eq!(s.this.as_ref().unwrap().cap_map["d"].as_ref().unwrap()[0], 1);
    assert_eq!(s.user["7"].login_name, "x@y");
    assert_eq!(serde_json::from_value::<Status>(serde_json::to_value(&s).unwrap()).unwrap(), s);
    assert!(serde_json::from_str::<Status>(r#"{"TailscaleIPs":["not an address"]}"#).is_err());
    let w: WhoIs = serde_json::from_str(r#"{"Node":{"ComputedName":"a"},"UserProfile":null,"CapMap":null}"#).unwrap();
    assert_eq!(w.node.computed_name, "a");
}

#[tokio::test]
async fn arguments_that_cannot_be_used() {
    let e = Node::builder().hostname("a\0b").start().await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument);
    let e = io::Error::from(e);
    assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(e.get_ref().unwrap().downcast_ref::<Error>().unwrap().kind(), ErrorKind::InvalidArgument);
    // A helper that is not there is told at once.
    let e = Node::builder().isolated(true).helper("/nonexistent/helper").start().await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
    assert_eq!(e.raw_os_error(), Some(2));
    // Nothing secret is printed.
    assert!(!format!("{:?}", Node::builder().auth_key("tskey-secret")).contains("secret"));
}
