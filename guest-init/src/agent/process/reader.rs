//! One reader of a process's output, at an offset of its own: from the log where the memory has let
//! go of it, then from the window as it comes. Says what is missing; never waits itself.

use std::sync::Arc;

use protocol::process::OutputGap;
use protocol::processes::MAX_TAIL;

use super::life::Process;
use super::output::Found;
use super::piece::Piece;
use super::segment::Cursor;
use super::watcher::Watcher;
use crate::agent::lock;
use crate::agent::stream::{Stream, StreamError};
use crate::log;

/// Pieces that are sent before the client is listened to again.
const TURN: u32 = 32;

/// See the module.
pub(crate) struct Reader {
    process: Arc<Process>,
    at: u64,
    /// Nothing is read beyond this.
    until: Option<u64>,
    follower: Option<u64>,
    watcher: Option<Arc<Watcher>>,
    cursor: Option<Cursor>,
}

/// What a reader has next.
enum Next {
    Piece(Piece),
    Gap(u64),
    Nothing,
    End,
}

/// How far it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The stream takes no more now.
    Full,
    /// There is more; it is the turn of others.
    More,
    /// The process has said no more yet.
    Waiting,
    /// Everything was sent that is to be sent.
    Done,
}

impl Reader {
    /// One that the process waits for, if its output is to be followed at all.
    pub(crate) fn following(process: &Arc<Process>, at: u64) -> Self {
        let mut reader = Self::until(process, at, None);
        reader.follower = Some(lock(&process.output).follow(at));
        reader
    }

    /// One that nobody waits for.
    pub(crate) fn until(process: &Arc<Process>, at: u64, until: Option<u64>) -> Self {
        Self {
            process: Arc::clone(process),
            at,
            until,
            follower: None,
            watcher: None,
            cursor: None,
        }
    }

    /// Has `watcher` woken when there is something new.
    pub(crate) fn watch(&mut self, watcher: &Arc<Watcher>) {
        lock(&self.process.output).watch(watcher);
        self.watcher = Some(Arc::clone(watcher));
    }

    /// The merged offset of what comes next.
    pub(crate) fn offset(&self) -> u64 {
        self.at
    }

    /// Sends what there is as long as the stream takes it.
    pub(crate) fn pull(&mut self, stream: &mut Stream) -> Result<Progress, StreamError> {
        let mut pieces = 0..TURN;
        while stream.pending() == 0 {
            if pieces.next().is_none() {
                return Ok(Progress::More);
            }
            match self.next() {
                Next::Piece(piece) => {
                    self.at = self.at.saturating_add(piece.len());
                    stream.send(piece.source.kind(), piece)?;
                }
                Next::Gap(bytes) => {
                    self.at = self.at.saturating_add(bytes);
                    stream.queue(&OutputGap { bytes })?;
                    stream.flush()?;
                }
                Next::Nothing => return Ok(Progress::Waiting),
                Next::End => return Ok(Progress::Done),
            }
        }
        Ok(Progress::Full)
    }

    fn next(&mut self) -> Next {
        if self.until.is_some_and(|until| self.at >= until) {
            return Next::End;
        }
        let found = {
            let mut output = lock(&self.process.output);
            if let Some(follower) = self.follower {
                output.advance(follower, self.at);
            }
            let found = output.find(self.at);
            if let (Found::Nothing, Some(watcher)) = (&found, &self.watcher) {
                watcher.arm();
            }
            found
        };
        if self.follower.is_some() {
            self.process.wake_pump_if_held();
        }
        let next = match found {
            Found::Piece(piece) => Next::Piece(piece),
            Found::NotInMemory { until } => self.read_log(until),
            Found::Nothing => Next::Nothing,
            Found::End => Next::End,
        };
        let Some(left) = self.until.map(|until| until.saturating_sub(self.at)) else {
            return next;
        };
        match next {
            Next::Piece(piece) => Next::Piece(piece.cut(left)),
            Next::Gap(bytes) => Next::Gap(bytes.min(left)),
            other => other,
        }
    }

    /// From the disk; what is neither there nor in memory, which begins at `memory`, is a gap.
    fn read_log(&mut self, memory: u64) -> Next {
        if let Some(piece) = self.read_cursor() {
            return Next::Piece(piece);
        }
        let segment = lock(&self.process.segments).find(self.at);
        match segment {
            Some(segment) if segment.start <= self.at => {
                match Cursor::open(&segment) {
                    Ok(cursor) => self.cursor = Some(cursor),
                    Err(error) => log::warn(format_args!(
                        "event=process_log_unreadable id={} error=\"{error}\"",
                        self.process.id
                    )),
                }
                match self.read_cursor() {
                    Some(piece) => Next::Piece(piece),
                    // The user has changed or removed it.
                    None => Next::Gap(segment.end.saturating_sub(self.at).max(1)),
                }
            }
            Some(segment) => Next::Gap(segment.start.min(memory).saturating_sub(self.at).max(1)),
            None => Next::Gap(memory.saturating_sub(self.at).max(1)),
        }
    }

    fn read_cursor(&mut self) -> Option<Piece> {
        let cursor = self.cursor.as_mut()?;
        if cursor.offset > self.at {
            self.cursor = None;
            return None;
        }
        loop {
            match cursor.next() {
                Ok(Some((offset, piece))) => {
                    let piece = piece.skip(self.at.saturating_sub(offset));
                    if piece.len() > 0 {
                        return Some(piece);
                    }
                }
                Ok(None) | Err(_) => {
                    self.cursor = None;
                    return None;
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(follower) = self.follower {
            lock(&self.process.output).unfollow(follower);
            self.process.wake_pump_if_held();
        }
    }
}

/// The merged offset of the oldest byte that is kept.
pub(crate) fn oldest(process: &Process) -> u64 {
    let segments = lock(&process.segments);
    let first = segments.list.iter().find(|one| one.end > one.start);
    let on_disk = first.map(|segment| segment.start);
    let in_memory = lock(&process.output).window_start();
    on_disk.map_or(in_memory, |start| start.min(in_memory))
}

/// Where the last `lines` lines before `head` begin, at most [`MAX_TAIL`] bytes back.
pub(crate) fn lines_back(process: &Arc<Process>, head: u64, lines: u64) -> u64 {
    if lines == 0 {
        return head;
    }
    let from = oldest(process).max(head.saturating_sub(MAX_TAIL));
    // The last byte ends its own line; it begins none.
    let last = head.saturating_sub(1);
    let begins = |visit: &mut dyn FnMut(u64) -> bool| {
        let mut reader = Reader::until(process, from, Some(last));
        loop {
            match reader.next() {
                Next::Piece(piece) => {
                    for (offset, byte) in (reader.at..).zip(piece.bytes()) {
                        if *byte == b'\n' && visit(offset.saturating_add(1)) {
                            return;
                        }
                    }
                    reader.at = reader.at.saturating_add(piece.len());
                }
                Next::Gap(bytes) => reader.at = reader.at.saturating_add(bytes),
                Next::Nothing | Next::End => return,
            }
        }
    };
    let mut count: u64 = 1;
    begins(&mut |_| {
        count = count.saturating_add(1);
        false
    });
    let mut skip = count.saturating_sub(lines);
    let mut start = from;
    if skip > 0 {
        begins(&mut |offset| {
            skip = skip.saturating_sub(1);
            start = offset;
            skip == 0
        });
    }
    start
}
