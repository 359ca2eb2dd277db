//! Certificates from an authority that speaks ACME: when to order one, and what was ordered, on
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
use crate::settings::{Acme as Settings, CertificateFiles, Domain};

/// Authorities allow few failures an hour.
const FIRST_PAUSE: Duration = Duration::from_secs(5 * 60);
const LONGEST_PAUSE: Duration = Duration::from_secs(12 * 60 * 60);

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

/// The orders of one domain.
pub(super) struct Acme {
    settings: Settings,
    domain: Domain,
    /// The account's key.
    account: PathBuf,
    /// Chain and key of the certificate, in one file: they are replaced together.
    files: CertificateFiles,
    under_way: Option<UnderWay>,
    failures: u32,
    /// Not before this, after failures.
    pause_until: Option<SystemTime>,
    tickets: u64,
}

struct UnderWay {
    ticket: u64,
    key: KeyPair,
    since: SystemTime,
}

impl Acme {
    pub(super) fn new(settings: Settings, domain: Domain, keys: &Path) -> Self {
        let file = keys.join("acme.pem");
        Self {
            settings,
            domain,
            account: keys.join("acme-account.key"),
            files: CertificateFiles {
                chain: file.clone(),
                key: file,
            },
            under_way: None,
            failures: 0,
            pause_until: None,
            tickets: 0,
        }
    }

    /// The certificate of an earlier order, if it can still be shown.
    pub(super) fn kept(&self, now: SystemTime) -> Option<Pair> {
        let read = Pair::read(&self.files, &self.domain, now);
        if let Err(error) = &read
            && self.files.chain.exists()
        {
            tracing::warn!(%error, "the certificate of an earlier order cannot be shown");
        }
        read.ok()
    }

    /// How long until something has to be ordered: at two thirds of a certificate's life.
    pub(super) fn wait(&self, shown: Option<&Pair>, now: SystemTime) -> Duration {
        let until = |at: Option<SystemTime>| {
            at.and_then(|at| at.duration_since(now).ok())
                .unwrap_or_default()
        };
        if let Some(order) = &self.under_way {
            return until(order.since.checked_add(LOST));
        }
        let renewal = shown.and_then(|pair| {
            let life = pair.expires.duration_since(pair.begins).ok()?;
            pair.begins.checked_add(life / 3 * 2)
        });
        until(renewal).max(until(self.pause_until))
    }

    /// The line to proxy is a new one: what was ordered over the old one is lost.
    pub(super) fn forget(&mut self) {
        self.under_way = None;
    }

    /// A new order.
    pub(super) fn order(
        &mut self,
        name_servers: &[SocketAddr],
        now: SystemTime,
    ) -> Result<OrderCertificate, AcmeError> {
        let made = self.make(name_servers);
        match made {
            Ok((mut order, key)) => {
                self.tickets = self.tickets.wrapping_add(1);
                order.ticket = self.tickets;
                self.under_way = Some(UnderWay {
                    ticket: order.ticket,
                    key,
                    since: now,
                });
                Ok(order)
            }
            Err(error) => {
                self.failed(now);
                Err(error)
            }
        }
    }

    fn make(&self, name_servers: &[SocketAddr]) -> Result<(OrderCertificate, KeyPair), AcmeError> {
        let settings = &self.settings;
        let domain = self.domain.as_str();
        let names = vec![domain.to_owned(), format!("*.{domain}")];
        let key = KeyPair::generate()?;
        let request = CertificateParams::new(names.clone())?.serialize_request(&key)?;
        let order = OrderCertificate {
            ticket: 0,
            directory: settings.directory.clone(),
            contact: settings.contact.clone(),
            account_key: self.account_key()?,
            names,
            request: request.der().to_vec(),
            update_server: settings.server.to_string(),
            zone: settings.zone.clone(),
            key_name: settings.key_name.clone(),
            key_secret: secret(&settings.key_file)?,
            propagation_s: settings.propagation_s,
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

    /// The certificate of an order, on disk before it is given; none for an answer that nobody
    /// waits for.
    pub(super) fn ordered(
        &mut self,
        answer: &CertificateOrdered,
        now: SystemTime,
    ) -> Result<Option<Pair>, AcmeError> {
        let Some(order) = self
            .under_way
            .take_if(|order| order.ticket == answer.ticket)
        else {
            return Ok(None);
        };
        let taken = self.take(&order.key, answer, now);
        match &taken {
            Ok(_) => {
                self.failures = 0;
                self.pause_until = None;
            }
            Err(_) => self.failed(now),
        }
        taken.map(Some)
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
        let pair = Pair::check(&self.files, bytes, bytes, &self.domain, now)?;
        write_replacing(&self.files.chain, bytes, 0o600)?;
        Ok(pair)
    }

    fn failed(&mut self, now: SystemTime) {
        let factor = 2_u32.saturating_pow(self.failures.min(16));
        let pause = FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.pause_until = now.checked_add(pause);
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
