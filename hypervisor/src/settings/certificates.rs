//! Certificates that the operator gives in place of those of the built-in authority.

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
