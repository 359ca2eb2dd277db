//! TLS for the API: what control handed over becomes a server that speaks TLS 1.2 or 1.3 and
//! nothing but `supvm/1` inside it. A client that offers another name, or none, is refused while
//! its handshake lasts. The edge has the same certificate, and others for single names.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::hello::ALPN;
use protocol::host::proxy::NamedCertificate;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// Why no TLS server can be made of what control sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// There is nothing to show to clients.
    #[error("an address for the API but no certificate; hand over a chain, leaf first")]
    NoCertificate,
    /// rustls refused the certificates or the key.
    #[error("certificate or key for the API: {0}")]
    Rejected(#[from] rustls::Error),
}

/// Builds the server's side of the handshake.
pub(crate) fn server_config(
    certificates: &[Vec<u8>],
    key: &[u8],
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate);
    }
    let (chain, key) = (chain(certificates), pkcs8(key));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// Builds the edge's side: `named` for who asks for one of these names, else the others.
pub(crate) fn edge_config(
    certificates: &[Vec<u8>],
    key: &[u8],
    named: &[NamedCertificate],
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certified = |certificates: &[Vec<u8>], key: &[u8]| {
        let certified = CertifiedKey::from_der(chain(certificates), pkcs8(key), &provider);
        certified.map(Arc::new)
    };
    let shared = certified(certificates, key)?;
    let mut by_name = HashMap::new();
    for named in named {
        let certified = certified(&named.certificates, &named.key)?;
        by_name.insert(named.name.to_ascii_lowercase(), certified);
    }
    let config = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Shown { shared, by_name }));
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Shown {
    shared: Arc<CertifiedKey>,
    by_name: HashMap<String, Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let named = hello
            .server_name()
            .and_then(|name| self.by_name.get(&name.to_ascii_lowercase()));
        Some(Arc::clone(named.unwrap_or(&self.shared)))
    }
}

fn chain(certificates: &[Vec<u8>]) -> Vec<CertificateDer<'static>> {
    let der = certificates.iter().cloned();
    der.map(CertificateDer::from).collect()
}

fn pkcs8(key: &[u8]) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()))
}
