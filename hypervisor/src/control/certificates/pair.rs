//! A certificate chain and its key, read from files of the operator's: whether they can be shown is
//! found out here, before proxy has them. An error names the file and says what to do about it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::libc;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::super::keys::Leaf;
use super::key::pkcs8;
use crate::settings::CertificateFiles;

/// The longest file that is read.
const LONGEST: u64 = 1 << 20;

/// Most certificates of a chain.
const MOST: usize = 16;

/// Why a pair is not shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PairError {
    /// A file cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A file holds something else.
    #[error("{} holds no {what} in PEM: {cause}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
        /// What was found.
        cause: String,
    },
    /// The key is another certificate's.
    #[error(
        "the key in {} is not that of the first certificate in {}; the leaf has to be the first, \
         and both files have to be of the same issue", key.display(), chain.display()
    )]
    Mismatch {
        /// The chain.
        chain: PathBuf,
        /// The key.
        key: PathBuf,
    },
    /// Clients would refuse it for its names.
    #[error("the certificate in {} is not for {name}; it has to be for {wanted}", path.display())]
    Name {
        /// The chain.
        path: PathBuf,
        /// The name that is missing.
        name: String,
        /// All that it has to name.
        wanted: String,
    },
    /// More than is ever sent to a client.
    #[error("{} is too long: {what}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit.
        what: &'static str,
    },
    /// Clients would refuse it for the time.
    #[error("the certificate in {} {what}; renew it, or set the clock", path.display())]
    Time {
        /// The chain.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// A pair that can be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Leaf first, each in DER.
    pub(crate) chain: Vec<Vec<u8>>,
    /// PKCS #8 in DER.
    pub(crate) key: Vec<u8>,
    /// When clients begin to take it.
    pub(crate) begins: SystemTime,
    /// When clients begin to refuse it.
    pub(crate) expires: SystemTime,
}

impl From<Pair> for Leaf {
    fn from(pair: Pair) -> Self {
        Self {
            chain: pair.chain,
            key: pair.key,
        }
    }
}

impl Pair {
    /// Reads and checks the files.
    pub(crate) fn read(
        files: &CertificateFiles,
        names: &[String],
        now: SystemTime,
    ) -> Result<Self, PairError> {
        let (chain, key) = (bytes(&files.chain)?, bytes(&files.key)?);
        Self::check(files, &chain, &key, names, now)
    }

    /// Checks what is in the files, or is going to be.
    pub(crate) fn check(
        files: &CertificateFiles,
        chain: &[u8],
        key: &[u8],
        names: &[String],
        now: SystemTime,
    ) -> Result<Self, PairError> {
        let chain_form = |cause: String| PairError::Form {
            path: files.chain.clone(),
            what: "certificates",
            cause,
        };
        let chain = CertificateDer::pem_slice_iter(chain)
            .take(MOST.saturating_add(1))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| chain_form(error.to_string()))?;
        if chain.len() > MOST {
            return Err(PairError::TooLong {
                path: files.chain.clone(),
                what: "a chain has at most 16 certificates",
            });
        }
        let Some(leaf) = chain.first() else {
            return Err(chain_form("there is no certificate in it".into()));
        };
        let key_form = |cause: String| PairError::Form {
            path: files.key.clone(),
            what: "private key",
            cause,
        };
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|error| key_form(error.to_string()))?;
        let signing = rustls::crypto::ring::sign::any_supported_type(&key)
            .map_err(|error| key_form(error.to_string()))?;
        let key = pkcs8(&key).ok_or_else(|| {
            key_form("a kind of key that is not known; use RSA, ECDSA P-256 or P-384".into())
        })?;
        if CertifiedKey::new(chain.clone(), signing)
            .keys_match()
            .is_err()
        {
            return Err(PairError::Mismatch {
                chain: files.chain.clone(),
                key: files.key.clone(),
            });
        }
        let parsed =
            ParsedCertificate::try_from(leaf).map_err(|error| chain_form(error.to_string()))?;
        for name in names {
            // A name below, as VMs have them.
            let asked = name.replace('*', "any-name-of-a-vm");
            let is_for = ServerName::try_from(asked)
                .is_ok_and(|asked| verify_server_name(&parsed, &asked).is_ok());
            if !is_for {
                return Err(PairError::Name {
                    path: files.chain.clone(),
                    name: name.clone(),
                    wanted: names.join(" and "),
                });
            }
        }
        let (begins, expires) = in_time(leaf, now, &files.chain)?;
        Ok(Self {
            chain: chain.iter().map(|der| der.to_vec()).collect(),
            key,
            begins,
            expires,
        })
    }
}

fn in_time(
    leaf: &[u8],
    now: SystemTime,
    path: &Path,
) -> Result<(SystemTime, SystemTime), PairError> {
    let time = |what: String| PairError::Time {
        path: path.to_owned(),
        what,
    };
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|error| PairError::Form {
        path: path.to_owned(),
        what: "certificates",
        cause: error.to_string(),
    })?;
    let validity = certificate.validity();
    let at = |seconds: i64| {
        let since = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(now)
    };
    let (from, until) = (validity.not_before, validity.not_after);
    if at(until.timestamp()) <= now {
        return Err(time(format!("has expired: it was valid until {until}")));
    }
    if at(from.timestamp()) > now {
        return Err(time(format!("is not valid yet, but from {from} on")));
    }
    Ok((at(from.timestamp()), at(until.timestamp())))
}

fn bytes(path: &Path) -> Result<Vec<u8>, PairError> {
    let unreadable = |cause| PairError::Unreadable {
        path: path.to_owned(),
        cause,
    };
    let mut bytes = Vec::new();
    // Something else than a file could keep us waiting for ever.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(unreadable(io::Error::other("it is no regular file")));
    }
    let length = file
        .take(LONGEST.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if u64::try_from(length).unwrap_or(u64::MAX) > LONGEST {
        return Err(PairError::TooLong {
            path: path.to_owned(),
            what: "at most 1 MiB is read",
        });
    }
    Ok(bytes)
}
