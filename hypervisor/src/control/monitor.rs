//! Control's side of one monitor: who it is, streams into its guest, and its off switch. Whatever
//! the monitor says is checked; a monitor that answers wrongly or not at all is an error of this VM
//! only.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use protocol::agent::AGENT_PORT;
use protocol::host::channel::{ChannelError, Packet};
use protocol::host::supervisor::Run;
use protocol::host::vmm::{
    AttachFrames, Connect, Connected, Identify, Identity, NotConnected, SwitchOff,
};
use protocol::message::MessageError;
use protocol::{Kind, decode};
use proxy::channel::Channel;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

/// How long a monitor may take to say who it is.
const IDENTIFY: Duration = Duration::from_secs(10);

/// Streams that may wait for the guest at once.
const MAX_WAITING: usize = 256;

/// Why a monitor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MonitorError {
    /// Its control socket cannot be reached.
    #[error("the monitor's control socket cannot be reached: {0}")]
    Connect(std::io::Error),
    /// The socket failed.
    #[error("the monitor's control socket failed: {0}")]
    Channel(#[from] ChannelError),
    /// It has gone.
    #[error("the monitor has gone")]
    Gone,
    /// It did not answer.
    #[error("the monitor did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// It is another run's.
    #[error("the monitor belongs to run {} of {}, expected {} of {}", found.generation, found.vm, expected.generation, expected.vm)]
    Stranger {
        /// Whose it should be.
        expected: Run,
        /// Whose it is.
        found: Run,
    },
    /// The guest refused the stream.
    #[error("the VM's agent refused the connection: {0}")]
    Refused(String),
    /// As many streams wait for the guest as may.
    #[error("{MAX_WAITING} connections wait for this VM's agent already")]
    TooMany,
    /// The system refused a socket.
    #[error("cannot make a socket pair: {0}")]
    Pair(nix::Error),
}

/// Handle to a monitor; its clones share one socket.
#[derive(Clone)]
pub(crate) struct Monitor(Arc<Shared>);

struct Shared {
    channel: Arc<Channel>,
    waiting: Arc<Mutex<Waiting>>,
    /// Held by the reader; closed when it ended.
    reading: watch::Receiver<()>,
    reader: AbortHandle,
}

#[derive(Default)]
struct Waiting {
    gone: bool,
    last_ticket: u64,
    streams: HashMap<u64, oneshot::Sender<Result<(), String>>>,
    identity: Option<oneshot::Sender<Identity>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Monitor {
    /// Connects to a monitor and makes sure that it is the one of `run`.
    pub(crate) async fn connect(path: &Path, run: &Run) -> Result<Self, MonitorError> {
        let channel = Arc::new(Channel::connect(path).map_err(MonitorError::Connect)?);
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (sender, receiver) = oneshot::channel();
        lock(&waiting).identity = Some(sender);
        let (alive, reading) = watch::channel(());
        let read = read(channel.clone(), waiting.clone());
        let reader = tokio::spawn(async move {
            let _alive = alive;
            read.await;
        });
        let monitor = Self(Arc::new(Shared {
            channel,
            waiting,
            reading,
            reader: reader.abort_handle(),
        }));
        monitor.0.channel.send(&Identify {}, &[]).await?;
        match tokio::time::timeout(IDENTIFY, receiver).await {
            Ok(Ok(identity)) if identity.run == *run => Ok(monitor),
            Ok(Ok(identity)) => Err(MonitorError::Stranger {
                expected: run.clone(),
                found: identity.run,
            }),
            Ok(Err(_)) => Err(MonitorError::Gone),
            Err(_) => Err(MonitorError::Silent(IDENTIFY)),
        }
    }

    /// Opens a stream to the guest's agent. With `wait_for_agent` an agent that is not up yet is
    /// waited for, without end: the caller has a deadline. A call that is dropped ends the attempt.
    pub(crate) async fn open(&self, wait_for_agent: bool) -> Result<OwnedFd, MonitorError> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(MonitorError::Pair)?;
        let (ticket, receiver) = self.ticket()?;
        let _forget = Forget {
            waiting: &self.0.waiting,
            ticket,
        };
        let connect = Connect {
            ticket,
            port: AGENT_PORT,
            wait_for_agent,
        };
        self.0.channel.send(&connect, &[theirs.as_fd()]).await?;
        drop(theirs);
        match receiver.await {
            Ok(Ok(())) => Ok(ours),
            Ok(Err(message)) => Err(MonitorError::Refused(message)),
            Err(_) => Err(MonitorError::Gone),
        }
    }

    /// Waits until its socket has closed: it ended, or one of the two broke the rules.
    pub(crate) async fn lost(&self) {
        let mut reading = self.0.reading.clone();
        while reading.changed().await.is_ok() {}
    }

    /// Hands over the monitor's end of a frame channel, in the place of the one before.
    pub(crate) async fn attach_frames(&self, end: BorrowedFd<'_>) -> Result<(), MonitorError> {
        Ok(self.0.channel.send(&AttachFrames {}, &[end]).await?)
    }

    /// Ends the run at once.
    pub(crate) async fn switch_off(&self) -> Result<(), MonitorError> {
        Ok(self.0.channel.send(&SwitchOff {}, &[]).await?)
    }

    fn ticket(&self) -> Result<(u64, oneshot::Receiver<Result<(), String>>), MonitorError> {
        let mut waiting = lock(&self.0.waiting);
        if waiting.gone {
            return Err(MonitorError::Gone);
        }
        if waiting.streams.len() >= MAX_WAITING {
            return Err(MonitorError::TooMany);
        }
        waiting.last_ticket = waiting.last_ticket.wrapping_add(1);
        let ticket = waiting.last_ticket;
        let (sender, receiver) = oneshot::channel();
        waiting.streams.insert(ticket, sender);
        Ok((ticket, receiver))
    }
}

/// Forgets a ticket when nobody waits for it any more.
struct Forget<'a> {
    waiting: &'a Mutex<Waiting>,
    ticket: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).streams.remove(&self.ticket);
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands answers to those who wait; when the monitor has gone, everybody learns it.
async fn read(channel: Arc<Channel>, waiting: Arc<Mutex<Waiting>>) {
    loop {
        match channel.receive().await {
            Ok(Some(packet)) => {
                if let Err(error) = take(&packet, &mut lock(&waiting)) {
                    tracing::warn!(%error, "a monitor's message cannot be read; its socket is closed");
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "a monitor's socket failed");
                break;
            }
        }
    }
    let mut waiting = lock(&waiting);
    waiting.gone = true;
    waiting.streams.clear();
    waiting.identity = None;
}

fn take(packet: &Packet, waiting: &mut Waiting) -> Result<(), MessageError> {
    let frame = &packet.frame;
    match frame.kind {
        Kind::IDENTITY => {
            if let Some(waiter) = waiting.identity.take() {
                let _ = waiter.send(decode::<Identity>(frame)?);
            }
        }
        Kind::CONNECTED => {
            let Connected { ticket } = decode(frame)?;
            if let Some(waiter) = waiting.streams.remove(&ticket) {
                let _ = waiter.send(Ok(()));
            }
        }
        Kind::NOT_CONNECTED => {
            let NotConnected { ticket, message } = decode(frame)?;
            if let Some(waiter) = waiting.streams.remove(&ticket) {
                let _ = waiter.send(Err(message));
            }
        }
        kind => tracing::warn!(%kind, "kind from a monitor is not known"),
    }
    Ok(())
}
