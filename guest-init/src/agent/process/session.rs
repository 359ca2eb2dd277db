//! A client and its running process: output one way, input and signals the other, both with
//! back-pressure and neither able to hold up the other. The last frame follows the last byte by
//! construction: both leave through the same queue, and the end is queued only after the pipes were
//! read. When the client goes, the process stays.
//!
//! When the main process has ended, what was in its pipes at that moment is always delivered.
//! After that the session goes on while somebody still writes: until both pipes are closed, or
//! nothing came for [`QUIET`], or [`LINGER`] has passed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use protocol::frame::{self, HEADER_LEN, Kind, MAX_DATA};
use protocol::message::decode_body;
use protocol::process::SignalProcess;
use protocol::{ErrorBody, ErrorCode, Frame};

use super::{Running, ending};
use crate::agent::poll::{self, Interest};
use crate::agent::stream::{Stream, StreamError};
use crate::agent::{Agent, unsupported};
use crate::reaper::Status;

/// How long the pipes must be silent after the main process has ended.
const QUIET: Duration = Duration::from_millis(100);
/// How long others may go on writing after the main process has ended.
const LINGER: Duration = Duration::from_secs(2);
/// Nothing more is read from the client while so much input waits for the process.
const MAX_INPUT: usize = 256 << 10;
/// Nothing more is read from the client while so many answers wait for it.
const MAX_ANSWERS: usize = 256 << 10;

pub(crate) struct Session<'a> {
    agent: &'a Arc<Agent>,
    running: Inner,
    stream: Stream,
    /// Header and data of one output frame.
    chunk: Vec<u8>,
    turn: Turn,
}

/// Which output comes first when both have something. Usually standard output; but a client that
/// takes less than one of them gives must hear the other, too.
#[derive(Default)]
struct Turn {
    stderr_first: bool,
}

impl Turn {
    fn order(&self) -> [Kind; 2] {
        if self.stderr_first {
            [Kind::STDERR, Kind::STDOUT]
        } else {
            [Kind::STDOUT, Kind::STDERR]
        }
    }

    /// The client had no room for this one, which had something; for none of them, all had room.
    fn left_out(&mut self, kind: Option<Kind>) {
        self.stderr_first = kind == Some(Kind::STDERR);
    }
}

struct Inner {
    process: Arc<crate::reaper::Child>,
    group: Option<Arc<crate::cgroup::CommandGroup>>,
    started: protocol::process::ProcessStarted,
    stdin: Input,
    stdout: Output,
    stderr: Output,
    exit: Option<Exit>,
}

/// Standard input on its way to the process.
struct Input {
    pipe: Option<OwnedFd>,
    waiting: Vec<u8>,
    written: usize,
    /// The client will send no more.
    ended: bool,
}

/// One of the process's output pipes.
struct Output {
    kind: Kind,
    pipe: Option<OwnedFd>,
    /// Bytes that were in it when the main process ended and have not been read yet.
    owed: usize,
}

/// The main process has ended.
struct Exit {
    status: Status,
    /// Set once everything owed was delivered: when to give up on others' output.
    limits: Option<Limits>,
}

struct Limits {
    quiet: Instant,
    last: Instant,
}

impl<'a> Session<'a> {
    pub(crate) fn new(agent: &'a Arc<Agent>, running: Running, stream: Stream) -> Self {
        let output = |kind, pipe| Output {
            kind,
            pipe: Some(pipe),
            owed: 0,
        };
        Self {
            agent,
            stream,
            chunk: vec![0; HEADER_LEN.saturating_add(MAX_DATA)],
            turn: Turn::default(),
            running: Inner {
                started: running.started(),
                process: running.child,
                group: running.group,
                stdin: Input {
                    ended: running.stdin.is_none(),
                    pipe: running.stdin,
                    waiting: Vec::new(),
                    written: 0,
                },
                stdout: output(Kind::STDOUT, running.stdout),
                stderr: output(Kind::STDERR, running.stderr),
                exit: None,
            },
        }
    }

    /// Serves the client until the last frame or until one of both has gone.
    pub(crate) fn serve(mut self, early: Vec<Frame>) -> Result<(), StreamError> {
        let outcome = self.relay(early);
        let Self {
            agent,
            running,
            stream,
            ..
        } = self;
        let mut outcome = outcome;
        if outcome.is_ok()
            && let Some(exit) = &running.exit
        {
            let out_of_memory = running
                .group
                .as_ref()
                .is_some_and(|group| group.out_of_memory());
            let open = running.stdout.pipe.is_some() || running.stderr.pipe.is_some();
            outcome = stream.finish(&ending::ended(exit.status, out_of_memory, open));
        }
        // Whoever still writes must not notice that nobody listens any more, and whoever still
        // reads must not take the client's leaving for the end of input.
        for pipe in [running.stdout.pipe, running.stderr.pipe]
            .into_iter()
            .flatten()
        {
            agent.drain.adopt(pipe);
        }
        if let Some(pipe) = running.stdin.pipe {
            running.process.park(pipe);
        }
        outcome
    }

    fn relay(&mut self, early: Vec<Frame>) -> Result<(), StreamError> {
        self.stream.queue(&self.running.started)?;
        let mut frames = early;
        let mut client_ended = false;
        // While nothing is read from the client, its leaving is looked for once.
        let mut end_seen = false;
        loop {
            for frame in frames.drain(..) {
                self.take(frame)?;
            }
            self.running.stdin.write();
            self.stream.flush()?;
            if self.is_over(false) {
                return Ok(());
            }

            let idle = self.stream.pending() == 0;
            let listen = !client_ended
                && self.running.stdin.waiting() < MAX_INPUT
                && self.stream.pending() < MAX_ANSWERS;
            let client = self.stream.interest(listen);
            let mut interests = [
                if listen || client_ended || end_seen {
                    client
                } else {
                    client.and_end()
                },
                self.running.stdout.interest(idle),
                self.running.stderr.interest(idle),
                self.running.stdin.interest(),
                self.running.exit_interest(),
            ];
            let deadline = if idle { self.running.deadline() } else { None };
            poll::wait(&mut interests, deadline).map_err(StreamError::Gone)?;
            let [client, stdout, stderr, _, ended] = interests;

            if client.has_input() && listen {
                match self.stream.read(&mut frames) {
                    Ok(_) => {}
                    // The client may have closed its half only and still listen. Of one that has
                    // gone, vsock says nothing else: its process keeps its input.
                    Err(StreamError::Ended) if self.stream.is_heard() => {
                        client_ended = true;
                        self.running.stdin.end();
                    }
                    Err(error) => return Err(error),
                }
            } else if client.hung_up() {
                return Err(StreamError::Gone(Errno::EPIPE));
            } else if client.ended() {
                end_seen = true;
                if !self.stream.is_heard() {
                    return Err(StreamError::Gone(Errno::EPIPE));
                }
            }
            // Before the pipes: what is owed counts what has not been read yet.
            if ended.readable() {
                self.running.note_exit();
            }
            let (mut moved, mut left_out) = (false, None);
            for kind in self.turn.order() {
                let output = if kind == Kind::STDOUT {
                    &stdout
                } else {
                    &stderr
                };
                if output.readable() {
                    if self.stream.pending() > 0 {
                        left_out = Some(kind);
                    } else {
                        moved |= self.forward(kind)?;
                    }
                }
            }
            if idle {
                self.turn.left_out(left_out);
            }
            self.running.update_limits(moved);
            if !stdout.readable() && !stderr.readable() && self.is_over(true) {
                return Ok(());
            }
        }
    }

    /// Whether nothing more is to be sent but the end. `silent` says that the pipes had nothing.
    fn is_over(&self, silent: bool) -> bool {
        let Some(exit) = &self.running.exit else {
            return false;
        };
        if self.stream.pending() > 0 {
            return false;
        }
        if self.running.stdout.pipe.is_none() && self.running.stderr.pipe.is_none() {
            return true;
        }
        let now = Instant::now();
        exit.limits
            .as_ref()
            .is_some_and(|limits| now >= limits.last || (silent && now >= limits.quiet))
    }

    /// Moves one chunk from a pipe to the client. Says whether there was one.
    fn forward(&mut self, kind: Kind) -> Result<bool, StreamError> {
        let output = if kind == Kind::STDOUT {
            &mut self.running.stdout
        } else {
            &mut self.running.stderr
        };
        let Some((head, data)) = self.chunk.split_first_chunk_mut::<HEADER_LEN>() else {
            return Ok(false);
        };
        let count = output.read(data);
        if count == 0 {
            return Ok(false);
        }
        *head = frame::header_for(output.kind, count)?;
        let whole = self.chunk.get(..HEADER_LEN.saturating_add(count));
        self.stream.send(whole.unwrap_or_default())?;
        Ok(true)
    }

    /// Does what a client's frame says.
    fn take(&mut self, frame: Frame) -> Result<(), StreamError> {
        match frame.kind {
            Kind::STDIN => self.running.stdin.add(&frame.body),
            Kind::STDIN_END => self.running.stdin.end(),
            Kind::SIGNAL_PROCESS => {
                let SignalProcess { signal } = decode_body(&frame.body)?;
                if (1..=64).contains(&signal) {
                    self.running.signal(self.agent, signal);
                } else {
                    let message = format!("signal {signal} is not one of 1 to 64");
                    let error = ErrorBody::caller(ErrorCode::InvalidArgument, message);
                    self.stream.queue(&error)?;
                }
            }
            kind => self.stream.queue::<ErrorBody>(&unsupported(kind))?,
        }
        Ok(())
    }
}

impl Inner {
    fn exit_interest(&self) -> Interest {
        match self.exit {
            None => Interest::new(self.process.ended(), true, false),
            Some(_) => Interest::NONE,
        }
    }

    fn note_exit(&mut self) {
        if let (None, Some(status)) = (&self.exit, self.process.status()) {
            self.stdout.count_owed();
            self.stderr.count_owed();
            self.exit = Some(Exit {
                status,
                limits: None,
            });
        }
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
            Some(limits) if moved => limits.quiet = quiet,
            Some(_) => {}
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let limits = self.exit.as_ref()?.limits.as_ref()?;
        Some(limits.quiet.min(limits.last))
    }

    fn signal(&self, agent: &Agent, signal: u8) {
        agent.reaper.signal_group(&self.process, signal);
        // SIGKILL is no request that a child could have been shielded from by a group of its own,
        // or by the main process's having ended before it.
        if i32::from(signal) == libc::SIGKILL
            && let Some(group) = &self.group
        {
            group.kill();
        }
    }
}

impl Input {
    fn waiting(&self) -> usize {
        self.waiting.len().saturating_sub(self.written)
    }

    fn interest(&self) -> Interest {
        match &self.pipe {
            Some(pipe) if self.waiting() > 0 => Interest::new(pipe.as_fd(), false, true),
            _ => Interest::NONE,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.pipe.is_some() && !self.ended {
            self.waiting.extend_from_slice(bytes);
        }
    }

    fn end(&mut self) {
        self.ended = true;
    }

    /// Gives the process what it takes now. One that has closed its input is left in peace.
    fn write(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        while self.waiting() > 0 {
            let rest = self.waiting.get(self.written..).unwrap_or_default();
            match nix::unistd::write(pipe, rest) {
                Ok(count) => self.written = self.written.saturating_add(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    self.ended = true;
                    break;
                }
            }
        }
        self.waiting = Vec::new();
        self.written = 0;
        if self.ended {
            self.pipe = None;
        }
    }
}

impl Output {
    fn interest(&self, idle: bool) -> Interest {
        match &self.pipe {
            // While the client does not take what is there, no more is read.
            Some(pipe) if idle => Interest::new(pipe.as_fd(), true, false),
            _ => Interest::NONE,
        }
    }

    /// Reads once; zero means nothing now, or the end.
    fn read(&mut self, data: &mut [u8]) -> usize {
        let Some(pipe) = &self.pipe else { return 0 };
        match nix::unistd::read(pipe, data) {
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Ok(count @ 1..) => {
                self.owed = self.owed.saturating_sub(count);
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
            self.owed = usize::try_from(count).unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_that_was_left_out_comes_first_the_next_time() {
        let mut turn = Turn::default();
        assert_eq!(turn.order()[0], Kind::STDOUT);
        turn.left_out(Some(Kind::STDERR));
        assert_eq!(turn.order()[0], Kind::STDERR);
        turn.left_out(Some(Kind::STDOUT));
        assert_eq!(turn.order()[0], Kind::STDOUT);
        turn.left_out(Some(Kind::STDERR));
        turn.left_out(None);
        assert_eq!(turn.order()[0], Kind::STDOUT);
    }
}
