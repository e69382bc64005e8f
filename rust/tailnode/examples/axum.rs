//! An axum server on the tailnet that greets its callers by name: `TS_AUTHKEY=... cargo run --features axum08 --example axum`, then
//! `curl http://hello/` on another machine of the tailnet.

use std::io;

use axum::extract::connect_info::ConnectInfo;
use axum::extract::State;
use axum::routing::get;
use axum::Router;
use tailnode::http::PeerAddr;
use tailnode::{Node, TcpListener};

async fn hello(State(node): State<Node>, ConnectInfo(peer): ConnectInfo<PeerAddr>) -> String {
    match node.whois(peer.0).await {
        Ok(who) => format!("hello, {} on {}\n", who.user_profile.login_name, who.node.computed_name),
        Err(e) => format!("hello, stranger: {e}\n"),
    }
}

/// Serves until the future is dropped.
pub async fn serve(node: Node, listener: TcpListener) -> io::Result<()> {
    let app = Router::new().route("/", get(hello)).with_state(node);
    axum::serve(listener, app.into_make_service_with_connect_info::<PeerAddr>()).await
}

#[allow(dead_code)] // the tests call serve
#[tokio::main]
async fn main() -> io::Result<()> {
    let node = Node::builder().hostname("hello").up().await?;
    let listener = node.listen(":80").await?;
    serve(node, listener).await
}
