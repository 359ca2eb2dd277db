//! A certificate from an authority that speaks ACME: when to order it, and what was ordered, on
//! disk. The keys of account and certificate are made and kept here; proxy, which has the network,
//! carries the order out.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use protocol::host::proxy::{CertificateOrdered, OrderCertificate};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::super::store::{StoreError, read_if_there, write_replacing};
use super::pair::{Pair, PairError};
use super::pause::Pause;
use crate::settings::{Acme as Settings, CertificateFiles, DnsProof};

/// Proxy gives up before this.
const LOST: Duration = Duration::from_secs(15 * 60);

/// Why there is no order, or no certificate from it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcmeError {
    /// A key of ours cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key or request cannot be made.
    #[error("cannot make a key or a request: {0}")]
    Make(#[from] rcgen::Error),
    /// A file that the settings name.
    #[error("cannot use {}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// What came cannot be shown.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// The order failed.
    #[error("{0}")]
    Failed(String),
}

/// One certificate.
pub(super) struct Acme {
    settings: Settings,
    /// How all its names are proved to be ours; none for TLS-ALPN-01.
    dns: Option<DnsProof>,
    names: Vec<String>,
    /// The account's key, the same for all certificates.
    account: PathBuf,
    /// Chain and key of the certificate, in one file: they are replaced together.
    files: CertificateFiles,
    /// What came of the last order that went well.
    pair: Option<Pair>,
    pause: Pause,
}

/// An order that proxy carries out.
pub(super) struct UnderWay {
    pub(super) key: KeyPair,
    pub(super) since: SystemTime,
}

impl UnderWay {
    /// When it is given up.
    pub(super) fn lost(&self) -> SystemTime {
        self.since.checked_add(LOST).unwrap_or(self.since)
    }
}

impl Acme {
    /// The certificate in `keys/FILE.pem`, if there is one that can still be shown.
    pub(super) fn new(
        settings: Settings,
        dns: Option<DnsProof>,
        names: Vec<String>,
        keys: &Path,
        file: &str,
    ) -> Self {
        let both = keys.join(format!("{file}.pem"));
        let mut acme = Self {
            settings,
            dns,
            names,
            account: keys.join("acme-account.key"),
            files: CertificateFiles {
                chain: both.clone(),
                key: both,
            },
            pair: None,
            pause: Pause::read(keys.join(format!("{file}.pause")), SystemTime::now()),
        };
        acme.pair = acme.kept(SystemTime::now());
        acme
    }

    fn kept(&self, now: SystemTime) -> Option<Pair> {
        let read = Pair::read(&self.files, &self.names, now);
        if let Err(error) = &read
            && self.files.chain.exists()
        {
            tracing::warn!(%error, "the certificate of an earlier order cannot be shown");
        }
        read.ok()
    }

    /// What it is for.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// What there is to show.
    pub(super) fn pair(&self, now: SystemTime) -> Option<&Pair> {
        self.pair.as_ref().filter(|pair| pair.expires > now)
    }

    /// When it has to be ordered: at two thirds of the life of the one that is shown.
    pub(super) fn due(&self, now: SystemTime) -> SystemTime {
        let renewal = self.pair(now).and_then(|pair| {
            let life = pair.expires.duration_since(pair.begins).ok()?;
            pair.begins.checked_add(life / 3 * 2)
        });
        let pause = self.pause.until(now);
        renewal.into_iter().chain(pause).max().unwrap_or(now)
    }

    /// A new order, and the key of the certificate.
    pub(super) fn order(
        &mut self,
        name_servers: &[SocketAddr],
        now: SystemTime,
    ) -> Result<(OrderCertificate, KeyPair), AcmeError> {
        self.pause.begun(now);
        self.make(name_servers)
    }

    fn make(&self, name_servers: &[SocketAddr]) -> Result<(OrderCertificate, KeyPair), AcmeError> {
        let settings = &self.settings;
        let key = KeyPair::generate()?;
        let request = CertificateParams::new(self.names.clone())?.serialize_request(&key)?;
        let key_secret = match &self.dns {
            Some(dns) => secret(&dns.key_file)?,
            None => Vec::new(),
        };
        let dns = self.dns.as_ref();
        let text = |what: fn(&DnsProof) -> String| dns.map(what).unwrap_or_default();
        let order = OrderCertificate {
            ticket: 0,
            directory: settings.directory.clone(),
            contact: settings.contact.clone(),
            account_key: self.account_key()?,
            names: self.names.clone(),
            request: request.der().to_vec(),
            update_server: text(|dns| dns.server.to_string()),
            zone: text(|dns| dns.zone.clone()),
            key_name: text(|dns| dns.key_name.clone()),
            key_secret,
            propagation_s: dns.map_or(0, |dns| dns.propagation_s),
            name_servers: name_servers.iter().map(SocketAddr::to_string).collect(),
            roots: match &settings.roots {
                Some(path) => roots(path)?,
                None => Vec::new(),
            },
        };
        Ok((order, key))
    }

    /// Made at the first order; kept for all later ones.
    fn account_key(&self) -> Result<Vec<u8>, AcmeError> {
        if let Some(pem) = read_if_there(&self.account)? {
            let key = KeyPair::from_pem(&String::from_utf8_lossy(&pem));
            let key = key.map_err(|error| unusable(&self.account, &error))?;
            return Ok(key.serialize_der());
        }
        let key = KeyPair::generate()?;
        write_replacing(&self.account, key.serialize_pem().as_bytes(), 0o600)?;
        Ok(key.serialize_der())
    }

    /// Takes the certificate of an order; it is on disk before it is shown.
    pub(super) fn ordered(
        &mut self,
        key: &KeyPair,
        answer: &CertificateOrdered,
        now: SystemTime,
    ) -> Result<(), AcmeError> {
        match self.take(key, answer, now) {
            Ok(pair) => {
                self.pair = Some(pair);
                self.pause.clear();
                Ok(())
            }
            Err(error) => {
                self.pause.failed(now);
                Err(error)
            }
        }
    }

    fn take(
        &self,
        key: &KeyPair,
        answer: &CertificateOrdered,
        now: SystemTime,
    ) -> Result<Pair, AcmeError> {
        if answer.chain.is_empty() {
            return Err(AcmeError::Failed(answer.message.clone()));
        }
        let both = format!("{}{}", key.serialize_pem(), answer.chain);
        let bytes = both.as_bytes();
        let pair = Pair::check(&self.files, bytes, bytes, &self.names, now)?;
        write_replacing(&self.files.chain, bytes, 0o600)?;
        Ok(pair)
    }
}

fn unusable(path: &Path, cause: &dyn std::fmt::Display) -> AcmeError {
    AcmeError::File {
        path: path.to_owned(),
        cause: cause.to_string(),
    }
}

fn secret(path: &Path) -> Result<Vec<u8>, AcmeError> {
    let text = fs::read_to_string(path).map_err(|error| unusable(path, &error))?;
    data_encoding::BASE64
        .decode(text.trim().as_bytes())
        .map_err(|error| unusable(path, &format!("it is no base64: {error}")))
}

fn roots(path: &Path) -> Result<Vec<Vec<u8>>, AcmeError> {
    let bytes = fs::read(path).map_err(|error| unusable(path, &error))?;
    let roots: Vec<Vec<u8>> = CertificateDer::pem_slice_iter(&bytes)
        .map(|der| der.map(|der| der.to_vec()))
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(path, &error))?;
    if roots.is_empty() {
        return Err(unusable(path, &"there is no certificate in it"));
    }
    Ok(roots)
}
