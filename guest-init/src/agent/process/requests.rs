//! What clients ask about processes by their ids, each on a stream of its own, so that none waits
//! behind another.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use protocol::processes::{
    AttachFrom, AttachProcess, ListProcesses, ProcessAttached, ProcessRemoved, RemoveProcess,
    SendSignal, StdinWritten, WaitProcess,
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
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    // Input that comes along has nowhere to go before that.
    let Some(mut stream) = once_begun(process, stream)? else {
        return Ok(());
    };
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
    let mut listening = Listening::default();
    while !has_ended(process, &watcher) && deadline.is_none_or(|at| Instant::now() < at) {
        listening.wait(&stream, &watcher, deadline)?;
    }
    tell_state(process, stream)
}

/// Waits until it is known whether there is a process; gives no stream when there is none, of which
/// the client is told.
pub(super) fn once_begun(process: &Process, stream: Stream) -> Result<Option<Stream>, StreamError> {
    let watcher = watch(process)?;
    let mut listening = Listening::default();
    loop {
        watcher.arm();
        if !process.is_starting() {
            break;
        }
        listening.wait(&stream, &watcher, None)?;
    }
    if process.is_refused() {
        stream.refuse(&was_refused(process))?;
        return Ok(None);
    }
    Ok(Some(stream))
}

/// The answer to whoever has found a process that was not to be started after all.
pub(super) fn was_refused(process: &Process) -> ErrorBody {
    let message = format!("the start of process {} was refused", process.id);
    ErrorBody::caller(ErrorCode::NoSuchProcess, message)
}

/// Answers with the process as it is now.
pub(super) fn tell_state(process: &Process, stream: Stream) -> Result<(), StreamError> {
    if process.is_refused() {
        return stream.refuse(&was_refused(process));
    }
    stream.finish(&process.info())
}

/// Waits for news of a process while a client waits for an answer.
struct Listening {
    /// The client's half has not ended.
    is_open: bool,
}

impl Default for Listening {
    fn default() -> Self {
        Self { is_open: true }
    }
}

impl Listening {
    /// Fails when the client has gone.
    fn wait(
        &mut self,
        stream: &Stream,
        watcher: &Watcher,
        deadline: Option<Instant>,
    ) -> Result<(), StreamError> {
        let client = stream.interest(false);
        let mut interests = [
            if self.is_open {
                client.and_end()
            } else {
                client
            },
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
            self.is_open = false;
            if !stream.is_heard() {
                return Err(StreamError::Gone(Errno::EPIPE));
            }
        }
        Ok(())
    }
}

pub(super) fn write_stdin(
    process: &Process,
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let Some(mut stream) = once_begun(process, stream)? else {
        return Ok(());
    };
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
    let Some(stream) = once_begun(process, stream)? else {
        return Ok(());
    };
    if process.signal(&agent.reaper, request.signal) {
        return stream.finish(&process.info());
    }
    let message = format!("process {} has ended and takes no signal", process.id);
    stream.refuse(&ErrorBody::caller(ErrorCode::ProcessNotRunning, message))
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

pub(super) fn watch(process: &Process) -> Result<Arc<Watcher>, StreamError> {
    let watcher = Watcher::new().map_err(StreamError::Gone)?;
    lock(&process.output).watch(&watcher);
    Ok(watcher)
}

/// If it has not ended, `watcher` will tell.
pub(super) fn has_ended(process: &Process, watcher: &Watcher) -> bool {
    let output = lock(&process.output);
    watcher.arm();
    output.has_ended()
}

pub(super) fn after(duration: Duration) -> Option<Instant> {
    Instant::now().checked_add(duration)
}
