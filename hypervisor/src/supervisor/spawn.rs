//! Starts a process with exactly the descriptors it is to have, and watches it by a pidfd. The
//! child gives up its rights before it executes anything; what fails there is told to the parent.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, setsid};
use protocol::host::{DESCRIPTORS_VARIABLE, FIRST_DESCRIPTOR, MAX_DESCRIPTORS};

use super::confinement::{Confinement, Step, copy, number, take_terminal};

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// More descriptors than a process is ever handed.
    #[error("{0} descriptors to hand over; a process gets at most {MAX_DESCRIPTORS}")]
    TooManyDescriptors(usize),
    /// A name, argument or variable holds a NUL byte.
    #[error("an argument, variable or descriptor name holds a NUL byte or a comma")]
    BadText,
    /// The program cannot be opened.
    #[error("cannot open the program {path}: {cause}")]
    Program {
        /// Where it should be.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// The parent's side failed.
    #[error("cannot {what}: {cause}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        cause: io::Error,
    },
    /// The child could not become what it was to be.
    #[error("the new process could not {step}: {cause}")]
    Child {
        /// What it was doing.
        step: &'static str,
        /// What the system said.
        cause: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(nix::Error) -> SpawnError {
    move |error| SpawnError::System {
        what,
        cause: error.into(),
    }
}

/// A program that is open already, so that it can be executed where no path leads to it.
#[derive(Debug)]
pub(crate) struct Program {
    file: File,
    arguments: Vec<CString>,
}

impl Program {
    /// The program at `path` with its arguments, the first of which is its own name.
    pub(crate) fn open(path: &Path, arguments: &[&str]) -> Result<Self, SpawnError> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .map_err(|cause| SpawnError::Program {
                path: path.display().to_string(),
                cause,
            })?;
        let arguments = arguments.iter().map(|text| CString::new(*text));
        Ok(Self {
            file,
            arguments: arguments
                .collect::<Result<_, _>>()
                .map_err(|_| SpawnError::BadText)?,
        })
    }

    /// This very program in another role.
    pub(crate) fn role(arguments: &[&str]) -> Result<Self, SpawnError> {
        let mut all = vec!["supvm"];
        all.extend(arguments);
        Self::open(Path::new("/proc/self/exe"), &all)
    }
}

/// How to start a program.
#[derive(Debug)]
pub(crate) struct Spawn<'a> {
    /// Which program.
    pub(crate) program: &'a Program,
    /// Its descriptors with their names, from number [`FIRST_DESCRIPTOR`] on.
    pub(crate) descriptors: &'a [(&'a str, BorrowedFd<'a>)],
    /// Its whole environment, to which the descriptors' names are added.
    pub(crate) environment: &'a [(String, String)],
    /// What it gives up.
    pub(crate) confinement: Confinement<'a>,
    /// A terminal of its own in place of /dev/null and the log.
    pub(crate) terminal: Option<BorrowedFd<'a>>,
}

/// All that the child needs, allocated before the fork.
struct Prepared<'a> {
    program: RawFd,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    sources: Vec<OwnedFd>,
    null: File,
    terminal: RawFd,
    confinement: Confinement<'a>,
    parent: Pid,
    report: OwnedFd,
}

impl Spawn<'_> {
    /// Starts it. The call returns once the program runs or is known not to.
    pub(crate) fn start(&self) -> Result<Child, SpawnError> {
        if self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(SpawnError::TooManyDescriptors(self.descriptors.len()));
        }
        let environment = self.environment()?;
        let (answer, report) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(system("make a pipe"))?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        // What the child still needs after its descriptors are in their places must not lie there.
        let network = self.confinement.network.map(above).transpose()?;
        let cgroup = self.confinement.cgroup.map(above).transpose()?;
        let confinement = Confinement {
            network: network.as_ref().map(AsFd::as_fd),
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            ..self.confinement
        };
        let prepared = Prepared {
            program: self.program.file.as_raw_fd(),
            arguments: pointers(&self.program.arguments),
            environment: pointers(&environment),
            sources: self
                .descriptors
                .iter()
                .map(|(_, descriptor)| above(*descriptor))
                .collect::<Result<_, _>>()?,
            null: null.map_err(|cause| SpawnError::System {
                what: "open /dev/null",
                cause,
            })?,
            terminal: number(self.terminal),
            confinement,
            parent: getpid(),
            report: above(report.as_fd())?,
        };
        // The program's own descriptor must not lie where the child's will be put.
        let program = above(self.program.file.as_fd())?;
        let prepared = Prepared {
            program: program.as_raw_fd(),
            ..prepared
        };
        drop(report);
        // SAFETY: the child calls only what may be called between fork and exec of a process
        // with threads: system calls on memory that was prepared before.
        let forked = unsafe { fork() }.map_err(system("fork"))?;
        let pid = match forked {
            ForkResult::Parent { child } => child,
            ForkResult::Child => child(&prepared),
        };
        drop(prepared);
        let started = Child::watch(pid)?;
        let mut told = [0; 5];
        match File::from(answer).read_exact(&mut told) {
            // Exec closed the pipe: the program runs.
            Err(_) => Ok(started),
            Ok(()) => {
                // It exits at once; nobody else waits for it.
                let _ = nix::sys::wait::waitpid(pid, None);
                let [step, a, b, c, d] = told;
                Err(SpawnError::Child {
                    step: Step::name(step),
                    cause: io::Error::from_raw_os_error(i32::from_ne_bytes([a, b, c, d])),
                })
            }
        }
    }

    fn environment(&self) -> Result<Vec<CString>, SpawnError> {
        let mut names = String::new();
        for (name, _) in self.descriptors {
            if name.is_empty() || name.contains(',') {
                return Err(SpawnError::BadText);
            }
            if !names.is_empty() {
                names.push(',');
            }
            names.push_str(name);
        }
        let ours = [(DESCRIPTORS_VARIABLE.to_owned(), names)];
        let all = self.environment.iter().chain(&ours);
        all.map(|(key, value)| CString::new(format!("{key}={value}")))
            .collect::<Result<_, _>>()
            .map_err(|_| SpawnError::BadText)
    }
}

/// A copy of a descriptor, close-on-exec, above all numbers that a child is given.
fn above(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, SpawnError> {
    const LOWEST: RawFd = FIRST_DESCRIPTOR + MAX_DESCRIPTORS as RawFd;
    let number = fcntl(descriptor, FcntlArg::F_DUPFD_CLOEXEC(LOWEST))
        .map_err(system("copy a descriptor"))?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    let texts = texts.iter().map(|text| text.as_ptr());
    texts.chain([std::ptr::null()]).collect()
}

/// The child's way from fork to exec.
fn child(prepared: &Prepared<'_>) -> ! {
    let (step, error) = match become_program(prepared) {
        Ok(never) => match never {},
        Err(failed) => failed,
    };
    let [a, b, c, d] = (error as i32).to_ne_bytes();
    let _ = nix::unistd::write(&prepared.report, &[step as u8, a, b, c, d]);
    // SAFETY: _exit(2) ends the child without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

fn become_program(prepared: &Prepared<'_>) -> Result<std::convert::Infallible, (Step, nix::Error)> {
    setsid().map_err(|error| (Step::Session, error))?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
        .map_err(|error| (Step::Session, error))?;
    // SAFETY: SIG_DFL is no handler of ours; the child has one thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    if prepared.terminal >= 0 {
        take_terminal(prepared.terminal).map_err(|error| (Step::Terminal, error))?;
    } else {
        for stream in 0..=1 {
            copy(prepared.null.as_raw_fd(), stream).map_err(|error| (Step::Descriptors, error))?;
        }
    }
    for (number, source) in (FIRST_DESCRIPTOR..).zip(&prepared.sources) {
        copy(source.as_raw_fd(), number).map_err(|error| (Step::Descriptors, error))?;
    }
    prepared.confinement.apply()?;
    close_rest(prepared.sources.len()).map_err(|error| (Step::Descriptors, error))?;
    // After the change of user, which would forget it.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| (Step::Session, error))?;
    if getppid() != prepared.parent {
        return Err((Step::Session, nix::Error::ESRCH));
    }
    let empty: &CStr = c"";
    // SAFETY: both arrays end in a null pointer and point to strings that live in `Prepared`'s
    // maker, whose memory this child has a copy of.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            prepared.program,
            empty.as_ptr(),
            prepared.arguments.as_ptr(),
            prepared.environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err((Step::Exec, nix::Error::last()))
}

/// Marks every descriptor behind those handed over close-on-exec. The program's and the pipe's stay
/// usable until then.
fn close_rest(handed: usize) -> nix::Result<()> {
    let first = libc::c_long::from(FIRST_DESCRIPTOR) + handed as libc::c_long;
    // SAFETY: close_range(2) with CLOEXEC closes nothing yet; it takes numbers only.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_long::from(u32::MAX),
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    nix::Error::result(done).map(drop)
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It exited with this code.
    Exited(u8),
    /// This signal ended it.
    Killed(u8),
}

impl End {
    /// Reads what waiting for a process gave; none while it runs.
    pub(crate) fn of(status: WaitStatus) -> Option<Self> {
        match status {
            WaitStatus::Exited(_, code) => Some(Self::Exited((code & 0xff) as u8)),
            WaitStatus::Signaled(_, signal, _) => Some(Self::Killed(signal as u8)),
            _ => None,
        }
    }

    /// The exit code of a process that exited.
    pub(crate) fn exit_code(self) -> Option<u8> {
        match self {
            Self::Exited(code) => Some(code),
            Self::Killed(_) => None,
        }
    }

    /// The signal that ended it.
    pub(crate) fn signal(self) -> Option<u8> {
        match self {
            Self::Exited(_) => None,
            Self::Killed(signal) => Some(signal),
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(formatter, "exit code {code}"),
            Self::Killed(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

/// A process of ours that nobody has waited for yet.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    fn watch(pid: Pid) -> Result<Self, SpawnError> {
        // SAFETY: pidfd_open(2) takes numbers only.
        let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let number = nix::Error::result(number).map_err(|error| {
            // A child that cannot be watched must not run unwatched.
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
            system("open a pidfd")(error)
        })?;
        // SAFETY: the kernel just made this descriptor for us, close-on-exec.
        let pidfd = unsafe { OwnedFd::from_raw_fd(number as RawFd) };
        Ok(Self { pid, pidfd })
    }

    /// Its number, which stays its own until it is waited for.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Becomes readable when it has ended.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal; one that has ended does not mind.
    pub(crate) fn signal(&self, signal: Signal) {
        let (number, none) = (signal as libc::c_int, std::ptr::null::<libc::siginfo_t>());
        // SAFETY: pidfd_send_signal(2) takes a null pointer for "as kill(2) would".
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                number,
                none,
                0,
            )
        };
    }

    /// How it ended, if it has. Once that was told, the process is gone.
    pub(crate) fn ended(&self) -> Option<End> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
            Ok(status) => End::of(status),
            Err(nix::Error::EINTR) => None,
            // Waited for by somebody else, which must not be: say that it is gone.
            Err(_) => Some(End::Killed(Signal::SIGKILL as u8)),
        }
    }
}
