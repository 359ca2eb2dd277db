//! Starts a process: its group with its limits, its pipes or its terminal, and the program.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::pipe2;
use protocol::id::ProcessId;
use protocol::process::TerminalSize;
use protocol::{ErrorBody, ErrorCode};

use super::command::Command;
use super::life::{Body, Process};
use super::pump::Pump;
use super::spawn::{self, SpawnError, Stage, Surroundings};
use crate::agent::Agent;
use crate::cgroup::CommandGroup;
use crate::log;

/// How long a process may take to become its program, at most. It takes long where the directory or
/// the program lies on a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(60);
const SIGKILL: u8 = 9;

/// Why there is no process.
pub(crate) enum NotStarted {
    /// It is not to be tried like this.
    Refused(ErrorBody),
    /// The system did not start it.
    Failed(SpawnError),
}

impl From<SpawnError> for NotStarted {
    fn from(error: SpawnError) -> Self {
        Self::Failed(error)
    }
}

impl From<Errno> for NotStarted {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno.into())
    }
}

/// The descriptors of both sides.
struct Stdio {
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    /// Standard input, output and error of the process; none is /dev/null.
    child: [Option<OwnedFd>; 3],
}

/// Starts the command as `process`.
pub(crate) fn start(
    agent: &Arc<Agent>,
    command: &Command,
    process: &Arc<Process>,
) -> Result<Pump, NotStarted> {
    let group = group(agent, command, process)?;
    let owner = command.program.identity.as_ref().map(|user| user.uid);
    let stdio = match command.terminal {
        Some(size) => on_terminal(agent, size, owner.unwrap_or(0))?,
        None => on_pipes(command.stdin_pipe, owner)?,
    };
    let [stdin, stdout, stderr] = &stdio.child;
    let surroundings = Surroundings {
        stdio: [stdin, stdout, stderr]
            .map(|one| one.as_ref().map_or(agent.dev_null.as_fd(), AsFd::as_fd)),
        terminal: command.terminal.is_some(),
        cgroup: group.as_ref().map(|group| group.directory()),
        proc: agent.proc.as_fd(),
    };
    let begun = Instant::now();
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let mut verdict = None;
    let child = agent.reaper.start(Box::new(group.clone()), || {
        let spawned = spawn::spawn(&command.program, &surroundings)?;
        verdict = Some(spawned.verdict);
        Ok::<_, SpawnError>((spawned.pid, spawned.descriptor))
    })?;
    // From here on only the process and its children hold these.
    drop(stdio.child);
    // From now on it can be killed.
    let body = process.embody(Body { child, group, wake });
    // While it becomes its program, and before anybody is told that it has.
    agent.registry.logs.announce(process);
    let became = verdict.map(|verdict| verdict.wait(begun.checked_add(patience(command))));
    match became {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            if error.stage == Stage::Late {
                process.signal(&agent.reaper, SIGKILL);
            }
            drop(process.bury());
            return Err(error.into());
        }
        None => return Err(Errno::EINVAL.into()),
    }
    if let Some(stdin) = stdio.stdin {
        process.stdin.open(stdin);
    }
    process.set_running();
    Ok(Pump::new(
        agent,
        process,
        body,
        stdio.stdout,
        stdio.stderr,
        command.deadline,
    ))
}

/// How long the process may take to become its program.
pub(crate) fn patience(command: &Command) -> Duration {
    command
        .deadline
        .map_or(PATIENCE, |given| given.min(PATIENCE))
}

/// What the group of a process is called.
pub(crate) fn group_name(id: ProcessId) -> String {
    format!("p-{id}")
}

fn group(
    agent: &Agent,
    command: &Command,
    process: &Process,
) -> Result<Option<Arc<CommandGroup>>, NotStarted> {
    let has_memory = |groups: &crate::cgroup::Cgroups| groups.has("memory");
    if command.memory.is_some() && !agent.cgroups.as_ref().is_some_and(has_memory) {
        let message = "the guest's kernel has no memory controller; start it without a limit";
        let error = ErrorBody::guest(ErrorCode::LimitUnavailable, message);
        return Err(NotStarted::Refused(error));
    }
    let Some(groups) = &agent.cgroups else {
        return Ok(None);
    };
    let failed = |error| {
        log::warn(format_args!("event=cgroup_failed error=\"{error}\""));
        Errno::EAGAIN
    };
    let group = groups.create(&group_name(process.id)).map_err(failed)?;
    if let Some(bytes) = command.memory {
        group.limit_memory(bytes).map_err(failed)?;
    }
    Ok(Some(Arc::new(group)))
}

fn on_pipes(with_stdin: bool, owner: Option<u32>) -> Result<Stdio, Errno> {
    let (stdout, child_stdout) = output_pipe()?;
    let (stderr, child_stderr) = output_pipe()?;
    let (stdin, child_stdin) = if with_stdin {
        let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
        do_not_block(&writing)?;
        (Some(writing), Some(reading))
    } else {
        (None, None)
    };
    let child = [child_stdin, Some(child_stdout), Some(child_stderr)];
    if let Some(uid) = owner {
        // /dev/stdout and its like are opened by name.
        for pipe in child.iter().flatten() {
            nix::unistd::fchown(pipe, Some(uid.into()), None)?;
        }
    }
    Ok(Stdio {
        stdin,
        stdout,
        stderr: Some(stderr),
        child,
    })
}

fn on_terminal(agent: &Agent, size: TerminalSize, owner: u32) -> Result<Stdio, Errno> {
    let terminal = agent.terminals.make(size, owner)?;
    let copy = |descriptor: &OwnedFd| {
        let copied = descriptor.try_clone();
        copied.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
    };
    Ok(Stdio {
        stdin: Some(copy(&terminal.master)?),
        stdout: terminal.master,
        stderr: None,
        child: [
            Some(copy(&terminal.slave)?),
            Some(copy(&terminal.slave)?),
            Some(terminal.slave),
        ],
    })
}

/// The agent's reading end, which does not block, and the process's writing end, which does.
fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
    do_not_block(&reading)?;
    Ok((reading, writing))
}

fn do_not_block(pipe: &OwnedFd) -> Result<(), Errno> {
    fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}
