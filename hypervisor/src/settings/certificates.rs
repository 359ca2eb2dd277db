//! Certificates in place of those of the built-in authority: the operator's own, or those of another
//! authority.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

/// A certificate for the domain and every name directly below it, and its key, as PEM files. They
/// are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    /// The chain, leaf first.
    pub chain: PathBuf,
    /// The leaf's private key.
    pub key: PathBuf,
}

/// An authority that speaks ACME, and the name server at which the domain is proved to be ours
/// (DNS-01 by dynamic updates).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acme {
    /// The authority's directory.
    #[serde(default = "lets_encrypt")]
    pub directory: String,
    /// Whom the authority writes to, such as `mailto:admin@example.org`.
    #[serde(default)]
    pub contact: String,
    /// PEM file of the certificates that the authority's own has to come from; none for those of
    /// the web.
    pub roots: Option<PathBuf>,
    /// The name server that takes updates.
    pub server: SocketAddr,
    /// The zone that is updated.
    pub zone: String,
    /// The name of the TSIG key, HMAC-SHA256.
    pub key_name: String,
    /// A file with the TSIG key in base64.
    pub key_file: PathBuf,
    /// Seconds that the zone's other servers need for a change.
    #[serde(default = "propagation")]
    pub propagation_s: u16,
}

fn lets_encrypt() -> String {
    "https://acme-v02.api.letsencrypt.org/directory".into()
}

fn propagation() -> u16 {
    30
}
