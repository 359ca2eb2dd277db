//! Plain HTTP, whose one answer is where to come instead. It says so for every name below the
//! domain, whether a VM has it or not.

use std::convert::Infallible;
use std::sync::Arc;

use http::header::{CACHE_CONTROL, CONNECTION, HOST, LOCATION};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::body::Answer;
use super::guests::Guests;
use super::pages::{Page, wants_html};
use super::places::Place;
use super::route::{Route, host_name};
use super::{Core, Names};

/// Where certificate authorities look for answers; this appliance gives them elsewhere.
const CHALLENGES: &str = "/.well-known/acme-challenge/";

/// Answers one request.
pub(crate) async fn serve<G: Guests>(core: Arc<Core<G>>, stream: TcpStream, place: Place) {
    let names = core.names();
    let service = service_fn(|request: Request<Incoming>| {
        let names = Arc::clone(&names);
        async move { Ok::<_, Infallible>(answer(&names, &request)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(core.limits.head)
        .max_headers(core.limits.header_fields)
        .max_buf_size(core.limits.head_bytes.max(8 * 1024))
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Also for who reads the answer slowly.
    let limit = if place.is_crowded() {
        core.limits.handshake
    } else {
        core.limits.idle
    };
    let _ = tokio::time::timeout(limit, connection).await;
}

fn answer(names: &Names, request: &Request<Incoming>) -> Response<Answer> {
    let location = location(
        names,
        request.headers(),
        request
            .uri()
            .path_and_query()
            .map_or("/", |path| path.as_str()),
    );
    let mut response = match location {
        Ok(location) => {
            let mut response = Response::new(Answer::whole(bytes::Bytes::new()));
            *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
            let headers = response.headers_mut();
            headers.insert(LOCATION, location);
            headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            response
        }
        Err(page) => page.answer(wants_html(request.headers())),
    };
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
    response
}

fn location(names: &Names, headers: &HeaderMap, path: &str) -> Result<HeaderValue, Page> {
    let host = headers
        .get(HOST)
        .and_then(|host| host.to_str().ok())
        .and_then(host_name)
        .ok_or(Page::BadRequest("a Host that is no name"))?;
    if path.starts_with(CHALLENGES) || names.route(&host) == Route::Nothing {
        return Err(Page::NotFound);
    }
    if !path.starts_with('/') {
        return Err(Page::BadRequest("a path that does not begin with /"));
    }
    let port = match names.public_port {
        443 => String::new(),
        port => format!(":{port}"),
    };
    HeaderValue::try_from(format!("https://{host}{port}{path}"))
        .map_err(|_| Page::BadRequest("an unusual address"))
}
