//! Certificates from an authority that speaks ACME (RFC 8555), for the domain and every name
//! directly below it, by DNS-01. Control decides when, keeps the account's and the certificate's
//! keys, and hands over what one order needs; nothing is kept here between two orders.

mod http;
#[cfg(test)]
mod tests;
mod update;

use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Identifier, Key, NewOrder, OrderStatus,
    RetryPolicy,
};
use protocol::host::proxy::OrderCertificate;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::{sleep, timeout};

use crate::gateway::dns::Upstreams;
use http::Https;
pub use update::UpdateError;
use update::Zone;

/// How long an order may take: the authority looks at its own pace.
const PATIENCE: Duration = Duration::from_secs(10 * 60);

/// How long the authority is asked again whether it is done.
const POLLING: Duration = Duration::from_secs(4 * 60);

/// More names than an order of ours ever has.
const MAX_NAMES: usize = 16;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    /// The authority or the way to it.
    #[error("the certificate authority: {0}")]
    Authority(#[from] instant_acme::Error),
    /// The domain's zone could not be changed.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// The operator's root certificates.
    #[error("the authority's root certificate: {0}")]
    Roots(#[from] rustls::Error),
    /// An address in the order is none.
    #[error("`{0}` is no address and port")]
    Address(String),
    /// The authority does not let a DNS record prove anything.
    #[error("the certificate authority offers no DNS-01 challenge for {0}")]
    NoChallenge(String),
    /// It looked and was not satisfied.
    #[error(
        "the certificate authority did not accept the order ({0}); does the whole world see \
         the TXT record that was set at the name server?"
    )]
    NotAccepted(String),
    /// It takes too long.
    #[error("the order was not done in ten minutes")]
    TooLong,
    /// More names than an order may have.
    #[error("an order for {0} names; at most {MAX_NAMES}")]
    TooMany(usize),
}

/// Carries out one order; gives the chain in PEM, leaf first.
pub async fn order(order: &OrderCertificate) -> Result<String, AcmeError> {
    timeout(PATIENCE, run(order))
        .await
        .unwrap_or(Err(AcmeError::TooLong))
}

async fn run(order: &OrderCertificate) -> Result<String, AcmeError> {
    if order.names.len() > MAX_NAMES {
        return Err(AcmeError::TooMany(order.names.len()));
    }
    let address = |text: &String| text.parse().map_err(|_| AcmeError::Address(text.clone()));
    let name_servers = order.name_servers.iter().map(address);
    let upstreams = Upstreams::new(name_servers.collect::<Result<_, _>>()?);
    let zone = Zone::new(
        address(&order.update_server)?,
        &order.zone,
        &order.key_name,
        &order.key_secret,
    )?;
    let account = account(order, Https::new(&order.roots, upstreams)?).await?;
    let mut records = Vec::new();
    let result = prove(order, &account, &zone, &mut records).await;
    // Also after an error: nothing of an order stays behind.
    for (at, _) in &records {
        if let Err(error) = zone.set_txt(at, &[]).await {
            tracing::warn!(%error, name = at, "the TXT record of an order is left behind");
        }
    }
    result
}

/// The account of this key; it is made at the first order.
async fn account(order: &OrderCertificate, http: Https) -> Result<Account, AcmeError> {
    let der = || PrivatePkcs8KeyDer::from(order.account_key.clone());
    let key = Key::from_pkcs8_der(der())?;
    let (account, _) = Account::builder_with_http(Box::new(http))
        .create_from_key((key, PrivateKeyDer::Pkcs8(der())), order.directory.clone())
        .await?;
    if !order.contact.is_empty() {
        account.update_contacts(&[order.contact.as_str()]).await?;
    }
    Ok(account)
}

/// Sets the records, notes them in `records`, and lets the authority look.
async fn prove(
    order: &OrderCertificate,
    account: &Account,
    zone: &Zone,
    records: &mut Vec<(String, Vec<String>)>,
) -> Result<String, AcmeError> {
    let names: Vec<Identifier> = order.names.iter().cloned().map(Identifier::Dns).collect();
    let mut placed = account.new_order(&NewOrder::new(&names)).await?;
    let mut authorizations = placed.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let name = authorization.identifier().identifier.clone();
        let name = match name {
            Identifier::Dns(name) => name.trim_start_matches("*.").to_owned(),
            other => return Err(AcmeError::NoChallenge(format!("{other:?}"))),
        };
        let challenge = authorization.challenge(ChallengeType::Dns01);
        let challenge = challenge.ok_or_else(|| AcmeError::NoChallenge(name.clone()))?;
        let value = challenge.key_authorization().dns_value();
        let at = format!("_acme-challenge.{name}");
        // The domain and the names below it prove themselves at the same place.
        match records.iter_mut().find(|(known, _)| *known == at) {
            Some((_, values)) => values.push(value),
            None => records.push((at, vec![value])),
        }
    }
    for (at, values) in records.iter() {
        zone.set_txt(at, values).await?;
    }
    if !records.is_empty() {
        // Other servers of the zone fetch the change from the one that has it.
        sleep(Duration::from_secs(order.propagation_s.into())).await;
    }
    let mut authorizations = placed.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status != AuthorizationStatus::Valid
            && let Some(mut challenge) = authorization.challenge(ChallengeType::Dns01)
        {
            challenge.set_ready().await?;
        }
    }
    let retries = RetryPolicy::new().timeout(POLLING);
    let status = match placed.poll_ready(&retries).await {
        Ok(status) => status,
        Err(instant_acme::Error::Api(problem)) => {
            return Err(AcmeError::NotAccepted(problem.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    if status != OrderStatus::Ready {
        return Err(AcmeError::NotAccepted(format!("{status:?}")));
    }
    placed.finalize_csr(&order.request).await?;
    Ok(placed.poll_certificate(&retries).await?)
}
