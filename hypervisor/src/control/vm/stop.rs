//! From a running machine to one that is off: ask politely, switch off at the deadline, kill the
//! monitor if it does not even do that.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::super::agent_client::{self, AgentError};
use super::super::monitor::{Monitor, MonitorError};
use super::super::supervisor_client::{Exit, wait_end};
use super::ending::{Asked, KILL};
use super::{Command, Host, Machine, Reply, View, busy};

/// How long a monitor may take to switch off.
const SWITCH_OFF: Duration = Duration::from_secs(5);

/// How long an agent may take to say that it powers off.
const AGENT: Duration = Duration::from_secs(10);

/// The longest time that processes get between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(10);

/// Commands that wait until the VM is off.
const MAX_DEFERRED: usize = 128;

/// A VM's mailbox. What cannot be done now can be put off.
pub(crate) struct Inbox {
    receiver: mpsc::Receiver<Command>,
    deferred: VecDeque<Command>,
}

impl Inbox {
    pub(crate) fn new(receiver: mpsc::Receiver<Command>) -> Self {
        Self {
            receiver,
            deferred: VecDeque::new(),
        }
    }

    /// The next command, those that were put off first; none when nobody can send any more.
    pub(crate) async fn next(&mut self) -> Option<Command> {
        match self.deferred.pop_front() {
            Some(command) => Some(command),
            None => self.receiver.recv().await,
        }
    }

    /// The next command that was not put off.
    pub(crate) async fn fresh(&mut self) -> Option<Command> {
        self.receiver.recv().await
    }

    /// Puts a command off; refuses when too many are.
    pub(crate) fn defer(&mut self, command: Command, vm: &protocol::id::VmId) {
        if self.deferred.len() < MAX_DEFERRED {
            self.deferred.push_back(command);
            return;
        }
        match command {
            Command::Start(reply)
            | Command::Wake(reply)
            | Command::SetNetwork { reply, .. }
            | Command::Stop { reply, .. } => drop(reply.send(Err(busy(vm)))),
            Command::Open(reply) | Command::Dial(reply) => drop(reply.send(Err(busy(vm)))),
            Command::Delete(reply) | Command::ShutDown { done: reply, .. } => {
                drop(reply.send(Err(busy(vm))));
            }
        }
    }
}

/// Who waits for a VM to be off.
#[derive(Default)]
pub(crate) struct StopWaiters {
    pub(crate) stopped: Vec<Reply<View>>,
    pub(crate) deleted: Vec<Reply<()>>,
    pub(crate) shut_down: Vec<Reply<()>>,
}

impl StopWaiters {
    /// Takes a command that wants the VM off and says when; gives any other back.
    pub(crate) fn take(&mut self, command: Command) -> Result<Duration, Command> {
        // Whoever asks again and again without waiting leaves nothing behind.
        self.stopped.retain(|reply| !reply.is_closed());
        self.deleted.retain(|reply| !reply.is_closed());
        self.shut_down.retain(|reply| !reply.is_closed());
        match command {
            Command::Stop { deadline, reply } => {
                self.stopped.push(reply);
                Ok(deadline)
            }
            Command::Delete(reply) => {
                self.deleted.push(reply);
                Ok(Duration::ZERO)
            }
            Command::ShutDown { deadline, done } => {
                self.shut_down.push(done);
                Ok(deadline)
            }
            other => Err(other),
        }
    }
}

/// How a stop went.
pub(crate) struct Stopped {
    /// How the monitor ended; none when it could not be ended.
    pub(crate) exit: Option<Exit>,
    pub(crate) asked: Asked,
}

/// Brings a machine down. Further commands that want it off join `waiters` and may shorten the
/// deadline; all others are put off.
pub(crate) async fn stop(
    host: &Arc<Host>,
    machine: &mut Machine,
    inbox: &mut Inbox,
    waiters: &mut StopWaiters,
    deadline: Duration,
) -> Stopped {
    let vm = machine.run.vm.clone();
    let mut asked = match waiters.shut_down.is_empty() {
        true => Asked::Stop,
        false => Asked::HostDown,
    };
    let mut at = after(deadline);
    let polite = ask_politely(machine.monitor.clone(), deadline);
    tokio::pin!(polite);
    let mut asking = !deadline.is_zero();
    let mut open = true;
    let exit = loop {
        tokio::select! {
            biased;
            exit = wait_end(&mut machine.ended) => break Some(exit),
            () = sleep_until(at) => break None,
            result = &mut polite, if asking => {
                asking = false;
                if let Err(error) = result {
                    tracing::warn!(%vm, %error, "the VM cannot be asked to power off; it is switched off");
                    at = Instant::now();
                }
            }
            command = inbox.fresh(), if open => match command {
                None => open = false,
                Some(command) => match waiters.take(command) {
                    Ok(deadline) => {
                        if !waiters.shut_down.is_empty() {
                            asked = Asked::HostDown;
                        }
                        at = at.min(after(deadline));
                    }
                    Err(other) => inbox.defer(other, &vm),
                },
            },
        }
    };
    if exit.is_some() {
        return Stopped { exit, asked };
    }
    if asked != Asked::HostDown {
        asked = Asked::SwitchOff;
    }
    // A monitor that reads nothing takes no message either.
    let switched_off = timeout(SWITCH_OFF, async {
        machine.monitor.switch_off().await?;
        Ok::<_, MonitorError>(wait_end(&mut machine.ended).await)
    });
    match switched_off.await {
        Ok(Ok(exit)) => {
            return Stopped {
                exit: Some(exit),
                asked,
            };
        }
        Ok(Err(error)) => {
            tracing::warn!(%vm, %error, "the monitor cannot be told to switch off; it is killed");
        }
        Err(_) => tracing::warn!(%vm, "the monitor does not switch off; it is killed"),
    }
    if let Err(error) = host.supervisor.kill(&machine.run).await {
        tracing::error!(%vm, %error, "cannot end a monitor");
    }
    Stopped {
        exit: timeout(KILL, wait_end(&mut machine.ended)).await.ok(),
        asked,
    }
}

fn after(deadline: Duration) -> Instant {
    // A day is as good as for ever here, and no time of day overflows.
    let deadline = deadline.min(Duration::from_secs(24 * 60 * 60));
    Instant::now() + deadline
}

/// Why a VM could not be asked.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("its agent did not answer within {} s", AGENT.as_secs())]
    Silent,
}

async fn ask_politely(monitor: Monitor, deadline: Duration) -> Result<(), AskError> {
    let grace = GRACE.min(deadline / 3);
    let ask = async {
        let stream = monitor.open(false).await?;
        let milliseconds = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        agent_client::power_off(stream, milliseconds).await?;
        Ok(())
    };
    timeout(AGENT, ask).await.unwrap_or(Err(AskError::Silent))
}
