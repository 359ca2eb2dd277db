//! The task that owns one VM: off, booting, up, going down. Each phase is a method that returns the
//! next one. The record on disk is written before the world is told.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use protocol::host::supervisor::Run;
use protocol::vm::{EndReason, VmState};
use protocol::{ErrorBody, ErrorCode};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::super::capacity::Reservation;
use super::super::monitor::{Monitor, MonitorError};
use super::super::registry::Registry;
use super::super::store::record::{RunState, VmRecord};
use super::super::supervisor_client::{Ended, Exit, SupervisorError, wait_end};
use super::boot::{self, BootError};
use super::ending::{Asked, KILL, describe, forget_run};
use super::stop::{Inbox, StopWaiters, stop};
use super::{Command, Host, MAILBOX, Machine, OpenedStream, Reply, View, VmHandle, internal};

/// How long an agent that was up may take to accept a stream.
const OPEN: Duration = Duration::from_secs(15);

/// Requests that may wait for one boot.
const MAX_WAITERS: usize = 1024;

/// So many resets within [`RESET_WINDOW`] are the last.
const MAX_RESETS: usize = 5;
const RESET_WINDOW: Duration = Duration::from_secs(120);

/// What a VM's task begins with.
pub(crate) enum Beginning {
    /// A create: the first boot, undone when it fails.
    Create {
        memory: Reservation,
        reply: Reply<View>,
    },
    /// It is off.
    Off,
    /// Its monitor runs since before control was started.
    Adopt,
    /// Its monitor ended while no control was there.
    Ended(Exit),
}

/// The task's state.
pub(crate) struct Vm {
    host: Arc<Host>,
    registry: Arc<Registry>,
    record: VmRecord,
    view: watch::Sender<View>,
    resets: VecDeque<Instant>,
}

enum Phase {
    Off,
    Boot(Boot),
    Up(Machine),
    Down(Machine, StopWaiters, Duration),
    Gone,
}

#[derive(Default)]
struct Boot {
    memory: Option<Reservation>,
    create: Option<Reply<View>>,
    waiters: Vec<Waiter>,
    /// A monitor that is on its way already.
    launched: Option<(Run, Ended)>,
}

enum Waiter {
    Start(Reply<View>),
    Open(Reply<OpenedStream>),
}

impl Boot {
    fn refuse(self, error: &ErrorBody) {
        if let Some(reply) = self.create {
            let _ = reply.send(Err(error.clone()));
        }
        for waiter in self.waiters {
            match waiter {
                Waiter::Start(reply) => drop(reply.send(Err(error.clone()))),
                Waiter::Open(reply) => drop(reply.send(Err(error.clone()))),
            }
        }
    }
}

enum BootOutcome {
    Ready(Monitor),
    Failed(BootError),
    Interrupted(Command),
}

impl Vm {
    /// Starts the task of a VM.
    pub(crate) fn spawn(
        host: Arc<Host>,
        registry: Arc<Registry>,
        record: VmRecord,
        beginning: Beginning,
    ) -> VmHandle {
        let (commands, receiver) = mpsc::channel(MAILBOX);
        let state = match (&beginning, record.run) {
            (Beginning::Create { .. }, _) => VmState::Starting,
            (Beginning::Adopt, RunState::Up) => VmState::Running,
            (Beginning::Adopt, _) => VmState::Starting,
            (Beginning::Off | Beginning::Ended(_), _) => VmState::Stopped,
        };
        let (view, seen) = watch::channel(View {
            record: Arc::new(record.clone()),
            state,
        });
        let handle = VmHandle {
            id: record.id.clone(),
            owner: record.owner.clone(),
            commands,
            view: seen,
            failed: Arc::default(),
        };
        let id = record.id.clone();
        let failed = handle.failed.clone();
        let vm = Self {
            host,
            registry,
            record,
            view,
            resets: VecDeque::new(),
        };
        tokio::spawn(async move {
            let run = std::panic::AssertUnwindSafe(vm.run(Inbox::new(receiver), beginning));
            if run.catch_unwind().await.is_err() {
                failed.store(true, Ordering::Relaxed);
                tracing::error!(vm = %id, "the task of this VM panicked; it can be used again after a restart of control");
            }
        });
        handle
    }

    async fn run(mut self, mut inbox: Inbox, beginning: Beginning) {
        let mut phase = match beginning {
            Beginning::Create { memory, reply } => Phase::Boot(Boot {
                memory: Some(memory),
                create: Some(reply),
                ..Boot::default()
            }),
            Beginning::Off => Phase::Off,
            Beginning::Adopt => self.adopt().await,
            Beginning::Ended(exit) => self.ended(exit, Asked::Nothing, None).await,
        };
        loop {
            phase = match phase {
                Phase::Off => self.off(&mut inbox).await,
                Phase::Boot(boot) => self.boot(&mut inbox, boot).await,
                Phase::Up(machine) => self.up(&mut inbox, machine).await,
                Phase::Down(machine, waiters, deadline) => {
                    self.down(&mut inbox, machine, waiters, deadline).await
                }
                Phase::Gone => return,
            };
        }
    }

    fn current_run(&self) -> Run {
        Run {
            vm: self.record.id.clone(),
            generation: self.record.generation,
        }
    }

    fn show(&self, state: VmState) -> View {
        let view = View {
            record: Arc::new(self.record.clone()),
            state,
        };
        self.view.send_replace(view.clone());
        view
    }

    /// Makes the record durable.
    async fn save(&self) -> Result<(), ErrorBody> {
        let record = self.record.clone();
        let saved = self
            .host
            .blocking(move |host| host.store.save(&record))
            .await;
        if let Err(error) = &saved {
            tracing::error!(vm = %self.record.id, %error, "cannot save the VM's record");
        }
        saved
    }

    async fn off(&mut self, inbox: &mut Inbox) -> Phase {
        let Some(command) = inbox.next().await else {
            return Phase::Gone;
        };
        let waiter = match command {
            Command::Start(reply) => Waiter::Start(reply),
            Command::Open(reply) => Waiter::Open(reply),
            Command::Stop { reply, .. } => {
                let _ = reply.send(Ok(self.view.borrow().clone()));
                return Phase::Off;
            }
            Command::Delete(reply) => return self.delete(vec![reply]).await,
            Command::ShutDown { done, .. } => {
                let _ = done.send(Ok(()));
                return Phase::Off;
            }
        };
        Phase::Boot(Boot {
            waiters: vec![waiter],
            ..Boot::default()
        })
    }

    async fn boot(&mut self, inbox: &mut Inbox, mut boot: Boot) -> Phase {
        let memory = match self.begin_boot(&mut boot).await {
            Ok(memory) => memory,
            Err(error) => return self.boot_refused(boot, error).await,
        };
        let (run, ended) = match boot.launched.take() {
            Some(launched) => launched,
            None => {
                let run = self.current_run();
                let ended = self.host.supervisor.ended(&run);
                self.show(VmState::Starting);
                if let Err(error) = boot::launch(&self.host, &self.record, &run).await {
                    return self.boot_failed(boot, &run, ended, error).await;
                }
                (run, ended)
            }
        };
        let outcome = {
            let ready = boot::make_ready(
                self.host.clone(),
                Arc::new(self.record.clone()),
                run.clone(),
                ended.clone(),
            );
            tokio::pin!(ready);
            loop {
                let command = tokio::select! {
                    biased;
                    result = &mut ready => break match result {
                        Ok(monitor) => BootOutcome::Ready(monitor),
                        Err(error) => BootOutcome::Failed(error),
                    },
                    // A create puts commands off, so it must not look at those again.
                    command = async {
                        if boot.create.is_some() { inbox.fresh().await } else { inbox.next().await }
                    } => command,
                };
                let waiter = match command {
                    None => break BootOutcome::Failed(SupervisorError::Gone.into()),
                    Some(Command::Start(reply)) => Waiter::Start(reply),
                    Some(Command::Open(reply)) => Waiter::Open(reply),
                    // Not before the create is answered one way or the other.
                    Some(command @ Command::Stop { .. }) if boot.create.is_some() => {
                        inbox.defer(command, &self.record.id);
                        continue;
                    }
                    Some(command) => break BootOutcome::Interrupted(command),
                };
                if boot.waiters.len() < MAX_WAITERS {
                    boot.waiters.push(waiter);
                } else {
                    Boot {
                        waiters: vec![waiter],
                        ..Boot::default()
                    }
                    .refuse(&super::busy(&self.record.id));
                }
            }
        };
        match outcome {
            BootOutcome::Ready(monitor) => {
                let machine = Machine {
                    run,
                    monitor,
                    ended,
                    _memory: memory,
                };
                self.boot_done(boot, machine).await
            }
            BootOutcome::Failed(error) => self.boot_failed(boot, &run, ended, error).await,
            BootOutcome::Interrupted(command) => {
                self.boot_interrupted(boot, &run, ended, command).await
            }
        }
    }

    /// Reserves memory and writes down that a run begins.
    async fn begin_boot(&mut self, boot: &mut Boot) -> Result<Reservation, ErrorBody> {
        self.host.refuse_when_going_down()?;
        let memory = match boot.memory.take() {
            Some(memory) => memory,
            None if boot.launched.is_some() => self.host.capacity.adopt(self.record.memory_mib),
            None => self
                .host
                .capacity
                .reserve(self.record.memory_mib)
                .map_err(|error| {
                    ErrorBody::host(ErrorCode::NoCapacity, error.to_string())
                        .retryable_after_ms(5000)
                })?,
        };
        if boot.launched.is_none() {
            self.record.generation = self.record.generation.saturating_add(1);
            self.record.run = RunState::Booting;
            self.record.end_reason = EndReason::None;
            self.record.end_message.clear();
            self.save().await?;
        }
        Ok(memory)
    }

    async fn boot_done(&mut self, boot: Boot, machine: Machine) -> Phase {
        self.record.run = RunState::Up;
        self.record.acknowledged = true;
        if let Err(error) = self.save().await {
            // Nobody was told yet: what is not durable is not acknowledged.
            let Machine { run, ended, .. } = machine;
            self.record.acknowledged = boot.create.is_none();
            let error = BootError::File {
                path: "the VM's record".into(),
                cause: std::io::Error::other(error),
            };
            return self.boot_failed(boot, &run, ended, error).await;
        }
        let view = self.show(VmState::Running);
        tracing::info!(vm = %self.record.id, generation = self.record.generation, "VM is up");
        if let Some(reply) = boot.create {
            let _ = reply.send(Ok(view.clone()));
        }
        for waiter in boot.waiters {
            match waiter {
                Waiter::Start(reply) => drop(reply.send(Ok(view.clone()))),
                Waiter::Open(reply) => open(&machine, reply),
            }
        }
        Phase::Up(machine)
    }

    /// The boot did not even begin.
    async fn boot_refused(&mut self, boot: Boot, error: ErrorBody) -> Phase {
        tracing::warn!(vm = %self.record.id, %error, "VM not started");
        if let Some((run, ended)) = &boot.launched {
            self.end_run(run, &mut ended.clone()).await;
            forget_run(&self.host, run).await;
        }
        if boot.create.is_some() {
            self.undo_create().await;
            boot.refuse(&error);
            return Phase::Gone;
        }
        self.record.run = RunState::Off;
        if boot.waiters.is_empty() {
            self.record.end_message = format!("it was not started again: {error}");
        }
        let _ = self.save().await;
        self.show(VmState::Stopped);
        boot.refuse(&error);
        Phase::Off
    }

    async fn boot_failed(
        &mut self,
        boot: Boot,
        run: &Run,
        mut ended: Ended,
        error: BootError,
    ) -> Phase {
        tracing::warn!(vm = %self.record.id, generation = run.generation, %error, "VM did not come up");
        // These two never got as far as a process.
        let no_process = matches!(
            error,
            BootError::File { .. } | BootError::Supervisor(SupervisorError::NotSpawned { .. })
        ) && self.record.run == RunState::Booting
            && ended.borrow().is_none();
        if !no_process {
            self.end_run(run, &mut ended).await;
        }
        let body = error.body(boot::console_tail(&self.host, &self.record).await);
        if boot.create.is_some() {
            self.undo_create().await;
            forget_run(&self.host, run).await;
            boot.refuse(&body);
            return Phase::Gone;
        }
        self.record.run = RunState::Off;
        self.record.end_reason = error.end_reason();
        self.record.end_message = error.to_string();
        let _ = self.save().await;
        forget_run(&self.host, run).await;
        self.show(VmState::Stopped);
        boot.refuse(&body);
        Phase::Off
    }

    async fn boot_interrupted(
        &mut self,
        boot: Boot,
        run: &Run,
        mut ended: Ended,
        command: Command,
    ) -> Phase {
        self.show(VmState::Stopping);
        self.end_run(run, &mut ended).await;
        let mut waiters = StopWaiters::default();
        let _ = waiters.take(command);
        let error = match waiters.shut_down.is_empty() {
            true => ErrorBody::caller(
                ErrorCode::VmStopped,
                format!("{} was stopped while it came up", self.record.id),
            ),
            false => ErrorBody::host(
                ErrorCode::Unavailable,
                "the appliance went down while the VM came up",
            )
            .retryable_after_ms(5000),
        };
        let create = boot.create.is_some();
        if create {
            self.undo_create().await;
        }
        boot.refuse(&error);
        let asked = match waiters.shut_down.is_empty() {
            true => Asked::SwitchOff,
            false => Asked::HostDown,
        };
        if create {
            forget_run(&self.host, run).await;
            self.answer(waiters, true).await;
            return Phase::Gone;
        }
        let _ = self.ended(Exit::Signal(9), asked, None).await;
        self.answer(waiters, false).await
    }

    /// Kills a monitor and waits until it has ended.
    async fn end_run(&self, run: &Run, ended: &mut Ended) -> bool {
        if ended.borrow().is_some() {
            return true;
        }
        if let Err(error) = self.host.supervisor.kill(run).await {
            tracing::error!(vm = %run.vm, %error, "cannot end a monitor");
        }
        let gone = timeout(KILL, wait_end(ended)).await.is_ok();
        if !gone {
            tracing::error!(vm = %run.vm, generation = run.generation, "a monitor does not end");
        }
        gone
    }

    /// Removes every trace of a VM whose create failed.
    async fn undo_create(&self) {
        let id = self.record.id.clone();
        let removed = self
            .host
            .blocking(move |host| host.store.remove_vm(&id))
            .await;
        if let Err(error) = removed {
            tracing::error!(vm = %self.record.id, %error, "cannot undo a create; the next start does");
        }
        self.registry.remove(&self.record, None);
    }

    async fn up(&mut self, inbox: &mut Inbox, mut machine: Machine) -> Phase {
        loop {
            let command = tokio::select! {
                biased;
                exit = wait_end(&mut machine.ended) => {
                    let Machine { _memory, .. } = machine;
                    return self.ended(exit, Asked::Nothing, Some(_memory)).await;
                }
                command = inbox.next() => command,
            };
            match command {
                None => return Phase::Gone,
                Some(Command::Start(reply)) => drop(reply.send(Ok(self.view.borrow().clone()))),
                Some(Command::Open(reply)) => open(&machine, reply),
                Some(command) => {
                    let mut waiters = StopWaiters::default();
                    if let Ok(deadline) = waiters.take(command) {
                        return Phase::Down(machine, waiters, deadline);
                    }
                }
            }
        }
    }

    async fn down(
        &mut self,
        inbox: &mut Inbox,
        mut machine: Machine,
        mut waiters: StopWaiters,
        deadline: Duration,
    ) -> Phase {
        self.show(VmState::Stopping);
        let stopped = stop(&self.host, &mut machine, inbox, &mut waiters, deadline).await;
        let Some(exit) = stopped.exit else {
            let error = internal(format!(
                "the monitor of {} does not end; restart the appliance",
                self.record.id
            ));
            self.show(VmState::Running);
            for reply in waiters.stopped {
                let _ = reply.send(Err(error.clone()));
            }
            for reply in waiters.deleted.into_iter().chain(waiters.shut_down) {
                let _ = reply.send(Err(error.clone()));
            }
            return Phase::Up(machine);
        };
        drop(machine);
        let _ = self.ended(exit, stopped.asked, None).await;
        self.answer(waiters, false).await
    }

    /// Tells those who wait that the VM is off, and deletes it if somebody wants that.
    async fn answer(&mut self, waiters: StopWaiters, gone: bool) -> Phase {
        let view = self.view.borrow().clone();
        for reply in waiters.stopped {
            let _ = reply.send(Ok(view.clone()));
        }
        for reply in waiters.shut_down {
            let _ = reply.send(Ok(()));
        }
        if gone {
            for reply in waiters.deleted {
                let _ = reply.send(Ok(()));
            }
            return Phase::Gone;
        }
        match waiters.deleted.is_empty() {
            true => Phase::Off,
            false => self.delete(waiters.deleted).await,
        }
    }

    async fn delete(&mut self, replies: Vec<Reply<()>>) -> Phase {
        let record = self.record.clone();
        let deleted = self
            .host
            .blocking(move |host| host.store.delete_vm(&record))
            .await;
        match deleted {
            Ok(deleted) => {
                tracing::info!(vm = %self.record.id, "VM deleted");
                self.registry.remove(&self.record, Some(deleted));
                for reply in replies {
                    let _ = reply.send(Ok(()));
                }
                Phase::Gone
            }
            Err(error) => {
                for reply in replies {
                    let _ = reply.send(Err(error.clone()));
                }
                Phase::Off
            }
        }
    }

    /// Writes down how a run ended; a guest that asked for a reset is started again.
    async fn ended(&mut self, exit: Exit, asked: Asked, memory: Option<Reservation>) -> Phase {
        let run = self.current_run();
        let (reason, message) = describe(exit, asked);
        tracing::info!(vm = %run.vm, generation = run.generation, ?reason, message, "VM ended");
        self.record.run = RunState::Off;
        self.record.end_reason = reason;
        self.record.end_message = message;
        let again = reason == EndReason::Rebooted && self.may_reset();
        if reason == EndReason::Rebooted && !again {
            self.record.end_message = format!(
                "it rebooted itself {MAX_RESETS} times within {} s and was not started again",
                RESET_WINDOW.as_secs()
            );
        }
        let _ = self.save().await;
        forget_run(&self.host, &run).await;
        if again {
            self.show(VmState::Starting);
            return Phase::Boot(Boot {
                memory,
                ..Boot::default()
            });
        }
        self.show(VmState::Stopped);
        Phase::Off
    }

    fn may_reset(&mut self) -> bool {
        let now = Instant::now();
        self.resets
            .retain(|at| now.duration_since(*at) < RESET_WINDOW);
        self.resets.push_back(now);
        self.resets.len() < MAX_RESETS && self.host.refuse_when_going_down().is_ok()
    }

    /// Takes over a monitor that runs.
    async fn adopt(&mut self) -> Phase {
        let run = self.current_run();
        let ended = self.host.supervisor.ended(&run);
        if self.record.run != RunState::Up {
            return Phase::Boot(Boot {
                launched: Some((run, ended)),
                ..Boot::default()
            });
        }
        let memory = self.host.capacity.adopt(self.record.memory_mib);
        match boot::reconnect(&self.host, &run).await {
            Ok(monitor) => {
                tracing::info!(vm = %run.vm, generation = run.generation, "monitor found again");
                Phase::Up(Machine {
                    run,
                    monitor,
                    ended,
                    _memory: memory,
                })
            }
            Err(error) => {
                // It may just have ended; else it is of no use any more.
                tracing::error!(vm = %run.vm, %error, "monitor cannot be used any more");
                let mut ended = ended;
                let brief = Duration::from_secs(2);
                let exit = match timeout(brief, wait_end(&mut ended)).await {
                    Ok(exit) => exit,
                    Err(_) => {
                        self.end_run(&run, &mut ended).await;
                        Exit::Signal(9)
                    }
                };
                self.ended(exit, Asked::Nothing, Some(memory)).await
            }
        }
    }
}

/// Opens a stream to the agent without holding up the VM's task.
fn open(machine: &Machine, mut reply: Reply<OpenedStream>) {
    let monitor = machine.monitor.clone();
    let run = machine.run.clone();
    tokio::spawn(async move {
        let opened = tokio::select! {
            () = reply.closed() => return,
            opened = timeout(OPEN, monitor.open(true)) => opened,
        };
        let answer = match opened {
            Ok(Ok(stream)) => Ok(OpenedStream {
                stream,
                generation: run.generation,
            }),
            Ok(Err(error)) => Err(open_error(&run, &error)),
            Err(_) => Err(ErrorBody::guest(
                ErrorCode::AgentUnreachable,
                format!(
                    "the agent of {} did not accept a connection within {} s; stop the VM and start it again",
                    run.vm,
                    OPEN.as_secs()
                ),
            )
            .retryable_after_ms(1000)),
        };
        let _ = reply.send(answer);
    });
}

fn open_error(run: &Run, error: &MonitorError) -> ErrorBody {
    match error {
        MonitorError::Gone | MonitorError::Channel(_) => ErrorBody::guest(
            ErrorCode::VmStopped,
            format!("{} ended meanwhile; start it again", run.vm),
        )
        .retryable_after_ms(500),
        MonitorError::TooMany => ErrorBody::caller(ErrorCode::Busy, format!("{}: {error}", run.vm))
            .retryable_after_ms(500),
        MonitorError::Refused(_) => {
            ErrorBody::guest(ErrorCode::AgentUnreachable, format!("{}: {error}", run.vm))
                .retryable_after_ms(1000)
        }
        _ => internal(format!("{}: {error}", run.vm)),
    }
}
