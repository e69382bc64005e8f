//! hyper over the tailnet, HTTP/1 and HTTP/2, as a server (`cargo run --features hyper1 --example hyper`) and as a
//! client (`... --example hyper http://peer/path`).

use std::convert::Infallible;
use std::error::Error;

use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tailnode::http::Connector;
use tailnode::{Node, TcpListener};

/// Tells every caller what it asked for, until the node is closed.
pub async fn serve(listener: TcpListener) {
    while let Ok((stream, peer)) = listener.accept().await {
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| async move {
                let text = format!("{} {:?} from {}\n", request.uri().path(), request.version(), peer.ip());
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
            });
            if let Err(e) = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await {
                eprintln!("{peer}: {e}");
            }
        });
    }
}

/// A client whose requests go to hosts of the tailnet, and which keeps their connections.
pub fn client(node: &Node, http2: bool) -> Client<Connector, Empty<Bytes>> {
    Client::builder(TokioExecutor::new()).http2_only(http2).build(Connector::new(node))
}

/// The body that a URI gives.
pub async fn get(client: &Client<Connector, Empty<Bytes>>, uri: Uri) -> Result<String, Box<dyn Error + Send + Sync>> {
    let body = client.get(uri).await?.into_body().collect().await?;
    Ok(String::from_utf8(body.to_bytes().into())?)
}

#[allow(dead_code)] // the tests call serve and get
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let node = Node::builder().hostname("hyper").up().await?;
    match std::env::args().nth(1) {
        Some(uri) => print!("{}", get(&client(&node, false), uri.parse()?).await?),
        None => serve(node.listen(":80").await?).await,
    }
    node.close().await?;
    Ok(())
}
