//! What the edge needs of the VMs behind it. The edge knows neither control nor the gateway: it asks
//! for a VM by the label of its public address, for byte streams to its ports, and to be told when
//! what it holds of a VM is worth nothing any more.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use protocol::id::{Subdomain, VmId};
use protocol::network::Publication;
use tokio::io::{AsyncRead, AsyncWrite};

/// The VMs, as the edge sees them.
pub trait Guests: Send + Sync + 'static {
    /// A connection to a port of a VM.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Who may come in at a label. Nothing is started for it: the edge asks this first, and for the
    /// VM itself only when the visitor may come in.
    fn publication(
        &self,
        subdomain: &Subdomain,
    ) -> impl Future<Output = Result<Publication, Refusal>> + Send;

    /// The VM of a label. One that is stopped is started and waited for, unless its owner turned
    /// that off. The future is dropped when the visitor goes away.
    fn find(&self, subdomain: &Subdomain) -> impl Future<Output = Result<Guest, Refusal>> + Send;

    /// Connects to a port of a VM that [`find`](Self::find) gave.
    fn connect(
        &self,
        guest: &Guest,
        port: u16,
    ) -> impl Future<Output = Result<Self::Stream, ConnectError>> + Send;

    /// Resolves when this start of the VM has ended, or its state changed in a way that connections
    /// do not outlive. The edge then drops the idle connections that it kept into the VM.
    fn ended(&self, guest: &Guest) -> impl Future<Output = ()> + Send;
}

/// A VM that runs.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Which VM.
    pub vm: VmId,
    /// Which of its starts.
    pub generation: u64,
    /// Who may come in.
    pub publication: Publication,
    /// Counts the requests that reach this VM's address.
    pub requests: Arc<AtomicU64>,
}

/// Why there is no VM for a visitor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The label is nobody's.
    #[error("no VM has this address")]
    Unknown,
    /// The VM is stopped and its owner does not want it started by visitors.
    #[error("the VM is stopped and does not start by itself")]
    Stopped,
    /// The VM did not start.
    #[error("the VM did not start")]
    StartFailed,
    /// The VM is not up within the limit for that.
    #[error("the VM took too long to start")]
    StartTimeout,
    /// Too many wait for VMs already.
    #[error("too many requests wait for VMs to start")]
    Busy,
    /// Nobody can say at the moment.
    #[error("the appliance cannot look up VMs at the moment")]
    Unavailable,
}

/// Why there is no connection to a VM's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nothing listens there.
    #[error("nothing listens on that port")]
    Refused,
    /// The VM did not answer in time.
    #[error("the VM did not answer")]
    TimedOut,
    /// The VM has too many connections.
    #[error("the VM has too many connections")]
    TooMany,
    /// The VM ended meanwhile.
    #[error("the VM has ended")]
    Gone,
}
