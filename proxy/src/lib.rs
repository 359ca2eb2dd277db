//! The process that talks to the world. It listens for the API, relays agent streams, and leads
//! visitors to the ports of VMs; it keeps no token, no record and no key beyond what control handed
//! it, and decides nothing about VMs. Every byte of a client is taken for an attacker's.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

pub mod acme;
mod api;
pub mod channel;
mod dial;
pub mod edge;
pub mod gateway;
mod online;
mod vms;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::net::UnixListener;

pub use api::quiet::Quiet;

/// Why proxy cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The asynchronous runtime did not start.
    #[error("cannot start the runtime: {0}")]
    Runtime(#[source] io::Error),
    /// The descriptor for control is no listening `SOCK_SEQPACKET` socket.
    #[error("the socket for control: {0}")]
    Listen(#[source] io::Error),
    /// The descriptor for the API is no listening Unix socket.
    #[error("the API's Unix socket: {0}")]
    Api(#[source] io::Error),
}

/// The role: serves for ever, on threads of its own. `listen` and `api` are the
/// listening sockets named by [`protocol::host::proxy::descriptor`].
pub fn run(listen: OwnedFd, api: OwnedFd) -> Result<(), ProxyError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(ProxyError::Runtime)?
        .block_on(serve(listen, api))
}

/// The same within a runtime that is there already.
pub async fn serve(listen: OwnedFd, api: OwnedFd) -> Result<(), ProxyError> {
    let shared = Arc::new(api::Shared::new());
    let control = channel::ChannelListener::new(listen).map_err(ProxyError::Listen)?;
    let unix = std::os::unix::net::UnixListener::from(api);
    unix.set_nonblocking(true).map_err(ProxyError::Api)?;
    let unix = UnixListener::from_std(unix).map_err(ProxyError::Api)?;
    let common = Arc::clone(&shared.common);
    tokio::spawn(async move {
        // Read once in any case; without news of changes they are as they were at the start.
        if let Err(error) = common.follow_host().await {
            tracing::error!(%error, "the host's own addresses cannot be followed");
        }
    });
    tokio::select! {
        () = api::control::accept(control, Arc::clone(&shared)) => Ok(()),
        () = api::listen::accept_unix(unix, shared) => Ok(()),
    }
}
