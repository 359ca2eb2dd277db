//! What moves the output of one process from its pipes to its window, and follows it to its end. The
//! thread that started the process runs this until the end, whoever reads, and serves the client
//! that asked for the start beside it, so that nothing is handed over between threads on that way.
//!
//! When the main process has ended, what was in its pipes at that moment is always taken in, whether
//! there is room or not: no reader can hold up the end. After that it goes on while somebody still writes: until both pipes are closed, or nothing came for
//! [`QUIET`], or [`LINGER`] has passed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use protocol::frame::MAX_DATA;
use protocol::process::{ProcessEnd, ProcessEnded};

use super::ending::{self, Cause};
use super::life::{Body, Process};
use super::piece::{Source, as_u64, give_buffer, take_buffer};
use super::registry::Gone;
use crate::agent::poll::Interest;
use crate::agent::{Agent, lock};
use crate::log;
use crate::reaper::Status;

/// How long the pipes must be silent after the main process has ended.
const QUIET: Duration = Duration::from_millis(100);
/// How long others may go on writing after the main process has ended.
const LINGER: Duration = Duration::from_secs(2);
/// How long a process may take to end after it was asked to because its time was up.
const GRACE: Duration = Duration::from_secs(5);
/// How long a process waits for a disk that does not take its log.
const STALL: Duration = Duration::from_secs(1);

/// See the module.
pub(crate) struct Pump {
    agent: Arc<Agent>,
    process: Arc<Process>,
    body: Arc<Body>,
    stdout: Pipe,
    stderr: Pipe,
    turn: Turn,
    /// The pipes were asked for, because there is room.
    listening: bool,
    /// Since when the log leaves no room.
    stalled: Option<Instant>,
    limit: Option<Limit>,
    timed_out: Option<Duration>,
    exit: Option<Exit>,
    /// It has ended, and somebody who traces it is told first.
    is_traced: bool,
    is_over: bool,
    concluded: bool,
    /// The process that is forgotten for this one.
    forgotten: Option<Gone>,
}

/// One of the process's output pipes.
struct Pipe {
    pipe: Option<OwnedFd>,
    /// Bytes that were in it when the main process ended and have not been read yet.
    owed: u64,
}

/// How long it may run.
struct Limit {
    given: Duration,
    /// When the next step is due.
    at: Instant,
    /// It was asked to end.
    asked: bool,
}

/// The main process has ended.
struct Exit {
    status: Status,
    /// Memory ran out in its group, and nobody had wanted its end before.
    out_of_memory: bool,
    /// Set once everything owed was taken in: when to give up on others' output.
    limits: Option<Limits>,
}

struct Limits {
    quiet: Instant,
    last: Instant,
}

/// Which output comes first when both have something. Usually standard output; but where there is
/// room for less than one of them gives, the other has its turn, too.
#[derive(Default)]
struct Turn {
    stderr_first: bool,
}

impl Turn {
    fn order(&self) -> [Source; 2] {
        if self.stderr_first {
            [Source::Stderr, Source::Stdout]
        } else {
            [Source::Stdout, Source::Stderr]
        }
    }

    /// There was no room for this one, which had something; for none of them, all had room.
    fn left_out(&mut self, source: Option<Source>) {
        self.stderr_first = source == Some(Source::Stderr);
    }
}

impl Pump {
    pub(crate) fn new(
        agent: &Arc<Agent>,
        process: &Arc<Process>,
        body: Arc<Body>,
        stdout: OwnedFd,
        stderr: Option<OwnedFd>,
        deadline: Option<Duration>,
    ) -> Self {
        let pipe = |pipe| Pipe { pipe, owed: 0 };
        Self {
            agent: Arc::clone(agent),
            process: Arc::clone(process),
            body,
            stdout: pipe(Some(stdout)),
            stderr: pipe(stderr),
            turn: Turn::default(),
            listening: true,
            stalled: None,
            // A time that the clock cannot hold is no limit.
            limit: deadline.and_then(|given| {
                Some(Limit {
                    given,
                    at: Instant::now().checked_add(given)?,
                    asked: false,
                })
            }),
            timed_out: None,
            exit: None,
            is_traced: false,
            is_over: false,
            concluded: false,
            forgotten: None,
        }
    }

    /// Nothing more comes from the process.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// What to wait for before the next [`step`](Self::step).
    pub(crate) fn interests(&mut self) -> [Interest; 4] {
        let owes = self.stdout.owed > 0 || self.stderr.owed > 0;
        let by_log = {
            let mut output = lock(&self.process.output);
            self.listening = owes || output.room() > 0;
            output.pump_held = !self.listening;
            !self.listening && output.is_held_by_log()
        };
        if by_log {
            self.stalled.get_or_insert_with(Instant::now);
            // What is there may have been little when there was more room for all.
            self.agent.registry.logs.hurry(&self.process);
        } else {
            self.stalled = None;
        }
        let exit = match &self.exit {
            Some(_) => Interest::NONE,
            None if self.is_traced => Interest::new(self.body.child.collected(), true, false),
            None => Interest::new(self.body.child.exited(), true, false),
        };
        [
            self.stdout.interest(self.listening),
            self.stderr.interest(self.listening),
            exit,
            Interest::new(self.body.wake.as_fd(), true, false),
        ]
    }

    /// When to step even if nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let limits = self.exit.as_ref().and_then(|exit| exit.limits.as_ref());
        let output = limits.map(|limits| {
            if self.listening {
                limits.quiet.min(limits.last)
            } else {
                limits.last
            }
        });
        let limit = self.limit.as_ref().map(|limit| limit.at);
        let stall = self.stalled.and_then(|since| since.checked_add(STALL));
        [output, limit, stall].into_iter().flatten().min()
    }

    /// Does what is due.
    pub(crate) fn step(&mut self, interests: [Interest; 4]) {
        let [stdout, stderr, exit, wake] = interests;
        if !self.listening {
            lock(&self.process.output).pump_held = false;
        }
        if wake.readable() {
            // Nothing to read is as good.
            let _ = self.body.wake.read();
        }
        // Before the pipes: what is owed counts what has not been read yet.
        if exit.readable() {
            self.note_exit();
        }
        let (mut moved, mut left_out) = (false, None);
        for source in self.turn.order() {
            let interest = match source {
                Source::Stdout => &stdout,
                Source::Stderr => &stderr,
            };
            if interest.readable() {
                match self.take_in(source) {
                    Some(some) => moved |= some,
                    None => left_out = Some(source),
                }
            }
        }
        if self.listening {
            self.turn.left_out(left_out);
        }
        self.update_limits(moved);
        self.keep_time();
        let silent = self.listening && !stdout.readable() && !stderr.readable();
        self.is_over = self.nothing_is_left(silent);
    }

    fn note_exit(&mut self) {
        let child = &self.body.child;
        if child.status().is_none() {
            self.agent.reaper.collect();
        }
        let Some(status) = child.status() else {
            self.is_traced = true;
            return;
        };
        if self.exit.is_none() {
            self.stdout.count_owed();
            self.stderr.count_owed();
            self.limit = None;
            // What happens to those that it leaves behind is not why it ended.
            let group = self.body.group.as_ref();
            let out_of_memory = group.is_some_and(|group| group.out_of_memory());
            // What it started had the same warning, and may be making more of itself.
            if self.timed_out.is_some()
                && let Some(group) = &self.body.group
            {
                group.kill();
            }
            self.exit = Some(Exit {
                status,
                out_of_memory,
                limits: None,
            });
        }
    }

    /// Moves one chunk from a pipe to the window. Says whether there was one; nothing when there is
    /// no room.
    fn take_in(&mut self, source: Source) -> Option<bool> {
        let pipe = match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        };
        let room = lock(&self.process.output).room().max(pipe.owed);
        if room == 0 {
            return None;
        }
        let most = usize::try_from(room).unwrap_or(MAX_DATA).min(MAX_DATA);
        // Only for the read: most processes say nothing most of the time, and many may run.
        let mut scratch = take_buffer();
        let data = scratch.get_mut(..most).unwrap_or_default();
        let count = pipe.read(data);
        if count > 0 {
            lock(&self.process.output).append(source, &mut scratch, count);
        }
        give_buffer(scratch);
        if count > 0 {
            self.agent.registry.logs.note(&self.process);
        }
        Some(count > 0)
    }

    /// Starts the limits when nothing is owed any more, and the silence anew when something came.
    fn update_limits(&mut self, moved: bool) {
        let owed = self.stdout.owed > 0 || self.stderr.owed > 0;
        let Some(exit) = &mut self.exit else { return };
        if owed {
            return;
        }
        let now = Instant::now();
        // A sum that the clock cannot hold ends the waiting at once.
        let quiet = now.checked_add(QUIET).unwrap_or(now);
        match &mut exit.limits {
            None => {
                exit.limits = Some(Limits {
                    quiet,
                    last: now.checked_add(LINGER).unwrap_or(now),
                });
            }
            // While nobody had room for their output, they were not silent.
            Some(limits) if moved || !self.listening => limits.quiet = quiet,
            Some(_) => {}
        }
    }

    /// Acts on deadlines that have passed.
    fn keep_time(&mut self) {
        let now = Instant::now();
        if self
            .stalled
            .and_then(|since| since.checked_add(STALL))
            .is_some_and(|at| now >= at)
        {
            log::warn(format_args!(
                "event=process_log_slow id={}",
                self.process.id
            ));
            lock(&self.process.output).log_failed();
            self.stalled = None;
        }
        let Some(limit) = self.limit.as_mut().filter(|limit| now >= limit.at) else {
            return;
        };
        self.timed_out = Some(limit.given);
        if limit.asked {
            self.limit = None;
            self.process.signal(&self.agent.reaper, SIGKILL);
        } else {
            limit.asked = true;
            limit.at = now.checked_add(GRACE).unwrap_or(now);
            self.process.signal(&self.agent.reaper, SIGTERM);
        }
    }

    /// Whether the end may be told. `silent` says that the pipes had nothing.
    fn nothing_is_left(&self, silent: bool) -> bool {
        let Some(exit) = &self.exit else {
            return false;
        };
        if self.stdout.pipe.is_none() && self.stderr.pipe.is_none() {
            return true;
        }
        let now = Instant::now();
        exit.limits
            .as_ref()
            .is_some_and(|limits| now >= limits.last || (silent && now >= limits.quiet))
    }

    /// Tells everybody how it ended.
    pub(crate) fn conclude(&mut self) {
        let ended = match &self.exit {
            Some(exit) => {
                let cause = Cause {
                    out_of_memory: exit.out_of_memory,
                    timed_out: self.timed_out,
                    killed: self.process.killed.load(Ordering::Acquire),
                    stopped: self.agent.powering_off.load(Ordering::Acquire),
                };
                let open = self.stdout.pipe.is_some() || self.stderr.pipe.is_some();
                ending::ended(exit.status, cause, open)
            }
            None => ProcessEnded {
                end: ProcessEnd::StartFailed,
                exit_code: 126,
                signal: 0,
                output_open: true,
                message: "the agent lost sight of it by a fault of its own".to_owned(),
            },
        };
        self.concluded = true;
        self.forgotten = self.agent.registry.retire(&self.process, ended);
        self.process.stdin.close();
    }

    /// Lets go of everything. Whoever still writes must not notice that nobody listens any more.
    pub(crate) fn bury(mut self) {
        for pipe in [self.stdout.pipe.take(), self.stderr.pipe.take()] {
            if let Some(pipe) = pipe.filter(|_| !self.process.about.terminal) {
                self.agent.drain.adopt(pipe);
            }
        }
        drop(self.process.bury());
        if let Some(gone) = self.forgotten.take() {
            gone.remove_log(&self.agent.registry.logs);
        }
    }
}

impl Drop for Pump {
    /// A panic is no reason for a process that never ends for those who ask.
    fn drop(&mut self) {
        if !self.concluded {
            self.conclude();
        }
    }
}

const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;

impl Pipe {
    fn interest(&self, listening: bool) -> Interest {
        match &self.pipe {
            Some(pipe) if listening => Interest::new(pipe.as_fd(), true, false),
            _ => Interest::NONE,
        }
    }

    /// Reads once; zero means nothing now, or the end.
    fn read(&mut self, data: &mut [u8]) -> usize {
        let Some(pipe) = &self.pipe else { return 0 };
        match nix::unistd::read(pipe, data) {
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Ok(count @ 1..) => {
                self.owed = self.owed.saturating_sub(as_u64(count));
                count
            }
            Ok(0) | Err(_) => {
                self.pipe = None;
                self.owed = 0;
                0
            }
        }
    }

    fn count_owed(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes one integer to the valid place it is given.
        let done = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
        if done == 0 {
            self.owed = u64::try_from(count).unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_that_was_left_out_comes_first_the_next_time() {
        let mut turn = Turn::default();
        assert_eq!(turn.order()[0], Source::Stdout);
        turn.left_out(Some(Source::Stderr));
        assert_eq!(turn.order()[0], Source::Stderr);
        turn.left_out(Some(Source::Stdout));
        assert_eq!(turn.order()[0], Source::Stdout);
        turn.left_out(Some(Source::Stderr));
        turn.left_out(None);
        assert_eq!(turn.order()[0], Source::Stdout);
    }
}
