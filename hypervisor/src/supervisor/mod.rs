//! The parent of every process: starts the services and, as control asks, the monitors; restarts
//! what ended; keeps how monitors ended. One loop that waits for events, no threads, no ticks.
//! Nothing that a child does or sends may stop or block it.

mod backoff;
mod cgroup;
pub(crate) mod confinement;
pub(crate) mod duties;
mod outbox;
pub(crate) mod prison;
pub mod serve;
pub(crate) mod service;
mod sockets;
pub(crate) mod spawn;
#[cfg(test)]
mod tests;
mod vmms;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::SockType;
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use protocol::ErrorBody;
use protocol::error::ErrorCode;
use protocol::frame::Kind as FrameKind;
use protocol::host::channel::{Packet, receive};
use protocol::host::supervisor::{
    ForgetVmm, KillVmm, Lease, ListVmms, Run, ShutDown, SpawnVmm, VmmListed, VmmNotSpawned,
    VmmSpawned, VmmsListed,
};
use protocol::message::{Message, MessageError, decode};

use self::duties::{Demand, Duties, Outcome};
use self::prison::Prison;
pub(crate) use self::service::SUPERVISOR;
use self::service::{Kind, Service};
use self::spawn::Program;
use self::vmms::Vmms;

pub use self::sockets::SocketError;
#[cfg(test)]
pub(crate) use self::sockets::pair;
pub use self::spawn::SpawnError;

/// How long the VMs have to stop by themselves when the host goes down.
const VMS_STOP_WITHIN: Duration = Duration::from_secs(30);
/// How much longer control has to write down that they did.
const CONTROL_ENDS_WITHIN: Duration = Duration::from_secs(5);
/// How long everything else has to end by itself.
const REST_ENDS_WITHIN: Duration = Duration::from_secs(3);
/// Packets of one child that are handled before others have their turn.
const PACKETS_PER_TURN: usize = 64;

/// Why the supervisor could not start.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// A socket could not be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A directory could not be made.
    #[error("cannot make the directory {path}: {cause}")]
    Directory {
        /// Which.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// The settings cannot be used.
    #[error(transparent)]
    Settings(#[from] crate::settings::SettingsError),
    /// Another supervisor has the state directory.
    #[error("{} is in use by another `supvm serve`; end that one first or use another --state directory", .0.display())]
    InUse(std::path::PathBuf),
    /// The process cannot wait for signals or events.
    #[error("cannot wait for events: {0}")]
    Events(nix::Error),
}

/// What every child is started with.
#[derive(Debug)]
pub(crate) struct Shared {
    proxy: OwnedFd,
    api: OwnedFd,
    prison: Prison,
    environment: Vec<(String, String)>,
}

/// How far stopping has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Control stops the VMs.
    StoppingVms(Instant),
    /// Everything else was told to end.
    StoppingRest(Instant),
    /// Everything else was ended.
    Killing,
}

/// What became ready.
#[derive(Clone, Debug)]
enum Source {
    Signals,
    Ended(usize),
    Channel(usize),
    Vmm(Run),
    Duty(usize),
}

/// The supervisor with its duties.
#[derive(Debug)]
pub(crate) struct Supervisor<D> {
    shared: Shared,
    vmm: Program,
    services: Vec<Service>,
    vmms: Vmms,
    signals: SignalFd,
    duties: D,
    phase: Phase,
    outcome: Outcome,
}

impl<D: Duties> Supervisor<D> {
    /// Binds the sockets in `run` and takes over SIGTERM, SIGINT and SIGCHLD of this thread.
    /// `environment` is what every child gets.
    pub(crate) fn new(
        run: &Path,
        prison: Prison,
        vmm: Program,
        services: Vec<Service>,
        environment: Vec<(String, String)>,
        duties: D,
    ) -> Result<Self, SupervisorError> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.add(Signal::SIGCHLD);
        mask.thread_block().map_err(SupervisorError::Events)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self {
            shared: Shared {
                proxy: sockets::listen_at(&run.join("proxy.sock"), SockType::SeqPacket)?,
                api: sockets::listen_at(&run.join("api.sock"), SockType::Stream)?,
                prison,
                environment,
            },
            vmm,
            services,
            vmms: Vmms::default(),
            signals: SignalFd::with_flags(&mask, flags).map_err(SupervisorError::Events)?,
            duties,
            phase: Phase::Running,
            outcome: Outcome::PowerOff,
        })
    }

    /// Runs until everything has stopped, and gives back the duties.
    pub(crate) fn run(mut self) -> Result<(Outcome, D), SupervisorError> {
        loop {
            let now = Instant::now();
            if self.duties.deadline().is_some_and(|due| due <= now)
                && let Some(demand) = self.duties.elapsed()
            {
                self.obey(demand);
            }
            self.start_due(now);
            self.advance(now);
            if self.phase == Phase::Killing && !self.anything_runs() {
                return Ok((self.outcome, self.duties));
            }
            for source in self.wait()? {
                self.handle(source);
            }
        }
    }

    fn start_due(&mut self, now: Instant) {
        if self.phase != Phase::Running {
            return;
        }
        for service in &mut self.services {
            if service.due().is_some_and(|due| due <= now) {
                service.start(&self.shared, now);
            }
        }
    }

    /// Waits for events or the next deadline.
    fn wait(&self) -> Result<Vec<Source>, SupervisorError> {
        let mut sources = vec![Source::Signals];
        let mut descriptors = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let mut watch = |source: Source, descriptor, flags| {
            sources.push(source);
            descriptors.push(PollFd::new(descriptor, flags));
        };
        for (index, service) in self.services.iter().enumerate() {
            if let Some(child) = service.child() {
                watch(Source::Ended(index), child.pidfd(), PollFlags::POLLIN);
            }
            if let Some(channel) = service.channel() {
                let mut flags = PollFlags::POLLIN;
                flags.set(PollFlags::POLLOUT, service.outbox.is_waiting());
                watch(Source::Channel(index), channel, flags);
            }
        }
        for (run, pidfd) in self.vmms.watched() {
            watch(Source::Vmm(run.clone()), pidfd, PollFlags::POLLIN);
        }
        for (number, descriptor) in self.duties.watched() {
            watch(Source::Duty(number), descriptor, PollFlags::POLLIN);
        }
        match poll(&mut descriptors, self.timeout()) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(SupervisorError::Events(error)),
        }
        let ready = descriptors.iter().zip(sources);
        let ready = ready.filter(|(descriptor, _)| descriptor.any().unwrap_or(true));
        Ok(ready.map(|(_, source)| source).collect())
    }

    fn timeout(&self) -> PollTimeout {
        let phase = match self.phase {
            Phase::StoppingVms(until) | Phase::StoppingRest(until) => Some(until),
            Phase::Running | Phase::Killing => None,
        };
        let starts = self.services.iter().filter_map(Service::due);
        let starts = starts.filter(|_| self.phase == Phase::Running);
        let deadlines = starts.chain(phase).chain(self.duties.deadline());
        let Some(next) = deadlines.min() else {
            return PollTimeout::NONE;
        };
        let wait = next.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when the wait is over.
        let wait = wait.as_millis().saturating_add(1).min(3_600_000);
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signals => self.take_signals(),
            Source::Ended(index) => self.service_ended(index),
            Source::Channel(index) => self.serve_channel(index),
            Source::Vmm(run) => self.vmm_ended(&run),
            Source::Duty(number) => {
                if let Some(demand) = self.duties.ready(number) {
                    self.obey(demand);
                }
            }
        }
    }

    fn obey(&mut self, demand: Demand) {
        match demand {
            Demand::Release => {
                let now = Instant::now();
                self.services
                    .iter_mut()
                    .for_each(|service| service.release(now));
            }
            Demand::ShutDown(outcome) => self.shut_down(outcome),
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo) {
                Ok(libc::SIGCHLD) => self.reap_orphans(),
                Ok(libc::SIGINT) => self.shut_down(Outcome::Restart),
                _ => self.shut_down(Outcome::PowerOff),
            }
        }
    }

    /// Waits for every child that is not ours by design, as PID 1 must.
    fn reap_orphans(&mut self) {
        if !self.duties.reaps_orphans() {
            return;
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        while let Ok(status) = waitid(Id::All, flags) {
            let Some(pid) = status.pid() else { break };
            let service =
                |service: &Service| service.child().is_some_and(|child| child.pid() == pid);
            let number = pid.as_raw().unsigned_abs();
            let run = self
                .vmms
                .running()
                .into_iter()
                .find(|(_, other)| *other == number);
            if let Some(index) = self.services.iter().position(service) {
                self.service_ended(index);
            } else if let Some((run, _)) = run {
                self.vmm_ended(&run);
            } else if waitpid(pid, Some(WaitPidFlag::WNOHANG)).is_err() {
                break;
            }
        }
    }

    fn service_ended(&mut self, index: usize) {
        let now = Instant::now();
        let again = self.phase == Phase::Running;
        // What it said before it ended still counts.
        self.serve_channel(index);
        if let Some(service) = self.services.get_mut(index)
            && let Some(end) = service.child().and_then(spawn::Child::ended)
        {
            service.ended(end, again, now);
        }
    }

    fn vmm_ended(&mut self, run: &Run) {
        if let Some(ended) = self.vmms.look_at(run) {
            let (exit_code, signal) = (ended.exit_code, ended.signal);
            tracing::info!(vm = %run.vm, run = run.generation, exit_code, signal, "monitor ended");
            self.tell_control(&ended);
        }
    }

    fn tell_control<M: Message>(&mut self, message: &M) {
        let control = |service: &Service| service.kind == Kind::Control;
        if let Some(index) = self.services.iter().position(control) {
            self.tell(index, message);
        }
    }

    /// Sends a service a message. One that takes no more is stuck: it is ended and started again.
    fn tell<M: Message>(&mut self, index: usize, message: &M) {
        let Some(service) = self.services.get_mut(index) else {
            return;
        };
        let mut outbox = std::mem::take(&mut service.outbox);
        let told = service
            .channel()
            .map_or(Ok(()), |channel| outbox.send(channel, message));
        service.outbox = outbox;
        if let Err(error) = told {
            self.give_up_on(index, &error);
        }
    }

    fn give_up_on(&mut self, index: usize, error: &dyn std::error::Error) {
        if let Some(service) = self.services.get_mut(index) {
            let name = service.kind.name();
            tracing::error!(service = name, %error, "does not listen; ending it");
            service.drop_channel();
            if let Some(child) = service.child() {
                child.signal(Signal::SIGKILL);
            }
        }
    }

    /// Reads what a service says and sends what it is to be told.
    fn serve_channel(&mut self, index: usize) {
        for _ in 0..PACKETS_PER_TURN {
            let Some(service) = self.services.get_mut(index) else {
                return;
            };
            let kind = service.kind;
            let Some(channel) = service.channel() else {
                return;
            };
            match receive(channel) {
                Ok(Some(packet)) => self.answer(index, kind, packet),
                Ok(None) => return service.drop_channel(),
                Err(error) if error.would_block() => break,
                Err(error @ protocol::host::channel::ChannelError::NotOneFrame) => {
                    let error = ErrorBody::caller(ErrorCode::Malformed, error.to_string());
                    self.refuse(index, kind, &error);
                }
                Err(error) => return self.give_up_on(index, &error),
            }
        }
        let Some(service) = self.services.get_mut(index) else {
            return;
        };
        let mut outbox = std::mem::take(&mut service.outbox);
        let flushed = service
            .channel()
            .map_or(Ok(()), |channel| outbox.flush(channel));
        service.outbox = outbox;
        if let Err(error) = flushed {
            self.give_up_on(index, &error);
        }
    }

    fn answer(&mut self, index: usize, kind: Kind, packet: Packet) {
        let done = match kind {
            Kind::Control => self.answer_control(index, packet),
            Kind::Net => decode::<Lease>(&packet.frame).map(|lease| self.duties.lease(lease)),
            Kind::Proxy | Kind::DebugShell => Ok(()),
        };
        if let Err(error) = done {
            self.refuse(index, kind, &error.into());
        }
    }

    fn refuse(&mut self, index: usize, kind: Kind, error: &ErrorBody) {
        tracing::error!(service = kind.name(), error = %error.message, "bad message");
        self.tell(index, error);
    }

    fn answer_control(&mut self, index: usize, packet: Packet) -> Result<(), MessageError> {
        let Packet { frame, descriptors } = packet;
        match frame.kind {
            FrameKind::SPAWN_VMM => self.spawn_vmm(index, &decode(&frame)?, &descriptors),
            FrameKind::LIST_VMMS => {
                let ListVmms {} = decode(&frame)?;
                for (run, pid) in self.vmms.running() {
                    self.tell(index, &VmmListed { run, pid });
                }
                for ended in self.vmms.ends() {
                    self.tell(index, &ended);
                }
                self.tell(index, &VmmsListed {});
            }
            FrameKind::FORGET_VMM => self.vmms.forget(&decode::<ForgetVmm>(&frame)?.run),
            // Whatever else comes is no message to a supervisor.
            _ => self.vmms.kill(&decode::<KillVmm>(&frame)?.run),
        }
        Ok(())
    }

    fn spawn_vmm(&mut self, index: usize, request: &SpawnVmm, descriptors: &[OwnedFd]) {
        let run = request.run.clone();
        if self.phase != Phase::Running {
            let message = "the host is shutting down".to_owned();
            return self.tell(index, &VmmNotSpawned { run, message });
        }
        let vmms = &mut self.vmms;
        match vmms.spawn(&self.vmm, &self.shared, request, descriptors) {
            Ok(pid) => {
                tracing::info!(vm = %run.vm, run = run.generation, pid, "monitor started");
                self.tell(index, &VmmSpawned { run, pid });
            }
            Err(error) => {
                tracing::error!(vm = %run.vm, run = run.generation, %error, "monitor not started");
                let message = error.to_string();
                self.tell(index, &VmmNotSpawned { run, message });
            }
        }
    }

    /// Begins to stop everything; asked again, stops waiting for the VMs.
    fn shut_down(&mut self, outcome: Outcome) {
        let now = Instant::now();
        match self.phase {
            Phase::Running => {
                tracing::info!(within_s = VMS_STOP_WITHIN.as_secs(), "stopping the VMs");
                self.outcome = outcome;
                if self.vmms.any_running() {
                    self.start_waiting_control(now);
                }
                self.services.iter_mut().for_each(Service::retire);
                self.phase = Phase::StoppingVms(now + VMS_STOP_WITHIN + CONTROL_ENDS_WITHIN);
                let deadline_ms = u32::try_from(VMS_STOP_WITHIN.as_millis()).unwrap_or(u32::MAX);
                self.tell_control(&ShutDown { deadline_ms });
            }
            Phase::StoppingVms(_) => {
                tracing::warn!("asked again: not waiting for the VMs");
                self.phase = Phase::StoppingVms(now);
            }
            Phase::StoppingRest(_) | Phase::Killing => {}
        }
    }

    /// Only control can ask VMs to stop: it does not wait for its next start then.
    fn start_waiting_control(&mut self, now: Instant) {
        for service in &mut self.services {
            if service.kind == Kind::Control && service.due().is_some() {
                service.start(&self.shared, now);
            }
        }
    }

    /// Goes on stopping when what was waited for has happened or its deadline has passed.
    fn advance(&mut self, now: Instant) {
        if let Phase::StoppingVms(until) = self.phase {
            let control = |service: &&Service| service.kind == Kind::Control;
            let control_runs = self.services.iter().find(control).and_then(Service::child);
            if control_runs.is_none() || until <= now {
                if self.vmms.any_running() {
                    tracing::warn!("ending the monitors that still run");
                }
                self.vmms.kill_all();
                self.signal_services(Signal::SIGTERM);
                self.phase = Phase::StoppingRest(now + REST_ENDS_WITHIN);
            }
        }
        if let Phase::StoppingRest(until) = self.phase
            && (!self.anything_runs() || until <= now)
        {
            self.vmms.kill_all();
            self.signal_services(Signal::SIGKILL);
            self.phase = Phase::Killing;
        }
    }

    fn signal_services(&self, signal: Signal) {
        for service in &self.services {
            // A shell that somebody types into ends by a hang-up; it ignores SIGTERM.
            let signal = match (service.kind, signal) {
                (Kind::DebugShell, Signal::SIGTERM) => Signal::SIGHUP,
                _ => signal,
            };
            if let Some(child) = service.child() {
                child.signal(signal);
            }
        }
    }

    fn anything_runs(&self) -> bool {
        self.vmms.any_running()
            || self
                .services
                .iter()
                .any(|service| service.child().is_some())
    }
}

/// The name that a process of this role has in the process table.
pub fn name_process(role: &str) {
    if let Ok(name) = std::ffi::CString::new(format!("supvm-{role}")) {
        let _ = nix::sys::prctl::set_name(&name);
    }
}

/// Makes a directory that nobody but its owner may enter.
pub(crate) fn private_directory(path: &Path) -> Result<(), SupervisorError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|cause| SupervisorError::Directory {
            path: path.display().to_string(),
            cause,
        })
}
