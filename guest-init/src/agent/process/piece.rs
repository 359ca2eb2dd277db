//! Pieces of output, which the window, its readers and the log share without copying them, and the
//! buffers that they were read into.

use std::sync::{Arc, Mutex};

use protocol::Kind;
use protocol::frame::MAX_DATA;

use crate::agent::lock;

/// Buffers that wait for their next use; memory that goes back to the system comes back slowly.
const SPARE: usize = 16;
/// At most [`SPARE`] buffers of [`MAX_DATA`] bytes.
static POOL: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer of [`MAX_DATA`] bytes to read into.
pub(crate) fn take_buffer() -> Vec<u8> {
    let mut buffer = lock(&POOL).pop().unwrap_or_default();
    buffer.resize(MAX_DATA, 0);
    buffer
}

/// Keeps a buffer for its next use, if it is one to read into and there is room for it.
pub(crate) fn give_buffer(buffer: Vec<u8>) {
    if buffer.capacity() >= MAX_DATA {
        let mut pool = lock(&POOL);
        if pool.len() < SPARE {
            pool.push(buffer);
        }
    }
}

/// Where bytes came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Source {
    /// The kind of the frames that carry it.
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::Stdout => Kind::STDOUT,
            Self::Stderr => Kind::STDERR,
        }
    }
}

/// Output of one source without a break, at most [`MAX_DATA`] bytes. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) source: Source,
    data: Arc<Vec<u8>>,
    from: usize,
    to: usize,
}

impl Piece {
    pub(crate) fn new(source: Source, data: Vec<u8>) -> Self {
        Self::of(source, &Arc::new(data))
    }

    /// All of what others have, too.
    pub(crate) fn of(source: Source, data: &Arc<Vec<u8>>) -> Self {
        Self {
            source,
            from: 0,
            to: data.len(),
            data: Arc::clone(data),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.data.get(self.from..self.to).unwrap_or_default()
    }

    /// Without the first `count` bytes.
    pub(crate) fn skip(mut self, count: u64) -> Self {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.from = self.from.saturating_add(count).min(self.to);
        self
    }

    /// Without what follows the first `count` bytes.
    pub(crate) fn cut(mut self, count: u64) -> Self {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.to = self.from.saturating_add(count).min(self.to);
        self
    }

    pub(crate) fn len(&self) -> u64 {
        as_u64(self.bytes().len())
    }
}

pub(crate) fn as_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
