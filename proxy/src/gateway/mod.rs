//! The gateway: one TCP/IP stack per VM, in this process, that turns the VM's frames into ordinary
//! sockets of the host and back. Every byte of a frame is an attacker's: at worst the stack of that
//! VM ends, and what one VM does is not felt by another.

pub mod address;
mod answer;
mod arena;
mod bucket;
mod counters;
pub mod dns;
mod engine;
mod flows;
mod frames;
mod link;
mod names;
mod packet;
mod pipe;
pub mod policy;
mod slab;
mod socket;
mod stack;
mod stream;
mod table;
mod tcp;
mod timers;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use protocol::host::proxy::ServeGateway;
use protocol::id::VmId;
use protocol::network::Egress;
use tokio::sync::watch;

use dns::Upstreams;
use policy::HostAddresses;
pub use stack::{Ended, Stack};
pub use stream::{ConnectError, GuestStream};

/// Connections and flows of one VM, where neither it nor the operator says how many.
pub const DEFAULT_CONNECTIONS: u32 = 1024;

/// Connections and flows of all VMs together.
const TOTAL: usize = 32_768;

/// One VM, as its stack has to know it.
#[derive(Clone, Debug)]
pub struct StackSettings {
    /// Which VM, for the log.
    pub vm: VmId,
    /// The name it has in itself.
    pub hostname: String,
    /// What it may reach.
    pub egress: Egress,
    /// What its channel is like.
    pub checksums: Checksums,
}

/// Whether the sums of TCP segments mean something on a frame channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// The channel of our own monitor: they are neither made nor checked.
    Trusted,
    /// A TAP device or QEMU: they are made and checked.
    Real,
}

/// What all stacks share: the operator's settings, and limits and totals over all VMs.
#[derive(Debug)]
pub struct Common {
    gateway: watch::Sender<Arc<ServeGateway>>,
    open: AtomicUsize,
    total: usize,
    panics: AtomicU64,
    host: Arc<HostAddresses>,
    upstreams: Arc<Upstreams>,
}

impl Common {
    /// Without rules and without name servers.
    pub fn new() -> Arc<Self> {
        Self::with_total(TOTAL)
    }

    fn with_total(total: usize) -> Arc<Self> {
        Arc::new(Self {
            gateway: watch::Sender::new(Arc::default()),
            open: AtomicUsize::new(0),
            total,
            panics: AtomicU64::new(0),
            host: Arc::default(),
            upstreams: Upstreams::new(Vec::new()),
        })
    }

    /// Replaces the operator's settings, for stacks that run too. Open connections go on.
    pub fn set(&self, gateway: ServeGateway) {
        let mut servers = Vec::new();
        for server in &gateway.name_servers {
            match server.parse() {
                Ok(address) => servers.push(address),
                Err(_) => tracing::error!(server, "this name server is no address with a port"),
            }
        }
        self.upstreams.set(servers);
        self.gateway.send_replace(Arc::new(gateway));
    }

    /// Keeps the host's own addresses, which no VM reaches without a rule, as the kernel has them.
    /// Ends only with an error; they stay as they were last read.
    pub async fn follow_host(&self) -> std::io::Result<()> {
        self.host.follow().await
    }

    /// Connections and flows of all VMs now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Stacks that ended by a defect of ours.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// Counts one more connection, unless there are too many.
    fn enter(&self) -> bool {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        if before < self.total {
            return true;
        }
        self.leave();
        false
    }

    fn leave(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}
