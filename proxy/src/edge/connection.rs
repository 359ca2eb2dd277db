//! One visitor's connection, after its TLS handshake: HTTP/1.1 or HTTP/2, until it has ended or its
//! patience has.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::Core;
use super::activity::{Activity, End, Patience};
use super::guests::Guests;
use super::header_blocks::Watched;
use super::places::Place;
use super::route::host_name;
use super::service::{Connection, call};
use super::visitor::{Signals, Visitor};
use crate::Quiet;

/// Bytes of an answer, or of a head, that hyper holds.
const BUFFER: usize = 64 * 1024;

/// Bytes of a body by HTTP/2 that may be on the way at a time, for one request and for all.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 512 * 1024;

/// Requests that were reset and that hyper has not seen yet, and errors of the visitor that are
/// answered by resetting a request; more end the connection.
const PENDING_RESETS: usize = 20;
const ERROR_RESETS: usize = 64;

/// Serves a connection to its end.
pub(crate) async fn serve<G: Guests>(
    core: Arc<Core<G>>,
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    place: Place,
) {
    let session = stream.get_ref().1;
    let http2 = match session.alpn_protocol() {
        Some(b"h2") => true,
        Some(b"http/1.1" | b"http/1.0") | None => false,
        // The edge offers nothing else.
        Some(_) => return,
    };
    let name = session.server_name().and_then(host_name);
    speak(core, stream, http2, name, peer, place).await;
}

/// The same for a stream whose handshake, if there was one, gave `name`.
pub(super) async fn speak<G, T>(
    core: Arc<Core<G>>,
    stream: T,
    http2: bool,
    name: Option<String>,
    peer: SocketAddr,
    place: Place,
) where
    G: Guests,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let signals = (!http2).then(|| Arc::new(Signals::default()));
    let activity = Arc::new(Activity::new(http2));
    let connection = Arc::new(Connection {
        peer,
        name,
        activity: Arc::clone(&activity),
        signals: signals.clone(),
        place,
    });
    let patience = Patience {
        head: core.limits.head,
        idle: core.limits.idle,
        cancelled: core.limits.cancelled,
    };
    let service = {
        let core = Arc::clone(&core);
        service_fn(move |request: hyper::Request<Incoming>| call(&core, &connection, request))
    };
    // The two kinds of connection have no common type; what is done with them is the same.
    macro_rules! drive {
        ($connection:expr, $expire:expr) => {{
            let mut connection = std::pin::pin!($connection);
            let end = tokio::select! {
                biased;
                ended = &mut connection => return log_end(peer, ended),
                end = activity.watch(patience) => end,
            };
            log_patience(peer, end);
            match end {
                End::Idle => connection.as_mut().graceful_shutdown(),
                End::SlowHead => $expire,
                End::Abuse => return,
            }
            // What is still going out has as long again.
            let _ = tokio::time::timeout(patience.idle, connection).await;
        }};
    }
    match signals {
        Some(signals) => {
            let stream = Visitor::new(
                stream,
                Arc::clone(&activity),
                Arc::clone(&signals),
                core.limits.head_bytes,
                core.limits.header_fields,
            );
            let mut builder = http1::Builder::new();
            // The stream has refused what is above the limits before.
            let most = core.limits.header_fields.saturating_add(1);
            builder.max_buf_size(BUFFER).max_headers(most);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            drive!(connection.with_upgrades(), signals.expire());
        }
        None => {
            let mut builder = http2::Builder::new(core.tasks.clone());
            let head_bytes = u32::try_from(core.limits.head_bytes).unwrap_or(u32::MAX);
            builder
                .enable_connect_protocol()
                .max_concurrent_streams(core.limits.streams)
                .max_header_list_size(head_bytes.saturating_mul(2))
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_send_buf_size(BUFFER)
                .max_pending_accept_reset_streams(PENDING_RESETS)
                .max_local_error_reset_streams(ERROR_RESETS);
            let stream = Watched::new(stream, activity.clone());
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            // Within a block there is nothing else that could be said to the visitor.
            drive!(connection, return);
        }
    }
}

fn log_end(peer: SocketAddr, ended: hyper::Result<()>) {
    if let Err(error) = ended {
        static QUIET: Quiet = Quiet::new();
        if let Some(left_out) = QUIET.allow() {
            tracing::debug!(%peer, %error, left_out, "a visitor's connection broke");
        }
    }
}

fn log_patience(peer: SocketAddr, end: End) {
    let why = match end {
        End::Idle => return,
        End::SlowHead => "its request's head took too long",
        End::Abuse => "it gave up too many requests",
    };
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(%peer, why, left_out, "a visitor's connection was closed");
    }
}
