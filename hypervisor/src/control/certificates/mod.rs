//! What proxy shows to clients: a pair of the operator's, read again when its files change, or one
//! that was ordered from an authority that speaks ACME, or else one of the built-in authority. A pair that cannot be shown is an error in the log and
//! changes nothing: what was shown before goes on being shown.

mod acme;
mod key;
mod news;
mod pair;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use protocol::host::proxy::{CertificateOrdered, OrderCertificate};
use tokio::sync::watch;
use tokio::time::sleep;

use super::keys::{Authority, KeyError, Leaf};
use crate::settings::{CertificateFiles, Domain, Settings};
use acme::Acme;
use news::News;
use pair::Pair;

/// Chain and key are written one after the other: they are read when nothing was written for this
/// long,
const QUIET: Duration = Duration::from_millis(500);

/// but no later than this after the first change.
const IMPATIENCE: Duration = Duration::from_secs(10);

/// Where nothing tells of changes, and again when the pair is about to expire.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Certificates for the domain.
pub(crate) struct Certificates {
    authority: Authority,
    domain: Domain,
    files: Option<CertificateFiles>,
    pair: Mutex<Option<Pair>>,
    acme: Option<Mutex<Acme>>,
    changes: watch::Sender<u64>,
}

impl Certificates {
    /// Reads the operator's files, or what was ordered before, if there is any of that.
    pub(crate) fn open(authority: Authority, settings: &Settings, keys: &Path) -> Self {
        let domain = settings.domain.clone();
        let acme = settings.acme.clone();
        let acme = acme.map(|acme| Acme::new(acme, domain.clone(), keys));
        let kept = acme.as_ref().and_then(|acme| acme.kept(SystemTime::now()));
        let certificates = Self {
            authority,
            domain,
            files: settings.certificates.clone(),
            pair: Mutex::new(kept),
            acme: acme.map(Mutex::new),
            changes: watch::Sender::new(0),
        };
        certificates.read();
        certificates
    }

    /// The line to proxy is a new one.
    pub(crate) fn begin(&self) {
        if let Some(acme) = &self.acme {
            lock(acme).forget();
        }
    }

    /// Waits until a certificate has to be ordered; for ever where none ever has to.
    pub(crate) async fn due(&self) {
        let Some(acme) = &self.acme else {
            return std::future::pending().await;
        };
        loop {
            let wait = lock(acme).wait(lock(&self.pair).as_ref(), SystemTime::now());
            if wait.is_zero() {
                return;
            }
            // The clock may be set meanwhile.
            sleep(wait.min(LONGEST_WAIT)).await;
        }
    }

    /// The order that is due, for proxy.
    pub(crate) fn order(&self, name_servers: &[SocketAddr]) -> Option<OrderCertificate> {
        let acme = self.acme.as_ref()?;
        let order = lock(acme).order(name_servers, SystemTime::now());
        match order {
            Ok(order) => {
                tracing::info!(names = ?order.names, directory = order.directory, "a certificate is ordered");
                Some(order)
            }
            Err(error) => {
                tracing::error!(%error, "a certificate cannot be ordered; tried again later");
                None
            }
        }
    }

    /// Takes what came of an order.
    pub(crate) fn ordered(&self, answer: &CertificateOrdered) {
        let Some(acme) = &self.acme else {
            return;
        };
        let taken = lock(acme).ordered(answer, SystemTime::now());
        match taken {
            Ok(None) => {}
            Ok(Some(pair)) => {
                tracing::info!("a new certificate was given and is shown");
                *lock(&self.pair) = Some(pair);
                self.changed();
            }
            Err(error) => {
                tracing::error!(%error, "the order of a certificate failed; tried again later");
            }
        }
    }

    /// What to show now.
    pub(crate) fn leaf(&self, addresses: &[IpAddr]) -> Result<Leaf, KeyError> {
        match &*lock(&self.pair) {
            Some(pair) => Ok(pair.clone().into()),
            None => self.authority.leaf(&self.domain, addresses),
        }
    }

    /// Marks each time when there is something else to show.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Follows the files for ever.
    pub(crate) async fn follow(&self) {
        let Some(files) = &self.files else {
            return std::future::pending().await;
        };
        loop {
            // What happens while they are read is in the news.
            let mut news = match News::of([&files.chain, &files.key]) {
                Ok(news) => Some(news),
                Err(error) => {
                    tracing::error!(%error, "changes of the certificate files are not followed");
                    None
                }
            };
            self.read();
            let told = async {
                match &mut news {
                    Some(news) => news.wait().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                told = told => if let Err(error) = told {
                    tracing::error!(%error, "changes of the certificate files are not told");
                    sleep(IMPATIENCE).await;
                },
                () = sleep(self.wait()) => continue,
            }
            if let Some(news) = &mut news {
                let settled = async {
                    while let Ok(Ok(())) = tokio::time::timeout(QUIET, news.wait()).await {}
                };
                let _ = tokio::time::timeout(IMPATIENCE, settled).await;
            }
        }
    }

    /// Until the pair has to be looked at again: what expires has to be said.
    fn wait(&self) -> Duration {
        let expires = lock(&self.pair).as_ref().map(|pair| pair.expires);
        let left = expires.and_then(|at| at.duration_since(SystemTime::now()).ok());
        // One that has expired is looked at once a day.
        left.map_or(LONGEST_WAIT, |left| left.min(LONGEST_WAIT))
    }

    fn changed(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn read(&self) {
        let Some(files) = &self.files else {
            return;
        };
        let read = Pair::read(files, &self.domain, SystemTime::now());
        let mut pair = lock(&self.pair);
        match read {
            Ok(new) if pair.as_ref() == Some(&new) => {}
            Ok(new) => {
                tracing::info!(chain = %files.chain.display(), "a new certificate is shown");
                *pair = Some(new);
                self.changes
                    .send_modify(|count| *count = count.wrapping_add(1));
            }
            Err(error) => {
                let shown = match &*pair {
                    Some(_) => "the one before is shown",
                    None => "one of the built-in authority is shown",
                };
                tracing::error!(%error, "the certificate cannot be used; {shown}");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
