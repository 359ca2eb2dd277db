//! Running one command for one client: from its request to its last frame.

mod command;
mod drain;
mod ending;
mod session;
mod spawn;

pub(crate) use command::check_key;
pub(crate) use drain::Drain;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use protocol::id::ProcessId;
use protocol::process::{ProcessStarted, StartProcess};
use protocol::{ErrorBody, ErrorCode, Frame};

use super::Agent;
use super::stream::{Stream, StreamError};
use crate::cgroup::CommandGroup;
use crate::log;
use crate::reaper::Child;
use command::Command;
use session::Session;
use spawn::{SpawnError, Stage, Surroundings};

/// Starts what the client asked for and serves the client until the end. `early` are frames that
/// came right behind the request.
pub(crate) fn run(
    agent: &Arc<Agent>,
    request: StartProcess,
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let settings = agent.settings();
    let command = match Command::parse(request, &agent.workspace, &settings) {
        Ok(command) => command,
        Err(problem) => {
            let error = ErrorBody::caller(ErrorCode::InvalidArgument, problem.to_string());
            return stream.refuse(&error);
        }
    };
    let Some(claim) = Claim::new(agent, command.id) else {
        let message = format!("a process with the id {} exists already", command.id);
        return stream.refuse(&ErrorBody::caller(ErrorCode::ProcessExists, message));
    };
    let started = start(agent, &command, claim);
    let running = match started {
        Ok(running) => running,
        Err(error) => return stream.finish(&ending::not_started(&command, error)),
    };
    Session::new(agent, running, stream).serve(early)
}

/// A process that became its program, and the agent's ends of its pipes.
pub(crate) struct Running {
    child: Arc<Child>,
    group: Option<Arc<CommandGroup>>,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Running {
    fn started(&self) -> ProcessStarted {
        ProcessStarted {
            pid: self.child.pid.unsigned_abs(),
        }
    }
}

/// A process id in use; free again when the process has ended.
struct Claim {
    agent: Arc<Agent>,
    id: ProcessId,
}

impl Claim {
    fn new(agent: &Arc<Agent>, id: ProcessId) -> Option<Self> {
        super::lock(&agent.processes).insert(id).then(|| Self {
            agent: Arc::clone(agent),
            id,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        super::lock(&self.agent.processes).remove(&self.id);
    }
}

fn start(agent: &Arc<Agent>, command: &Command, claim: Claim) -> Result<Running, SpawnError> {
    let group = match &agent.cgroups {
        Some(groups) => {
            let group = groups
                .create(&format!("p-{}", command.id))
                .map_err(|error| {
                    log::warn(format_args!("event=cgroup_failed error={error}"));
                    SpawnError::from(Errno::EAGAIN)
                })?;
            Some(Arc::new(group))
        }
        None => None,
    };
    let (stdout, child_stdout) = output_pipe()?;
    let (stderr, child_stderr) = output_pipe()?;
    let (stdin, child_stdin) = if command.stdin_pipe {
        let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
        do_not_block(&writing)?;
        (Some(writing), Some(reading))
    } else {
        (None, None)
    };
    let surroundings = Surroundings {
        stdio: [
            child_stdin
                .as_ref()
                .map_or(agent.dev_null.as_fd(), AsFd::as_fd),
            child_stdout.as_fd(),
            child_stderr.as_fd(),
        ],
        cgroup: group.as_ref().map(|group| group.directory()),
        proc: agent.proc.as_fd(),
    };
    let mut verdict = None;
    let keep = Box::new((claim, group.clone()));
    let child = agent.reaper.start(keep, || {
        let (pid, wait) = spawn::spawn(&command.program, &surroundings)?;
        verdict = Some(wait);
        Ok::<_, SpawnError>(pid)
    })?;
    // From here on only the process and its children hold these.
    drop((child_stdin, child_stdout, child_stderr));
    match verdict {
        Some(verdict) => verdict.wait()?,
        None => {
            return Err(SpawnError {
                stage: Stage::Clone,
                errno: Errno::EINVAL,
            });
        }
    }
    Ok(Running {
        child,
        group,
        stdin,
        stdout,
        stderr,
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
