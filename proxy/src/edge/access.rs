//! Who may come in to a VM whose owner set a token. The token is shown in a header field; a link that
//! opens once is traded for a cookie; the guest sees none of the three. The cookie is not the token:
//! it can be made of the token's hash, and is worth nothing once the token has changed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::header::{AUTHORIZATION, COOKIE};
use http::{HeaderMap, HeaderValue, Method};
use protocol::id::Subdomain;
use protocol::network::{LINK_QUERY, Publication};
use tokio::time::Instant;

use super::headers::SUPVM_TOKEN;
use super::links::Links;
use super::pages::Page;
use crate::api::strangers::network;

/// The cookie's name. Browsers take a name that begins like this only from the very host that it
/// is sent back to, so no VM can set it for another.
const COOKIE_NAME: &str = "__Host-supvm";

/// Networks whose wrong tokens are counted.
const NETWORKS: usize = 4_096;

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on.
    Enter {
        /// Path and query without a link's secret, where there was one.
        target: Option<String>,
    },
    /// The visitor came by a link: it gets this cookie and comes again by this path.
    Trade {
        /// `Set-Cookie`.
        cookie: String,
        /// Path and query without the secret.
        target: String,
    },
    /// It ends here.
    Refuse(Page),
}

/// A request, as far as it matters here.
#[derive(Debug)]
pub(crate) struct Knock<'a> {
    pub(crate) method: &'a Method,
    pub(crate) target: &'a str,
    pub(crate) address: IpAddr,
    pub(crate) subdomain: &'a Subdomain,
}

/// Checks a request and removes from its fields what was meant for the edge.
pub(crate) fn check(
    publication: &Publication,
    knock: &Knock<'_>,
    headers: &mut HeaderMap,
    tries: &Tries,
    links: &Links,
) -> Verdict {
    let cookie = take_cookie(headers);
    let shown = headers.remove(SUPVM_TOKEN);
    let (link, rest) = link(knock.target).unzip();
    let enter = |target| Verdict::Enter { target };
    let Some(hash) = publication.token else {
        return enter(rest);
    };
    let expected = blake3::Hash::from_bytes(hash);
    let right = |token: &[u8]| blake3::hash(token) == expected;
    // The comparisons take the same time wherever the difference is.
    if cookie.is_some_and(|cookie| {
        blake3::Hash::from_hex(cookie).is_ok_and(|cookie| cookie == ticket(&hash, knock.subdomain))
    }) {
        // Who shows the token beside the cookie does not show it to the guest.
        if headers
            .get(AUTHORIZATION)
            .and_then(bearer)
            .is_some_and(right)
        {
            headers.remove(AUTHORIZATION);
        }
        return enter(rest);
    }
    let bearer = headers.get(AUTHORIZATION).and_then(bearer);
    let shows = shown.is_some() || bearer.is_some();
    let allowed = shows && tries.allowed(knock.address);
    if allowed {
        let bearer = bearer.is_some_and(right);
        if bearer {
            headers.remove(AUTHORIZATION);
        }
        if bearer || shown.is_some_and(|token| right(token.as_bytes())) {
            return enter(rest);
        }
    }
    // Only GET is sure to be somebody who wants to see what is there.
    let link = link.filter(|_| knock.method == Method::GET);
    match (link, rest) {
        (Some(secret), Some(target))
            if links.spend(knock.subdomain, &hash, &secret, Instant::now()) =>
        {
            let ticket = ticket(&hash, knock.subdomain).to_hex();
            let cookie = format!(
                "{COOKIE_NAME}={ticket}; Path=/; Max-Age=2592000; Secure; HttpOnly; SameSite=Lax"
            );
            return Verdict::Trade { cookie, target };
        }
        // A secret has too many bits to be found by trying: it is not counted.
        (Some(_), _) if !shows => return Verdict::Refuse(Page::LinkSpent),
        _ => {}
    }
    Verdict::Refuse(match (shows, allowed) {
        (false, _) => Page::Unauthorized,
        (true, false) => Page::TooManyTries,
        (true, true) => {
            tries.failed(knock.address);
            Page::Forbidden
        }
    })
}

/// What the cookie says when the token has this hash.
fn ticket(hash: &[u8; 32], subdomain: &Subdomain) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(hash);
    hasher.update(b"supvm edge cookie 1 ");
    hasher.update(subdomain.as_str().as_bytes());
    hasher.finalize()
}

fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| token.trim_ascii())
}

/// The secret of a link, and path and query without it.
fn link(target: &str) -> Option<(String, String)> {
    let (path, query) = target.split_once('?')?;
    let mut secret = None;
    let rest: Vec<&str> = query
        .split('&')
        .filter(|field| match field.split_once('=') {
            Some((LINK_QUERY, value)) => {
                secret = Some(value.to_owned());
                false
            }
            _ => true,
        })
        .collect();
    let target = match rest.as_slice() {
        [] => path.to_owned(),
        rest => format!("{path}?{}", rest.join("&")),
    };
    secret.map(|secret| (secret, target))
}

/// Takes our cookie out of the fields and joins the others in one.
fn take_cookie(headers: &mut HeaderMap) -> Option<String> {
    let ours = |pair: &[u8]| {
        pair.trim_ascii()
            .strip_prefix(COOKIE_NAME.as_bytes())
            .and_then(|rest| rest.strip_prefix(b"="))
            .map(|value| String::from_utf8_lossy(value).into_owned())
    };
    let mut fields = headers.get_all(COOKIE).iter();
    let single = fields.next()?;
    let found = |value: &HeaderValue| value.as_bytes().split(|byte| *byte == b';').find_map(ours);
    let mut cookie = found(single);
    let mut several = false;
    for field in fields {
        several = true;
        cookie = cookie.or_else(|| found(field));
    }
    if cookie.is_none() && !several {
        return None;
    }
    let mut joined = Vec::new();
    for field in headers.get_all(COOKIE) {
        for pair in field.as_bytes().split(|byte| *byte == b';') {
            if ours(pair).is_none() && !pair.trim_ascii().is_empty() {
                if !joined.is_empty() {
                    joined.extend_from_slice(b"; ");
                }
                joined.extend_from_slice(pair.trim_ascii());
            }
        }
    }
    headers.remove(COOKIE);
    if !joined.is_empty()
        && let Ok(value) = HeaderValue::from_bytes(&joined)
    {
        headers.insert(COOKIE, value);
    }
    cookie
}

/// Wrong tokens, by network.
#[derive(Debug)]
pub(crate) struct Tries {
    most: u32,
    period: Duration,
    failed: Mutex<HashMap<IpAddr, (Instant, u32)>>,
}

impl Tries {
    pub(crate) fn new(most: u32, period: Duration) -> Self {
        Self {
            most,
            period,
            failed: Mutex::default(),
        }
    }

    fn allowed(&self, address: IpAddr) -> bool {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let network = network(address);
        match failed.get(&network) {
            Some((since, _)) if since.elapsed() >= self.period => {
                failed.remove(&network);
                true
            }
            Some((_, count)) => *count < self.most,
            None => true,
        }
    }

    fn failed(&self, address: IpAddr) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let network = network(address);
        if failed.len() >= NETWORKS && !failed.contains_key(&network) {
            failed.retain(|_, (since, _)| since.elapsed() < self.period);
            if failed.len() >= NETWORKS {
                // A token has too many bits to be found by trying; memory is what is guarded here.
                failed.clear();
            }
        }
        let (_, count) = failed.entry(network).or_insert((Instant::now(), 0));
        *count = count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use protocol::host::proxy::AdmitLink;

    use super::*;

    const ENTER: Verdict = Verdict::Enter { target: None };
    const NAME: &str = "abcdefghijklmnopqrst";

    /// What becomes of a request while a link with the secret `once` waits.
    fn knock(target: &str, fields: &[(&str, &str)], tries: &Tries) -> (Verdict, HeaderMap) {
        let links = Links::default();
        let link = AdmitLink {
            subdomain: NAME.parse().unwrap(),
            secret: *blake3::hash(b"once").as_bytes(),
            token: *blake3::hash(b"secret").as_bytes(),
            lifetime_s: 60,
        };
        links.admit(&link, Instant::now());
        knock_with(&Method::GET, target, fields, tries, &links)
    }

    fn knock_with(
        method: &Method,
        target: &str,
        fields: &[(&str, &str)],
        tries: &Tries,
        links: &Links,
    ) -> (Verdict, HeaderMap) {
        let publication = Publication {
            autostart: true,
            token: Some(*blake3::hash(b"secret").as_bytes()),
        };
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            let name: http::HeaderName = name.parse().unwrap();
            headers.append(name, HeaderValue::try_from(*value).unwrap());
        }
        let knock = Knock {
            method,
            target,
            address: "192.0.2.1".parse().unwrap(),
            subdomain: &NAME.parse().unwrap(),
        };
        let verdict = check(&publication, &knock, &mut headers, tries, links);
        (verdict, headers)
    }

    fn tries() -> Tries {
        Tries::new(3, Duration::from_secs(60))
    }

    #[test]
    fn the_token_opens_and_the_guest_does_not_see_it() {
        let tries = tries();
        let (verdict, headers) = knock("/", &[("x-supvm-token", "secret")], &tries);
        assert_eq!((verdict, headers.len()), (ENTER, 0));
        let (verdict, headers) = knock("/", &[("authorization", "bearer secret")], &tries);
        assert_eq!((verdict, headers.len()), (ENTER, 0));
        let own = [
            ("authorization", "Bearer mine"),
            ("x-supvm-token", "secret"),
        ];
        let (verdict, headers) = knock("/", &own, &tries);
        assert_eq!(verdict, ENTER);
        assert_eq!(headers["authorization"], "Bearer mine", "the guest's own");
        let (verdict, _) = knock("/", &[], &tries);
        assert_eq!(verdict, Verdict::Refuse(Page::Unauthorized));
        let (verdict, _) = knock("/", &[("x-supvm-token", "secreT")], &tries);
        assert_eq!(verdict, Verdict::Refuse(Page::Forbidden));
    }

    #[test]
    fn a_link_is_traded_for_a_cookie_that_opens_without_being_the_token() {
        let tries = tries();
        let (verdict, _) = knock("//evil/x?a=1&supvm_link=once&b=2", &[], &tries);
        let Verdict::Trade { cookie, target } = verdict else {
            panic!("{verdict:?}");
        };
        assert_eq!(target, "//evil/x?a=1&b=2");
        let (pair, attributes) = cookie.split_once("; ").unwrap();
        assert!(attributes.contains("Secure; HttpOnly; SameSite=Lax"));
        let hash = blake3::hash(b"secret").to_hex();
        assert!(!pair.contains("secret") && !pair.contains(hash.as_str()));
        let cookies = format!("a=1; {pair};b=2");
        let (verdict, headers) = knock("/", &[("cookie", &cookies), ("cookie", "c=3")], &tries);
        assert_eq!(verdict, ENTER);
        assert_eq!(headers["cookie"], "a=1; b=2; c=3");
        assert_eq!(headers.get_all("cookie").iter().count(), 1);
        let (verdict, _) = knock("/?supvm_link=secret", &[], &tries);
        assert_eq!(verdict, Verdict::Refuse(Page::LinkSpent), "not the token");
        let forged = format!("{COOKIE_NAME}={hash}");
        let (verdict, _) = knock("/", &[("cookie", &forged)], &tries);
        assert_eq!(verdict, Verdict::Refuse(Page::Unauthorized));
    }

    #[test]
    fn a_link_is_spent_by_nobody_but_who_needs_it() {
        let (tries, links) = (tries(), Links::default());
        let link = AdmitLink {
            subdomain: NAME.parse().unwrap(),
            secret: *blake3::hash(b"once").as_bytes(),
            token: *blake3::hash(b"secret").as_bytes(),
            lifetime_s: 60,
        };
        links.admit(&link, Instant::now());
        let target = "/?supvm_link=once";
        for method in [Method::HEAD, Method::POST] {
            let (verdict, _) = knock_with(&method, target, &[], &tries, &links);
            assert_eq!(verdict, Verdict::Refuse(Page::Unauthorized), "{method}");
        }
        let token = [("x-supvm-token", "secret")];
        let (verdict, _) = knock_with(&Method::GET, target, &token, &tries, &links);
        let target_without = Some("/".to_owned());
        let entered = Verdict::Enter {
            target: target_without,
        };
        assert_eq!(verdict, entered, "who has the token");
        // A field of the guest's own does not keep a link from opening, nor do tries.
        let own = [("authorization", "Bearer mine")];
        let none = Tries::new(0, Duration::from_secs(60));
        let (verdict, _) = knock_with(&Method::GET, target, &own, &none, &links);
        assert!(matches!(verdict, Verdict::Trade { .. }), "{verdict:?}");
        let (verdict, _) = knock_with(&Method::GET, target, &[], &tries, &links);
        assert_eq!(verdict, Verdict::Refuse(Page::LinkSpent));
    }

    #[test]
    fn wrong_tokens_make_a_network_wait_even_with_the_right_one() {
        let tries = tries();
        for _ in 0..3 {
            let (verdict, _) = knock("/", &[("x-supvm-token", "no")], &tries);
            assert_eq!(verdict, Verdict::Refuse(Page::Forbidden));
        }
        let (verdict, _) = knock("/", &[("x-supvm-token", "secret")], &tries);
        assert_eq!(verdict, Verdict::Refuse(Page::TooManyTries));
        assert!(tries.allowed("192.0.2.2".parse().unwrap()), "others go on");
        let over = Tries::new(1, Duration::ZERO);
        over.failed("192.0.2.1".parse().unwrap());
        assert!(over.allowed("192.0.2.1".parse().unwrap()), "for a time");
        for host in 0..10_000_u32 {
            tries.failed(IpAddr::V4(host.into()));
        }
        assert!(tries.failed.lock().unwrap().len() <= NETWORKS);
    }
}
