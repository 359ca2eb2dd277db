//! Files: each request is served here on its own stream, from the first frame to the last. What a
//! path leads to is the user's: it may be a pipe that never answers, a device, a file without end,
//! or another thing a moment later. None of them may block the agent or fill its memory.

mod budget;
mod entries;
mod error;
mod inflow;
mod info;
mod list;
mod manage;
mod outflow;
mod owner;
mod path;
mod read;
mod remove;
mod tree;
mod upload;
mod watch;
mod write;

pub(crate) use entries::Entries;
#[cfg(fuzzing)]
pub(crate) use tree::fuzz as fuzz_archive;
pub(crate) use upload::Uploads;

use std::path::Path;

use protocol::message::{Message, decode_body};
use protocol::{ErrorBody, ErrorCode, Frame, Kind};

use super::Agent;
use super::stream::{Stream, StreamError};

/// Whether a stream that begins with this kind is served here.
pub(crate) fn is_request(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::STAT_FILE
            | Kind::MAKE_DIRECTORY
            | Kind::RENAME_FILE
            | Kind::REMOVE_FILE
            | Kind::MAKE_SYMLINK
            | Kind::READ_LINK
            | Kind::CHANGE_MODE
            | Kind::CHANGE_OWNER
            | Kind::RESIZE_FILE
            | Kind::WALK_DIRECTORY
            | Kind::READ_FILE
            | Kind::WRITE_FILE
            | Kind::QUERY_UPLOAD
            | Kind::DROP_UPLOAD
            | Kind::PACK_TREE
            | Kind::UNPACK_TREE
            | Kind::WATCH_FILES
    )
}

/// Serves a stream whose first frame [`is_request`]. `early` are frames that came right behind it.
pub(crate) fn serve(
    agent: &Agent,
    frame: &Frame,
    stream: Stream,
    early: Vec<Frame>,
) -> Result<(), StreamError> {
    let at = &agent.workspace;
    match frame.kind {
        Kind::STAT_FILE => answer(stream, frame, |request| manage::stat_file(request, at)),
        Kind::MAKE_DIRECTORY => {
            answer(stream, frame, |request| manage::make_directory(request, at))
        }
        Kind::RENAME_FILE => answer(stream, frame, |request| manage::rename(request, at)),
        Kind::REMOVE_FILE => answer(stream, frame, |request| manage::remove(request, at)),
        Kind::MAKE_SYMLINK => answer(stream, frame, |request| manage::symlink(request, at)),
        Kind::READ_LINK => answer(stream, frame, |request| manage::read_link(request, at)),
        Kind::CHANGE_MODE => answer(stream, frame, |request| manage::change_mode(request, at)),
        Kind::CHANGE_OWNER => answer(stream, frame, |request| manage::change_owner(request, at)),
        Kind::RESIZE_FILE => answer(stream, frame, |request| manage::resize(request, at)),
        Kind::WALK_DIRECTORY => match decode_body(&frame.body) {
            Ok(request) => list::walk(agent, request, stream),
            Err(error) => stream.refuse(&error.into()),
        },
        Kind::QUERY_UPLOAD => match decode_body(&frame.body) {
            Ok(request) => upload::query(agent, request, stream),
            Err(error) => stream.refuse(&error.into()),
        },
        Kind::DROP_UPLOAD => answer(stream, frame, |request| upload::discard(agent, request)),
        Kind::READ_FILE => match decode_body(&frame.body) {
            Ok(request) => read::serve(agent, request, stream),
            Err(error) => stream.refuse(&error.into()),
        },
        Kind::WRITE_FILE => match decode_body(&frame.body) {
            Ok(request) => write::serve(agent, request, stream, early),
            Err(error) => stream.refuse_and_drain(&error.into()),
        },
        Kind::PACK_TREE => match decode_body(&frame.body) {
            Ok(request) => tree::pack(agent, request, stream),
            Err(error) => stream.refuse(&error.into()),
        },
        Kind::UNPACK_TREE => match decode_body(&frame.body) {
            Ok(request) => tree::unpack(agent, request, stream, early),
            Err(error) => stream.refuse_and_drain(&error.into()),
        },
        Kind::WATCH_FILES => match decode_body(&frame.body) {
            Ok(request) => watch::serve(agent, request, stream),
            Err(error) => stream.refuse(&error.into()),
        },
        kind => stream.refuse(&super::unsupported(kind)),
    }
}

/// One request, one answer.
fn answer<Q: Message, A: Message>(
    stream: Stream,
    frame: &Frame,
    serve: impl FnOnce(Q) -> Result<A, ErrorBody>,
) -> Result<(), StreamError> {
    let outcome = decode_body(&frame.body)
        .map_err(ErrorBody::from)
        .and_then(serve);
    match outcome {
        Ok(answer) => stream.finish(&answer),
        Err(error) => stream.refuse(&error),
    }
}

fn not_regular(path: &Path) -> ErrorBody {
    let shown = error::show(path);
    ErrorBody::caller(
        ErrorCode::NotARegularFile,
        format!("{shown} is no regular file"),
    )
    .with_detail(format!("EINVAL\n{shown}"))
}
