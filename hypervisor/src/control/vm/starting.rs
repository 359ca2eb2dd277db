//! The phase in which a VM comes up: its own first boot (a create, undone when it fails), a start on
//! request, or the next run after a reset. Requests that come meanwhile join it; a stop or delete
//! ends it.

use std::sync::Arc;

use protocol::host::supervisor::Run;
use protocol::vm::{EndReason, VmState};
use protocol::{ErrorBody, ErrorCode};

use super::super::capacity::Reservation;
use super::super::injected_panic;
use super::super::monitor::Monitor;
use super::super::store::record::RunState;
use super::super::supervisor_client::{Ended, Exit, SupervisorError};
use super::actor::{Phase, Vm};
use super::boot::{self, BootError};
use super::ending::{Asked, forget_run};
use super::open::open;
use super::stop::{Inbox, StopWaiters};
use super::{Command, Machine, OpenedStream, Reply, View};

/// Requests that may wait for one boot.
const MAX_WAITERS: usize = 1024;

/// A boot under way and who waits for it.
#[derive(Default)]
pub(super) struct Boot {
    pub(super) memory: Option<Reservation>,
    pub(super) create: Option<Reply<View>>,
    pub(super) waiters: Vec<Waiter>,
    /// A monitor that is on its way already.
    pub(super) launched: Option<(Run, Ended)>,
}

pub(super) enum Waiter {
    Start(Reply<View>),
    Open(Reply<OpenedStream>),
}

impl Waiter {
    /// Nobody waits there any more.
    fn has_gone(&self) -> bool {
        match self {
            Self::Start(reply) => reply.is_closed(),
            Self::Open(reply) => reply.is_closed(),
        }
    }
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
    pub(super) async fn boot(&mut self, inbox: &mut Inbox, mut boot: Boot) -> Phase {
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
        injected_panic(&self.record.labels, "boot");
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
                    Some(Command::Start(reply) | Command::Wake(reply)) => Waiter::Start(reply),
                    Some(Command::Open(reply) | Command::Dial(reply)) => Waiter::Open(reply),
                    Some(Command::SetNetwork {
                        egress,
                        publication,
                        reply,
                    }) => {
                        self.set_network(egress, publication, reply).await;
                        continue;
                    }
                    // Not before the create is answered one way or the other.
                    Some(command @ Command::Stop { .. }) if boot.create.is_some() => {
                        inbox.defer(command, &self.record.id);
                        continue;
                    }
                    Some(command) => break BootOutcome::Interrupted(command),
                };
                if boot.waiters.len() >= MAX_WAITERS {
                    boot.waiters.retain(|waiter| !waiter.has_gone());
                }
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
        self.host.frames.up(&self.record, &machine.monitor).await;
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

    /// Removes every trace of a VM whose create failed.
    pub(super) async fn undo_create(&self) {
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
}
