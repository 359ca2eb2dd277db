//! Standard input: the process's end of it, which any number of streams may write to and which stays
//! open when they leave, and the bytes of one stream on their way there. What the process does not
//! take now waits with the stream that brought it, up to a bound, and holds up nobody else.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::life::Process;
use crate::agent::lock;
use crate::agent::poll::Interest;

/// Nothing more is read from a client while so much input waits for its process.
pub(crate) const MAX_INPUT: usize = 256 << 10;
/// What ends the input of a terminal: Ctrl-D.
const END_KEY: u8 = 4;

/// The agent's end of a process's input.
#[derive(Default)]
pub(crate) struct Stdin(Mutex<Option<Arc<OwnedFd>>>);

impl Stdin {
    pub(crate) fn open(&self, pipe: OwnedFd) {
        *lock(&self.0) = Some(Arc::new(pipe));
    }

    /// The descriptor while it is open. It closes when the last one who has it lets go.
    pub(crate) fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.0).clone()
    }

    pub(crate) fn close(&self) {
        *lock(&self.0) = None;
    }
}

/// One stream's bytes for a process.
#[derive(Default)]
pub(crate) struct Typing {
    waiting: Vec<u8>,
    written: usize,
    /// The client has closed the input; done once everything before it is written.
    ended: bool,
    /// How many bytes the process has taken.
    pub(crate) taken: u64,
}

impl Typing {
    /// Bytes that the process has not taken yet.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len().saturating_sub(self.written)
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        if !self.ended {
            self.waiting.extend_from_slice(bytes);
        }
    }

    pub(crate) fn end(&mut self, process: &Process) {
        if !self.ended {
            self.ended = true;
            if process.about.terminal {
                self.waiting.push(END_KEY);
            }
        }
    }

    /// The process's input while something waits for it. Nobody else may keep it over a wait: an
    /// input that was closed ends only when the last descriptor of it is gone.
    pub(crate) fn descriptor(&self, process: &Process) -> Option<Arc<OwnedFd>> {
        (self.waiting() > 0)
            .then(|| process.stdin.descriptor())
            .flatten()
    }

    /// What to wait for on [`descriptor`](Self::descriptor).
    pub(crate) fn interest(descriptor: Option<&Arc<OwnedFd>>) -> Interest {
        descriptor.map_or(Interest::NONE, |pipe| {
            Interest::new(pipe.as_fd(), false, true)
        })
    }

    /// Gives the process what it takes now. Says whether its input is still there.
    pub(crate) fn write(&mut self, process: &Process) -> bool {
        if self.waiting() == 0 && !self.ended {
            return true;
        }
        let Some(pipe) = process.stdin.descriptor() else {
            // Nobody will ever read it.
            self.discard();
            return false;
        };
        let mut is_there = true;
        while self.waiting() > 0 {
            let rest = self.waiting.get(self.written..).unwrap_or_default();
            match nix::unistd::write(&pipe, rest) {
                Ok(count) => {
                    self.written = self.written.saturating_add(count);
                    self.taken = self.taken.saturating_add(u64::try_from(count).unwrap_or(0));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    // A reader that is never done keeps no more than what it has not taken.
                    self.waiting.drain(..self.written);
                    self.written = 0;
                    return true;
                }
                // It has closed its input, and is left in peace.
                Err(_) => {
                    process.stdin.close();
                    is_there = false;
                    break;
                }
            }
        }
        self.discard();
        if self.ended && !process.about.terminal {
            process.stdin.close();
        }
        is_there
    }

    fn discard(&mut self) {
        self.waiting = Vec::new();
        self.written = 0;
    }
}
