//! The axum example, served and called over a tailnet.

mod common;
#[path = "../examples/axum.rs"]
mod example;

use common::{up, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread")]
async fn axum_over_the_tailnet() {
    within(async {
        let (a, b) = (up("raxumclient").await, up("raxum").await);
        let listener = b.listen(":80").await.unwrap();
        let server = tokio::spawn(example::serve(b.clone(), listener));
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
