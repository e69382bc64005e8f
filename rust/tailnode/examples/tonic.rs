//! gRPC over the tailnet with tonic: the standard health service (`cargo run --features hyper1,tonic014 --example tonic`), and its client
//! (`... --example tonic http://peer:50051`).

use std::error::Error;

use tailnode::http::Connector;
use tailnode::{Node, TcpListener};
use tonic::transport::{Channel, Endpoint, Server};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::HealthCheckRequest;

/// Serves until the node is closed.
pub async fn serve(listener: TcpListener) -> Result<(), tonic::transport::Error> {
    let (_reporter, health) = tonic_health::server::health_reporter();
    Server::builder().add_service(health).serve_with_incoming(listener.into_incoming()).await
}

/// A channel to a server on the tailnet.
pub async fn connect(node: &Node, uri: &str) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(uri.to_owned())?.connect_with_connector(Connector::new(node)).await
}

/// Whether the server is healthy.
pub async fn healthy(channel: Channel) -> Result<bool, tonic::Status> {
    let answer = HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await?;
    Ok(answer.into_inner().status() == ServingStatus::Serving)
}

#[allow(dead_code)] // the tests call serve and healthy
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let node = Node::builder().hostname("grpc").up().await?;
    match std::env::args().nth(1) {
        Some(uri) => println!("{}", if healthy(connect(&node, &uri).await?).await? { "serving" } else { "not serving" }),
        None => serve(node.listen(":50051").await?).await?,
    }
    node.close().await?;
    Ok(())
}
