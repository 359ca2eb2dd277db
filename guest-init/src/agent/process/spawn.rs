//! Starts a program: a new process directly in its control group, with a session of its own, three
//! descriptors, default signals and nothing else of the agent's. Between the new process's first
//! instruction and its exec only system calls happen, no allocation and no lock, because other
//! threads of the agent may hold locks that the copy will never see released.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use crate::agent::poll::{self, Interest};

/// What a new process needs, made before it exists.
pub(crate) struct Program {
    /// Where the program may be, tried in order.
    pub(crate) candidates: Vec<CString>,
    /// Its arguments, its own name first.
    pub(crate) arguments: Vec<CString>,
    /// Its environment, `KEY=value`.
    pub(crate) environment: Vec<CString>,
    /// Where it starts.
    pub(crate) directory: CString,
    /// Whose it is; none means root, as the agent is.
    pub(crate) identity: Option<Identity>,
}

/// Who a process is to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// What the new process gets from the agent.
pub(crate) struct Surroundings<'a> {
    /// Standard input, output and error.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Standard input is a terminal that the process's session is to control.
    pub(crate) terminal: bool,
    /// The control group's directory, if there is one.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    /// A directory of /proc that the user cannot take away.
    pub(crate) proc: BorrowedFd<'a>,
}

/// How far the new process came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Making the process itself.
    Clone,
    /// Session, descriptors, limits.
    Prepare,
    /// Becoming the user.
    Identity,
    /// Entering the working directory.
    Directory,
    /// Becoming the program.
    Execute,
    /// One of these, which did not come to an end.
    Late,
}

impl Stage {
    const fn to_byte(self) -> u8 {
        match self {
            Self::Clone => 0,
            Self::Prepare => 1,
            Self::Directory => 2,
            Self::Execute => 3,
            Self::Identity => 4,
            Self::Late => 5,
        }
    }

    const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Clone,
            2 => Self::Directory,
            3 => Self::Execute,
            4 => Self::Identity,
            _ => Self::Prepare,
        }
    }
}

/// Why the program does not run.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{stage:?}: {errno}")]
pub(crate) struct SpawnError {
    /// At which step.
    pub(crate) stage: Stage,
    /// What the system said.
    pub(crate) errno: Errno,
}

impl From<Errno> for SpawnError {
    fn from(errno: Errno) -> Self {
        Self {
            stage: Stage::Clone,
            errno,
        }
    }
}

/// A process that was made but may not have become its program yet.
pub(crate) struct Verdict(OwnedFd);

impl Verdict {
    /// Waits until the process has become its program or has failed to. Where it starts may be a file
    /// system that never answers; then it is [`Stage::Late`] and still there.
    pub(crate) fn wait(self, deadline: Option<Instant>) -> Result<(), SpawnError> {
        let late = |errno| SpawnError {
            stage: Stage::Late,
            errno,
        };
        loop {
            let mut interests = [Interest::new(self.0.as_fd(), true, false)];
            poll::wait(&mut interests, deadline).map_err(late)?;
            let [report] = interests;
            if report.readable() || report.hung_up() {
                break;
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                return Err(late(Errno::ETIMEDOUT));
            }
        }
        let mut report = [0; 5];
        let read = loop {
            match nix::unistd::read(&self.0, &mut report) {
                Err(Errno::EINTR) => {}
                other => break other,
            }
        };
        // A report is shorter than what a pipe writes in one piece: it comes whole or not at all.
        match read {
            Ok(5) => {
                let [stage, e0, e1, e2, e3] = report;
                Err(SpawnError {
                    stage: Stage::from_byte(stage),
                    errno: Errno::from_raw(i32::from_le_bytes([e0, e1, e2, e3])),
                })
            }
            _ => Ok(()),
        }
    }
}

/// A process that was made: its identifier, a descriptor that tells when it has ended, and whether it
/// became the program.
pub(crate) struct Spawned {
    pub(crate) pid: libc::pid_t,
    pub(crate) descriptor: OwnedFd,
    pub(crate) verdict: Verdict,
}

/// Makes the process.
pub(crate) fn spawn(
    program: &Program,
    surroundings: &Surroundings<'_>,
) -> Result<Spawned, SpawnError> {
    let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
    let arguments = pointers(&program.arguments);
    let environment = pointers(&program.environment);

    // SAFETY: all zeroes is a valid value of this plain structure of numbers.
    let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
    let mut descriptor: RawFd = -1;
    clone.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    clone.flags = CLONE_PIDFD | CLONE_CLEAR_SIGHAND;
    clone.pidfd = (&raw mut descriptor).expose_provenance() as u64;
    if let Some(group) = surroundings.cgroup {
        clone.flags |= CLONE_INTO_CGROUP;
        clone.cgroup = u64::from(group.as_raw_fd().unsigned_abs());
    }
    // SAFETY: without CLONE_VM this is a fork: the new process has a copy of everything, and below
    // it makes system calls only until it execs or exits.
    let made = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut clone,
            size_of::<libc::clone_args>(),
        )
    };
    match made {
        0 => become_program(
            program,
            surroundings,
            &arguments,
            &environment,
            writing.as_raw_fd(),
        ),
        -1 => Err(Errno::last().into()),
        pid => Ok(Spawned {
            pid: libc::pid_t::try_from(pid).unwrap_or(libc::pid_t::MAX),
            // SAFETY: the kernel has just made this descriptor and nobody else owns it.
            descriptor: unsafe { OwnedFd::from_raw_fd(descriptor) },
            verdict: Verdict(reading),
        }),
    }
}

/// Notes which signals the agent ignores; to be called once, before there are other threads.
pub(crate) fn note_ignored_signals() {
    let mut ignored = 0;
    for signal in 1..=64 {
        let mut action = [0_u64; 4];
        // SAFETY: the kernel writes 32 bytes, its `sigaction` with a mask of 8 bytes, whose first
        // field is the handler.
        let asked = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                std::ptr::null::<u64>(),
                action.as_mut_ptr(),
                8,
            )
        };
        let [handler, ..] = action;
        if asked == 0 && usize::try_from(handler) == Ok(libc::SIG_IGN) {
            ignored |= 1_u64.wrapping_shl(signal).wrapping_shr(1);
        }
    }
    IGNORED.store(ignored, Ordering::Relaxed);
}

/// Signal n is bit n - 1.
static IGNORED: AtomicU64 = AtomicU64::new(0);

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// From the kernel's `linux/sched.h`; the C library's constants are too narrow for some.
const CLONE_PIDFD: u64 = 1 << 12;
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// Where the report's descriptor lives in the new process.
const REPORT: RawFd = 3;

/// Everything that happens in the new process. Nothing here may allocate, lock or return.
fn become_program(
    program: &Program,
    surroundings: &Surroundings<'_>,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    report: RawFd,
) -> ! {
    if let Err(errno) = prepare(surroundings, report) {
        // The report may still be where it was made or where it belongs: one of both is the pipe.
        fail(report, Stage::Prepare, errno);
    }
    if let Some(identity) = &program.identity
        && let Err(errno) = become_user(identity)
    {
        fail(REPORT, Stage::Identity, errno);
    }
    if let Err(errno) = nix::unistd::chdir(program.directory.as_c_str()) {
        fail(REPORT, Stage::Directory, errno);
    }
    let mut errno = Errno::ENOENT;
    for candidate in &program.candidates {
        let problem = execute(candidate, arguments, environment);
        match problem {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => errno = problem,
            _ => fail(REPORT, Stage::Execute, problem),
        }
    }
    fail(REPORT, Stage::Execute, errno)
}

fn prepare(surroundings: &Surroundings<'_>, report: RawFd) -> Result<(), Errno> {
    nix::unistd::setsid()?;
    expose_to_oom_killer(surroundings.proc)?;
    let [stdin, stdout, stderr] = surroundings.stdio;
    nix::unistd::dup2_stdin(stdin)?;
    nix::unistd::dup2_stdout(stdout)?;
    nix::unistd::dup2_stderr(stderr)?;
    if surroundings.terminal {
        // SAFETY: plain numbers; standard input is the terminal now.
        Errno::result(unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) })?;
    }
    if report != REPORT {
        // SAFETY: plain numbers; whatever was number 3 in this process is not needed any more.
        Errno::result(unsafe { libc::dup3(report, REPORT, libc::O_CLOEXEC) })?;
    }
    // Not only on exec: until then this process would hold other commands' pipes open.
    // SAFETY: plain numbers; nothing above the report's descriptor is used from here on.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 4, libc::c_uint::MAX, 0) })?;
    // Handlers were reset when the process was made; what the agent ignores was not. Straight to the
    // kernel: the C library keeps some signals to itself, which the agent's own parent may have
    // left ignored.
    let default_action = [0_u64; 4];
    let mut ignored = IGNORED.load(Ordering::Relaxed);
    while ignored != 0 {
        let signal = ignored.trailing_zeros().wrapping_add(1);
        ignored &= ignored.wrapping_sub(1);
        // SAFETY: the kernel reads 32 bytes, its `sigaction` with the default handler, no flags and
        // an empty mask of 8 bytes.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default_action.as_ptr(),
                std::ptr::null::<u64>(),
                8,
            )
        };
    }
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Ok(())
}

/// Straight to the kernel: the C library would look for the agent's other threads, which this
/// process does not have.
fn become_user(identity: &Identity) -> Result<(), Errno> {
    // SAFETY: the list is alive and as long as said.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_setgroups,
            identity.groups.len(),
            identity.groups.as_ptr(),
        )
    })?;
    let gid = identity.gid;
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    let uid = identity.uid;
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

/// The agent may be exempt from the kernel's out-of-memory killer; what it starts is not.
fn expose_to_oom_killer(proc: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the path is a NUL-terminated constant and the directory is open.
    let file = Errno::result(unsafe {
        libc::openat(
            proc.as_raw_fd(),
            c"self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        )
    })?;
    // SAFETY: `openat` has just made this descriptor and nobody else owns it.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    nix::unistd::write(&file, b"0").map(drop)
}

/// Gives the reason when the program could not be executed; otherwise does not return.
fn execute(
    path: &CStr,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
) -> Errno {
    // SAFETY: `path` and all strings that the two null-terminated lists point to are NUL-terminated
    // and alive.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    Errno::last()
}

fn fail(report: RawFd, stage: Stage, errno: Errno) -> ! {
    let [e0, e1, e2, e3] = (errno as i32).to_le_bytes();
    let bytes = [stage.to_byte(), e0, e1, e2, e3];
    // SAFETY: the buffer is valid for its length; a descriptor that is not open is an error only.
    unsafe { libc::write(report, bytes.as_ptr().cast(), bytes.len()) };
    // SAFETY: ends this process without running anything of the agent's.
    unsafe { libc::_exit(127) }
}
