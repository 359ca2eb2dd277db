//! The API listener: clients come in by TLS or by the Unix socket, their requests go to control,
//! and agent streams are relayed. It knows no VM and no token; it must keep one client's misuse
//! from being felt by another.

mod connection;
pub(crate) mod control;
pub(crate) mod desk;
mod gate;
pub(crate) mod listen;
pub(crate) mod quiet;
mod relay;
mod session;
pub(crate) mod strangers;
mod stream;
pub(crate) mod tls;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use desk::Desk;
use strangers::Strangers;

use crate::edge::Edge;
use crate::edge::limits::Limits;
use crate::gateway::Common;
use crate::online::Online;
use crate::vms::Vms;

/// Streams of a connection until control has said how many.
const DEFAULT_STREAMS: u32 = 64;

/// Connections until control has said how many.
const DEFAULT_CONNECTIONS: u32 = 256;

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) desk: Arc<Desk>,
    pub(crate) vms: Arc<Vms>,
    /// What the stacks of all VMs share.
    pub(crate) common: Arc<Common>,
    pub(crate) edge: Edge<Online>,
    pub(crate) panics: AtomicU64,
    // Counted apart, so that strangers on the network cannot lock out the host's own user.
    tcp_connections: AtomicU32,
    unix_connections: AtomicU32,
    strangers: Strangers,
    max_streams: AtomicU32,
    max_connections: AtomicU32,
    tls: RwLock<Option<Arc<rustls::ServerConfig>>>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        let desk = Arc::new(Desk::new());
        let vms = Vms::new(Arc::clone(&desk));
        Self {
            edge: Edge::new(Online::new(Arc::clone(&vms)), Limits::default()),
            common: Common::new(),
            vms,
            desk,
            panics: AtomicU64::new(0),
            tcp_connections: AtomicU32::new(0),
            unix_connections: AtomicU32::new(0),
            strangers: Strangers::default(),
            max_streams: AtomicU32::new(DEFAULT_STREAMS),
            max_connections: AtomicU32::new(DEFAULT_CONNECTIONS),
            tls: RwLock::new(None),
        }
    }

    fn set_limits(&self, max_streams: u32, max_connections: u32) {
        self.max_streams.store(max_streams, Ordering::Relaxed);
        self.max_connections
            .store(max_connections, Ordering::Relaxed);
    }

    fn set_tls(&self, config: Arc<rustls::ServerConfig>) {
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = Some(config);
    }

    fn tls(&self) -> Option<Arc<rustls::ServerConfig>> {
        self.tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn max_streams(&self) -> u32 {
        self.max_streams.load(Ordering::Relaxed)
    }

    fn max_connections(&self) -> u32 {
        self.max_connections.load(Ordering::Relaxed)
    }
}
