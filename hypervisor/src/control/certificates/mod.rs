//! What proxy shows to clients: a pair of the operator's, read again when its files change, or else
//! a certificate of the built-in authority. A pair that cannot be shown is an error in the log and
//! changes nothing: what was shown before goes on being shown.

mod key;
mod news;
mod pair;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::sleep;

use super::keys::{Authority, KeyError, Leaf};
use crate::settings::{CertificateFiles, Domain};
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
    changes: watch::Sender<u64>,
}

impl Certificates {
    /// Reads the operator's files, if there are any.
    pub(crate) fn open(
        authority: Authority,
        domain: Domain,
        files: Option<CertificateFiles>,
    ) -> Self {
        let certificates = Self {
            authority,
            domain,
            files,
            pair: Mutex::new(None),
            changes: watch::Sender::new(0),
        };
        certificates.read();
        certificates
    }

    /// What to show now.
    pub(crate) fn leaf(&self, addresses: &[IpAddr]) -> Result<Leaf, KeyError> {
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        match &*pair {
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
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        let expires = pair.as_ref().map(|pair| pair.expires);
        let left = expires.and_then(|at| at.duration_since(SystemTime::now()).ok());
        // One that has expired is looked at once a day.
        left.map_or(LONGEST_WAIT, |left| left.min(LONGEST_WAIT))
    }

    fn read(&self) {
        let Some(files) = &self.files else {
            return;
        };
        let read = Pair::read(files, &self.domain, SystemTime::now());
        let mut pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
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
