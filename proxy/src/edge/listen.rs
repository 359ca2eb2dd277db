//! The sockets that visitors come in by. A connection takes its place before its first byte is
//! read; its handshake has a deadline; a panic in it ends it alone.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::server::Acceptor;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::LazyConfigAcceptor;

use super::guests::Guests;
use super::places::Place;
use super::{Core, connection, redirect};
use crate::Quiet;
use crate::api::listen::{keep_alive, log_accept};

/// What a listener's connections speak.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Speaks {
    /// TLS, with HTTP in it.
    Tls,
    /// HTTP, to be redirected.
    Plain,
}

/// A listening socket, or none.
#[derive(Debug, Default)]
pub(crate) struct Listening(Option<Listener>);

#[derive(Debug)]
struct Listener {
    asked: String,
    actual: SocketAddr,
    task: JoinHandle<()>,
}

/// Why the edge does not listen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error("the edge cannot listen at `{address}`: {error}; is the address in use?")]
    Bind {
        address: String,
        error: std::io::Error,
    },
}

impl Listening {
    /// Listens at `address` from now on, or nowhere when it is empty. Connections that are there
    /// stay. Gives the actual address.
    pub(crate) async fn apply<G: Guests>(
        &mut self,
        address: &str,
        speaks: Speaks,
        core: &Arc<Core<G>>,
    ) -> Result<String, ListenError> {
        if let Some(listener) = &self.0
            && listener.asked == address
            && !listener.task.is_finished()
        {
            return Ok(listener.actual.to_string());
        }
        // The new address may be the old one in other words: that has to be closed first.
        self.stop().await;
        if address.is_empty() {
            return Ok(String::new());
        }
        let failed = |error| ListenError::Bind {
            address: address.to_owned(),
            error,
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let actual = listener.local_addr().map_err(failed)?;
        let task = tokio::spawn(accept(listener, speaks, Arc::clone(core)));
        self.0 = Some(Listener {
            asked: address.to_owned(),
            actual,
            task,
        });
        Ok(actual.to_string())
    }

    async fn stop(&mut self) {
        if let Some(listener) = self.0.take() {
            listener.task.abort();
            let _ = listener.task.await;
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(listener) = self.0.take() {
            listener.task.abort();
        }
    }
}

async fn accept<G: Guests>(listener: TcpListener, speaks: Speaks, core: Arc<Core<G>>) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                let place = core.places.take(peer.ip());
                if place.as_ref().is_none_or(Place::is_crowded) {
                    log_full(peer);
                }
                let Some(place) = place else { continue };
                let own = Arc::clone(&core);
                core.tasks.spawn(async move {
                    match speaks {
                        Speaks::Tls => handshake(own, socket, peer, place).await,
                        Speaks::Plain => redirect::serve(own, socket, place).await,
                    }
                });
            }
            Err(error) => log_accept(&error).await,
        }
    }
}

async fn handshake<G: Guests>(
    core: Arc<Core<G>>,
    socket: TcpStream,
    peer: SocketAddr,
    place: Place,
) {
    let Some(config) = core.tls() else { return };
    // Neither can fail on a fresh TCP socket, and neither is worth refusing a visitor for.
    let _ = socket.set_nodelay(true);
    let _ = keep_alive(&socket);
    let handshake = async {
        let start = LazyConfigAcceptor::new(Acceptor::default(), socket).await?;
        match core.challenges.answer(&start.client_hello()) {
            None => start.into_stream(config).await.map(Some),
            Some(proof) => {
                start.into_stream(proof).await?.shutdown().await?;
                Ok(None)
            }
        }
    };
    let limit = core.limits.handshake;
    match tokio::time::timeout(limit, handshake).await {
        Ok(Ok(Some(stream))) if place.is_crowded() => {
            // All that it is told is there at once.
            let served = connection::serve(core, stream, peer, place);
            let _ = tokio::time::timeout(limit, served).await;
        }
        Ok(Ok(Some(stream))) => connection::serve(core, stream, peer, place).await,
        Ok(Ok(None)) => tracing::info!(%peer, "an authority looked at the proof of a name"),
        Ok(Err(error)) => log_handshake(peer, &error.to_string()),
        Err(_) => log_handshake(peer, "took too long"),
    }
}

fn log_full(peer: SocketAddr) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::warn!(%peer, left_out, "visitor refused: too many connections are open");
    }
}

fn log_handshake(peer: SocketAddr, error: &str) {
    static QUIET: Quiet = Quiet::new();
    if let Some(left_out) = QUIET.allow() {
        tracing::info!(%peer, error, left_out, "a visitor's handshake failed");
    }
}
