//! What proxy shows to clients: a pair of the operator's, read again when its files change, or one
//! that was ordered from an authority that speaks ACME, or else one of the built-in authority. A pair
//! that cannot be shown is an error in the log and changes nothing: what was shown before goes on
//! being shown until it expires.

mod acme;
mod key;
mod news;
mod orders;
mod pair;
mod pause;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use protocol::host::proxy::{CertificateOrdered, NamedCertificate, OrderCertificate};
use tokio::sync::watch;
use tokio::time::sleep;

use super::clock;
use super::keys::{Authority, KeyError, LEAF_RENEWAL, Leaf};
use crate::settings::{CertificateFiles, Domain, Settings};
use news::News;
use orders::Orders;
use pair::Pair;

/// Chain and key are written one after the other: they are read when nothing was written for this
/// long,
const QUIET: Duration = Duration::from_millis(500);

/// but no later than this after the first change.
const IMPATIENCE: Duration = Duration::from_secs(10);

/// Where nothing tells of changes.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Bytes of all certificates of single names: everything goes to proxy in one packet of 64 KiB.
const BESIDE: usize = 36 << 10;

/// Certificates for the domain.
pub(crate) struct Certificates {
    authority: Authority,
    domain: Domain,
    files: Option<CertificateFiles>,
    /// What is in the files.
    pair: Mutex<Option<Pair>>,
    orders: Mutex<Orders>,
    changes: watch::Sender<u64>,
}

/// What the edge shows beside a leaf for everything.
pub(crate) struct Beside {
    /// The built-in authority's certificate in DER if the leaf comes from it, else empty.
    pub(crate) authority: Vec<u8>,
    /// Certificates of single names.
    pub(crate) named: Vec<NamedCertificate>,
}

/// Both names that a certificate for everything has.
fn wildcard(domain: &Domain) -> Vec<String> {
    let domain = domain.as_str();
    vec![domain.to_owned(), format!("*.{domain}")]
}

impl Certificates {
    /// Reads the operator's files, or what was ordered before, if there is any of that.
    pub(crate) fn open(authority: Authority, settings: &Settings, keys: &Path) -> Self {
        let certificates = Self {
            authority,
            domain: settings.domain.clone(),
            files: settings.certificates.clone(),
            pair: Mutex::new(None),
            orders: Mutex::new(Orders::new(settings, keys)),
            changes: watch::Sender::new(0),
        };
        certificates.read();
        certificates
    }

    /// The line to proxy is a new one.
    pub(crate) fn begin(&self) {
        lock(&self.orders).forget();
    }

    /// Waits until a certificate has to be ordered, and says which; for ever where none ever has to.
    pub(crate) async fn due(&self) -> usize {
        loop {
            let now = SystemTime::now();
            let next = lock(&self.orders).next(now);
            match next {
                None => return std::future::pending().await,
                Some((which, at)) if at <= now => return which,
                Some((_, at)) => clock::until(at).await,
            }
        }
    }

    /// The order that is due, for proxy.
    pub(crate) fn order(
        &self,
        which: usize,
        name_servers: &[SocketAddr],
    ) -> Option<OrderCertificate> {
        let order = lock(&self.orders).order(which, name_servers, SystemTime::now());
        match order {
            Ok(order) => {
                let order = order?;
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
        match lock(&self.orders).ordered(answer, SystemTime::now()) {
            Ok(None) => {}
            Ok(Some(names)) => {
                tracing::info!(?names, "a new certificate was given and is shown");
                self.changed();
            }
            Err(error) => {
                tracing::error!(%error, "the order of a certificate failed; tried again later");
            }
        }
    }

    /// What to show now.
    pub(crate) fn leaf(&self, addresses: &[IpAddr]) -> Result<Leaf, KeyError> {
        match self.given(SystemTime::now()) {
            Some(pair) => Ok(pair.into()),
            None => self.authority.leaf(&self.domain, addresses),
        }
    }

    /// What the edge shows beside that.
    pub(crate) fn beside(&self) -> Beside {
        let now = SystemTime::now();
        let mut room = BESIDE;
        let mut named = Vec::new();
        for (name, pair) in lock(&self.orders).named(now) {
            let length = pair.chain.iter().map(Vec::len).sum::<usize>();
            match room.checked_sub(length.saturating_add(pair.key.len())) {
                Some(left) => room = left,
                None => {
                    tracing::error!(
                        name,
                        length,
                        "a certificate is too long to be shown beside the others"
                    );
                    continue;
                }
            }
            named.push(NamedCertificate {
                name: name.to_owned(),
                certificates: pair.chain.clone(),
                key: pair.key.clone(),
            });
        }
        Beside {
            authority: match self.given(now) {
                Some(_) => Vec::new(),
                None => self.authority.certificate().to_vec(),
            },
            named,
        }
    }

    /// When what is shown from `now` on has to be made anew.
    pub(crate) fn until(&self, now: SystemTime) -> SystemTime {
        let renewal = now.checked_add(LEAF_RENEWAL).unwrap_or(now);
        let orders = lock(&self.orders);
        let named = orders.named(now).map(|(_, pair)| pair.expires);
        let wildcard = orders.wildcard(now).map(|pair| pair.expires);
        let file = lock(&self.pair).as_ref().map(|pair| pair.expires);
        let expiries = named.chain(wildcard).chain(file);
        expiries
            .filter(|at| *at > now)
            .fold(renewal, SystemTime::min)
    }

    /// A certificate for everything that is not the built-in authority's. One that has expired is
    /// none.
    fn given(&self, now: SystemTime) -> Option<Pair> {
        let pair = lock(&self.pair).clone();
        pair.filter(|pair| pair.expires > now)
            .or_else(|| lock(&self.orders).wildcard(now).cloned())
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
                () = clock::until(self.look_again()) => continue,
            }
            if let Some(news) = &mut news {
                let settled = async {
                    while let Ok(Ok(())) = tokio::time::timeout(QUIET, news.wait()).await {}
                };
                let _ = tokio::time::timeout(IMPATIENCE, settled).await;
            }
        }
    }

    /// When the files have to be looked at again: what expires has to be said. One that has expired
    /// is looked at once a day, and whenever the clock is set.
    fn look_again(&self) -> SystemTime {
        let now = SystemTime::now();
        let latest = now.checked_add(LONGEST_WAIT).unwrap_or(now);
        let expires = lock(&self.pair).as_ref().map(|pair| pair.expires);
        expires
            .filter(|at| *at > now)
            .map_or(latest, |at| at.min(latest))
    }

    fn changed(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn read(&self) {
        let Some(files) = &self.files else {
            return;
        };
        let read = Pair::read(files, &wildcard(&self.domain), SystemTime::now());
        let mut pair = lock(&self.pair);
        match read {
            Ok(new) if pair.as_ref() == Some(&new) => {}
            Ok(new) => {
                tracing::info!(chain = %files.chain.display(), "a new certificate is shown");
                *pair = Some(new);
                drop(pair);
                self.changed();
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
