//! What becomes of header fields on their way through: those of one connection end here, and what
//! the visitor says about where the request came from is replaced by what the edge knows.

use std::net::IpAddr;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// In which a visitor shows the token of a VM.
pub(crate) const SUPVM_TOKEN: HeaderName = HeaderName::from_static("x-supvm-token");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Fields that the fields of one connection never are, whatever `Connection` lists.
const END_TO_END: [HeaderName; 3] = [HOST, CONTENT_LENGTH, http::header::CONTENT_TYPE];

/// How a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// By HTTP/1.1.
    Plain,
    /// By HTTP/1.1, to become a WebSocket.
    WebSocket,
    /// By HTTP/2 without TLS.
    Http2,
}

/// What the edge knows of a request.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) address: IpAddr,
    /// As the visitor wrote it.
    pub(crate) host: HeaderValue,
    pub(crate) version: Version,
}

/// Makes a visitor's header fields those of the request to the guest.
pub(crate) fn to_guest(headers: &mut HeaderMap, origin: &Origin, hop: Hop) {
    let trailers = accepts_trailers(headers);
    remove_hop(headers);
    headers.remove(FORWARDED);
    headers.remove(VIA);
    remove_claims(headers);
    if origin.version == Version::HTTP_10 {
        headers.remove(EXPECT);
    }
    headers.insert(HOST, origin.host.clone());
    if let Ok(address) = HeaderValue::try_from(origin.address.to_canonical().to_string()) {
        headers.insert(FORWARDED_FOR, address);
    }
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("https"));
    headers.insert(FORWARDED_HOST, origin.host.clone());
    headers.insert(VIA, via(origin.version));
    match hop {
        Hop::Plain if trailers => {
            headers.insert(TE, HeaderValue::from_static("trailers"));
            headers.insert(CONNECTION, HeaderValue::from_static("TE"));
        }
        Hop::Plain => {}
        Hop::WebSocket => {
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        }
        Hop::Http2 => {
            // The authority says it.
            headers.remove(HOST);
            if trailers {
                headers.insert(TE, HeaderValue::from_static("trailers"));
            }
        }
    }
}

/// Removes from a visitor's trailers what may not stand there (RFC 9110, 6.5.1): a program that
/// joins them with the header would otherwise believe them.
pub(crate) fn trailers_to_guest(trailers: &mut HeaderMap) {
    remove_hop(trailers);
    remove_claims(trailers);
    for name in [
        HOST,
        VIA,
        EXPECT,
        CONTENT_LENGTH,
        AUTHORIZATION,
        COOKIE,
        SUPVM_TOKEN,
    ] {
        trailers.remove(name);
    }
}

/// Makes a guest's header fields those of the answer to the visitor.
pub(crate) fn to_visitor(headers: &mut HeaderMap) {
    remove_hop(headers);
}

/// Whether the fields ask for a WebSocket by HTTP/1.1.
pub(crate) fn asks_for_websocket(headers: &HeaderMap) -> bool {
    lists(headers, &CONNECTION, "upgrade") && lists(headers, &UPGRADE, "websocket")
}

/// Whether the request is one of gRPC, which needs HTTP/2 all the way.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE);
    kind.and_then(|kind| kind.as_bytes().strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

fn accepts_trailers(headers: &HeaderMap) -> bool {
    lists(headers, &TE, "trailers")
}

fn via(version: Version) -> HeaderValue {
    HeaderValue::from_static(match version {
        Version::HTTP_2 => "2.0 supvm",
        Version::HTTP_10 => "1.0 supvm",
        _ => "1.1 supvm",
    })
}

fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token))
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|part| part.split(';').next().unwrap_or_default().trim())
}

/// Removes the fields of one connection, those that `Connection` lists among them.
fn remove_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let listed: Vec<HeaderName> = tokens(headers, &CONNECTION)
            .filter_map(|token| token.parse().ok())
            .filter(|name| !END_TO_END.contains(name))
            .collect();
        for name in listed {
            headers.remove(name);
        }
    }
    for name in [
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        HTTP2_SETTINGS,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        headers.remove(name);
    }
}

/// Removes what only a proxy may say, also under names that programs take for the same.
fn remove_claims(headers: &mut HeaderMap) {
    let claims: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_claim(name.as_str()))
        .cloned()
        .collect();
    for name in claims {
        headers.remove(name);
    }
}

fn is_claim(name: &str) -> bool {
    let said = |byte| if byte == b'_' { b'-' } else { byte };
    let begins = |with: &[u8]| {
        name.bytes()
            .map(said)
            .take(with.len())
            .eq(with.iter().copied())
    };
    let is = |whole: &[u8]| name.len() == whole.len() && begins(whole);
    begins(b"x-forwarded-") || is(b"x-real-ip") || is(b"forwarded")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn sent(pairs: &[(&'static str, &'static str)], hop: Hop) -> Vec<(String, String)> {
        let mut headers = fields(pairs);
        let origin = Origin {
            address: "::ffff:192.0.2.7".parse().unwrap(),
            host: HeaderValue::from_static("Name.example:8443"),
            version: Version::HTTP_11,
        };
        to_guest(&mut headers, &origin, hop);
        let mut sent: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        sent.sort();
        sent
    }

    fn expected(more: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut all: Vec<_> = [
            ("host", "Name.example:8443"),
            ("via", "1.1 supvm"),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-host", "Name.example:8443"),
            ("x-forwarded-proto", "https"),
        ]
        .iter()
        .chain(more)
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
        all.sort();
        all
    }

    #[test]
    fn what_a_visitor_claims_about_itself_is_replaced() {
        let claims = [
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x_forwarded_for", "10.0.0.3"),
            ("x-forwarded-port", "1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "evil"),
            ("x-real-ip", "10.0.0.4"),
            ("x-real_ip", "10.0.0.4"),
            ("forwarded", "for=10.0.0.5"),
            ("via", "1.1 evil"),
            ("host", "other"),
        ];
        assert_eq!(sent(&claims, Hop::Plain), expected(&[]));
    }

    #[test]
    fn fields_of_one_connection_end_here_also_those_that_connection_lists() {
        let hop = [
            ("connection", "keep-alive, X-Mine, host, x-forwarded-for"),
            ("connection", "Other;"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
            ("te", "gzip"),
            ("x-mine", "1"),
            ("other", "2"),
            ("kept", "3"),
        ];
        assert_eq!(sent(&hop, Hop::Plain), expected(&[("kept", "3")]));
    }

    #[test]
    fn a_websocket_and_trailers_are_asked_for_anew() {
        let socket = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
        ];
        assert!(asks_for_websocket(&fields(&socket)));
        assert!(!asks_for_websocket(&fields(&[("upgrade", "websocket")])));
        assert!(!asks_for_websocket(&fields(&[
            ("connection", "upgrade"),
            ("upgrade", "h2c")
        ])));
        let asked = [("connection", "Upgrade"), ("upgrade", "websocket")];
        assert_eq!(sent(&socket, Hop::WebSocket), expected(&asked));
        let trailers = [("connection", "TE"), ("te", "trailers")];
        assert_eq!(
            sent(&[("te", "trailers, deflate")], Hop::Plain),
            expected(&trailers)
        );
    }

    #[test]
    fn grpc_is_told_from_what_only_begins_like_it() {
        let kind = |kind| is_grpc(&fields(&[("content-type", kind)]));
        assert!(kind("application/grpc") && kind("application/grpc+proto"));
        assert!(!kind("application/grpc-web") && !kind("text/plain"));
    }
}
