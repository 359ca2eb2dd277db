//! The task that owns one VM: off, booting, up, going down. Each phase is a method that returns the
//! next one. The record on disk is written before the world is told.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use protocol::ErrorBody;
use protocol::host::supervisor::Run;
use protocol::network::{Egress, Publication};
use protocol::vm::{EndReason, VmState};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::super::capacity::Reservation;
use super::super::injected_panic;
use super::super::registry::Registry;
use super::super::store::record::{RunState, VmRecord};
use super::super::supervisor_client::{Ended, Exit, wait_end};
use super::boot;
use super::ending::{Asked, KILL, describe, forget_run, give_up_run};
use super::open::open;
use super::starting::{Boot, Waiter};
use super::stop::{Inbox, StopWaiters, stop};
use super::{Command, Host, MAILBOX, Machine, Reply, View, VmHandle, internal};

/// So many resets within [`RESET_WINDOW`] are the last.
const MAX_RESETS: usize = 5;
const RESET_WINDOW: Duration = Duration::from_secs(120);

/// How long a monitor whose socket closed may take to end before it is taken for one that does not.
const ENDING: Duration = Duration::from_secs(2);

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
    pub(super) host: Arc<Host>,
    pub(super) registry: Arc<Registry>,
    pub(super) record: VmRecord,
    view: watch::Sender<View>,
    resets: VecDeque<Instant>,
}

/// What a VM's task does next.
pub(super) enum Phase {
    Off,
    Boot(Boot),
    Up(Machine),
    Down(Machine, StopWaiters, Duration),
    Gone,
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
            (Beginning::Off, _) => VmState::Stopped,
            // Not stopped before the reason is known with it.
            (Beginning::Ended(_), _) => VmState::Stopping,
        };
        if matches!(beginning, Beginning::Adopt) {
            host.frames.expect(&Run {
                vm: record.id.clone(),
                generation: record.generation,
            });
        }
        let (view, seen) = watch::channel(View {
            record: Arc::new(record.clone()),
            state,
        });
        let handle = VmHandle {
            id: record.id.clone(),
            owner: record.owner.clone(),
            commands,
            view: seen,
        };
        let vm = Self {
            host,
            registry,
            record,
            view,
            resets: VecDeque::new(),
        };
        tokio::spawn(vm.live(Inbox::new(receiver), beginning));
        handle
    }

    /// Runs until the VM is no more. A panic costs what was under way, not the VM.
    async fn live(mut self, mut inbox: Inbox, mut beginning: Beginning) {
        loop {
            let run = AssertUnwindSafe(self.run(&mut inbox, beginning));
            if run.catch_unwind().await.is_ok() {
                return;
            }
            tracing::error!(vm = %self.record.id, "the task of this VM panicked; the VM is ended");
            match AssertUnwindSafe(self.after_panic()).catch_unwind().await {
                Ok(true) => beginning = Beginning::Off,
                Ok(false) => return,
                Err(_) => {
                    tracing::error!(vm = %self.record.id, "it panicked again; the VM waits for a restart of control");
                    return;
                }
            }
        }
    }

    /// Ends what may run and writes that down; a VM whose create was never answered is undone. Says
    /// whether the VM is still there.
    async fn after_panic(&mut self) -> bool {
        let run = self.current_run();
        if self.record.run != RunState::Off {
            let mut ended = self.host.supervisor.ended(&run);
            give_up_run(&self.host, &run, &mut ended).await;
        }
        // Also one that does not end.
        self.host.frames.down(&run);
        if !self.record.acknowledged {
            self.undo_create().await;
            return false;
        }
        self.record.run = RunState::Off;
        self.record.end_reason = EndReason::MonitorFailed;
        self.record.end_message =
            "the appliance failed while it served this VM and ended it; its log says more, and \
             the VM can be started again"
                .into();
        // Said already if it cannot be saved.
        let _ = self.save().await;
        self.show(VmState::Stopped);
        true
    }

    async fn run(&mut self, inbox: &mut Inbox, beginning: Beginning) {
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
                Phase::Off => self.off(inbox).await,
                Phase::Boot(boot) => self.boot(inbox, boot).await,
                Phase::Up(machine) => self.up(inbox, machine).await,
                Phase::Down(machine, waiters, deadline) => {
                    self.down(inbox, machine, waiters, deadline).await
                }
                Phase::Gone => return,
            };
        }
    }

    pub(super) fn current_run(&self) -> Run {
        Run {
            vm: self.record.id.clone(),
            generation: self.record.generation,
        }
    }

    pub(super) fn show(&self, state: VmState) -> View {
        let view = View {
            record: Arc::new(self.record.clone()),
            state,
        };
        self.view.send_replace(view.clone());
        view
    }

    /// Makes the record durable.
    pub(super) async fn save(&self) -> Result<(), ErrorBody> {
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
            Command::Dial(reply) => {
                let _ = reply.send(Err(super::stopped(&self.record.id)));
                return Phase::Off;
            }
            Command::Open(reply) if !self.record.publication.autostart => {
                let _ = reply.send(Err(super::stopped(&self.record.id)));
                return Phase::Off;
            }
            Command::Wake(reply) if !self.record.publication.autostart => {
                let _ = reply.send(Err(super::stopped(&self.record.id)));
                return Phase::Off;
            }
            Command::Start(reply) | Command::Wake(reply) => Waiter::Start(reply),
            Command::Open(reply) => Waiter::Open(reply),
            Command::SetNetwork {
                egress,
                publication,
                reply,
            } => {
                self.set_network(egress, publication, reply).await;
                return Phase::Off;
            }
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

    /// Changes how the VM is connected: durable, and known to proxy, before the answer.
    pub(super) async fn set_network(
        &mut self,
        egress: Option<Egress>,
        publication: Option<Publication>,
        reply: Reply<View>,
    ) {
        let before = (self.record.egress.clone(), self.record.publication.clone());
        if let Some(egress) = egress {
            self.record.egress = egress;
        }
        if let Some(publication) = publication {
            self.record.publication = publication;
        }
        if let Err(error) = self.save().await {
            (self.record.egress, self.record.publication) = before;
            let _ = reply.send(Err(error));
            return;
        }
        self.view
            .send_modify(|view| view.record = Arc::new(self.record.clone()));
        self.host.frames.update(&self.record).await;
        let _ = reply.send(Ok(self.view.borrow().clone()));
    }

    /// Kills a monitor and waits until it has ended.
    pub(super) async fn end_run(&self, run: &Run, ended: &mut Ended) -> bool {
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

    async fn up(&mut self, inbox: &mut Inbox, mut machine: Machine) -> Phase {
        loop {
            let command = tokio::select! {
                biased;
                exit = wait_end(&mut machine.ended) => {
                    let Machine { _memory, .. } = machine;
                    return self.ended(exit, Asked::Nothing, Some(_memory)).await;
                }
                () = machine.monitor.lost() => {
                    // One that ends closes its socket first.
                    let exit = timeout(ENDING, wait_end(&mut machine.ended)).await;
                    let Machine { run, ended, _memory, .. } = machine;
                    return match exit {
                        Ok(exit) => self.ended(exit, Asked::Nothing, Some(_memory)).await,
                        Err(_) => self.find_monitor(run, ended, _memory).await,
                    };
                }
                command = inbox.next() => command,
            };
            match command {
                None => return Phase::Gone,
                Some(Command::Start(reply) | Command::Wake(reply)) => {
                    drop(reply.send(Ok(self.view.borrow().clone())));
                }
                Some(Command::SetNetwork {
                    egress,
                    publication,
                    reply,
                }) => self.set_network(egress, publication, reply).await,
                Some(Command::Open(reply) | Command::Dial(reply)) => {
                    injected_panic(&self.record.labels, "open");
                    open(&machine, reply);
                }
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
    pub(super) async fn answer(&mut self, waiters: StopWaiters, gone: bool) -> Phase {
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
    pub(super) async fn ended(
        &mut self,
        exit: Exit,
        asked: Asked,
        memory: Option<Reservation>,
    ) -> Phase {
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
        self.find_monitor(run, ended, memory).await
    }

    /// Connects to a monitor that runs, unless it has just ended. One that does not answer is of no
    /// use any more and is ended.
    async fn find_monitor(&mut self, run: Run, mut ended: Ended, memory: Reservation) -> Phase {
        let error = match boot::reconnect(&self.host, &run).await {
            Ok(monitor) => {
                tracing::info!(vm = %run.vm, generation = run.generation, "monitor found again");
                self.host.frames.up(&self.record, &monitor).await;
                return Phase::Up(Machine {
                    run,
                    monitor,
                    ended,
                    _memory: memory,
                });
            }
            Err(error) => error,
        };
        let exit = match timeout(ENDING, wait_end(&mut ended)).await {
            Ok(exit) => exit,
            Err(_) => {
                tracing::error!(vm = %run.vm, %error, "monitor cannot be used any more");
                self.end_run(&run, &mut ended).await;
                Exit::Signal(9)
            }
        };
        self.ended(exit, Asked::Nothing, Some(memory)).await
    }
}
