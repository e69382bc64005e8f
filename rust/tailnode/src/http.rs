//! HTTP and gRPC over the tailnet: what axum, hyper and tonic want a listener, a connector and a connection to be. Each by a feature of its own, named after the
//! version that it is for.

#[cfg(feature = "axum08")]
pub use self::axum08::PeerAddr;
#[cfg(feature = "hyper1")]
pub use self::hyper1::{Connecting, Connector};

#[cfg(feature = "axum08")]
mod axum08 {
    use std::io;
    use std::net::SocketAddr;
    use std::time::Duration;

    use axum::extract::connect_info::Connected;
    use axum::serve::{IncomingStream, Listener};

    use crate::{TcpListener, TcpStream};

    /// `axum::serve(node.listen(":80").await?, app)`. Accepting waits for ever once the node is closed, for axum knows no end of a listener: serve
    /// with a graceful shutdown, or drop the future.
    impl Listener for TcpListener {
        type Io = TcpStream;
        type Addr = SocketAddr;

        async fn accept(&mut self) -> (TcpStream, SocketAddr) {
            loop {
                match TcpListener::accept(self).await {
                    Ok(conn) => return conn,
                    Err(e) if e.kind() == io::ErrorKind::NotConnected => std::future::pending().await,
                    // No descriptor is left, which takes others to end. axum waits a second at its own listeners.
                    Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                }
            }
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            TcpListener::local_addr(self)
        }
    }

    /// The caller's address, for handlers: `ConnectInfo<PeerAddr>`, with `into_make_service_with_connect_info::<PeerAddr>()`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PeerAddr(pub SocketAddr);

    impl Connected<IncomingStream<'_, TcpListener>> for PeerAddr {
        fn connect_info(stream: IncomingStream<'_, TcpListener>) -> PeerAddr {
            PeerAddr(*stream.remote_addr())
        }
    }
}

#[cfg(feature = "hyper1")]
mod hyper1 {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use http::Uri;
    use hyper_util::client::legacy::connect::{Connected, Connection};
    use hyper_util::rt::TokioIo;
    use tower_service::Service;

    use crate::{Error, ErrorKind, Node, Result, TcpStream};

    /// Connects to the host of a URI on the tailnet: for hyper-util's client, and for `connect_with_connector` of tonic's endpoints. It speaks no TLS;
    /// WireGuard protects what it carries.
    #[derive(Clone, Debug)]
    pub struct Connector(Node);

    impl Connector {
        /// A connector of a node.
        pub fn new(node: &Node) -> Connector {
            Connector(node.clone())
        }
    }

    /// A connection that is being made. Dropping it gives it up.
    pub struct Connecting(Pin<Box<dyn Future<Output = Result<TokioIo<TcpStream>>> + Send>>);

    impl Future for Connecting {
        type Output = Result<TokioIo<TcpStream>>;

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            self.0.as_mut().poll(cx)
        }
    }

    impl std::fmt::Debug for Connecting {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Connecting").finish_non_exhaustive()
        }
    }

    /// `host:port` of a URI; the port of its scheme if it names none.
    pub(super) fn target(uri: &Uri) -> Result<String> {
        let invalid = |why: &str| Error::new(ErrorKind::InvalidArgument, format!("tailnode: {uri}: {why}"));
        let host = uri.host().filter(|h| !h.is_empty()).ok_or_else(|| invalid("no host"))?;
        let port = match (uri.port_u16(), uri.scheme_str()) {
            (Some(port), _) => port,
            (None, Some("http") | None) => 80,
            (None, Some("https")) => 443,
            (None, Some(_)) => return Err(invalid("no port, and none is known for the scheme")),
        };
        Ok(format!("{host}:{port}"))
    }

    impl Service<Uri> for Connector {
        type Response = TokioIo<TcpStream>;
        type Error = Error;
        type Future = Connecting;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, uri: Uri) -> Connecting {
            let node = self.0.clone();
            Connecting(Box::pin(async move { Ok(TokioIo::new(node.dial(target(&uri)?).await?)) }))
        }
    }

    impl Connection for TcpStream {
        fn connected(&self) -> Connected {
            Connected::new()
        }
    }

    #[cfg(test)]
    #[test]
    fn targets() {
        for (uri, want) in [
            ("http://peer/x", Some("peer:80")),
            ("https://peer.example.ts.net", Some("peer.example.ts.net:443")),
            ("http://peer:8080", Some("peer:8080")),
            ("http://[fd7a::1]/", Some("[fd7a::1]:80")),
            ("http://100.64.0.1:50051", Some("100.64.0.1:50051")),
            ("ftp://peer/", None),
            ("/only/a/path", None),
        ] {
            assert_eq!(target(&uri.parse().unwrap()).ok().as_deref(), want, "{uri}");
        }
    }
}

#[cfg(feature = "tonic014")]
mod tonic014 {
    use tonic::transport::server::{Connected, TcpConnectInfo};

    use crate::TcpStream;

    /// tonic's requests tell the caller's address by `remote_addr`.
    impl Connected for TcpStream {
        type ConnectInfo = TcpConnectInfo;

        fn connect_info(&self) -> TcpConnectInfo {
            TcpConnectInfo { local_addr: self.local_addr().ok(), remote_addr: self.peer_addr().ok() }
        }
    }
}
