//! What the objects of a patch need of VMs, as one narrow blocking trait: the library behind the
//! `sup` command implements it, and tests of the JavaScript side record what is asked of it.
//! Nothing here knows JavaScript.
//!
//! Every call may wait as long as it must, and gives [`Failure::Interrupted`] soon after the
//! [`Interrupt`](super::Interrupt) that the implementation was made with is set.

use std::io::{Read, Seek, Write};

use protocol::id::{ProcessId, VmId};
use protocol::process::{ProcessEnd, ProcessEnded};

/// The code of an appliance that cannot be reached, after retries.
pub(super) const UNREACHABLE: &str = "UNREACHABLE";
/// The code of an appliance that does not take the token.
pub(super) const UNAUTHENTICATED: &str = "UNAUTHENTICATED";

/// Why something that a patch asked for was not done.
///
/// ```
/// use client::patch::Failure;
/// let failure = Failure::file("ENOENT", "/workspace/a", "there is no /workspace/a");
/// assert_eq!(failure.to_string(), "there is no /workspace/a");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The VM is gone, failed, or stopped in the middle: `execResult` shows it as a result.
    #[error("{message}")]
    Vm {
        /// For programs, as `VM_NOT_FOUND`.
        code: String,
        /// For people, as `VM not found`.
        message: String,
    },
    /// An operation on a file failed.
    #[error("{message}")]
    File {
        /// As `ENOENT`.
        code: String,
        /// Which file: in a VM the absolute path, on this machine as it was named.
        path: String,
        /// For people.
        message: String,
    },
    /// The appliance cannot be reached, or refused for a reason that is not the VM's state.
    #[error("{message}")]
    Host {
        /// For programs, as `UNREACHABLE`.
        code: String,
        /// For people.
        message: String,
    },
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Someone asked the patch to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// The appliance does not know the VM.
    pub fn vm_not_found() -> Self {
        Self::Vm {
            code: "VM_NOT_FOUND".into(),
            message: "VM not found".into(),
        }
    }

    /// Its words where a command's result tells of it: `execResult` and `blockResult` throw nothing but
    /// what leaves no result, which is an appliance out of reach, a call that makes no sense, and the
    /// wish to stop.
    pub(super) fn as_result(&self) -> Option<&str> {
        match self {
            Self::Vm { message, .. } | Self::File { message, .. } => Some(message),
            Self::Host { code, .. } if code == UNREACHABLE || code == UNAUTHENTICATED => None,
            Self::Host { message, .. } => Some(message),
            Self::Usage(_) | Self::Interrupted => None,
        }
    }

    /// A file of this machine or of a VM could not be used.
    pub fn file(code: &str, path: &str, message: impl Into<String>) -> Self {
        Self::File {
            code: code.into(),
            path: path.into(),
            message: message.into(),
        }
    }

    /// A file operation of this machine failed.
    pub fn io(path: &str, what: &str, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => "ENOENT",
            std::io::ErrorKind::PermissionDenied => "EACCES",
            std::io::ErrorKind::IsADirectory => "EISDIR",
            std::io::ErrorKind::NotADirectory => "ENOTDIR",
            std::io::ErrorKind::StorageFull => "ENOSPC",
            _ => "EIO",
        };
        Self::file(code, path, format!("{what} {path}: {error}"))
    }
}

/// What is told of a VM.
///
/// ```no_run
/// # fn example(backend: &dyn client::patch::Backend) -> Result<(), client::patch::Failure> {
/// let client::patch::backend::VmFacts { id, url } = backend.create()?;
/// println!("{id} is at {url}");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmFacts {
    /// Its identifier.
    pub id: VmId,
    /// Where its port 3000 is on the web, without a slash at the end.
    pub url: String,
}

/// What to run. Standard input and output follow from the call it is given to.
///
/// ```
/// use client::patch::backend::{Command, Program};
/// let command = Command {
///     program: Program::Shell("make test".into()),
///     cwd: Some("app".into()),
///     env: vec![("CI".into(), Some("1".into())), ("HOME".into(), None)],
/// };
/// # let _ = command;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The program.
    pub program: Program,
    /// Where; relative ones start at /workspace, and none is /workspace.
    pub cwd: Option<String>,
    /// Variables to set, or to take away.
    pub env: Vec<(String, Option<String>)>,
}

/// A command's program.
///
/// ```
/// use client::patch::backend::Program;
/// let clone = Program::Argv(vec!["git".into(), "clone".into(), "a directory".into()]);
/// assert_ne!(clone, Program::Shell("git clone a directory".into()));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// For `sh -c`.
    Shell(String),
    /// The program and its arguments; never empty.
    Argv(Vec<String>),
}

/// Which pipe output came from.
///
/// ```
/// use client::patch::backend::Source;
/// let mut errors = 0;
/// let mut sink = |source: Source, bytes: &[u8]| {
///     if source == Source::Stderr {
///         errors += bytes.len();
///     }
/// };
/// sink(Source::Stderr, b"oh");
/// assert_eq!(errors, 2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One step of a process's output.
///
/// ```no_run
/// # use client::patch::{Backend, Failure};
/// # use client::protocol::id::{ProcessId, VmId};
/// # fn example(backend: &dyn Backend, vm: &VmId, id: ProcessId) -> Result<(), Failure> {
/// use client::patch::backend::{Record, Whence};
/// let mut records = backend.attach(vm, id, Whence::Oldest, true)?;
/// let ended = loop {
///     match records.next()? {
///         Record::Data(_, bytes) => print!("{}", String::from_utf8_lossy(&bytes)),
///         Record::Gap(bytes) => println!("[{bytes} bytes are missing]"),
///         Record::Ended(ended) => break Some(ended),
///         Record::Replayed => break None,
///     }
/// };
/// # let _ = ended;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Bytes in merged order.
    Data(Source, Vec<u8>),
    /// So many bytes are no longer kept here.
    Gap(u64),
    /// The process has ended, and this was all of it.
    Ended(ProcessEnded),
    /// All that was there; the process still runs. Only when not following.
    Replayed,
}

/// A reader of a process's output. Dropping it detaches.
///
/// ```no_run
/// # use client::patch::{Backend, Failure};
/// # use client::protocol::id::{ProcessId, VmId};
/// # fn example(backend: &dyn Backend, vm: &VmId, id: ProcessId) -> Result<(), Failure> {
/// use client::patch::backend::{Record, Records, Whence};
/// let mut records: Box<dyn Records> = backend.attach(vm, id, Whence::Oldest, false)?;
/// let first: Record = records.next()?;
/// # let _ = first;
/// # Ok(())
/// # }
/// ```
pub trait Records {
    /// The next step; waits for it. Not called again after [`Record::Ended`] or
    /// [`Record::Replayed`].
    fn next(&mut self) -> Result<Record, Failure>;
}

/// Where a reader begins.
///
/// ```no_run
/// # use client::patch::{Backend, Failure};
/// # use client::protocol::id::{ProcessId, VmId};
/// # fn example(backend: &dyn Backend, vm: &VmId, id: ProcessId) -> Result<(), Failure> {
/// use client::patch::backend::Whence;
/// let last_lines = backend.attach(vm, id, Whence::Lines(20), false)?;
/// # let _ = last_lines;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// At the oldest byte that is kept, behind a gap for what is not.
    Oldest,
    /// At the last so many lines.
    Lines(u64),
}

/// What is uploaded: after a lost connection it is read again from where that is needed.
///
/// ```
/// use client::patch::backend::Content;
/// let mut text: Box<dyn Content> = Box::new(std::io::Cursor::new("text"));
/// assert_eq!(std::io::read_to_string(&mut text).unwrap(), "text");
/// ```
pub trait Content: Read + Seek {}
impl<C: Read + Seek + ?Sized> Content for C {}

/// Takes output as it comes.
///
/// ```no_run
/// # use client::patch::{Backend, Failure, backend::Command};
/// # use client::protocol::id::VmId;
/// # fn example(backend: &dyn Backend, vm: &VmId, command: &Command) -> Result<(), Failure> {
/// use client::patch::backend::{Sink, Source};
/// let mut all = Vec::new();
/// let sink: &mut Sink<'_> = &mut |_: Source, bytes: &[u8]| {
///     all.extend_from_slice(bytes);
///     Ok(())
/// };
/// backend.exec(vm, command, sink)?;
/// # Ok(())
/// # }
/// ```
pub type Sink<'a> = dyn FnMut(Source, &[u8]) -> Result<(), Failure> + 'a;

/// VMs, as a patch needs them.
///
/// ```no_run
/// use client::patch::{Backend, Failure, backend::{Command, Program}};
///
/// /// The first line of what a command prints in a VM of its own.
/// fn first_line(backend: &dyn Backend, line: &str) -> Result<String, Failure> {
///     let vm = backend.create()?.id;
///     let program = Program::Shell(line.to_owned());
///     let command = Command { program, cwd: None, env: Vec::new() };
///     let mut output = Vec::new();
///     let ended = backend.exec(&vm, &command, &mut |_, bytes| {
///         output.extend_from_slice(bytes);
///         Ok(())
///     });
///     backend.delete(&vm)?;
///     ended?;
///     let text = String::from_utf8_lossy(&output);
///     Ok(text.lines().next().unwrap_or_default().to_owned())
/// }
/// ```
pub trait Backend: Send + Sync {
    /// Makes a VM and waits until it is ready.
    fn create(&self) -> Result<VmFacts, Failure>;

    /// Takes a VM away. One that is not there is no error.
    fn delete(&self, vm: &VmId) -> Result<(), Failure>;

    /// Runs a command to its end, its input empty, its output followed without loss. When `sink`
    /// fails, the command is killed and the failure handed on.
    fn exec(
        &self,
        vm: &VmId,
        command: &Command,
        sink: &mut Sink<'_>,
    ) -> Result<ProcessEnded, Failure>;

    /// Starts a process with an open input and its output kept in the log. The same `id` twice
    /// starts once. A process that could not be started is found by `status` as ended.
    fn start(&self, vm: &VmId, id: ProcessId, command: &Command) -> Result<(), Failure>;

    /// Reads output; with `follow` until the process has ended.
    fn attach(
        &self,
        vm: &VmId,
        id: ProcessId,
        from: Whence,
        follow: bool,
    ) -> Result<Box<dyn Records>, Failure>;

    /// How a process ended; none while it runs. Does not wait for its end.
    fn status(&self, vm: &VmId, id: ProcessId) -> Result<Option<ProcessEnded>, Failure>;

    /// Writes all of it to the process's input.
    fn stdin(&self, vm: &VmId, id: ProcessId, bytes: &[u8]) -> Result<(), Failure>;

    /// Closes the process's input; twice is no error.
    fn stdin_end(&self, vm: &VmId, id: ProcessId) -> Result<(), Failure>;

    /// Ends a process and all it started: SIGTERM, later SIGKILL. Returns when it is gone; one
    /// that has ended is no error.
    fn kill(&self, vm: &VmId, id: ProcessId) -> Result<(), Failure>;

    /// Replaces the file at an absolute path at once, making its parents; a directory there is an
    /// error. `progress` is called with how far in the source it is, which after a lost connection
    /// may be less than before.
    fn upload(
        &self,
        vm: &VmId,
        path: &str,
        source: &mut dyn Content,
        size: Option<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Failure>;

    /// Writes the file at an absolute path into `sink`. `progress` is called with the bytes so far
    /// and the file's size, before the first byte too; when it fails, so does the download.
    fn download(
        &self,
        vm: &VmId,
        path: &str,
        sink: &mut dyn Write,
        progress: &mut dyn FnMut(u64, u64) -> Result<(), Failure>,
    ) -> Result<(), Failure>;
}

/// How a process's end is shown to a patch.
///
/// ```
/// use client::patch::backend::Ending;
/// let ending = Ending::failed("VM stopped".into());
/// assert_eq!((ending.exit_code, ending.state), (255, "error"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Always there.
    pub exit_code: i32,
    /// None after a plain exit.
    pub reason: Option<String>,
    /// What `status.state` says.
    pub state: &'static str,
}

impl Ending {
    /// What became of a command whose VM failed it.
    pub fn failed(reason: String) -> Self {
        Self {
            exit_code: 255,
            reason: Some(reason),
            state: "error",
        }
    }
}

impl From<&ProcessEnded> for Ending {
    fn from(ended: &ProcessEnded) -> Self {
        let (state, short) = match ended.end {
            ProcessEnd::Exited => ("exited", None),
            ProcessEnd::Signalled => ("killed", Some("killed by a signal")),
            ProcessEnd::OutOfMemory => ("killed", Some("out of memory")),
            ProcessEnd::TimedOut => ("killed", Some("timed out")),
            ProcessEnd::Killed => ("killed", Some("killed")),
            ProcessEnd::Lost => ("error", Some("VM was restarted")),
            ProcessEnd::NotFound => ("error", Some("not found")),
            ProcessEnd::NotExecutable => ("error", Some("not executable")),
            ProcessEnd::NoSuchDirectory => ("error", Some("no such directory")),
            _ => ("error", Some("the command could not be run")),
        };
        let reason = short.map(|short| {
            if ended.message.is_empty() {
                short.to_owned()
            } else {
                ended.message.clone()
            }
        });
        Self {
            exit_code: ended.exit_code.into(),
            reason,
            state,
        }
    }
}
