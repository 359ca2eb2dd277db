//! The HTTPS client that orders go over: one connection per request, HTTP/1.1, names asked for at
//! the name servers that control handed over, and certificates checked against the web's
//! authorities or those that the operator names. Answers are bounded.

use std::error::Error as StdError;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Limited};
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::gateway::dns::{Upstreams, lookup};

/// One request from the name to the end of the answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest answer: a directory or a chain.
const LONGEST: usize = 256 << 10;

/// The client.
pub(super) struct Https {
    tls: TlsConnector,
    upstreams: Arc<Upstreams>,
}

impl Https {
    /// With these authorities in DER, or the web's when there are none.
    pub(super) fn new(roots: &[Vec<u8>], upstreams: Arc<Upstreams>) -> Result<Self, rustls::Error> {
        let mut store = RootCertStore::empty();
        if roots.is_empty() {
            store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        for root in roots {
            store.add(CertificateDer::from(root.clone()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(store)
            .with_no_client_auth();
        Ok(Self {
            tls: TlsConnector::from(Arc::new(config)),
            upstreams,
        })
    }
}

type Failure = Box<dyn StdError + Send + Sync + 'static>;

impl HttpClient for Https {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let (tls, upstreams) = (self.tls.clone(), Arc::clone(&self.upstreams));
        Box::pin(async move {
            let answered = timeout(PATIENCE, send(tls, upstreams, request)).await;
            let answered = answered.unwrap_or_else(|_| Err("no answer in 30 seconds".into()));
            answered.map_err(Error::Other)
        })
    }
}

async fn send(
    tls: TlsConnector,
    upstreams: Arc<Upstreams>,
    mut request: Request<BodyWrapper<Bytes>>,
) -> Result<BytesResponse, Failure> {
    let uri = request.uri().clone();
    if uri.scheme_str() != Some("https") {
        return Err(format!("{uri} is not https").into());
    }
    let authority = uri.authority().ok_or("an address without a host")?;
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    let stream = connect(&upstreams, &host, authority.port_u16().unwrap_or(443)).await?;
    let stream = tls.connect(ServerName::try_from(host)?, stream).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Origin form, and the host in its header.
    request
        .headers_mut()
        .insert(http::header::HOST, authority.as_str().parse()?);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse()?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, LONGEST).collect().await?.to_bytes();
        Ok::<_, Failure>(Response::from_parts(parts, http_body_util::Full::new(body)))
    };
    tokio::pin!(answer);
    tokio::select! {
        answered = &mut answer => Ok(answered?.into()),
        // It may end with the answer on its way.
        ended = connection => match ended {
            Ok(()) => Ok(answer.await?.into()),
            Err(error) => Err(error.into()),
        },
    }
}

async fn connect(upstreams: &Arc<Upstreams>, host: &str, port: u16) -> Result<TcpStream, Failure> {
    let addresses = match host.parse::<IpAddr>() {
        Ok(address) => vec![address],
        Err(_) => lookup(upstreams, host).await,
    };
    let mut last = io::Error::new(
        io::ErrorKind::NotFound,
        format!("the name servers know no address of {host}"),
    );
    for address in addresses {
        match TcpStream::connect(SocketAddr::new(address, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last.into())
}
