//! The edge alone in front of a server that runs already, to be measured beside other proxies:
//!
//!     cargo run --release -p proxy --example edge -- DIRECTORY ADDRESS BACKEND
//!
//! Serves `https://aaaaaaaaaaaaaaaaaaaa.vm.test` at ADDRESS from BACKEND (an address and port) until
//! it is killed. Its certificate and key, for the other proxy, are in DIRECTORY as `cert.pem` and
//! `key.pem`.

use std::net::SocketAddr;
use std::sync::Arc;

use protocol::host::proxy::ServeEdge;
use protocol::id::{Subdomain, VmId};
use protocol::network::Publication;
use proxy::edge::Edge;
use proxy::edge::guests::{ConnectError, Guest, Guests, Refusal};
use proxy::edge::limits::Limits;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::net::TcpStream;

/// One VM: the backend.
struct Backend {
    guest: Guest,
    address: SocketAddr,
}

impl Guests for Backend {
    type Stream = TcpStream;

    async fn publication(&self, _: &Subdomain) -> Result<Publication, Refusal> {
        Ok(self.guest.publication.clone())
    }

    async fn find(&self, _: &Subdomain) -> Result<Guest, Refusal> {
        Ok(self.guest.clone())
    }

    async fn connect(&self, _: &Guest, _: u16) -> Result<TcpStream, ConnectError> {
        let stream = TcpStream::connect(self.address).await;
        let stream = stream.map_err(|_| ConnectError::Refused)?;
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    async fn ended(&self, _: &Guest) {
        std::future::pending().await
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, address, backend] = arguments.as_slice() else {
        return Err("arguments: DIRECTORY ADDRESS BACKEND".into());
    };
    let key = rcgen::KeyPair::generate()?;
    let names = vec!["vm.test".to_owned(), "*.vm.test".to_owned()];
    let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
    std::fs::write(format!("{directory}/cert.pem"), certificate.pem())?;
    std::fs::write(format!("{directory}/key.pem"), key.serialize_pem())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.into())?;
    let guests = Backend {
        guest: Guest {
            vm: VmId::from_random([0; 8]),
            generation: 1,
            publication: Publication::default(),
            requests: Arc::default(),
        },
        address: backend.parse()?,
    };
    // All visitors of a measurement come from one address.
    let limits = Limits {
        connections_per_network: u32::MAX,
        requests_per_network: u32::MAX,
        requests_per_vm: u32::MAX,
        ..Limits::default()
    };
    let edge = Edge::new(Arc::new(guests), limits);
    edge.set_tls(Arc::new(config));
    let serve = ServeEdge {
        https_address: address.clone(),
        domain: "vm.test".into(),
        ..ServeEdge::default()
    };
    println!("{:?}", edge.apply(&serve).await);
    std::future::pending().await
}
