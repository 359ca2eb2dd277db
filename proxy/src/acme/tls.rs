//! Proof by TLS-ALPN-01 (RFC 8737): for each name a self-signed certificate that carries the digest
//! of the authority's challenge, shown by the edge as long as the order lasts.

use std::sync::Arc;

use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use super::AcmeError;
use crate::edge::challenges::{ALPN, Challenges, Proving};

/// Bytes of a digest (SHA-256).
const DIGEST: usize = 32;

/// The proofs of one order; they go with it.
pub(super) struct Proofs {
    challenges: Arc<Challenges>,
    names: Vec<String>,
    shown: Vec<Proving>,
}

impl Proofs {
    /// For these names, and no others that an authority may ask for.
    pub(super) fn new(challenges: Arc<Challenges>, names: &[String]) -> Result<Self, AcmeError> {
        match names.iter().find(|name| name.contains('*')) {
            Some(name) => Err(AcmeError::Wildcard(name.clone())),
            None => Ok(Self {
                challenges,
                names: names.to_vec(),
                shown: Vec::new(),
            }),
        }
    }

    /// Shows the proof of `name`.
    pub(super) fn show(&mut self, name: &str, digest: &[u8]) -> Result<(), AcmeError> {
        let failed = |cause: String| AcmeError::Proof {
            name: name.to_owned(),
            cause,
        };
        if !self.names.iter().any(|own| own.eq_ignore_ascii_case(name)) {
            return Err(failed(
                "the authority asks for a name that was not ordered".into(),
            ));
        }
        if digest.len() != DIGEST {
            return Err(failed(format!("a digest of {} bytes", digest.len())));
        }
        let config = config(name, digest).map_err(failed)?;
        self.shown.push(self.challenges.prove(name, config));
        Ok(())
    }
}

pub(super) fn config(name: &str, digest: &[u8]) -> Result<Arc<rustls::ServerConfig>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let key = KeyPair::generate().map_err(|error| text(&error))?;
    let mut parameters =
        CertificateParams::new(vec![name.to_owned()]).map_err(|error| text(&error))?;
    let identifier = CustomExtension::new_acme_identifier(digest);
    parameters.custom_extensions.push(identifier);
    let certificate = parameters.self_signed(&key).map_err(|error| text(&error))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let signing = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| text(&error))?;
    // Not checked against each other: the extension is critical, and unknown to what checks.
    let shown = CertifiedKey::new(vec![certificate.der().clone()], signing);
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| text(&error))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Nothing of such a connection is remembered.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
