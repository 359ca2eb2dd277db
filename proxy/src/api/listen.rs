//! The sockets that clients come in by: TCP with TLS where control says, and the Unix socket that
//! proxy was started with. Every connection is a task of its own, counted, and its panic ends it
//! alone.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use protocol::hello::ALPN;
use protocol::host::proxy::{Serve, Serving};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::JoinHandle;
use tokio_rustls::LazyConfigAcceptor;

use super::quiet::Quiet;
use super::strangers::Stranger;
use super::tls::server_config;
use super::{Shared, connection};

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long to pause when the system cannot give us a connection, such as for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Bytes that are read of a client's socket at once. rustls itself asks for 4 KiB at a time. What a
/// stranger can make us hold beyond the gate's allowance is as much.
const READ_AHEAD: usize = 64 << 10;

/// A fatal TLS alert `no_application_protocol` (RFC 8446, 6.2), as it is sent before a ServerHello.
const NO_APPLICATION_PROTOCOL: [u8; 7] = [21, 3, 3, 0, 2, 2, 120];

/// The TCP listener that control asked for.
#[derive(Debug, Default)]
pub(crate) struct Listening {
    current: Option<Listener>,
}

#[derive(Debug)]
struct Listener {
    asked: String,
    actual: SocketAddr,
    task: JoinHandle<()>,
}

impl Listening {
    /// Does what control says; connections that are there stay.
    pub(crate) async fn apply(&mut self, serve: &Serve, shared: &Arc<Shared>) -> Serving {
        match self.try_apply(serve, shared).await {
            Ok(api_address) => {
                tracing::info!(api_address, "serving the API");
                Serving {
                    api_address,
                    ..Serving::default()
                }
            }
            Err(message) => {
                tracing::error!(message, "not serving the API over TLS");
                self.stop();
                Serving {
                    message,
                    ..Serving::default()
                }
            }
        }
    }

    async fn try_apply(&mut self, serve: &Serve, shared: &Arc<Shared>) -> Result<String, String> {
        shared.set_limits(serve.max_streams, serve.max_connections);
        if serve.api_address.is_empty() {
            self.stop();
            return Ok(String::new());
        }
        let config =
            server_config(&serve.certificates, &serve.key).map_err(|error| error.to_string())?;
        shared.set_tls(config);
        if let Some(listener) = &self.current
            && listener.asked == serve.api_address
            && !listener.task.is_finished()
        {
            return Ok(listener.actual.to_string());
        }
        // The new address may be the old one in other words.
        self.stop();
        let listener = TcpListener::bind(&serve.api_address)
            .await
            .map_err(|error| format!("cannot listen at `{}`: {error}", serve.api_address))?;
        let actual = listener.local_addr().map_err(|error| error.to_string())?;
        let task = tokio::spawn(accept_tcp(listener, Arc::clone(shared)));
        self.current = Some(Listener {
            asked: serve.api_address.clone(),
            actual,
            task,
        });
        Ok(actual.to_string())
    }

    fn stop(&mut self) {
        if let Some(listener) = self.current.take() {
            listener.task.abort();
        }
    }
}

async fn accept_tcp(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                let Some(place) = Place::take(&shared, |shared| &shared.tcp_connections) else {
                    log_full(&peer.to_string());
                    continue;
                };
                let strangers = &shared.strangers;
                let Some(stranger) = strangers.take(peer.ip(), shared.max_connections()) else {
                    log_full(&peer.to_string());
                    continue;
                };
                let shared = Arc::clone(&shared);
                spawn(Arc::clone(&shared), peer.to_string(), async move {
                    let _place = place;
                    serve_tcp(socket, peer, stranger, shared).await;
                });
            }
            Err(error) => log_accept(&error).await,
        }
    }
}

/// Accepts clients of the Unix socket for ever.
pub(crate) async fn accept_unix(listener: UnixListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let Some(place) = Place::take(&shared, |shared| &shared.unix_connections) else {
                    log_full("unix");
                    continue;
                };
                let shared = Arc::clone(&shared);
                spawn(Arc::clone(&shared), "unix".into(), async move {
                    let _place = place;
                    connection::serve(socket, "unix".into(), None, shared).await;
                });
            }
            Err(error) => log_accept(&error).await,
        }
    }
}

async fn serve_tcp(socket: TcpStream, peer: SocketAddr, stranger: Stranger, shared: Arc<Shared>) {
    let Some(config) = shared.tls() else { return };
    // Neither can fail on a fresh TCP socket, and neither is worth refusing a client for.
    let _ = socket.set_nodelay(true);
    let _ = keep_alive(&socket);
    let socket = BufReader::with_capacity(READ_AHEAD, socket);
    let handshake = async {
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket).await?;
        let offered = start
            .client_hello()
            .alpn()
            .is_some_and(|mut names| names.any(|name| name == ALPN));
        if !offered {
            let mut socket = start.io;
            socket.write_all(&NO_APPLICATION_PROTOCOL).await?;
            socket.shutdown().await?;
            return Err(io::Error::other("client did not offer ALPN supvm/1"));
        }
        start.into_stream(config).await
    };
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => {
            connection::serve(stream, peer.to_string(), Some(stranger), shared).await;
        }
        Ok(Err(error)) => log_handshake(peer, &error.to_string()),
        Err(_) => log_handshake(peer, "took too long"),
    }
}

/// A peer that vanished without a word is found out after two minutes.
pub(crate) fn keep_alive(socket: &TcpStream) -> nix::Result<()> {
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &60)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &15)?;
    setsockopt(socket, sockopt::TcpKeepCount, &4)
}

/// Runs a connection; its panic is counted and logged.
fn spawn(shared: Arc<Shared>, peer: String, connection: impl Future<Output = ()> + Send + 'static) {
    let task = tokio::spawn(connection);
    tokio::spawn(async move {
        if let Err(error) = task.await
            && error.is_panic()
        {
            let panics = shared
                .panics
                .fetch_add(1, Ordering::Relaxed)
                .saturating_add(1);
            static QUIET: Quiet = Quiet::new();
            if let Some(left_out) = QUIET.allow() {
                tracing::error!(peer, panics, left_out, "a connection's task panicked");
            }
        }
    });
}

/// One connection's place among those that may be open.
struct Place {
    shared: Arc<Shared>,
    counter: fn(&Shared) -> &AtomicU32,
}

impl Place {
    fn take(shared: &Arc<Shared>, counter: fn(&Shared) -> &AtomicU32) -> Option<Self> {
        let before = counter(shared).fetch_add(1, Ordering::Relaxed);
        let place = Self {
            shared: Arc::clone(shared),
            counter,
        };
        (before < shared.max_connections()).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        (self.counter)(&self.shared).fetch_sub(1, Ordering::Relaxed);
    }
}

pub(crate) async fn log_accept(error: &io::Error) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::warn!(%error, left_out, "cannot accept a connection");
    }
    tokio::time::sleep(PAUSE).await;
}

fn log_full(peer: &str) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::warn!(peer, left_out, "connection refused: too many are open");
    }
}

fn log_handshake(peer: SocketAddr, error: &str) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(%peer, error, left_out, "handshake failed");
    }
}
