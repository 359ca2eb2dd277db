//! One-time links to a VM whose public address asks for a token. Control makes the secret and forgets
//! it; proxy has its hash until the link is opened.

use protocol::host::proxy::AdmitLink;
use protocol::network::{LINK_LIFETIME_S, LINK_QUERY, LinkCreated};
use protocol::{ErrorBody, ErrorCode};

use super::random::random;
use super::vm::{Host, View};

/// Makes a link that opens once.
pub(crate) async fn create(host: &Host, view: &View) -> Result<LinkCreated, ErrorBody> {
    let record = &view.record;
    let Some(token) = record.publication.token else {
        return Err(ErrorBody::caller(
            ErrorCode::InvalidArgument,
            format!(
                "{} asks visitors for no token: its address is open to everybody who knows it",
                record.id
            ),
        ));
    };
    let secret = blake3::Hash::from_bytes(random()).to_hex();
    let admit = AdmitLink {
        subdomain: record.subdomain.clone(),
        secret: *blake3::hash(secret.as_bytes()).as_bytes(),
        token,
        lifetime_s: LINK_LIFETIME_S,
    };
    if !host.frames.admit(&admit).await {
        return Err(ErrorBody::host(
            ErrorCode::Unavailable,
            "the process that lets visitors in is being started anew",
        )
        .retryable_after_ms(500));
    }
    let address = host.settings.url(&record.subdomain);
    Ok(LinkCreated {
        url: format!("{address}/?{LINK_QUERY}={secret}"),
        lifetime_s: LINK_LIFETIME_S,
    })
}
