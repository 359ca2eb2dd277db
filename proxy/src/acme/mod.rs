//! Certificates from an authority that speaks ACME (RFC 8555): for the domain and every name
//! directly below it by DNS-01, for the domain alone by TLS-ALPN-01. Never for the name of a VM:
//! authorities publish names, and a VM's is its secret. Control decides when, keeps the account's
//! and the certificate's keys, and hands over what one order needs; nothing is kept here between two
//! orders.

mod dns;
mod http;
#[cfg(test)]
mod tests;
mod tls;
mod update;

use std::sync::Arc;
use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Identifier, Key, NewOrder, OrderStatus,
    RetryPolicy,
};
use protocol::host::proxy::OrderCertificate;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::timeout;

use crate::edge::challenges::Challenges;
use crate::gateway::dns::Upstreams;
use dns::Records;
use http::Https;
use tls::Proofs;
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
    /// The authority does not take this kind of proof.
    #[error("the certificate authority offers no {kind} challenge for {name}")]
    NoChallenge {
        /// For what.
        name: String,
        /// Which.
        kind: &'static str,
    },
    /// It would be published.
    #[error("`{0}` is below the domain: such a name is a VM's secret and is never ordered")]
    Secret(String),
    /// This kind of proof is for single names.
    #[error("`{0}` cannot be proved by TLS-ALPN-01, which is for single names; use DNS-01")]
    Wildcard(String),
    /// The proof cannot be made.
    #[error("the proof of {name}: {cause}")]
    Proof {
        /// Of what.
        name: String,
        /// What is wrong.
        cause: String,
    },
    /// It looked and was not satisfied.
    #[error("the certificate authority did not accept the order ({problem}); {hint}")]
    NotAccepted {
        /// What it said.
        problem: String,
        /// What to look at.
        hint: &'static str,
    },
    /// It takes too long.
    #[error("the order was not done in ten minutes")]
    TooLong,
    /// More names than an order may have.
    #[error("an order for {0} names; at most {MAX_NAMES}")]
    TooMany(usize),
}

/// Where an order is carried out.
#[derive(Clone, Debug)]
pub struct Here {
    /// Where the edge proves names.
    pub challenges: Arc<Challenges>,
    /// The domain below which VMs have their names.
    pub domain: String,
}

/// Carries out one order; gives the chain in PEM, leaf first.
pub async fn order(order: &OrderCertificate, here: &Here) -> Result<String, AcmeError> {
    timeout(PATIENCE, run(order, here))
        .await
        .unwrap_or(Err(AcmeError::TooLong))
}

async fn run(order: &OrderCertificate, here: &Here) -> Result<String, AcmeError> {
    if order.names.len() > MAX_NAMES {
        return Err(AcmeError::TooMany(order.names.len()));
    }
    for name in &order.names {
        publishable(name, &here.domain)?;
    }
    let name_servers = order.name_servers.iter().map(|text| address(text));
    let upstreams = Upstreams::new(name_servers.collect::<Result<_, _>>()?);
    let https = Https::new(&order.roots, upstreams)?;
    if order.update_server.is_empty() {
        let proofs = Proofs::new(Arc::clone(&here.challenges), &order.names)?;
        let account = account(order, https).await?;
        return prove(order, &account, Proof::Tls(proofs)).await;
    }
    let zone = Zone::new(
        address(&order.update_server)?,
        &order.zone,
        &order.key_name,
        &order.key_secret,
    )?;
    // What an order before left, because it was cut: also where nothing is set this time, because
    // the authority remembers an earlier proof.
    let mut records = Records::clean(zone, &order.names).await?;
    let result = match account(order, https).await {
        Ok(account) => prove(order, &account, Proof::Dns(&mut records)).await,
        Err(error) => Err(error),
    };
    records.remove().await;
    result
}

fn address(text: &str) -> Result<std::net::SocketAddr, AcmeError> {
    text.parse()
        .map_err(|_| AcmeError::Address(text.to_owned()))
}

/// Whether everybody may learn of a name: of one below the domain nobody may, but for `*`.
fn publishable(name: &str, domain: &str) -> Result<(), AcmeError> {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let below = name
        .strip_suffix(&domain.to_ascii_lowercase())
        .and_then(|rest| rest.strip_suffix('.'));
    match below {
        Some(label) if !domain.is_empty() && label != "*" => Err(AcmeError::Secret(name)),
        _ => Ok(()),
    }
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

/// How names are proved.
enum Proof<'a> {
    Dns(&'a mut Records),
    Tls(Proofs),
}

impl Proof<'_> {
    fn kind(&self) -> (ChallengeType, &'static str) {
        match self {
            Self::Dns(_) => (ChallengeType::Dns01, "DNS-01"),
            Self::Tls(_) => (ChallengeType::TlsAlpn01, "TLS-ALPN-01"),
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::Dns(_) => {
                "does the whole world see the TXT record that was set at the name server?"
            }
            Self::Tls(_) => {
                "does the name lead to this appliance for the whole world, and port 443 to the edge?"
            }
        }
    }
}

/// Gives the proofs, lets the authority look, and fetches the certificate.
async fn prove(
    order: &OrderCertificate,
    account: &Account,
    mut proof: Proof<'_>,
) -> Result<String, AcmeError> {
    let names: Vec<Identifier> = order.names.iter().cloned().map(Identifier::Dns).collect();
    let mut placed = account.new_order(&NewOrder::new(&names)).await?;
    let (kind, text) = proof.kind();
    let no_challenge = |name: String| AcmeError::NoChallenge { name, kind: text };
    let mut authorizations = placed.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let name = authorization.identifier().identifier.clone();
        let name = match name {
            Identifier::Dns(name) => name.trim_start_matches("*.").to_owned(),
            other => return Err(no_challenge(format!("{other:?}"))),
        };
        let challenge = authorization.challenge(kind.clone());
        let challenge = challenge.ok_or_else(|| no_challenge(name.clone()))?;
        let key = challenge.key_authorization();
        match &mut proof {
            Proof::Dns(records) => records.note(&name, key.dns_value()),
            Proof::Tls(proofs) => proofs.show(&name, key.digest().as_ref())?,
        }
    }
    if let Proof::Dns(records) = &mut proof {
        records
            .set(Duration::from_secs(order.propagation_s.into()))
            .await?;
    }
    let mut authorizations = placed.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status != AuthorizationStatus::Valid
            && let Some(mut challenge) = authorization.challenge(kind.clone())
        {
            challenge.set_ready().await?;
        }
    }
    let not_accepted = |problem: String| AcmeError::NotAccepted {
        problem,
        hint: proof.hint(),
    };
    let retries = RetryPolicy::new().timeout(POLLING);
    let status = match placed.poll_ready(&retries).await {
        Ok(status) => status,
        Err(instant_acme::Error::Api(problem)) => return Err(not_accepted(problem.to_string())),
        Err(error) => return Err(error.into()),
    };
    if status != OrderStatus::Ready {
        return Err(not_accepted(format!("{status:?}")));
    }
    placed.finalize_csr(&order.request).await?;
    Ok(placed.poll_certificate(&retries).await?)
}
