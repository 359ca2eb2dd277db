//! WebSockets: by HTTP/1.1's upgrade, or by HTTP/2's extended CONNECT (RFC 8441), which becomes an
//! upgrade on the way to the guest. Once both sides agreed, the edge looks at no byte of it.

use std::sync::Arc;

use data_encoding::BASE64;
use http::header::{
    CONNECTION, CONTENT_LENGTH, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION,
    UPGRADE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use ring::rand::{SecureRandom, SystemRandom};

use super::body::{Answer, Keep, Upload};
use super::forward::{Outgoing, Target, send};
use super::guests::Guests;
use super::headers::{Hop, to_guest, to_visitor};
use super::pages::Page;
use super::service::{Asked, InFlight, answer};
use super::{Core, tunnel};

/// RFC 6455, 1.3.
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Asks the guest for a WebSocket and, when it agrees, connects the visitor with it.
pub(super) async fn serve<G: Guests>(
    core: &Arc<Core<G>>,
    target: &Target,
    mut head: Parts,
    asked: Asked,
    in_flight: &mut Option<InFlight>,
) -> Result<Response<Answer>, Page> {
    let http2 = head.method == Method::CONNECT;
    let visitor = head.extensions.remove::<OnUpgrade>();
    let visitor = visitor.ok_or(Page::BadRequest("no connection to upgrade"))?;
    head.headers.remove(CONTENT_LENGTH);
    to_guest(&mut head.headers, &asked.origin, Hop::WebSocket);
    let expected = if http2 {
        Some(own_key(&mut head.headers)?)
    } else {
        None
    };
    let outgoing = Outgoing {
        method: Method::GET,
        path: asked.path,
        authority: None,
        headers: head.headers,
        body: Upload::empty(),
        gate: None,
    };
    let (mut response, lease) = send(core, target, outgoing, Hop::WebSocket).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // For a CONNECT a success would mean that there is a tunnel.
        if response.status().is_informational() || (http2 && response.status().is_success()) {
            return Err(Page::BadAnswer);
        }
        // The connection is made for one WebSocket; it is not used again.
        drop(lease);
        return answer(response, Keep::default());
    }
    let agreed = |headers: &HeaderMap| {
        let upgrade = headers.get(UPGRADE).map(HeaderValue::as_bytes);
        let accept = headers.get(SEC_WEBSOCKET_ACCEPT);
        upgrade.is_some_and(|upgrade| upgrade.eq_ignore_ascii_case(b"websocket"))
            && expected
                .as_ref()
                .is_none_or(|expected| accept == Some(expected))
    };
    if !agreed(response.headers()) {
        return Err(Page::BadAnswer);
    }
    let guest = hyper::upgrade::on(&mut response);
    let in_flight = in_flight.take().ok_or(Page::Unavailable)?.answered();
    let half_closed = core.limits.half_closed;
    if let Some(signals) = &in_flight.connection.signals {
        signals.tunnel();
    }
    core.tasks.spawn(async move {
        let _in_flight = in_flight;
        let (Ok(guest), Ok(visitor)) = futures::future::join(guest, visitor).await else {
            return;
        };
        // How it ended matters to nobody: each side saw its own end.
        let _ = tunnel::run(TokioIo::new(visitor), TokioIo::new(guest), half_closed).await;
    });
    let mut agreement = Response::new(Answer::whole(bytes::Bytes::new()));
    *agreement.headers_mut() = std::mem::take(response.headers_mut());
    let headers = agreement.headers_mut();
    to_visitor(headers);
    if http2 {
        headers.remove(SEC_WEBSOCKET_ACCEPT);
    } else {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        *agreement.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    }
    Ok(agreement)
}

/// Puts a key into the request, which HTTP/2 does without, and says what the guest has to answer.
fn own_key(headers: &mut HeaderMap) -> Result<HeaderValue, Page> {
    let mut random = [0; 16];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| Page::Unavailable)?;
    let key = BASE64.encode(&random);
    let accept = accept(&key);
    let value = |text: String| HeaderValue::try_from(text).map_err(|_| Page::Unavailable);
    headers.insert(SEC_WEBSOCKET_KEY, value(key)?);
    if !headers.contains_key(SEC_WEBSOCKET_VERSION) {
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    }
    value(accept)
}

fn accept(key: &str) -> String {
    let text = format!("{key}{KEY_SUFFIX}");
    BASE64.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_a_key_is_that_of_the_specification() {
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        assert_eq!(accept(key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
