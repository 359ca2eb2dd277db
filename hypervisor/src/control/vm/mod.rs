//! One VM: a task of its own owns its record and its machine, so that whatever is asked of it
//! happens one after the other, and a VM that hangs holds up nobody else.

mod actor;
mod boot;
mod ending;
mod open;
mod starting;
mod stop;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use protocol::host::supervisor::Run;
use protocol::id::{Owner, VmId};
use protocol::network::{Egress, Publication};
use protocol::vm::{VmInfo, VmState};
use protocol::{ErrorBody, ErrorCode};
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use actor::{Beginning, Vm};
pub(crate) use ending::{end_run, give_up_run};

use super::capacity::{Capacity, Reservation};
use super::frames::Frames;
use super::monitor::Monitor;
use super::store::record::VmRecord;
use super::store::{Store, StoreError};
use super::supervisor_client::{Ended, Supervisor};
use crate::settings::Settings;

/// Commands that may wait in one VM's mailbox.
const MAILBOX: usize = 128;

/// What every VM's task needs of the host.
pub(crate) struct Host {
    pub(crate) settings: Settings,
    pub(crate) store: Store,
    pub(crate) supervisor: Supervisor,
    pub(crate) capacity: Capacity,
    pub(crate) frames: Frames,
    /// Directory of the monitors' sockets.
    pub(crate) sockets: PathBuf,
    /// Whether monitors can be given users of their own.
    pub(crate) privileged: bool,
    /// The host goes down: nothing is started any more.
    pub(crate) going_down: AtomicBool,
}

impl Host {
    /// The control socket of a VM's monitor.
    pub(crate) fn socket(&self, id: &VmId) -> PathBuf {
        self.sockets.join(format!("{id}.sock"))
    }

    /// Runs file work off the asynchronous threads.
    pub(crate) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ErrorBody> {
        let host = self.clone();
        match tokio::task::spawn_blocking(move || work(&host)).await {
            Ok(result) => result.map_err(|error| store_error(&error)),
            Err(error) => Err(internal(format!("file work ended badly: {error}"))),
        }
    }

    pub(crate) fn refuse_when_going_down(&self) -> Result<(), ErrorBody> {
        if self.going_down.load(Ordering::Relaxed) {
            return Err(ErrorBody::host(
                ErrorCode::Unavailable,
                "the appliance is going down; try again when it is back",
            )
            .retryable_after_ms(5000));
        }
        Ok(())
    }
}

/// What everybody may see of a VM at any time.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) record: Arc<VmRecord>,
    pub(crate) state: VmState,
}

impl View {
    pub(crate) fn info(&self, settings: &Settings) -> VmInfo {
        let url = settings.url(&self.record.subdomain);
        self.record.info(self.state, url)
    }
}

/// Where an answer goes. Nobody may be listening any more; the step is done all the same.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, ErrorBody>>;

/// What can be asked of a VM.
pub(crate) enum Command {
    /// Start it, answer when it is ready.
    Start(Reply<View>),
    /// Stop it, answer when it is off.
    Stop {
        /// When it is switched off hard.
        deadline: Duration,
        reply: Reply<View>,
    },
    /// Delete it.
    Delete(Reply<()>),
    /// Open a stream to its agent, starting it first if need be and its owner lets that happen.
    Open(Reply<OpenedStream>),
    /// Somebody asks for its public address: as [`Start`](Self::Start) where its owner lets that
    /// happen.
    Wake(Reply<View>),
    /// Open a stream to its agent if it runs or is coming up.
    Dial(Reply<OpenedStream>),
    /// Change how it is connected.
    SetNetwork {
        egress: Option<Egress>,
        publication: Option<Publication>,
        reply: Reply<View>,
    },
    /// The host goes down.
    ShutDown { deadline: Duration, done: Reply<()> },
}

/// A stream to a VM's agent.
pub(crate) struct OpenedStream {
    pub(crate) stream: OwnedFd,
    pub(crate) generation: u64,
}

/// How others reach a VM's task.
#[derive(Clone)]
pub(crate) struct VmHandle {
    pub(crate) id: VmId,
    pub(crate) owner: Owner,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) view: watch::Receiver<View>,
}

impl VmHandle {
    /// Asks and waits for the answer. Giving up waiting does not take the command back.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, ErrorBody> {
        let (sender, receiver) = oneshot::channel();
        match self.commands.try_send(command(sender)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(busy(&self.id)),
            Err(mpsc::error::TrySendError::Closed(_)) => {
                return Err(not_found(self.id.as_str()));
            }
        }
        receiver.await.unwrap_or_else(|_| Err(self.unanswered()))
    }

    /// A task that ended with the command unread has deleted its VM; one that goes on has panicked.
    fn unanswered(&self) -> ErrorBody {
        if self.commands.is_closed() {
            return not_found(self.id.as_str());
        }
        internal(format!(
            "this request failed inside the appliance, whose log says more; {} was ended and can \
             be started again",
            self.id
        ))
    }
}

/// A machine that is on.
pub(crate) struct Machine {
    run: Run,
    monitor: Monitor,
    ended: Ended,
    _memory: Reservation,
}

pub(crate) fn not_found(vm: &str) -> ErrorBody {
    ErrorBody::caller(
        ErrorCode::VmNotFound,
        format!("there is no VM `{vm}`; `sup ls` lists yours"),
    )
}

fn stopped(id: &VmId) -> ErrorBody {
    ErrorBody::caller(
        ErrorCode::VmStopped,
        format!(
            "{id} is stopped, and its owner has turned off that requests start it; start it with \
             `sup start {id}`"
        ),
    )
}

fn busy(id: &VmId) -> ErrorBody {
    ErrorBody::host(
        ErrorCode::Busy,
        format!("too many requests wait for {id}; try again"),
    )
    .retryable_after_ms(500)
}

pub(crate) fn internal(message: impl Into<String>) -> ErrorBody {
    ErrorBody::host(ErrorCode::Internal, message)
}

pub(crate) fn store_error(error: &StoreError) -> ErrorBody {
    match error {
        StoreError::Full { .. } => ErrorBody::host(ErrorCode::DiskFull, error.to_string()),
        _ => internal(error.to_string()),
    }
}
