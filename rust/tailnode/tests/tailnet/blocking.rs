//! The blocking types.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tailnode::blocking::{Node, TcpStream};
use tailnode::{Error, ErrorKind, Event, PingType, State};

use crate::common::{builder, AGAIN, HANG};

fn up(hostname: &str) -> Node {
    builder(hostname).up_blocking().unwrap()
}

/// Fails a test that hangs.
fn within(f: impl FnOnce() + Send + 'static) {
    let (tx, rx) = mpsc::channel();
    let test = thread::spawn(move || {
        f();
        let _ = tx.send(());
    });
    if let Err(mpsc::RecvTimeoutError::Timeout) = rx.recv_timeout(HANG) {
        panic!("the test hangs");
    }
    test.join().unwrap();
}

#[test]
fn streams() {
    within(|| {
        let (a, b) = (up("rbalpha"), up("rbbeta"));
        let listener = b.listen(":80").unwrap();
        assert_eq!(b.listen(":80").unwrap_err().kind(), ErrorKind::AddressInUse);
        // A greeting, then an echo, for every connection.
        let server = thread::spawn(move || {
            let mut served = 0;
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                served += 1;
                thread::spawn(move || {
                    stream.write_all(b"hello")?;
                    io::copy(&mut &stream, &mut &stream)?;
                    stream.shutdown(Shutdown::Write)
                });
            }
            served
        });

        let mut conn = a.dial("rbbeta:80").unwrap();
        assert_eq!(conn.local_addr().unwrap().ip(), a.addresses().unwrap().0.unwrap());
        assert_eq!(conn.peer_addr().unwrap().port(), 80);
        let mut buf = [0; 64];
        assert!(conn.peek(&mut buf).unwrap() > 0);
        conn.read_exact(&mut buf[..5]).unwrap();
        assert_eq!(&buf[..5], b"hello");

        // Time-outs, as of std::net.
        assert_eq!(conn.read_timeout().unwrap(), None);
        conn.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        assert_eq!(conn.read_timeout().unwrap(), Some(Duration::from_millis(20)));
        assert_eq!(conn.read(&mut buf).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(conn.set_read_timeout(Some(Duration::ZERO)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        conn.set_read_timeout(None).unwrap();
        conn.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        conn.set_nonblocking(true).unwrap();
        assert_eq!(conn.read(&mut buf).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        conn.set_nonblocking(false).unwrap();
        assert!(conn.take_error().unwrap().is_none());

        // A clone writes while this one reads; shutting one down shuts down both.
        let mut writer = conn.try_clone().unwrap();
        let sender = thread::spawn(move || {
            for _ in 0..64 {
                writer.write_all(&[7; 64 << 10]).unwrap();
            }
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut all = Vec::new();
        conn.read_to_end(&mut all).unwrap();
        sender.join().unwrap();
        assert!(all.len() == 4 << 20 && all.iter().all(|b| *b == 7));
        assert_eq!(conn.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);

        // Errors of dialling, and its time-out.
        assert_eq!(a.dial("nobody:80").unwrap_err().kind(), ErrorKind::NoSuchHost);
        let e = a.dial_timeout("100.127.9.9:1", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Timeout | ErrorKind::Unreachable), "{e}");
        let who = a.whois(conn.peer_addr().unwrap()).unwrap();
        assert_eq!(who.node.computed_name, "rbbeta");
        assert_eq!(a.status(false).unwrap().backend_state, "Running");
        let pong = a.ping(conn.peer_addr().unwrap().ip(), PingType::Tsmp, Some(Duration::from_secs(60))).unwrap();
        assert_eq!(pong.node_name, "rbbeta");
        assert!(a.runtime_stats().unwrap().total > 0);

        // Another thread's close ends what waits: the server's accept, and a read here.
        let mut conn = a.dial("rbbeta:80").unwrap();
        conn.read_exact(&mut buf[..5]).unwrap();
        let closer = thread::spawn(move || b.close().unwrap());
        assert_eq!(conn.read(&mut buf).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        closer.join().unwrap();
        assert_eq!(server.join().unwrap(), 2);
        a.close().unwrap();
        assert_eq!(a.close().unwrap_err().kind(), ErrorKind::Closed);
    });
}

#[test]
fn half_close_of_the_one_that_accepts() {
    within(|| {
        let (a, b) = (up("rbhalf"), up("rbhalfserver"));
        let listener = b.listen(":80").unwrap();
        let mut conn = a.dial("rbhalfserver:80").unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"that is all").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let mut all = String::new();
        conn.read_to_string(&mut all).unwrap();
        assert_eq!(all, "that is all");
        // The other way goes on.
        for _ in 0..100 {
            conn.write_all(b"more").unwrap();
            peer.read_exact(&mut [0; 4]).unwrap();
        }
        conn.shutdown(Shutdown::Both).unwrap();
        assert_eq!(peer.read(&mut [0; 4]).unwrap(), 0);
        a.close().unwrap();
        b.close().unwrap();
    });
}

#[test]
fn datagrams() {
    within(|| {
        let a = up("rbudp");
        let conn = a.dial_udp("gopeer:7").unwrap();
        conn.set_read_timeout(Some(AGAIN)).unwrap();
        let mut buf = vec![0; 65536];
        for text in [&b"ping"[..], b"", b"pong"] {
            loop {
                conn.send(text).unwrap();
                match conn.peek(&mut buf) {
                    Ok(_) => {
                        let n = conn.recv(&mut buf).unwrap();
                        if &buf[..n] == text {
                            break;
                        }
                    }
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock), // lost: again
                }
            }
        }
        assert_eq!(conn.send_to(b"x", conn.peer_addr().unwrap()).unwrap_err().raw_os_error(), Some(libc::EISCONN));
        let socket = a.listen_udp(":0").unwrap();
        socket.set_read_timeout(Some(AGAIN)).unwrap();
        let to = conn.peer_addr().unwrap();
        let (n, from) = loop {
            socket.send_to(b"from anyone", to).unwrap();
            if let Ok(got) = socket.recv_from(&mut buf) {
                break got;
            }
        };
        assert_eq!((&buf[..n], from), (&b"from anyone"[..], to));
        assert_eq!(socket.send(b"x").unwrap_err().kind(), io::ErrorKind::NotConnected);
        a.close().unwrap();
        let e = loop {
            match socket.recv_from(&mut buf) {
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert_eq!(e.get_ref().unwrap().downcast_ref::<Error>().unwrap().kind(), ErrorKind::Closed);
    });
}

#[test]
fn watch_and_loopback() {
    within(|| {
        let a = up("rbwatch");
        let mut watch = a.watch().unwrap();
        assert!(matches!(watch.next().unwrap().unwrap(), Event::State(State::Running, _)));
        // Through SOCKS5, by name: what is no Rust gets in by the loopback.
        let lo = a.loopback().unwrap();
        assert_eq!(a.loopback().unwrap(), lo);
        assert!(!format!("{lo:?}").contains(&lo.proxy_credential));
        let mut conn = std::net::TcpStream::connect(lo.address).unwrap();
        conn.write_all(b"\x05\x01\x02").unwrap();
        conn.read_exact(&mut [0; 2]).unwrap();
        let mut auth = b"\x01\x05tsnet".to_vec();
        auth.push(lo.proxy_credential.len() as u8);
        auth.extend(lo.proxy_credential.as_bytes());
        conn.write_all(&auth).unwrap();
        let mut answer = [9; 2];
        conn.read_exact(&mut answer).unwrap();
        assert_eq!(answer[1], 0);
        conn.write_all(b"\x05\x01\x00\x03\x06gopeer\x00\x07").unwrap();
        let mut head = [9; 4];
        conn.read_exact(&mut head).unwrap();
        assert_eq!(head[1], 0, "SOCKS5 connects");
        conn.read_exact(&mut vec![0; if head[3] == 4 { 18 } else { 6 }]).unwrap();
        conn.write_all(b"echo").unwrap();
        let mut echo = [0; 4];
        conn.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"echo");
        a.close().unwrap();
        assert!(watch.by_ref().all(|e| e.is_ok()));
    });
}

fn nonblocking(fd: &impl std::os::fd::AsRawFd) -> bool {
    // Safety: no memory.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK != 0 }
}

/// Sockets change their kind both ways, and nodes do.
#[test]
fn to_tokio_and_back() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    within(|| {
        let a = up("rbtokio");
        let mut conn = a.dial("gopeer:7").unwrap();
        conn.write_all(b"one").unwrap();
        let listener = a.listen(":0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (mut conn, listener) = runtime.block_on(async {
            let mut conn = tailnode::TcpStream::from_std(conn).unwrap();
            let mut buf = [0; 3];
            conn.read_exact(&mut buf).await.unwrap();
            assert_eq!(&buf, b"one");
            conn.write_all(b"two").await.unwrap();
            let listener = tailnode::TcpListener::from_std(listener).unwrap();
            let node = tailnode::Node::from(a.clone());
            let me = node.addresses().await.unwrap().0.unwrap();
            let (dialled, accepted) = tokio::join!(node.dial(format!("{me}:{port}")), listener.accept());
            let accepted = accepted.unwrap();
            assert!(nonblocking(&accepted.0));
            assert_eq!(accepted.1, dialled.unwrap().local_addr().unwrap());
            let udp = tailnode::UdpSocket::from_std(a.listen_udp(":0").unwrap()).unwrap();
            udp.into_std().unwrap().set_nonblocking(false).unwrap();
            (conn.into_std().unwrap(), listener.into_std().unwrap())
        });
        conn.set_nonblocking(false).unwrap();
        let mut buf = [0; 3];
        conn.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"two");
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // What a listener of Tokio's accepts blocks once it is none any more.
        let listener = runtime.block_on(async { tailnode::Node::from(a.clone()).listen(":0").await.unwrap().into_std().unwrap() });
        listener.set_nonblocking(false).unwrap();
        let to = format!("{}:{}", a.addresses().unwrap().0.unwrap(), listener.local_addr().unwrap().port());
        let _dialled = a.dial(to).unwrap();
        assert!(!nonblocking(&listener.accept().unwrap().0));
        a.close().unwrap();
    });
}

#[test]
fn send_and_sync() {
    fn both<T: Send + Sync + 'static>() {}
    both::<Node>();
    both::<TcpStream>();
    both::<tailnode::blocking::TcpListener>();
    both::<tailnode::blocking::UdpSocket>();
    both::<tailnode::blocking::Watch>();
}
