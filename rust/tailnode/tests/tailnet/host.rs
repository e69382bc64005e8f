//! The host stays itself: its signals, threads, descriptors and forks.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use tailnode::{runtime, ErrorKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{signal, SignalKind};

use crate::common::{alone, builder, descriptors, isolated, threads, until, up, within};

/// std::process forks and execs while data flows: the children get none of our descriptors, what they call before exec fails at once, and
/// nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn fork_and_exec_during_a_transfer() {
    const LEN: u64 = 32 << 20;
    within(async {
        let a = up("rfork").await;
        let mut conn = a.dial("gopeer:19").await.unwrap();
        conn.write_u64(LEN).await.unwrap();
        let node = tailnode::blocking::Node::from(a.clone());
        let children = std::thread::spawn(move || {
            for i in 0..20 {
                let mut command = Command::new("ls");
                command.args(["-l", "/proc/self/fd"]);
                if i % 2 == 0 {
                    let node = node.clone();
                    // Safety: the call does nothing in a child but say so.
                    unsafe {
                        command.pre_exec(move || match node.addresses() {
                            Err(e) if e.kind() == ErrorKind::Forked => Ok(()),
                            _ => Err(io::Error::from_raw_os_error(libc::EDOM)),
                        });
                    }
                }
                let out = command.output().unwrap();
                let text = String::from_utf8(out.stdout).unwrap();
                assert!(out.status.success() && !text.contains("socket:"), "{text}");
            }
        });
        let (mut got, mut buf) = (0, vec![0; 64 << 10]);
        loop {
            match conn.read(&mut buf).await.unwrap() {
                0 => break,
                n => got += n as u64,
            }
        }
        assert_eq!(got, LEN);
        children.join().unwrap();
        drop(conn);
        a.close().await.unwrap();
    })
    .await;
}

/// The handler of every signal.
fn handlers() -> Vec<usize> {
    (1..65)
        .map(|n| {
            let mut sa = MaybeUninit::<libc::sigaction>::zeroed();
            // Safety: it only asks; zeroes are a sigaction.
            unsafe {
                libc::sigaction(n, std::ptr::null(), sa.as_mut_ptr());
                sa.assume_init().sa_sigaction
            }
        })
        .collect()
}

fn raise(signal: i32) {
    // Safety: to this process, which handles it.
    assert_eq!(unsafe { libc::kill(libc::getpid(), signal) }, 0);
}

/// Handlers of tokio::signal and of signal-hook, installed before the node and after, get every signal, also those that Go's runtime likes.
#[test]
fn signals() {
    if !alone("host::signals") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(within(async {
        const BEFORE: [i32; 5] = [libc::SIGUSR1, libc::SIGTERM, libc::SIGCHLD, libc::SIGPROF, libc::SIGURG];
        const AFTER: [i32; 5] = [libc::SIGUSR2, libc::SIGINT, libc::SIGHUP, libc::SIGALRM, libc::SIGWINCH];
        let hooked: Vec<Arc<AtomicUsize>> = (0..BEFORE.len() + AFTER.len()).map(|_| Arc::default()).collect();
        let hook = |n: i32, i: usize| {
            let count = hooked[i].clone();
            // Safety: adding to an atomic is async-signal-safe.
            unsafe {
                signal_hook::low_level::register(n, move || {
                    count.fetch_add(1, Ordering::SeqCst);
                })
            }
            .unwrap();
        };
        let mut streams = Vec::new();
        for (i, n) in BEFORE.into_iter().enumerate() {
            hook(n, i);
            streams.push(signal(SignalKind::from_raw(n)).unwrap());
        }
        let a = up("rsignals").await;
        let up = handlers();
        for (i, n) in AFTER.into_iter().enumerate() {
            hook(n, BEFORE.len() + i);
            streams.push(signal(SignalKind::from_raw(n)).unwrap());
        }

        let mut conn = a.dial("gopeer:19").await.unwrap();
        const LEN: u64 = 8 << 20;
        conn.write_u64(LEN).await.unwrap();
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            conn.read_to_end(&mut all).await.unwrap();
            all.len() as u64
        });
        for round in 1..=20 {
            for (i, n) in BEFORE.into_iter().chain(AFTER).enumerate() {
                raise(n);
                streams[i].recv().await.unwrap();
                until("signal-hook has it, too", || hooked[i].load(Ordering::SeqCst) >= round).await;
            }
        }
        assert_eq!(reader.await.unwrap(), LEN);
        // SIGPIPE is Rust's to ignore; nothing that the host did not touch has changed by traffic and close.
        assert_eq!(up[libc::SIGPIPE as usize - 1], libc::SIG_IGN);
        a.close().await.unwrap();
        let now = handlers();
        for n in (1..65).filter(|n| !AFTER.contains(n)) {
            assert_eq!(now[n as usize - 1], up[n as usize - 1], "signal {n}");
        }
    }));
}

/// What a stack overflow and a fault look like is Rust's affair, with a node in the process.
#[test]
fn a_stack_overflow_is_reported_by_rust() {
    const NAME: &str = "host::a_stack_overflow_is_reported_by_rust";
    if std::env::var("TAILNODE_TEST_ALONE").is_ok_and(|v| v == NAME) {
        fn overflow(n: u64) -> u64 {
            let big = std::hint::black_box([n; 512]);
            if n == 0 {
                0
            } else {
                overflow(std::hint::black_box(n + 1)) + big[7]
            }
        }
        let node = tailnode::Node::builder().state_in_memory().control_url("http://127.0.0.1:9").isolated(isolated());
        let _node = node.start_blocking().unwrap();
        std::process::exit((overflow(1) % 2) as i32);
    }
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
        .env("TAILNODE_TEST_ALONE", NAME)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{}: {text}", out.status);
    assert!(text.contains("has overflowed its stack"), "{text}");
}

/// 200 connections add no thread, all descriptors go again, and Tokio's blocking pool is not needed: its only thread is taken.
#[test]
fn threads_and_descriptors() {
    if !alone("host::threads_and_descriptors") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(1).enable_all().build().unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    runtime.spawn_blocking(move || held.recv());
    runtime.block_on(within(async {
        let (a, b) = (up("rthreads").await, up("rthreadsserver").await);
        let listener = b.listen(":80").await.unwrap();
        let one = || async {
            let (conn, accepted) = tokio::join!(a.dial("rthreadsserver:80"), listener.accept());
            let (mut conn, mut peer) = (conn.unwrap(), accepted.unwrap().0);
            conn.write_all(b"x").await.unwrap();
            assert_eq!(peer.read_u8().await.unwrap(), b'x');
            (conn, peer)
        };
        let mut all = Vec::new();
        for _ in 0..10 {
            all.push(one().await);
        }
        let (few, open) = (threads(), descriptors());
        for _ in 0..200 {
            all.push(one().await);
        }
        // The Go runtime may start one for a system call that takes long, whenever it likes; not one for each connection.
        assert!(threads() < few + 50, "{few} threads have become {}", threads());
        // Isolated, the helper has the other ends. Those of the last calls may still be about to be closed.
        let most = open + 200 * 2 * if isolated() { 1 } else { 2 };
        until("there are two descriptors for each connection", || descriptors() <= most).await;
        all.truncate(10);
        until("the descriptors are gone", || descriptors() <= open).await;
        drop(all);
        let _ = runtime::stats(&a).await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    }));
    release.send(()).unwrap();
}

/// Nothing that is dropped waits for the core: it is stopped meanwhile.
#[tokio::test(flavor = "current_thread")]
async fn drops_do_not_wait() {
    if !isolated() {
        return; // the core cannot be stopped alone
    }
    within(async {
        let a = builder("rdrops").up().await.unwrap();
        let listener = a.listen(":80").await.unwrap();
        let udp = a.listen_udp(":80").await.unwrap();
        let watch = a.watch().await.unwrap();
        let mut conn = a.dial("gopeer:7").await.unwrap();
        let helper = runtime::stats(&a).await.unwrap().pid as i32;
        // Safety: the helper of this test's own node.
        let kill = |n| assert_eq!(unsafe { libc::kill(helper, n) }, 0);
        kill(libc::SIGSTOP);
        // A thread of it may be running still.
        let stopped = |tid| std::fs::read_to_string(format!("/proc/{helper}/task/{tid}/stat")).is_ok_and(|s| s.contains(") T "));
        let all =
            || std::fs::read_dir(format!("/proc/{helper}/task")).unwrap().all(|t| stopped(t.unwrap().file_name().into_string().unwrap()));
        until("the helper has stopped", all).await;
        conn.write_all(b"not read any more").await.unwrap();
        for _ in 0..100 {
            // Started, polled, given up.
            let dial = a.dial("gopeer:7");
            let given_up = tokio::time::timeout(Duration::from_millis(1), dial).await;
            assert!(given_up.is_err(), "{given_up:?}");
        }
        drop((listener, udp, watch, conn));
        drop(a);
        kill(libc::SIGCONT);
    })
    .await;
}

/// The helper's death is told, with the code, wherever it shows.
#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_helper() {
    if !isolated() {
        return;
    }
    within(async {
        let a = builder("rdeath").up().await.unwrap();
        let listener = a.listen(":80").await.unwrap();
        let mut watch = a.watch().await.unwrap();
        let mut conn = a.dial("gopeer:7").await.unwrap();
        let helper = runtime::stats(&a).await.unwrap().pid as i32;
        // Safety: the helper of this test's own node.
        assert_eq!(unsafe { libc::kill(helper, libc::SIGKILL) }, 0);
        assert_eq!(conn.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(listener.accept().await.unwrap_err().kind(), io::ErrorKind::NotConnected);
        let lost = loop {
            match watch.next().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        assert_eq!(lost.unwrap_err().kind(), ErrorKind::CoreLost);
        assert_eq!(a.status(false).await.unwrap_err().kind(), ErrorKind::CoreLost);
        drop(a);
    })
    .await;
}

/// The feature decides whether there is Go in the program.
#[test]
fn go_is_there_only_with_the_feature() {
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let mark = ["runtime.", "gcBgMarkWorker"].concat(); // in Go's table of functions, even of a stripped program
    let found = program.windows(mark.len()).any(|w| w == mark.as_bytes());
    assert_eq!(found, cfg!(feature = "core"));
}
