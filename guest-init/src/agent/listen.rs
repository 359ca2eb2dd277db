//! Where streams come from: vsock in a virtual machine, a Unix socket elsewhere; and the thread
//! that receives signals. On vsock only the host is heard: a program inside the machine could
//! otherwise have the agent, which is root, do its work.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername,
    listen, socket,
};
use nix::sys::stat::Mode;
use protocol::agent::AGENT_PORT;

use super::file::Uploads;
use super::poll::{self, Interest};
use super::process::{self, Drain, Registry, Terminals};
use super::{Agent, LOGS, Machine, WORKSPACE, start_thread};
use crate::cgroup::{CgroupError, Cgroups};
use crate::log;
use crate::reaper::Reaper;

/// Where a machine of its own keeps the list of broken uploads.
const UPLOADS: &str = "/var/lib/supvm/uploads";
/// How long to wait before accepting again when the system is out of descriptors or memory.
const RECOVER: Duration = Duration::from_millis(100);
/// Grace for processes when a signal asks for the end.
const SIGNAL_GRACE: Duration = Duration::from_secs(5);
/// Descriptors that the agent and, by inheritance, every process may have.
const DESCRIPTORS: u64 = 65_536;
/// The most that a process may raise that to.
const MAX_DESCRIPTORS: u64 = 524_288;

const NO_THREAD: &str = "start a thread";

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// A system call failed.
    #[error("cannot {what}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// The socket could not be bound.
    #[error("cannot listen on {path}: {cause}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// Control groups are missing.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> ListenError {
    move |errno| ListenError::System { what, errno }
}

/// The command line of `guest-init agent`.
pub(crate) struct UnixOptions {
    /// Where to listen.
    pub(crate) socket: PathBuf,
    /// The control group for commands; none means no groups.
    pub(crate) cgroup: Option<PathBuf>,
    /// Where commands start when they do not say otherwise.
    pub(crate) workspace: PathBuf,
    /// Where the output of processes is kept; none means in memory only.
    pub(crate) logs: Option<PathBuf>,
}

/// Serves on a Unix socket as an ordinary process. Returns only when it cannot.
pub(crate) fn serve_unix(options: UnixOptions) -> Result<(), ListenError> {
    let cgroups = match &options.cgroup {
        Some(directory) => {
            let (groups, missing) = Cgroups::prepare(directory)?;
            if !missing.is_empty() {
                log::warn(format_args!(
                    "event=controllers_missing group={} names={}",
                    directory.display(),
                    missing.join(",")
                ));
            }
            Some(groups)
        }
        None => None,
    };
    nix::sys::prctl::set_child_subreaper(true).map_err(system("become the parent of orphans"))?;
    let agent = Agent::new(Machine::Borrowed, options.workspace, options.logs, cgroups)?;
    let failed = |cause| ListenError::Socket {
        path: options.socket.clone(),
        cause,
    };
    // What an agent that was killed left behind; nothing else is taken away.
    if std::fs::symlink_metadata(&options.socket).is_ok_and(|file| file.file_type().is_socket()) {
        std::fs::remove_file(&options.socket).map_err(failed)?;
    }
    let listener = UnixListener::bind(&options.socket).map_err(failed)?;
    std::fs::set_permissions(&options.socket, std::fs::Permissions::from_mode(0o600))
        .map_err(failed)?;
    agent.accept_from(&listener.into(), |_| true)
}

/// Serves on vsock in a machine of its own. Returns only when it cannot.
pub(crate) fn serve_vsock(cgroups: Cgroups) -> Result<(), ListenError> {
    let agent = Agent::new(
        Machine::Own,
        PathBuf::from(WORKSPACE),
        Some(PathBuf::from(LOGS)),
        Some(cgroups),
    )?;
    let listener = vsock_socket(SockFlag::SOCK_CLOEXEC)?;
    let address = VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT);
    bind(listener.as_raw_fd(), &address).map_err(system("bind vsock port 1024"))?;
    // As many as the kernel lets wait (4,096): over vsock it resets what has no room.
    listen(&listener, Backlog::MAXALLOWABLE).map_err(system("listen on vsock port 1024"))?;

    log::info(format_args!("event=serving port={AGENT_PORT}"));
    // The doorbell: the host refuses this connection, and knows from it that the agent listens.
    // Kept open, so that the attempt is not withdrawn before the host has seen it.
    let bell = vsock_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    let host = VsockAddr::new(libc::VMADDR_CID_HOST, AGENT_PORT);
    match connect(bell.as_raw_fd(), &host) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => log::info(format_args!("event=doorbell answer={errno}")),
    }
    let served = agent.accept_from(&listener, |peer| {
        getpeername::<VsockAddr>(peer).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST)
    });
    drop(bell);
    served
}

fn vsock_socket(flags: SockFlag) -> Result<OwnedFd, ListenError> {
    socket(AddressFamily::Vsock, SockType::Stream, flags, None)
        .map_err(system("make a vsock socket"))
}

impl Agent {
    /// Makes the agent and starts its helpers. Must come before any other thread: they inherit
    /// which signals are blocked.
    fn new(
        machine: Machine,
        workspace: PathBuf,
        logs: Option<PathBuf>,
        cgroups: Option<Cgroups>,
    ) -> Result<Arc<Self>, ListenError> {
        process::note_ignored_signals();
        raise_descriptor_limit(machine).map_err(system("set the limit of descriptors"))?;
        let mut signals = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGPWR,
        ] {
            signals.add(signal);
        }
        signals.thread_block().map_err(system("block signals"))?;
        let signals =
            SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
                .map_err(system("receive signals"))?;
        let open_directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open_null = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let agent = Arc::new(Self {
            machine,
            workspace,
            reaper: Reaper::default(),
            cgroups,
            drain: Drain::new().map_err(system("make an epoll set"))?,
            dev_null: open("/dev/null", open_null, Mode::empty())
                .map_err(system("open /dev/null"))?,
            proc: open("/proc", open_directory, Mode::empty()).map_err(system("open /proc"))?,
            configuration: Mutex::default(),
            registry: Registry::new(logs),
            terminals: Terminals::find(),
            uploads: Uploads::kept_in(match machine {
                Machine::Own => Some(PathBuf::from(UPLOADS)),
                Machine::Borrowed => None,
            }),
            streams: AtomicUsize::new(0),
            powering_off: AtomicBool::new(false),
        });
        let receiver = Arc::clone(&agent);
        start_thread("signals", move || restart(|| receiver.receive(&signals)))
            .map_err(system(NO_THREAD))?;
        let drainer = Arc::clone(&agent);
        start_thread("drain", move || restart(|| drainer.drain.run()))
            .map_err(system(NO_THREAD))?;
        let writer = Arc::clone(&agent);
        start_thread("logs", move || {
            restart(|| writer.registry.logs.run(|one| writer.registry.trim(one)));
        })
        .map_err(system(NO_THREAD))?;
        Ok(agent)
    }

    fn accept_from(
        self: &Arc<Self>,
        listener: &OwnedFd,
        is_welcome: impl Fn(RawFd) -> bool,
    ) -> Result<(), ListenError> {
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match accept4(listener.as_raw_fd(), flags) {
                Ok(number) => {
                    // SAFETY: `accept4` has just made this descriptor and nobody else owns it.
                    let connection = unsafe { OwnedFd::from_raw_fd(number) };
                    if is_welcome(connection.as_raw_fd()) {
                        self.accept(connection);
                    } else {
                        log::warn(format_args!("event=stranger_refused"));
                    }
                }
                Err(Errno::EINTR | Errno::ECONNABORTED | Errno::ECONNRESET) => {}
                Err(error @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS)) => {
                    log::warn(format_args!("event=accept_failed error={error}"));
                    std::thread::sleep(RECOVER);
                }
                Err(errno) => return Err(system("accept connections")(errno)),
            }
        }
    }

    /// Receives signals and the news of control groups, for ever.
    fn receive(self: &Arc<Self>, signals: &SignalFd) {
        loop {
            let groups = match &self.cgroups {
                Some(groups) => Interest::new(groups.changes(), true, false),
                None => Interest::NONE,
            };
            let mut interests = [Interest::new(signals.as_fd(), true, false), groups];
            if let Err(error) = poll::wait(&mut interests, None) {
                log::error(format_args!("event=signals_not_received error={error}"));
                std::thread::sleep(RECOVER);
                continue;
            }
            while let Ok(Some(signal)) = signals.read_signal() {
                let is_child = i32::try_from(signal.ssi_signo) == Ok(libc::SIGCHLD);
                if !is_child {
                    let agent = Arc::clone(self);
                    let started =
                        start_thread("power", move || super::power_off(&agent, SIGNAL_GRACE));
                    if let Err(error) = started {
                        log::error(format_args!("event=power_off_failed error=\"{error}\""));
                    }
                }
            }
            self.reaper.collect();
            if let Some(groups) = &self.cgroups {
                groups.sweep();
            }
        }
    }
}

/// Runs what every command depends on; a panic in it is not the end of it.
fn restart(run: impl Fn()) {
    while std::panic::catch_unwind(std::panic::AssertUnwindSafe(&run)).is_err() {
        log::error(format_args!("event=helper_panicked"));
        std::thread::sleep(RECOVER);
    }
}

fn raise_descriptor_limit(machine: Machine) -> Result<(), Errno> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let hard = match machine {
        Machine::Own => MAX_DESCRIPTORS,
        Machine::Borrowed => hard,
    };
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(DESCRIPTORS), hard)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_helper_that_panics_goes_on() {
        let runs = Cell::new(0);
        restart(|| {
            runs.set(runs.get() + 1);
            assert!(runs.get() > 2, "injected");
        });
        assert_eq!(runs.get(), 3);
    }
}
