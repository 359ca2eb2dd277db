//! The process between qemu-test and QEMU. It is QEMU's parent and lives in a session of its own;
//! it ends QEMU when the deadline is over, when it is told to (SIGTERM) or, if it is attached, when
//! qemu-test is gone, however that came about. QEMU cannot outlive it: the kernel ends a child
//! whose parent died.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until, timeout};

/// How long QEMU has to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// What to watch.
#[derive(Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// Seconds after which QEMU is ended in any case.
    #[arg(long)]
    pub(crate) deadline_s: u64,
    /// End QEMU when standard input ends.
    #[arg(long)]
    pub(crate) attached: bool,
    /// Where to write who is running.
    #[arg(long)]
    pub(crate) pidfile: PathBuf,
    /// QEMU and its arguments.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

/// Why there was nothing to watch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    /// QEMU could not be started.
    #[error("cannot start {program:?}: {cause}; run ./setup.sh, then try again")]
    Start {
        /// The program.
        program: OsString,
        /// What the system said.
        cause: io::Error,
    },
    /// A call of the system's failed.
    #[error("watching QEMU: {0}")]
    Io(#[from] io::Error),
}

/// Runs QEMU until one of the ends that this module names. Returns QEMU's exit code.
pub(crate) async fn watch(args: WatchArgs) -> Result<u8, WatchError> {
    // Fails only for a process that leads a group already; then it has what is wanted.
    let _ = setsid();
    let mut terminate = signal(SignalKind::terminate())?;
    let deadline = Instant::now() + Duration::from_secs(args.deadline_s);
    let mut child = start(&args.command)?;
    let qemu = child.id();
    Identity::of_self()?.write(&args.pidfile, qemu)?;
    let code = tokio::select! {
        status = child.wait() => status?.code(),
        () = sleep_until(deadline) => {
            eprintln!("qemu-test watch: the deadline of {} s is over", args.deadline_s);
            end(&mut child).await?
        }
        _ = terminate.recv() => end(&mut child).await?,
        () = end_of_input(), if args.attached => end(&mut child).await?,
    };
    // Removed by nobody else, and of no use once QEMU is gone.
    let _ = std::fs::remove_file(&args.pidfile);
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn start(command: &[OsString]) -> Result<Child, WatchError> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut qemu = Command::new(program);
    qemu.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent's.
    unsafe {
        qemu.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
    }
    qemu.spawn().map_err(|cause| WatchError::Start {
        program: program.clone(),
        cause,
    })
}

async fn end(child: &mut Child) -> io::Result<Option<i32>> {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // It may have gone a moment ago; then there is nothing to end.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if let Ok(status) = timeout(GRACE, child.wait()).await {
        return Ok(status?.code());
    }
    child.kill().await?;
    Ok(None)
}

/// Returns when standard input, a pipe whose other end nobody writes to, is closed there.
async fn end_of_input() {
    let pipe = io::stdin().as_fd().try_clone_to_owned();
    let Ok(mut input) = pipe.and_then(Receiver::from_owned_fd) else {
        // Attached to nothing: nobody is there to whom QEMU could belong.
        return;
    };
    let mut buffer = [0; 64];
    while !matches!(input.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

/// A process that cannot be taken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pid: i32,
    start_time: u64,
}

impl Identity {
    /// The calling process.
    pub(crate) fn of_self() -> io::Result<Self> {
        let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        Self::of(pid).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; the fields are counted after the last one.
        let fields = stat.get(stat.rfind(')')?.checked_add(1)?..)?;
        let start_time = fields.split_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, start_time })
    }

    fn write(self, file: &Path, qemu: Option<u32>) -> io::Result<()> {
        let qemu = qemu.unwrap_or_default();
        let text = format!("{} {}\nqemu {qemu}\n", self.pid, self.start_time);
        std::fs::write(file, text)
    }

    /// Whom a pidfile names, if that very process still runs.
    pub(crate) fn running(file: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(file).ok()?;
        let mut words = text.split_whitespace();
        let pid: i32 = words.next()?.parse().ok()?;
        let start_time: u64 = words.next()?.parse().ok()?;
        Self::of(pid).filter(|found| found.start_time == start_time)
    }

    /// QEMU's process number, as the pidfile has it.
    pub(crate) fn qemu(file: &Path) -> Option<i32> {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("qemu "))?;
        line.trim().parse().ok().filter(|pid| *pid > 1)
    }

    /// Waits until the process is gone; false when it is still there after `patience`.
    pub(crate) async fn gone_within(self, patience: Duration) -> io::Result<bool> {
        let Some(gone) = self.watch()? else {
            return Ok(true);
        };
        Ok(timeout(patience, gone.readable()).await.is_ok())
    }

    /// Tells the process to end and waits until it is gone, or until it had its time and was killed.
    pub(crate) async fn end(self) -> io::Result<()> {
        let Some(gone) = self.watch()? else {
            return Ok(());
        };
        let pid = Pid::from_raw(self.pid);
        let _ = kill(pid, Signal::SIGTERM);
        if timeout(GRACE * 2, gone.readable()).await.is_err() {
            let _ = kill(pid, Signal::SIGKILL);
            // Killed processes end; should the kernel take its time, nothing here depends on it.
            let _ = timeout(GRACE, gone.readable()).await;
        }
        Ok(())
    }

    /// A descriptor that becomes readable when the process ends; none when it is gone already.
    fn watch(self) -> io::Result<Option<AsyncFd<OwnedFd>>> {
        let pidfd = match pidfd(self.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // The number may have passed to another process before the descriptor was made.
        if Self::of(self.pid) != Some(self) {
            return Ok(None);
        }
        // SAFETY: the registration owns the descriptor, which stays the same and open in it.
        let registered = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        registered.map(Some).map_err(io::Error::from)
    }
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: a system call with two integers; it reads and writes no memory of ours.
    let number = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
    let number = i32::try_from(number).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pidfile_of_an_earlier_process_with_the_same_number_names_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        assert_eq!(Identity::running(&file), None);
        let me = Identity::of_self().unwrap();
        me.write(&file, Some(77)).unwrap();
        assert_eq!(Identity::running(&file), Some(me));
        assert_eq!(Identity::qemu(&file), Some(77));
        let earlier = Identity {
            start_time: me.start_time - 1,
            ..me
        };
        earlier.write(&file, None).unwrap();
        assert_eq!(Identity::running(&file), None);
    }

    #[tokio::test]
    async fn a_stale_process_is_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let identity = Identity::of(pid).unwrap();
        identity.end().await.unwrap();
        assert_eq!(child.wait().await.unwrap().code(), None);
        // A second time there is nobody left, which is fine.
        identity.end().await.unwrap();
    }
}
