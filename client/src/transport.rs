//! The socket under a connection: TCP with TLS, or a Unix socket. Each step of its making has a
//! deadline. `localhost` and `*.localhost` are this machine (RFC 6761), whatever a resolver thinks.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use protocol::hello::ALPN;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::endpoint::Endpoint;
use crate::error::ClientError;
use crate::trust::Trust;

/// How long connecting and the handshake may take, each.
const STEP: Duration = Duration::from_secs(10);

/// Bytes that are read of a socket under TLS at once: rustls itself asks for 4 KiB at a time.
const READ_AHEAD: usize = 64 << 10;

/// A socket of either kind.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// Connects to the endpoint.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    trust: &Trust,
) -> Result<Box<dyn Socket>, ClientError> {
    match endpoint {
        Endpoint::Tls { .. } => {
            let config = trust.config(endpoint)?;
            Ok(Box::new(connect_tls(endpoint, config).await?))
        }
        Endpoint::Unix(path) => {
            let socket = within(endpoint, UnixStream::connect(path)).await?;
            Ok(Box::new(socket.map_err(|cause| refused(endpoint, cause))?))
        }
    }
}

/// Connects to a TLS endpoint; the peer speaks `supvm/1` or the handshake fails.
pub(crate) async fn connect_tls(
    endpoint: &Endpoint,
    config: Arc<rustls::ClientConfig>,
) -> Result<TlsStream<BufReader<TcpStream>>, ClientError> {
    let Endpoint::Tls { host, port } = endpoint else {
        let cause = io::Error::other("a Unix socket carries no TLS");
        return Err(refused(endpoint, cause));
    };
    let failed = |cause| ClientError::Tls {
        endpoint: endpoint.clone(),
        cause,
    };
    let name = ServerName::try_from(host.clone()).map_err(|e| failed(io::Error::other(e)))?;
    let socket = within(endpoint, connect_tcp(host, *port))
        .await?
        .map_err(|cause| refused(endpoint, cause))?;
    let socket = BufReader::with_capacity(READ_AHEAD, socket);
    let stream = within(endpoint, TlsConnector::from(config).connect(name, socket))
        .await?
        .map_err(failed)?;
    if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(failed(io::Error::other("the peer does not speak supvm/1")));
    }
    Ok(stream)
}

async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = if is_this_machine(host) {
        let ours: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        ours.map(|address| SocketAddr::new(address, port)).into()
    } else {
        tokio::net::lookup_host((host, port)).await?.collect()
    };
    let mut first_error = None;
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                // An appliance that lost its power is found out after two minutes.
                setsockopt(&socket, sockopt::KeepAlive, &true)?;
                setsockopt(&socket, sockopt::TcpKeepIdle, &60)?;
                setsockopt(&socket, sockopt::TcpKeepInterval, &15)?;
                setsockopt(&socket, sockopt::TcpKeepCount, &4)?;
                return Ok(socket);
            }
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    Err(first_error.unwrap_or_else(|| io::Error::other("the name has no address")))
}

fn is_this_machine(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

async fn within<T>(endpoint: &Endpoint, step: impl Future<Output = T>) -> Result<T, ClientError> {
    tokio::time::timeout(STEP, step)
        .await
        .map_err(|_| ClientError::TooSlow {
            endpoint: endpoint.clone(),
            seconds: STEP.as_secs(),
        })
}

fn refused(endpoint: &Endpoint, cause: io::Error) -> ClientError {
    ClientError::Connect {
        endpoint: endpoint.clone(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_under_localhost_are_this_machine_and_no_others() {
        for name in [
            "localhost",
            "supvm.localhost",
            "A.B.LocalHost",
            "x.localhost.",
        ] {
            assert!(is_this_machine(name), "{name}");
        }
        for name in ["localhost.example", "notlocalhost", "127.0.0.1", ""] {
            assert!(!is_this_machine(name), "{name}");
        }
    }
}
