//! The end of a process at a client's request, with all that it started, also when the process itself
//! has ended before: first they are asked, then they are ended. Answers when nothing is left, or when
//! even the kernel cannot end it; never merely because time has passed.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::processes::KillProcess;
use protocol::{ErrorBody, ErrorCode};

use super::life::{Body, Process};
use super::requests::{after, has_ended, tell_state, watch};
use super::start::group_name;
use super::watcher::Watcher;
use crate::agent::Agent;
use crate::agent::poll::{self, Interest};
use crate::agent::stream::{Stream, StreamError};
use crate::cgroup::CommandGroup;

/// How long a process may take to end by itself when the caller does not say.
const GRACE: Duration = Duration::from_secs(5);
/// The longest that a caller can give it.
const MAX_GRACE: Duration = Duration::from_secs(600);
/// How long a killed process may take to go; one that takes longer waits for hardware.
const AFTER_KILL: Duration = Duration::from_secs(10);
/// How long a process takes to be made, at most.
const STARTING: Duration = Duration::from_secs(1);
const SIGKILL: u8 = 9;

pub(super) fn kill(
    agent: &Agent,
    process: &Process,
    request: &KillProcess,
    stream: Stream,
) -> Result<(), StreamError> {
    let grace = request.grace_ms.map_or(GRACE, |given| {
        Duration::from_millis(u64::from(given)).min(MAX_GRACE)
    });
    // Whether the client is still there does not matter.
    if Killing::of(agent, process)?.run(grace)? {
        return tell_state(process, stream);
    }
    let message = format!(
        "process {}, or something that it started, has not ended {} s after SIGKILL; it waits for a \
         device",
        process.id,
        AFTER_KILL.as_secs()
    );
    let error = ErrorBody::guest(ErrorCode::ProcessRunning, message);
    stream.refuse(&error.retryable_after_ms(5000))
}

/// What is being ended.
struct Killing<'a> {
    agent: &'a Agent,
    process: &'a Process,
    watcher: Arc<Watcher>,
    /// While the process runs, or its output does.
    body: Option<Arc<Body>>,
    /// It outlives the process while something is in it.
    group: Option<Arc<CommandGroup>>,
}

impl<'a> Killing<'a> {
    fn of(agent: &'a Agent, process: &'a Process) -> Result<Self, StreamError> {
        let watcher = watch(process)?;
        // Before that there is nobody to be ended. One that hangs afterwards can be.
        let deadline = after(STARTING);
        loop {
            watcher.arm();
            if !process.is_starting() || deadline.is_none_or(|at| Instant::now() >= at) {
                break;
            }
            let mut interests = [Interest::new(watcher.event().as_fd(), true, false)];
            poll::wait(&mut interests, deadline).map_err(StreamError::Gone)?;
            watcher.rest();
        }
        let body = process.body();
        let group = match &body {
            Some(body) => body.group.clone(),
            None => agent
                .cgroups
                .as_ref()
                .and_then(|groups| groups.find(&group_name(process.id)))
                .map(Arc::new),
        };
        Ok(Self {
            agent,
            process,
            watcher,
            body,
            group,
        })
    }

    /// Says whether nothing is left.
    fn run(self, grace: Duration) -> Result<bool, StreamError> {
        if self.main_runs() {
            self.process.mark_killed();
            if let Some(body) = &self.body {
                body.expect_end();
            }
        }
        if !grace.is_zero() {
            self.ask();
            if self.wait(after(grace))? {
                return Ok(true);
            }
        }
        self.end();
        self.wait(after(AFTER_KILL))
    }

    fn main_runs(&self) -> bool {
        self.body
            .as_ref()
            .is_some_and(|body| body.child.status().is_none())
    }

    /// Everybody in the group is asked: whom the process has left behind is not in its process group
    /// any more once it has ended, or never was.
    fn ask(&self) {
        let mut signals = vec![libc::SIGTERM];
        if self.process.about.terminal {
            signals.push(libc::SIGHUP);
        }
        // One that was stopped could not hear either.
        signals.push(libc::SIGCONT);
        let reached = self.group.as_ref().map(|group| group.signal(&signals));
        let is_reached = |body: &Arc<Body>| {
            let reached = reached.as_ref();
            reached.is_some_and(|reached| reached.contains(&body.child.pid))
        };
        if !self.body.as_ref().is_some_and(is_reached) {
            for signal in signals {
                let signal = u8::try_from(signal).unwrap_or(SIGKILL);
                self.process.signal(&self.agent.reaper, signal);
            }
        }
    }

    fn end(&self) {
        if self.main_runs() {
            self.process.signal(&self.agent.reaper, SIGKILL);
        }
        if let Some(group) = self.group.as_ref().filter(|group| group.is_populated()) {
            group.kill();
        }
    }

    /// Waits until the process has ended and nothing that it started is left. Says whether it is so.
    fn wait(&self, deadline: Option<Instant>) -> Result<bool, StreamError> {
        let events = self.group.as_ref().and_then(|group| group.events());
        loop {
            // Read where it is polled, or it stays interesting.
            let populated = events.as_ref().is_some_and(CommandGroup::says_populated);
            let ended = has_ended(self.process, &self.watcher);
            if ended && !populated {
                return Ok(true);
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                return Ok(false);
            }
            let group = events.as_ref().filter(|_| populated);
            let mut interests = [
                Interest::new(self.watcher.event().as_fd(), true, false),
                group.map_or(Interest::NONE, |events| Interest::news(events.as_fd())),
            ];
            poll::wait(&mut interests, deadline).map_err(StreamError::Gone)?;
            self.watcher.rest();
        }
    }
}
