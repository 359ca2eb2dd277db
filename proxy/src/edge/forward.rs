//! A request on its way to the guest: over a connection that waits, or a new one. What was sent over
//! a connection that turned out to be closed is sent again only where that cannot do anything twice.

use std::error::Error as _;
use std::sync::Arc;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;

use super::Core;
use super::body::{Gate, Upload};
use super::guests::{Guest, Guests};
use super::headers::Hop;
use super::pages::Page;
use super::pool::{Lease, Sender, Sender2, VmPool};

/// The buffer of a connection, and with it the largest head of an answer.
const BUFFER: usize = 64 * 1024;

/// Header fields of an answer.
const FIELDS: usize = 200;

/// Where a request goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) guest: Guest,
    pub(crate) port: u16,
    pub(crate) pool: Arc<VmPool>,
}

/// A request for the guest, ready but for its form on the wire.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) authority: Option<Authority>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Upload,
    /// Opens when the guest says that it wants the body.
    pub(crate) gate: Option<Arc<Gate>>,
}

/// The head of the request, to be sent a second time.
struct Again {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

/// The guest's answer; by HTTP/1.1 with the connection it came by.
pub(crate) type Answered = (Response<Incoming>, Option<Lease>);

/// Sends a request to the guest.
pub(crate) async fn send<G: Guests>(
    core: &Core<G>,
    target: &Target,
    outgoing: Outgoing,
    hop: Hop,
) -> Result<Answered, Page> {
    match hop {
        Hop::Http2 => Box::pin(send_http2(core, target, outgoing)).await,
        Hop::Plain => send_http1(core, target, outgoing).await,
        Hop::WebSocket => {
            let sender = Box::pin(dial_http1(core, target, true)).await?;
            let (request, _) = http1_request(outgoing);
            once(core, sender, request, None, target)
                .await
                .map_err(|failed| failed.page)
        }
    }
}

async fn send_http1<G: Guests>(
    core: &Core<G>,
    target: &Target,
    outgoing: Outgoing,
) -> Result<Answered, Page> {
    let (mut request, gate) = http1_request(outgoing);
    // Without a body and idempotent (RFC 9110, 9.2.2): twice does what once does.
    let repeatable = request.body().is_empty()
        && matches!(
            *request.method(),
            Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE
        );
    while let Some(sender) = target.pool.take(target.port, repeatable) {
        let again = repeatable.then(|| Again {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
        });
        match once(core, sender, request, gate.clone(), target).await {
            Ok(answered) => return Ok(answered),
            Err(failed) => match (failed.unsent, again) {
                (Some(unsent), _) => request = *unsent,
                (None, Some(again)) if failed.closed => {
                    request = again.request();
                    break;
                }
                _ => return Err(failed.page),
            },
        }
    }
    let sender = Box::pin(dial_http1(core, target, false)).await?;
    once(core, sender, request, gate, target)
        .await
        .map_err(|failed| failed.page)
}

/// A request that failed.
struct Failed {
    page: Page,
    /// The request, where nothing of it was sent.
    unsent: Option<Box<Request<Upload>>>,
    /// The connection ended before anything of an answer came.
    closed: bool,
}

async fn once<G: Guests>(
    core: &Core<G>,
    mut sender: Sender,
    request: Request<Upload>,
    gate: Option<Arc<Gate>>,
    target: &Target,
) -> Result<Answered, Failed> {
    let sent = {
        let sending = sender.try_send_request(request);
        tokio::pin!(sending);
        match gate {
            None => sending.await,
            Some(gate) => tokio::select! {
                sent = &mut sending => sent,
                () = tokio::time::sleep(core.limits.expect) => {
                    gate.open();
                    sending.await
                }
            },
        }
    };
    match sent {
        Ok(response) => {
            let lease = Lease {
                pool: Arc::clone(&target.pool),
                port: target.port,
                sender,
            };
            Ok((response, Some(lease)))
        }
        Err(mut error) => Err(Failed {
            unsent: error.take_message().map(Box::new),
            closed: is_closed(error.error()),
            page: page(error.error()),
        }),
    }
}

async fn send_http2<G: Guests>(
    core: &Core<G>,
    target: &Target,
    outgoing: Outgoing,
) -> Result<Answered, Page> {
    let mut request = http2_request(outgoing)?;
    if let Some(mut sender) = target.pool.http2(target.port) {
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, None)),
            Err(mut error) => match error.take_message() {
                Some(unsent) => request = unsent,
                None => return Err(page(error.error())),
            },
        }
    }
    let mut sender = dial_http2(core, target).await?;
    target.pool.share_http2(target.port, &sender);
    match sender.send_request(request).await {
        Ok(response) => Ok((response, None)),
        Err(error) => Err(page(&error)),
    }
}

async fn dial<G: Guests>(core: &Core<G>, target: &Target) -> Result<TokioIo<G::Stream>, Page> {
    let connecting = core.guests.connect(&target.guest, target.port);
    match tokio::time::timeout(core.limits.connect, connecting).await {
        Ok(Ok(stream)) => Ok(TokioIo::new(stream)),
        Ok(Err(error)) => Err(Page::not_connected(error, target.port)),
        Err(_) => Err(Page::NoAnswer),
    }
}

async fn dial_http1<G: Guests>(
    core: &Core<G>,
    target: &Target,
    upgrade: bool,
) -> Result<Sender, Page> {
    let stream = dial(core, target).await?;
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(BUFFER)
        .max_headers(FIELDS)
        .handshake(stream)
        .await
        .map_err(|error| page(&error))?;
    // How a connection ended, those who wait for its answers learn.
    if upgrade {
        core.tasks.spawn(connection.with_upgrades());
    } else {
        core.tasks.spawn(connection);
    }
    Ok(sender)
}

async fn dial_http2<G: Guests>(core: &Core<G>, target: &Target) -> Result<Sender2, Page> {
    let stream = dial(core, target).await?;
    let (sender, connection) = http2::Builder::new(core.tasks.clone())
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(1024 * 1024)
        .max_header_list_size(BUFFER as u32)
        .max_send_buf_size(BUFFER)
        .handshake(stream)
        .await
        .map_err(|error| page(&error))?;
    core.tasks.spawn(connection);
    Ok(sender)
}

fn http1_request(outgoing: Outgoing) -> (Request<Upload>, Option<Arc<Gate>>) {
    let gate = outgoing.gate;
    let body = match &gate {
        Some(gate) => outgoing.body.gated(Arc::clone(gate)),
        None => outgoing.body,
    };
    let mut request = Request::new(body);
    *request.method_mut() = outgoing.method;
    *request.uri_mut() = Uri::from(outgoing.path);
    *request.headers_mut() = outgoing.headers;
    if let Some(gate) = &gate {
        let gate = Arc::clone(gate);
        hyper::ext::on_informational(&mut request, move |response| {
            if response.status() == http::StatusCode::CONTINUE {
                gate.open();
            }
        });
    }
    (request, gate)
}

fn http2_request(outgoing: Outgoing) -> Result<Request<Upload>, Page> {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = outgoing.authority;
    parts.path_and_query = Some(outgoing.path);
    let uri = Uri::from_parts(parts).map_err(|_| Page::BadRequest("an unusual address"))?;
    let mut request = Request::new(outgoing.body);
    *request.method_mut() = outgoing.method;
    *request.uri_mut() = uri;
    *request.headers_mut() = outgoing.headers;
    *request.version_mut() = Version::HTTP_2;
    Ok(request)
}

impl Again {
    fn request(self) -> Request<Upload> {
        let mut request = Request::new(Upload::empty());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}

/// Whether a connection ended without a byte of an answer, as far as hyper tells.
fn is_closed(error: &hyper::Error) -> bool {
    error.is_incomplete_message() || error.is_canceled() || error.is_closed() || is_io(error)
}

fn is_io(error: &hyper::Error) -> bool {
    error
        .source()
        .is_some_and(|source| source.is::<std::io::Error>())
}

fn page(error: &hyper::Error) -> Page {
    if error.is_user() {
        Page::BadRequest("a body that ends early")
    } else if error.is_parse() {
        Page::BadAnswer
    } else {
        Page::ClosedEarly
    }
}
