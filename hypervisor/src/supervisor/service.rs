//! A process that is to run all the time: when to start it, when to start it again. It knows what a
//! service is started with; the supervisor's loop decides.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::confinement::{Capability, Confinement};
use super::outbox::Outbox;
use super::sockets::pair;
use super::spawn::{Child, End, Program, Spawn, SpawnError};
use super::{Shared, SupervisorError};

/// Which service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Lifecycle of VMs.
    Control,
    /// The process that talks to the world.
    Proxy,
    /// The process that finds out the host's addresses.
    Net,
    /// A shell for looking inside, on a terminal of its own.
    DebugShell,
}

impl Kind {
    /// Its name in the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Proxy => "proxy",
            Self::Net => "net",
            Self::DebugShell => "debug shell",
        }
    }

    /// Where memory runs out all the same, clients' connections go before anybody's VM, and control
    /// goes last. Without the right to say so it stays as it is.
    fn stand_with_oom_killer(self, child: &Child) {
        let score = match self {
            Self::Proxy => "900",
            Self::Control => "-900",
            Self::Net | Self::DebugShell => return,
        };
        let file = format!("/proc/{}/oom_score_adj", child.pid().as_raw());
        if let Err(error) = std::fs::write(file, score) {
            tracing::debug!(service = self.name(), %error, "no place with the OOM killer");
        }
    }
}

/// What a service may do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rights {
    /// User to run as where the supervisor may choose; zero is the supervisor's own.
    pub(crate) uid: u32,
    /// The one capability that it keeps.
    pub(crate) capability: Option<Capability>,
    /// Whether it is locked into an empty directory.
    pub(crate) locked_in: bool,
}

#[derive(Debug)]
enum State {
    /// Not to be started yet.
    Held,
    /// To be started at this time.
    Due(Instant),
    Running {
        child: Child,
        since: Instant,
        channel: Option<OwnedFd>,
    },
    /// Not to be started again.
    Over,
}

/// A service and what is known of it.
#[derive(Debug)]
pub(crate) struct Service {
    pub(super) kind: Kind,
    program: Program,
    rights: Rights,
    terminal: Option<PathBuf>,
    state: State,
    backoff: Backoff,
    pub(super) outbox: Outbox,
}

impl Service {
    /// A service that is started as soon as the supervisor runs.
    pub(crate) fn new(kind: Kind, program: Program, rights: Rights) -> Self {
        Self {
            kind,
            program,
            rights,
            terminal: None,
            state: State::Due(Instant::now()),
            backoff: Backoff::default(),
            outbox: Outbox::default(),
        }
    }

    /// The same, but not started before it is released.
    pub(crate) fn held(mut self) -> Self {
        self.state = State::Held;
        self
    }

    /// The same on a terminal of its own.
    pub(crate) fn on_terminal(mut self, terminal: PathBuf) -> Self {
        self.terminal = Some(terminal);
        self
    }

    /// It may be started from now on.
    pub(super) fn release(&mut self, now: Instant) {
        if matches!(self.state, State::Held) {
            self.state = State::Due(now);
        }
    }

    /// When it is to be started, if it is to be.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.state {
            State::Due(when) => Some(when),
            _ => None,
        }
    }

    /// Starts it; when that fails, it is due again later.
    pub(super) fn start(&mut self, shared: &Shared, now: Instant) {
        let name = self.kind.name();
        match self.spawn(shared) {
            Ok((child, channel)) => {
                tracing::info!(service = name, pid = child.pid().as_raw(), "started");
                self.kind.stand_with_oom_killer(&child);
                self.outbox = Outbox::default();
                self.state = State::Running {
                    child,
                    since: now,
                    channel,
                };
            }
            Err(error) => {
                let wait = self.backoff.ended(now, now);
                tracing::error!(service = name, %error, again_in_ms = milliseconds(wait), "could not be started");
                self.state = State::Due(now + wait);
            }
        }
    }

    fn spawn(&self, shared: &Shared) -> Result<(Child, Option<OwnedFd>), SupervisorError> {
        let channel = match self.kind {
            Kind::Control | Kind::Net => Some(pair()?),
            Kind::Proxy | Kind::DebugShell => None,
        };
        let mut descriptors: Vec<(&str, BorrowedFd<'_>)> = Vec::new();
        if let Some((_, theirs)) = &channel {
            descriptors.push((SUPERVISOR, theirs.as_fd()));
        }
        if self.kind == Kind::Proxy {
            use protocol::host::proxy::descriptor::{API, LISTEN};
            descriptors.push((LISTEN, shared.proxy.as_fd()));
            descriptors.push((API, shared.api.as_fd()));
        }
        let terminal = self.terminal.as_deref().map(open_terminal).transpose()?;
        let root: Option<CString> = match self.rights.locked_in {
            true => shared.prison.root.clone(),
            false => None,
        };
        let child = Spawn {
            program: &self.program,
            descriptors: &descriptors,
            environment: &shared.environment,
            confinement: Confinement {
                uid: if shared.prison.privileged {
                    self.rights.uid
                } else {
                    0
                },
                capability: self.rights.capability,
                root: root.as_deref(),
                no_new_privileges: self.kind != Kind::DebugShell,
                ..Confinement::default()
            },
            terminal: terminal.as_ref().map(AsFd::as_fd),
        }
        .start()?;
        Ok((child, channel.map(|(ours, _)| ours)))
    }

    /// The running process.
    pub(super) fn child(&self) -> Option<&Child> {
        match &self.state {
            State::Running { child, .. } => Some(child),
            _ => None,
        }
    }

    /// The socket to the running process.
    pub(super) fn channel(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Running { channel, .. } => channel.as_ref().map(AsFd::as_fd),
            _ => None,
        }
    }

    /// The process closed its socket, or says nothing that can be read: no use listening.
    pub(super) fn drop_channel(&mut self) {
        if let State::Running { channel, .. } = &mut self.state {
            *channel = None;
        }
    }

    /// The process has ended; it is due again after a while, or never.
    pub(super) fn ended(&mut self, end: End, again: bool, now: Instant) {
        let State::Running { since, .. } = &self.state else {
            return;
        };
        let name = self.kind.name();
        if again {
            let wait = self.backoff.ended(*since, now);
            tracing::error!(service = name, how = %end, again_in_ms = milliseconds(wait), "ended");
            self.state = State::Due(now + wait);
        } else {
            tracing::info!(service = name, how = %end, "ended");
            self.state = State::Over;
        }
    }

    /// It is not to be started any more.
    pub(super) fn retire(&mut self) {
        if !matches!(self.state, State::Running { .. }) {
            self.state = State::Over;
        }
    }
}

fn milliseconds(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)
}

/// Name of the socket between a service and the supervisor.
pub(crate) const SUPERVISOR: &str = "supervisor";

fn open_terminal(path: &std::path::Path) -> Result<std::fs::File, SpawnError> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .and_then(|terminal| {
            // Opened without waiting for a carrier; used like any terminal.
            let blocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
            nix::fcntl::fcntl(&terminal, blocking)?;
            Ok(terminal)
        })
        .map_err(|cause| SpawnError::Program {
            path: path.display().to_string(),
            cause,
        })
}
