//! Processes for clients: started, read, written to, signalled and ended, by ids of the clients' own
//! and independent of any connection. The pump of a process runs on the thread that started it;
//! every other stream looks on, through what [`life`] holds.

mod command;
mod drain;
mod ending;
mod input;
mod kill;
mod life;
mod logs;
mod output;
mod piece;
mod pump;
mod reader;
mod registry;
mod requests;
mod segment;
mod session;
mod spawn;
mod start;
mod terminal;
mod user;
mod watcher;

#[cfg(fuzzing)]
pub(crate) use command::Command;
pub(crate) use command::check_key;
pub(crate) use drain::Drain;
#[cfg(test)]
pub(crate) use piece::Source;
pub(crate) use piece::{Piece, as_u64};
pub(crate) use registry::Registry;
pub(crate) use spawn::note_ignored_signals;
pub(crate) use terminal::Terminals;
#[cfg(fuzzing)]
pub(crate) use user::fuzz as fuzz_users;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use protocol::id::ProcessId;
use protocol::message::{Message, decode_body};
use protocol::process::{ProcessStarted, StartProcess};
use protocol::processes::{AttachProcess, KillProcess, SendSignal, WaitProcess, WriteStdin};
use protocol::{ErrorBody, ErrorCode, Frame, Kind};

use super::Agent;
use super::stream::{Stream, StreamError};
#[cfg(not(fuzzing))]
use command::Command;
use life::Process;
use reader::Reader;
use registry::Claim;
use session::Client;
use start::NotStarted;

/// Whether a frame of this kind begins a stream that is served here.
pub(crate) fn is_request(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::START_PROCESS
            | Kind::ATTACH_PROCESS
            | Kind::LIST_PROCESSES
            | Kind::WAIT_PROCESS
            | Kind::WRITE_STDIN
            | Kind::SEND_SIGNAL
            | Kind::KILL_PROCESS
            | Kind::REMOVE_PROCESS
    )
}

/// Serves one stream to its end. `early` are frames that came right behind the request.
pub(crate) fn serve(
    agent: &Arc<Agent>,
    request: Frame,
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    match request.kind {
        Kind::START_PROCESS => with(request, stream, |request, stream| {
            run(agent, request, stream, early)
        }),
        Kind::LIST_PROCESSES => with(request, stream, |request, stream| {
            requests::list(agent, &request, stream)
        }),
        Kind::ATTACH_PROCESS => with_process(
            agent,
            (request, stream),
            |request: &AttachProcess| request.id,
            |process, request, stream| requests::attach(agent, process, request, stream, early),
        ),
        Kind::WRITE_STDIN => with_process(
            agent,
            (request, stream),
            |request: &WriteStdin| request.id,
            |process, _, stream| requests::write_stdin(process, stream, early),
        ),
        Kind::WAIT_PROCESS => with_process(
            agent,
            (request, stream),
            |request: &WaitProcess| request.id,
            |process, request, stream| requests::wait(process, request, stream),
        ),
        Kind::SEND_SIGNAL => with_process(
            agent,
            (request, stream),
            |request: &SendSignal| request.id,
            |process, request, stream| requests::send_signal(agent, process, request, stream),
        ),
        Kind::KILL_PROCESS => with_process(
            agent,
            (request, stream),
            |request: &KillProcess| request.id,
            |process, request, stream| kill::kill(agent, process, request, stream),
        ),
        Kind::REMOVE_PROCESS => with(request, stream, |request, stream| {
            requests::remove(agent, &request, stream)
        }),
        kind => stream.refuse(&super::unsupported(kind)),
    }
}

/// Reads the request, and refuses what is none.
fn with<M: Message>(
    frame: Frame,
    stream: Stream,
    serve: impl FnOnce(M, Stream) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    match decode_body::<M>(&frame.body) {
        Ok(request) => {
            drop(frame);
            serve(request, stream)
        }
        Err(error) => stream.refuse(&error.into()),
    }
}

/// The same for a request about one process, of which `id` says which; refuses those of unknown ones.
fn with_process<M: Message>(
    agent: &Agent,
    (frame, stream): (Frame, Stream),
    id: impl FnOnce(&M) -> ProcessId,
    serve: impl FnOnce(&Arc<Process>, &M, Stream) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    with(frame, stream, |request: M, stream| {
        match agent.registry.find(id(&request)) {
            Ok(process) => serve(&process, &request, stream),
            Err(error) => stream.refuse(&error),
        }
    })
}

/// Starts what the client asked for and stays with it until its end, whether the client does or not.
fn run(
    agent: &Arc<Agent>,
    request: StartProcess,
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let invalid = |problem: String| ErrorBody::caller(ErrorCode::InvalidArgument, problem);
    let process = match agent.registry.claim(&request) {
        Ok(Claim::New(process)) => process,
        Ok(Claim::Known(process)) => return join(agent, &process, stream, early),
        Err(error) => return stream.refuse(&error),
    };
    if agent.powering_off.load(Ordering::Acquire) {
        agent.registry.forget(&process);
        let error = ErrorBody::caller(ErrorCode::VmStopped, "the VM is powering off");
        return stream.refuse(&error);
    }
    let command = match Command::parse(request, &agent.workspace, &agent.settings()) {
        Ok(command) => command,
        Err(problem) => {
            agent.registry.forget(&process);
            return stream.refuse(&invalid(problem.to_string()));
        }
    };
    let pump = match start::start(agent, &command, &process) {
        Ok(pump) => pump,
        Err(NotStarted::Refused(error)) => {
            agent.registry.forget(&process);
            return stream.refuse(&error);
        }
        Err(NotStarted::Failed(error)) => {
            let ended = ending::not_started(&command, error);
            let forgotten = agent.registry.retire(&process, ended.clone());
            let told = stream.finish(&ended);
            if let Some(gone) = forgotten {
                gone.remove_log(&agent.registry.logs);
            }
            return told;
        }
    };
    let client = if command.follows {
        let reader = Reader::following(&process, 0);
        let mut stream = stream;
        let queued = stream.queue(&started(&process));
        let client = Client::new(agent, &process, stream, reader, early, true);
        queued.is_ok().then_some(client)
    } else {
        tell(stream, &started(&process));
        None
    };
    drop(command);
    session::own(pump, &process, client);
    Ok(())
}

fn started(process: &Process) -> ProcessStarted {
    ProcessStarted {
        pid: process.pid.get().copied().unwrap_or(0),
    }
}

/// Sends the only answer of a stream if the connection takes it at once; one that has got no answer
/// before always does. The process does not wait for its client.
fn tell<M: Message>(mut stream: Stream, message: &M) {
    // A client that has gone finds the process by its id.
    let _ = stream.queue(message).and_then(|()| stream.flush());
}

/// Answers a repeated start as the first one was answered.
fn join(
    agent: &Arc<Agent>,
    process: &Arc<Process>,
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let Some(mut stream) = requests::once_begun(process, stream)? else {
        return Ok(());
    };
    if process.pid.get().is_none()
        && let Some(ended) = process.ended()
    {
        return stream.finish(&ended);
    }
    if process.about.output != protocol::process::OutputMode::Follow {
        return stream.finish(&started(process));
    }
    let reader = Reader::following(process, 0);
    stream.queue(&started(process))?;
    Client::new(agent, process, stream, reader, early, true).serve()
}
