//! One request, from its head to its answer, in this order: is it sound, which name does it ask for,
//! is that the name of the TLS connection, which VM is that, may the visitor come in, is there a
//! place; then it goes to the guest. Whatever fails ends in a page.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, LOCATION, REFERRER_POLICY, SET_COOKIE,
    TRANSFER_ENCODING,
};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::ext::Protocol;

use super::access::{Knock, Verdict, check};
use super::activity::Activity;
use super::body::{Answer, Gate, Keep, Upload};
use super::forward::{Outgoing, Target, send};
use super::framing::Malformed;
use super::guests::{Guests, Refusal};
use super::headers::{Hop, Origin, asks_for_websocket, is_grpc, to_guest, to_visitor};
use super::log::Entry;
use super::pages::{Page, wants_html};
use super::places::{Place, RequestPlace};
use super::pool::VmPlace;
use super::route::{Route, host_name};
use super::visitor::Signals;
use super::{Core, Names, root, websocket};

/// What all requests of a connection share.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) peer: SocketAddr,
    /// The name that the TLS handshake asked for.
    pub(crate) name: Option<String>,
    pub(crate) activity: Arc<Activity>,
    /// Only with HTTP/1.1.
    pub(crate) signals: Option<Arc<Signals>>,
    pub(crate) place: Place,
}

/// A request that is being answered, or a WebSocket. The connection has its place as long.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(super) connection: Arc<Connection>,
    place: Option<RequestPlace>,
    vm_place: Option<VmPlace>,
    answered: bool,
}

impl InFlight {
    fn begin(connection: &Arc<Connection>) -> Self {
        connection.activity.request_began();
        Self {
            connection: Arc::clone(connection),
            place: connection.place.request(),
            vm_place: None,
            answered: false,
        }
    }

    /// With this, its end is no cancellation: the answer has begun.
    pub(crate) fn answered(mut self) -> Self {
        self.answered = true;
        self
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.vm_place = None;
        self.place = None;
        self.connection.activity.request_ended(self.answered);
    }
}

/// Answers a request. The first part runs at once, before hyper reads on.
pub(crate) fn call<G: Guests>(
    core: &Arc<Core<G>>,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
) -> impl Future<Output = Result<Response<Answer>, Infallible>> + Send + use<G> {
    let malformed = connection
        .signals
        .as_ref()
        .and_then(|signals| signals.malformed());
    #[cfg(any(test, fuzzing))]
    if let (Some(signals), None) = (&connection.signals, &malformed) {
        signals.compare(request.method(), request.uri());
    }
    let in_flight = InFlight::begin(connection);
    let core = Arc::clone(core);
    // Several KiB, which hyper and the runtime hand from one to the next.
    Box::pin(async move {
        let html = wants_html(request.headers());
        let version = request.version();
        let peer = in_flight.connection.peer;
        let crowded = in_flight.connection.place.is_crowded();
        let mut entry = Entry::begin(peer, request.method(), request.uri().path(), version);
        let mut in_flight = Some(in_flight);
        let result = match malformed {
            Some(malformed) => {
                entry.malformed();
                Err(malformed.into())
            }
            None => respond(&core, &mut in_flight, request, &mut entry).await,
        };
        let mut response = result.unwrap_or_else(|page| {
            let mut response = page.answer(html);
            let close = crowded
                || matches!(
                    page,
                    Page::BadRequest(_)
                        | Page::HeadTooLarge
                        | Page::HeadTooSlow
                        | Page::MethodNotAllowed
                );
            if close && version != Version::HTTP_2 {
                let headers = response.headers_mut();
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            response
        });
        if let Some(in_flight) = in_flight.take() {
            response.body_mut().hold(in_flight.answered());
        }
        entry.end(response.status(), &core.log);
        Ok(response)
    })
}

impl From<Malformed> for Page {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Bad(why) => Self::BadRequest(why),
            Malformed::TooLarge => Self::HeadTooLarge,
            Malformed::Slow => Self::HeadTooSlow,
            Malformed::Connect => Self::MethodNotAllowed,
        }
    }
}

/// What a request asks for.
pub(super) struct Asked {
    /// In lower case, without port and final dot.
    pub(super) host: String,
    /// As the visitor wrote it.
    pub(super) authority: Authority,
    pub(super) origin: Origin,
    pub(super) path: PathAndQuery,
}

async fn respond<G: Guests>(
    core: &Arc<Core<G>>,
    in_flight: &mut Option<InFlight>,
    request: Request<Incoming>,
    entry: &mut Entry,
) -> Result<Response<Answer>, Page> {
    let connection = match in_flight {
        Some(own) if own.place.is_some() => Arc::clone(&own.connection),
        _ => return Err(Page::TooMany),
    };
    let (mut head, body) = request.into_parts();
    sound(&head, core.limits.header_fields, core.limits.head_bytes)?;
    let hop = hop(&head)?;
    let mut asked = asked(&head, connection.peer.ip())?;
    let name = connection.name.as_ref();
    if name.is_some_and(|name| *name != asked.host) {
        return Err(Page::Misdirected);
    }
    let names = core.names();
    let (subdomain, port) = match names.route(&asked.host) {
        Route::Guest { subdomain, port } => (subdomain, port),
        Route::Base => return base(&names, &head.method, asked.path.path()),
        Route::Nothing => return Err(Page::NotFound),
    };
    // A stopped VM is started only for who may come in.
    let publication = found(core, core.guests.publication(&subdomain)).await?;
    let knock = Knock {
        method: &head.method,
        target: asked.path.as_str(),
        address: connection.peer.ip(),
        subdomain: &subdomain,
    };
    let (tries, links) = (&core.tries, &core.links);
    match check(&publication, &knock, &mut head.headers, tries, links) {
        Verdict::Enter { target: None } => {}
        Verdict::Enter {
            target: Some(target),
        } => {
            let path = PathAndQuery::try_from(target);
            asked.path = path.map_err(|_| Page::BadRequest("an unusual address"))?;
        }
        Verdict::Trade { cookie, target } => return trade(&asked, &cookie, &target),
        Verdict::Refuse(page) => return Err(page),
    }
    let guest = found(core, core.guests.find(&subdomain)).await?;
    guest.requests.fetch_add(1, Ordering::Relaxed);
    entry.guest(&guest, port);
    let now = guest.publication.token;
    if now.is_some() && now != publication.token {
        // Its owner changed the token while it started.
        return Err(Page::Unauthorized);
    }
    let pool = core.pool(&guest);
    let place = pool.enter().ok_or(Page::TooMany)?;
    if let Some(in_flight) = in_flight {
        in_flight.vm_place = Some(place);
    }
    let target = Target { guest, port, pool };
    if hop == Hop::WebSocket {
        return Box::pin(websocket::serve(core, &target, head, asked, in_flight)).await;
    }
    forward(core, &target, head, body, asked, hop).await
}

/// What the domain itself answers.
fn base(names: &Names, method: &Method, path: &str) -> Result<Response<Answer>, Page> {
    match (path, &names.root) {
        ("/", root) => Err(Page::Landing(root.clone())),
        (root::PATH, Some(root)) => match *method {
            Method::GET | Method::HEAD => Ok(root.answer()),
            _ => Err(Page::MethodNotAllowed),
        },
        _ => Err(Page::NotFound),
    }
}

/// Sends a request to the guest and makes the visitor's answer of the guest's.
async fn forward<G: Guests>(
    core: &Core<G>,
    target: &Target,
    mut head: Parts,
    body: Incoming,
    asked: Asked,
    hop: Hop,
) -> Result<Response<Answer>, Page> {
    to_guest(&mut head.headers, &asked.origin, hop);
    let body = Upload::new(body);
    if body.is_empty() {
        // The guest would wait for a body, and take the next request for it.
        let none = |length: &HeaderValue| length.as_bytes().iter().all(|digit| *digit == b'0');
        if !head.headers.get(CONTENT_LENGTH).is_none_or(none) {
            return Err(Page::BadRequest("a Content-Length without a body"));
        }
    } else if hop == Hop::Plain && !head.headers.contains_key(CONTENT_LENGTH) {
        // hyper would leave a body of unknown length out of a GET.
        let chunked = HeaderValue::from_static("chunked");
        head.headers.insert(TRANSFER_ENCODING, chunked);
    }
    let expected = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"100-continue");
    let gate =
        (hop == Hop::Plain && !body.is_empty() && head.headers.get(EXPECT).is_some_and(expected))
            .then(|| Arc::new(Gate::default()));
    let outgoing = Outgoing {
        method: head.method,
        path: asked.path,
        authority: Some(asked.authority),
        headers: head.headers,
        body,
        gate: gate.clone(),
    };
    let (response, lease) = send(core, target, outgoing, hop).await?;
    if response.status().is_informational() {
        // 101, which nobody asked for.
        return Err(Page::BadAnswer);
    }
    answer(response, Keep::new(lease, gate))
}

/// The visitor's answer, made of the guest's.
pub(super) fn answer(response: Response<Incoming>, keep: Keep) -> Result<Response<Answer>, Page> {
    let (head, body) = response.into_parts();
    // hyper does not look at the length where there is no body, as in an answer to HEAD.
    let lengths = head.headers.get_all(CONTENT_LENGTH);
    let plain = |length: &HeaderValue| {
        length.as_bytes().iter().all(u8::is_ascii_digit)
            && length
                .to_str()
                .is_ok_and(|text| text.parse::<u64>().is_ok())
    };
    if lengths.iter().count() > 1 || !lengths.iter().all(plain) {
        return Err(Page::BadAnswer);
    }
    let mut response = Response::new(Answer::streamed(body).keeping(keep));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    if let Some(reason) = head.extensions.get::<hyper::ext::ReasonPhrase>() {
        response.extensions_mut().insert(reason.clone());
    }
    to_visitor(response.headers_mut());
    Ok(response)
}

/// Sends who came by a link on, with the cookie.
fn trade(asked: &Asked, cookie: &str, target: &str) -> Result<Response<Answer>, Page> {
    // With the host: a path that begins with `//` would lead elsewhere by itself.
    let location = format!("https://{}{target}", asked.authority);
    let value = |text: &str| {
        HeaderValue::try_from(text).map_err(|_| Page::BadRequest("an unusual address"))
    };
    let mut response = Response::new(Answer::whole(Bytes::new()));
    *response.status_mut() = StatusCode::SEE_OTHER;
    let headers = response.headers_mut();
    headers.insert(LOCATION, value(&location)?);
    headers.insert(SET_COOKIE, value(cookie)?);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Ok(response)
}

/// What is known of a VM, within the limit for that.
async fn found<G: Guests, T>(
    core: &Core<G>,
    finding: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Page> {
    match tokio::time::timeout(core.limits.find, finding).await {
        Ok(found) => Ok(found?),
        Err(_) => Err(Page::StartTimeout),
    }
}

/// Refuses what could be understood in two ways. With HTTP/1.1 most of this was seen before.
fn sound(head: &Parts, most_fields: usize, most_bytes: usize) -> Result<(), Page> {
    let bytes = head.headers.iter().fold(0_usize, |sum, (name, value)| {
        sum.saturating_add(name.as_str().len())
            .saturating_add(value.len())
    });
    if head.headers.len() > most_fields || bytes > most_bytes {
        return Err(Page::HeadTooLarge);
    }
    let lengths = head.headers.get_all(CONTENT_LENGTH).iter().count();
    let http2 = head.version == Version::HTTP_2;
    if lengths > 1 || (http2 && head.headers.contains_key(TRANSFER_ENCODING)) {
        return Err(Page::BadRequest("more than one length"));
    }
    Ok(())
}

/// How the request goes on, by its method and what it wants to become.
fn hop(head: &Parts) -> Result<Hop, Page> {
    let http2 = head.version == Version::HTTP_2;
    match head.method {
        Method::TRACE => Err(Page::MethodNotAllowed),
        Method::CONNECT => match head.extensions.get::<Protocol>() {
            Some(protocol) if protocol.as_str().eq_ignore_ascii_case("websocket") => {
                Ok(Hop::WebSocket)
            }
            Some(_) => Err(Page::NotImplemented),
            None => Err(Page::MethodNotAllowed),
        },
        Method::GET if head.version == Version::HTTP_11 && asks_for_websocket(&head.headers) => {
            Ok(Hop::WebSocket)
        }
        _ if http2 && is_grpc(&head.headers) => Ok(Hop::Http2),
        _ => Ok(Hop::Plain),
    }
}

/// The name and the path that a request asks for.
fn asked(head: &Parts, peer: IpAddr) -> Result<Asked, Page> {
    let mut hosts = head.headers.get_all(HOST).iter();
    let (written, more) = (hosts.next(), hosts.next());
    let same = |authority: &Authority, host: &HeaderValue| {
        host.as_bytes()
            .eq_ignore_ascii_case(authority.as_str().as_bytes())
    };
    // By HTTP/1.1 the authority is there in the absolute form only; that is a proxy's.
    let unusual = Page::BadRequest("a Host other than its address");
    let authority = match (head.uri.authority(), written, more) {
        (Some(authority), None, None) => authority.clone(),
        (Some(authority), Some(host), None) if same(authority, host) => authority.clone(),
        (None, Some(host), None) => Authority::try_from(host.as_bytes())
            .map_err(|_| Page::BadRequest("a Host that is no name"))?,
        _ => return Err(unusual),
    };
    let absolute = head.uri.scheme().is_some() || head.uri.authority().is_none();
    let path = match head.uri.path_and_query() {
        Some(path) if absolute => path.clone(),
        None if absolute => PathAndQuery::from_static("/"),
        _ => return Err(unusual),
    };
    let form =
        path.as_str().starts_with('/') || (head.method == Method::OPTIONS && path.as_str() == "*");
    if !form {
        return Err(Page::BadRequest("a path that does not begin with /"));
    }
    let host = host_name(authority.as_str()).ok_or(Page::BadRequest("a Host that is no name"))?;
    let written = HeaderValue::try_from(authority.as_str());
    Ok(Asked {
        host,
        path,
        origin: Origin {
            address: peer,
            host: written.map_err(|_| Page::BadRequest("a Host that is no name"))?,
            version: head.version,
        },
        authority,
    })
}
