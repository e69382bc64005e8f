//! The examples for axum, hyper and tonic, served and called over a tailnet.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{up, within};

#[path = "../../examples/axum.rs"]
mod axum_example;
#[path = "../../examples/hyper.rs"]
mod hyper_example;
#[path = "../../examples/tonic.rs"]
mod tonic_example;

#[tokio::test(flavor = "multi_thread")]
async fn axum() {
    within(async {
        let (a, b) = (up("raxumclient").await, up("raxum").await);
        let listener = b.listen(":80").await.unwrap();
        let server = tokio::spawn(axum_example::serve(b.clone(), listener));
        for _ in 0..20 {
            let mut conn = a.dial("raxum:80").await.unwrap();
            conn.write_all(b"GET / HTTP/1.1\r\nHost: raxum\r\nConnection: close\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            conn.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("hello, ") && answer.contains(" on raxumclient\n"), "{answer}");
        }
        server.abort();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hyper() {
    within(async {
        let (a, b) = (up("rhyperclient").await, up("rhyper").await);
        let listener = b.listen(":8080").await.unwrap();
        let server = tokio::spawn(hyper_example::serve(listener));
        let me = a.addresses().await.unwrap().0.unwrap();
        for (http2, version) in [(false, "HTTP/1.1"), (true, "HTTP/2.0")] {
            let client = hyper_example::client(&a, http2);
            let gets = (0..50).map(|i| {
                let client = client.clone();
                tokio::spawn(async move { hyper_example::get(&client, format!("http://rhyper:8080/{i}").parse().unwrap()).await.unwrap() })
            });
            for (i, get) in gets.collect::<Vec<_>>().into_iter().enumerate() {
                assert_eq!(get.await.unwrap(), format!("/{i} {version} from {me}\n"));
            }
        }
        let e = hyper_example::get(&hyper_example::client(&a, false), "http://nobody/".parse().unwrap()).await.unwrap_err();
        let mut cause: &dyn std::error::Error = &*e;
        while let Some(next) = cause.source() {
            cause = next;
        }
        assert_eq!(cause.downcast_ref::<tailnode::Error>().unwrap().kind(), tailnode::ErrorKind::NoSuchHost, "{e}");
        b.close().await.unwrap();
        server.await.unwrap(); // it ends with its node
        a.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tonic() {
    within(async {
        let (a, b) = (up("rtonicclient").await, up("rtonic").await);
        let listener = b.listen(":50051").await.unwrap();
        let server = tokio::spawn(tonic_example::serve(listener));
        let channel = tonic_example::connect(&a, "http://rtonic:50051").await.unwrap();
        let calls: Vec<_> = (0..50).map(|_| tokio::spawn(tonic_example::healthy(channel.clone()))).collect();
        for call in calls {
            assert!(call.await.unwrap().unwrap());
        }
        drop(channel);
        b.close().await.unwrap();
        server.await.unwrap().unwrap(); // it ends with its node
        a.close().await.unwrap();
    })
    .await;
}
