//! An axum server on the tailnet that greets its callers by name: `TS_AUTHKEY=... cargo run --example axum`, then `curl http://hello/`.

use std::io;
use std::net::SocketAddr;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::State;
use axum::routing::get;
use axum::serve::{IncomingStream, Listener};
use axum::Router;
use tailnode::{Node, TcpListener, TcpStream};

/// A listener that axum takes. It waits for ever once the node is closed.
pub struct Tailnet(pub TcpListener);

impl Listener for Tailnet {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok(conn) => return conn,
                Err(e) if e.kind() == io::ErrorKind::NotConnected => std::future::pending().await,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await, // no descriptors left
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// The caller's address, for handlers.
#[derive(Clone, Copy)]
pub struct Peer(SocketAddr);

impl Connected<IncomingStream<'_, Tailnet>> for Peer {
    fn connect_info(s: IncomingStream<'_, Tailnet>) -> Peer {
        Peer(*s.remote_addr())
    }
}

async fn hello(State(node): State<Node>, ConnectInfo(peer): ConnectInfo<Peer>) -> String {
    match node.whois(peer.0).await {
        Ok(who) => format!("hello, {} on {}\n", who.user_profile.login_name, who.node.computed_name),
        Err(e) => format!("hello, stranger: {e}\n"),
    }
}

/// Serves until the future is dropped.
pub async fn serve(node: Node, listener: TcpListener) -> io::Result<()> {
    let app = Router::new().route("/", get(hello)).with_state(node);
    axum::serve(Tailnet(listener), app.into_make_service_with_connect_info::<Peer>()).await
}

#[allow(dead_code)] // the tests call serve
#[tokio::main]
async fn main() -> io::Result<()> {
    let node = Node::builder().hostname("hello").up().await?;
    let listener = node.listen(":80").await?;
    serve(node, listener).await
}
