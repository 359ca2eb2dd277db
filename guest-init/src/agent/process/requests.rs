//! What clients ask about processes by their ids, each on a stream of its own, so that none waits
//! behind another.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use protocol::processes::{
    AttachFrom, AttachProcess, KillProcess, ListProcesses, ProcessAttached, ProcessRemoved,
    RemoveProcess, SendSignal, StdinWritten, WaitProcess,
};
use protocol::{ErrorBody, ErrorCode, Frame, Kind};

use super::input::{MAX_INPUT, Typing};
use super::life::Process;
use super::reader::{self, Reader};
use super::session::{Client, check_signal};
use super::watcher::Watcher;
use crate::agent::poll::{self, Interest};
use crate::agent::stream::{Stream, StreamError};
use crate::agent::{Agent, lock, unsupported};
use crate::cgroup::CommandGroup;

/// How long a process may take to end by itself when the caller does not say.
const GRACE: Duration = Duration::from_secs(5);
/// The longest that a caller can give it.
const MAX_GRACE: Duration = Duration::from_secs(600);
/// How long a killed process may take to go; one that takes longer waits for hardware.
const AFTER_KILL: Duration = Duration::from_secs(10);
const SIGHUP: u8 = 1;
const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;
const SIGCONT: u8 = 18;

pub(super) fn list(
    agent: &Arc<Agent>,
    request: &ListProcesses,
    stream: Stream,
) -> Result<(), StreamError> {
    stream.finish(&agent.registry.list(request.after))
}

pub(super) fn attach(
    agent: &Arc<Agent>,
    process: &Arc<Process>,
    request: &AttachProcess,
    mut stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    // What is there now; a reader that does not follow goes no further.
    let head = lock(&process.output).head();
    let refusal = |message: String| ErrorBody::caller(ErrorCode::InvalidArgument, message);
    let at = match request.from {
        AttachFrom::Offset if request.value > head => {
            let message = format!(
                "offset {} is beyond the end of the output, {head}",
                request.value
            );
            return stream.refuse(&refusal(message));
        }
        AttachFrom::Offset => request.value,
        AttachFrom::Oldest => reader::oldest(process).min(head),
        AttachFrom::Now => head,
        AttachFrom::Lines => reader::lines_back(process, head, request.value),
        other => {
            let message = format!("`from` has the unknown value {}", other.to_wire());
            return stream.refuse(&refusal(message));
        }
    };
    // A follower holds the process back from here on, so nothing is lost between the two.
    let reader = if request.follow {
        Reader::following(process, at)
    } else {
        Reader::until(process, at, Some(head))
    };
    stream.queue(&ProcessAttached {
        process: process.info(),
        offset: at,
    })?;
    Client::new(agent, process, stream, reader, early, false).serve()
}

pub(super) fn wait(
    process: &Process,
    request: &WaitProcess,
    stream: Stream,
) -> Result<(), StreamError> {
    let deadline = request
        .timeout_ms
        .and_then(|given| after(Duration::from_millis(u64::from(given))));
    let watcher = watch(process)?;
    let mut listens = true;
    while !has_ended(process, &watcher) && deadline.is_none_or(|at| Instant::now() < at) {
        let client = stream.interest(false);
        let mut interests = [
            if listens { client.and_end() } else { client },
            Interest::new(watcher.event().as_fd(), true, false),
        ];
        poll::wait(&mut interests, deadline).map_err(StreamError::Gone)?;
        let [client, news] = interests;
        if news.readable() {
            watcher.rest();
        }
        if client.hung_up() {
            return Err(StreamError::Gone(Errno::EPIPE));
        }
        if client.ended() {
            // It may have closed its half only.
            listens = false;
            if !stream.is_heard() {
                return Err(StreamError::Gone(Errno::EPIPE));
            }
        }
    }
    stream.finish(&process.info())
}

pub(super) fn write_stdin(
    process: &Process,
    mut stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let watcher = watch(process)?;
    let mut typing = Typing::default();
    let mut frames = early;
    let mut is_last = false;
    loop {
        for frame in std::mem::take(&mut frames) {
            match frame.kind {
                Kind::STDIN if is_last => {}
                Kind::STDIN if !frame.body.is_empty() => typing.add(&frame.body),
                Kind::STDIN => {}
                Kind::STDIN_END => {
                    is_last = true;
                    typing.end(process);
                }
                kind => stream.queue::<ErrorBody>(&unsupported(kind))?,
            }
        }
        let had = typing.waiting() > 0;
        if had && has_ended(process, &watcher) {
            let message = format!("process {} has ended and takes no input", process.id);
            let error = ErrorBody::caller(ErrorCode::ProcessNotRunning, message);
            return stream.refuse(&error);
        }
        if !typing.write(process) && had {
            let message = format!(
                "process {} has no standard input, or it was closed",
                process.id
            );
            let error = ErrorBody::caller(ErrorCode::InputClosed, message);
            return stream.refuse(&error);
        }
        stream.flush()?;
        if is_last && typing.waiting() == 0 {
            return stream.finish(&StdinWritten {
                bytes: typing.taken,
            });
        }
        let listening = !is_last && typing.waiting() < MAX_INPUT && stream.pending() == 0;
        let descriptor = typing.descriptor(process);
        let mut interests = [
            stream.interest(listening),
            Typing::interest(descriptor.as_ref()),
            Interest::new(watcher.event().as_fd(), true, false),
        ];
        watcher.arm();
        poll::wait(&mut interests, None).map_err(StreamError::Gone)?;
        let [client, _, news] = interests;
        if news.readable() {
            watcher.rest();
        }
        if client.has_input() && listening {
            match stream.read(&mut frames) {
                Ok(_) => {}
                // Its half has ended; what it sent is still to be written. The answer finds out
                // whether it is still there.
                Err(StreamError::Ended) => is_last = true,
                Err(error) => return Err(error),
            }
        } else if client.hung_up() && !is_last {
            return Err(StreamError::Gone(Errno::EPIPE));
        }
    }
}

pub(super) fn send_signal(
    agent: &Agent,
    process: &Process,
    request: &SendSignal,
    stream: Stream,
) -> Result<(), StreamError> {
    if let Err(error) = check_signal(request.signal) {
        return stream.refuse(&error);
    }
    if process.signal(&agent.reaper, request.signal) {
        return stream.finish(&process.info());
    }
    let message = format!("process {} has ended and takes no signal", process.id);
    stream.refuse(&ErrorBody::caller(ErrorCode::ProcessNotRunning, message))
}

pub(super) fn kill(
    agent: &Agent,
    process: &Process,
    request: &KillProcess,
    stream: Stream,
) -> Result<(), StreamError> {
    let grace = request.grace_ms.map_or(GRACE, |given| {
        Duration::from_millis(u64::from(given)).min(MAX_GRACE)
    });
    end(agent, process, grace)?;
    if process.ended().is_none() {
        let message = format!(
            "process {} has not ended {} s after SIGKILL; it waits for a device",
            process.id,
            AFTER_KILL.as_secs()
        );
        let error = ErrorBody::guest(ErrorCode::ProcessRunning, message);
        return stream.refuse(&error.retryable_after_ms(5000));
    }
    stream.finish(&process.info())
}

/// Asks the process to end, waits, and ends it and what it started. Whether the client is still
/// there does not matter.
fn end(agent: &Agent, process: &Process, grace: Duration) -> Result<(), StreamError> {
    let watcher = watch(process)?;
    let Some(body) = process.body() else {
        // It may be just starting or just ending.
        return until_ended(process, &watcher, after(AFTER_KILL));
    };
    if body.child.status().is_none() {
        process.mark_killed();
    }
    let deadline = after(grace);
    if !grace.is_zero() {
        process.signal(&agent.reaper, SIGTERM);
        if process.about.terminal {
            process.signal(&agent.reaper, SIGHUP);
        }
        // One that was stopped could not hear either.
        process.signal(&agent.reaper, SIGCONT);
        match &body.group {
            Some(group) => {
                let events = group.events();
                // The main process is one of the group.
                let is_populated = || match &events {
                    // Read where it is polled, or it stays interesting.
                    Some(events) => CommandGroup::says_populated(events),
                    None => group.is_populated(),
                };
                while is_populated() && deadline.is_some_and(|at| Instant::now() < at) {
                    let events = events.as_ref().map(AsFd::as_fd).map(Interest::news);
                    let mut interests = [events.unwrap_or(Interest::NONE)];
                    poll::wait(&mut interests, deadline).map_err(StreamError::Gone)?;
                }
            }
            None => until_ended(process, &watcher, deadline)?,
        }
    }
    let populated = body
        .group
        .as_ref()
        .is_some_and(|group| group.is_populated());
    if populated || body.child.status().is_none() {
        process.signal(&agent.reaper, SIGKILL);
    }
    drop(body);
    until_ended(process, &watcher, after(AFTER_KILL))
}

pub(super) fn remove(
    agent: &Arc<Agent>,
    request: &RemoveProcess,
    stream: Stream,
) -> Result<(), StreamError> {
    match agent.registry.remove(request.id) {
        Ok(()) => stream.finish(&ProcessRemoved {}),
        Err(error) => stream.refuse(&error),
    }
}

fn watch(process: &Process) -> Result<Arc<Watcher>, StreamError> {
    let watcher = Watcher::new().map_err(StreamError::Gone)?;
    lock(&process.output).watch(&watcher);
    Ok(watcher)
}

/// If it has not ended, `watcher` will tell.
fn has_ended(process: &Process, watcher: &Watcher) -> bool {
    let output = lock(&process.output);
    watcher.arm();
    output.has_ended()
}

fn until_ended(
    process: &Process,
    watcher: &Watcher,
    deadline: Option<Instant>,
) -> Result<(), StreamError> {
    while !has_ended(process, watcher) && deadline.is_none_or(|at| Instant::now() < at) {
        let mut interests = [Interest::new(watcher.event().as_fd(), true, false)];
        poll::wait(&mut interests, deadline).map_err(StreamError::Gone)?;
        watcher.rest();
    }
    Ok(())
}

fn after(duration: Duration) -> Option<Instant> {
    Instant::now().checked_add(duration)
}
