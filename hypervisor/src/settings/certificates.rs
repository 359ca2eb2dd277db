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

/// An authority that speaks ACME.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Acme {
    /// The authority's directory.
    pub directory: String,
    /// Whom the authority writes to, such as `mailto:admin@example.org`; empty for nobody.
    pub contact: String,
    /// PEM file of the certificates that the authority's own has to come from; none for those of
    /// the web.
    pub roots: Option<PathBuf>,
    /// Where the domain and all names below it are proved to be ours; without it only the domain
    /// itself is, by the edge (TLS-ALPN-01).
    pub dns: Option<DnsProof>,
}

/// A name server at which a domain is proved to be ours (DNS-01 by dynamic updates).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsProof {
    /// The name server that takes updates.
    pub server: SocketAddr,
    /// The zone that is updated.
    pub zone: String,
    /// The name of the TSIG key, HMAC-SHA256.
    pub key_name: String,
    /// A file with the TSIG key in base64.
    pub key_file: PathBuf,
    /// Seconds that the zone's other servers need for a change.
    pub propagation_s: u16,
}

/// As it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default = "lets_encrypt")]
    directory: String,
    #[serde(default)]
    contact: String,
    roots: Option<PathBuf>,
    server: Option<SocketAddr>,
    zone: Option<String>,
    key_name: Option<String>,
    key_file: Option<PathBuf>,
    propagation_s: Option<u16>,
}

impl TryFrom<Written> for Acme {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let propagation_s = written.propagation_s;
        let dns = match (
            written.server,
            written.zone,
            written.key_name,
            written.key_file,
        ) {
            (Some(server), Some(zone), Some(key_name), Some(key_file)) => Some(DnsProof {
                server,
                zone,
                key_name,
                key_file,
                propagation_s: propagation_s.unwrap_or(PROPAGATION),
            }),
            (None, None, None, None) if propagation_s.is_none() => None,
            _ => {
                return Err(
                    "[acme] needs all of server, zone, key_name and key_file, for the domain and \
                     all names below it, or none of them, for the domain alone",
                );
            }
        };
        Ok(Self {
            directory: written.directory,
            contact: written.contact,
            roots: written.roots,
            dns,
        })
    }
}

const PROPAGATION: u16 = 30;

fn lets_encrypt() -> String {
    "https://acme-v02.api.letsencrypt.org/directory".into()
}
