//! Control's side of the supervisor: it starts monitors for us and tells how they ended. An end is
//! remembered here until somebody asks for it, so none is lost between a message and its reader.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::host::channel::{ChannelError, Packet};
use protocol::host::supervisor::{
    ForgetVmm, KillVmm, ListVmms, Run, ShutDown, SpawnVmm, VmmEnded, VmmListed, VmmNotSpawned,
    VmmSpawned, VmmsListed,
};
use protocol::message::MessageError;
use protocol::{Kind, Message, decode};
use proxy::channel::Channel;
use tokio::sync::{oneshot, watch};

/// How long the supervisor may take to answer.
const ANSWER: Duration = Duration::from_secs(15);

/// Why the supervisor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SupervisorError {
    /// The socket failed.
    #[error("the supervisor cannot be reached: {0}")]
    Channel(#[from] ChannelError),
    /// It closed the socket.
    #[error("the supervisor has gone")]
    Gone,
    /// It did not answer.
    #[error("the supervisor did not answer within {} s", ANSWER.as_secs())]
    Silent,
    /// The monitor could not be started.
    #[error("the monitor of {run_vm} could not be started: {message}", run_vm = run.vm)]
    NotSpawned {
        /// Which run.
        run: Run,
        /// Why.
        message: String,
    },
    /// It said something that is no message.
    #[error("the supervisor's message cannot be read: {0}")]
    Message(#[from] MessageError),
}

/// How a monitor's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It exited with this code.
    Code(u8),
    /// A signal ended it.
    Signal(u8),
}

/// Tells when a monitor has ended.
pub(crate) type Ended = watch::Receiver<Option<Exit>>;

/// Handle to the supervisor; its clones share one socket.
#[derive(Clone)]
pub(crate) struct Supervisor(Arc<Shared>);

struct Shared {
    channel: Channel,
    state: Mutex<State>,
    shut_down: watch::Sender<Option<Duration>>,
}

#[derive(Default)]
struct State {
    spawning: HashMap<Run, oneshot::Sender<Result<u32, SupervisorError>>>,
    listing: Option<(Vec<Run>, oneshot::Sender<Vec<Run>>)>,
    ends: HashMap<Run, watch::Sender<Option<Exit>>>,
}

impl Supervisor {
    /// Takes the socket that control was started with.
    pub(crate) fn new(socket: OwnedFd) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            channel: Channel::new(socket)?,
            state: Mutex::default(),
            shut_down: watch::channel(None).0,
        })))
    }

    /// Reads what the supervisor says until it closes. Runs as long as control does.
    pub(crate) async fn listen(&self) -> Result<(), SupervisorError> {
        while let Some(packet) = self.0.channel.receive().await? {
            if let Err(error) = self.take(&packet) {
                tracing::warn!(%error, "message from the supervisor ignored");
            }
        }
        Err(SupervisorError::Gone)
    }

    /// Resolves with the time the VMs have when the host goes down.
    pub(crate) fn shut_down(&self) -> watch::Receiver<Option<Duration>> {
        self.0.shut_down.subscribe()
    }

    /// Starts a monitor with named descriptors; returns its process identifier.
    pub(crate) async fn spawn(
        &self,
        run: &Run,
        uid: u32,
        memory_max: u64,
        descriptors: &[(&str, BorrowedFd<'_>)],
    ) -> Result<u32, SupervisorError> {
        let message = SpawnVmm {
            run: run.clone(),
            uid,
            memory_max,
            descriptors: descriptors
                .iter()
                .filter_map(|(name, _)| heapless_name(name))
                .collect(),
        };
        let attached: Vec<BorrowedFd<'_>> = descriptors.iter().map(|(_, fd)| fd.as_fd()).collect();
        let (sender, receiver) = oneshot::channel();
        self.state().spawning.insert(run.clone(), sender);
        self.0.channel.send(&message, &attached).await?;
        match tokio::time::timeout(ANSWER, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(SupervisorError::Gone),
            Err(_) => {
                self.state().spawning.remove(run);
                Err(SupervisorError::Silent)
            }
        }
    }

    /// Ends a monitor; that it has ended is told through [`ended`](Self::ended).
    pub(crate) async fn kill(&self, run: &Run) -> Result<(), SupervisorError> {
        self.tell(&KillVmm { run: run.clone() }).await
    }

    /// Tells the supervisor that an end has been written down.
    pub(crate) async fn forget(&self, run: &Run) -> Result<(), SupervisorError> {
        self.state().ends.remove(run);
        self.tell(&ForgetVmm { run: run.clone() }).await
    }

    /// Follows a monitor's end. Ask before it is started, or for one that was listed.
    pub(crate) fn ended(&self, run: &Run) -> Ended {
        self.state()
            .ends
            .entry(run.clone())
            .or_insert_with(|| watch::channel(None).0)
            .subscribe()
    }

    /// Every monitor that runs. Those that ended unforgotten are known to [`ended`](Self::ended)
    /// and [`ended_runs`](Self::ended_runs) when this returns.
    pub(crate) async fn list(&self) -> Result<Vec<Run>, SupervisorError> {
        let (sender, receiver) = oneshot::channel();
        self.state().listing = Some((Vec::new(), sender));
        self.tell(&ListVmms {}).await?;
        match tokio::time::timeout(ANSWER, receiver).await {
            Ok(Ok(runs)) => Ok(runs),
            Ok(Err(_)) => Err(SupervisorError::Gone),
            Err(_) => Err(SupervisorError::Silent),
        }
    }

    /// The runs whose end is known and not forgotten.
    pub(crate) fn ended_runs(&self) -> Vec<(Run, Exit)> {
        let state = self.state();
        let ends = state.ends.iter();
        ends.filter_map(|(run, sender)| Some((run.clone(), (*sender.borrow())?)))
            .collect()
    }

    async fn tell<M: Message>(&self, message: &M) -> Result<(), SupervisorError> {
        Ok(self.0.channel.send(message, &[]).await?)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, packet: &Packet) -> Result<(), MessageError> {
        let frame = &packet.frame;
        match frame.kind {
            Kind::VMM_SPAWNED => {
                let spawned: VmmSpawned = decode(frame)?;
                if let Some(waiter) = self.state().spawning.remove(&spawned.run) {
                    let _ = waiter.send(Ok(spawned.pid));
                }
            }
            Kind::VMM_NOT_SPAWNED => {
                let VmmNotSpawned { run, message } = decode(frame)?;
                if let Some(waiter) = self.state().spawning.remove(&run) {
                    let _ = waiter.send(Err(SupervisorError::NotSpawned { run, message }));
                }
            }
            Kind::VMM_ENDED => {
                let ended: VmmEnded = decode(frame)?;
                let exit = match (ended.exit_code, ended.signal) {
                    (Some(code), _) => Exit::Code(code),
                    (None, signal) => Exit::Signal(signal.unwrap_or_default()),
                };
                self.state()
                    .ends
                    .entry(ended.run)
                    .or_insert_with(|| watch::channel(None).0)
                    .send_replace(Some(exit));
            }
            Kind::VMM_LISTED => {
                let listed: VmmListed = decode(frame)?;
                if let Some((runs, _)) = &mut self.state().listing {
                    runs.push(listed.run);
                }
            }
            Kind::VMMS_LISTED => {
                let VmmsListed {} = decode(frame)?;
                if let Some((runs, waiter)) = self.state().listing.take() {
                    let _ = waiter.send(runs);
                }
            }
            Kind::SHUT_DOWN => {
                let ShutDown { deadline_ms } = decode(frame)?;
                self.0
                    .shut_down
                    .send_replace(Some(Duration::from_millis(deadline_ms.into())));
            }
            kind => tracing::warn!(%kind, "kind from the supervisor is not known"),
        }
        Ok(())
    }
}

/// Waits until the monitor has ended.
pub(crate) async fn wait_end(ended: &mut Ended) -> Exit {
    match ended.wait_for(Option::is_some).await {
        Ok(exit) => exit.unwrap_or(Exit::Signal(0)),
        // Forgotten by somebody else: nobody will tell any more.
        Err(_) => Exit::Signal(0),
    }
}

fn heapless_name(name: &str) -> Option<heapless::String<16>> {
    heapless::String::try_from(name).ok()
}
