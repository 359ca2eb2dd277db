//! VMs at work on the network: a stack of the gateway for each that is attached, and what the edge
//! asks of them. It must never let one VM's trouble reach another, nor keep anything of a VM that is
//! gone.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use protocol::id::Subdomain;
use protocol::network::Publication;
use protocol::{ErrorBody, ErrorCode};
use tokio::net::UnixStream;
use tokio_util::either::Either;

use crate::Quiet;
use crate::dial::{DialError, dial};
use crate::edge::guests::{ConnectError, Guest, Guests, Refusal};
use crate::gateway::{self, Checksums, Common, GuestStream, Stack, StackSettings};
use crate::vms::{Vm, Vms};

/// Gives an attached VM its stack, which lives as long as the VM is attached or until it fails; then
/// control is told, which makes a new channel.
pub(crate) fn connect_to_world(vms: &Arc<Vms>, vm: Arc<Vm>, common: &Arc<Common>) {
    let Some(frames) = vm.take_frames() else {
        return;
    };
    let mut egress = vm.egress();
    let settings = StackSettings {
        vm: vm.id.clone(),
        hostname: vm.hostname.clone(),
        egress: egress.borrow_and_update().as_ref().clone(),
        checksums: Checksums::Trusted,
    };
    let stack = match Stack::start(settings, frames, Arc::clone(common)) {
        Ok(stack) => Arc::new(stack),
        Err(error) => {
            tracing::error!(vm = %vm.id, %error, "a VM's network cannot be started");
            vms.lost(&vm);
            return;
        }
    };
    vm.set_stack(Some(Arc::clone(&stack)));
    let vms = Arc::clone(vms);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                Ok(()) = egress.changed() => {
                    stack.update(egress.borrow_and_update().as_ref().clone());
                }
                _ = stack.ended() => {
                    vms.lost(&vm);
                    break;
                }
                () = vm.gone() => break,
            }
        }
        vm.set_stack(None);
    });
}

/// The VMs, as the edge sees them.
#[derive(Debug)]
pub(crate) struct Online {
    vms: Arc<Vms>,
}

impl Online {
    pub(crate) fn new(vms: Arc<Vms>) -> Arc<Self> {
        Arc::new(Self { vms })
    }

    /// The VM of a guest, if it is still the same start of it.
    fn same(&self, guest: &Guest) -> Option<Arc<Vm>> {
        let vm = self.vms.get(&guest.vm)?;
        (vm.generation == guest.generation).then_some(vm)
    }
}

impl Guests for Online {
    /// Through the VM's stack, or through its agent.
    type Stream = Either<GuestStream, UnixStream>;

    async fn publication(&self, subdomain: &Subdomain) -> Result<Publication, Refusal> {
        self.vms.publication(subdomain).await.map_err(refusal)
    }

    async fn find(&self, subdomain: &Subdomain) -> Result<Guest, Refusal> {
        let vm = match self.vms.find(subdomain) {
            Some(vm) => vm,
            None => {
                self.vms.wake(subdomain).await.map_err(refusal)?;
                // It may have ended again in this very moment.
                self.vms.find(subdomain).ok_or(Refusal::Unavailable)?
            }
        };
        Ok(Guest {
            vm: vm.id.clone(),
            generation: vm.generation,
            publication: vm.publication().as_ref().clone(),
            requests: Arc::<AtomicU64>::clone(&vm.requests),
        })
    }

    async fn connect(&self, guest: &Guest, port: u16) -> Result<Self::Stream, ConnectError> {
        let vm = self.same(guest).ok_or(ConnectError::Gone)?;
        // While the channel is made anew there is no stack.
        if let Some(stack) = vm.stack() {
            match stack.connect(port).await {
                Ok(stream) => return Ok(Either::Left(stream)),
                // Perhaps it listens on the loopback only.
                Err(gateway::ConnectError::Refused | gateway::ConnectError::Gone) => {}
                Err(gateway::ConnectError::TimedOut) => return Err(ConnectError::TimedOut),
                Err(gateway::ConnectError::TooMany) => return Err(ConnectError::TooMany),
            }
        }
        let stream = match self.vms.dial_agent(&vm.id).await {
            Ok(stream) => stream,
            Err(error) => {
                return Err(match error.code {
                    ErrorCode::VmStopped | ErrorCode::VmNotFound => ConnectError::Gone,
                    ErrorCode::TooManyStreams => ConnectError::TooMany,
                    _ => ConnectError::TimedOut,
                });
            }
        };
        match dial(stream, port).await {
            Ok(stream) => Ok(Either::Right(stream)),
            // The agent refuses its own port, and says so.
            Err(DialError::Refused | DialError::Agent(_)) => Err(ConnectError::Refused),
            Err(DialError::Silent) => Err(ConnectError::TimedOut),
            Err(error) => {
                tracing::debug!(vm = %vm.id, %error, "a port was not reached through the agent");
                Err(ConnectError::Gone)
            }
        }
    }

    async fn ended(&self, guest: &Guest) {
        if let Some(vm) = self.same(guest) {
            vm.gone().await;
        }
    }
}

/// What a visitor is told of control's refusal to start a VM.
fn refusal(error: ErrorBody) -> Refusal {
    match error.code {
        ErrorCode::VmNotFound => Refusal::Unknown,
        ErrorCode::VmStopped => Refusal::Stopped,
        ErrorCode::BootTimeout => Refusal::StartTimeout,
        ErrorCode::Busy => Refusal::Busy,
        ErrorCode::Unavailable => Refusal::Unavailable,
        // Why is for the owner, who learns it by a start of his own, and for the log.
        _ => {
            static QUIET: Quiet = Quiet::new();
            if let Some(left_out) = QUIET.allow() {
                let message = error.message;
                tracing::warn!(%message, left_out, "no VM for a visitor");
            }
            Refusal::StartFailed
        }
    }
}
