//! TLS for the API: what control handed over becomes a server that speaks TLS 1.2 or 1.3 and
//! nothing but `supvm/1` inside it. A client that offers another name, or none, is refused while
//! its handshake lasts.

use std::sync::Arc;

use protocol::hello::ALPN;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

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
    let chain = certificates
        .iter()
        .map(|der| CertificateDer::from(der.clone()))
        .collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}
