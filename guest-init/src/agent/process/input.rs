//! Standard input: the process's end of it, which any number of streams may write to and which stays
//! open when they leave, and the bytes of one stream on their way there. What the process does not
//! take now waits with the stream that brought it, up to a bound, and holds up nobody else.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::life::Process;
use super::piece::as_u64;
use super::terminal;
use crate::agent::lock;
use crate::agent::poll::Interest;

/// Nothing more is read from a client while so much input waits for its process.
pub(crate) const MAX_INPUT: usize = 256 << 10;
/// What ends the input of a terminal: Ctrl-D.
const END_KEY: u8 = 4;

/// Keys that a terminal takes for the end of a line, or for its being given up: line feed, carriage
/// return, the end itself, Ctrl-C, Ctrl-\\, Ctrl-Z and Ctrl-U.
const LINE_IS_OVER: [u8; 7] = [b'\n', b'\r', END_KEY, 3, 0x1c, 0x1a, 0x15];

/// The agent's end of a process's input.
#[derive(Default)]
pub(crate) struct Stdin {
    pipe: Mutex<Option<Arc<OwnedFd>>>,
    /// The last byte that was written, by anybody, leaves a terminal's line unfinished.
    is_mid_line: AtomicBool,
}

impl Stdin {
    pub(crate) fn open(&self, pipe: OwnedFd) {
        *lock(&self.pipe) = Some(Arc::new(pipe));
    }

    /// The descriptor while it is open. It closes when the last one who has it lets go.
    pub(crate) fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.pipe).clone()
    }

    pub(crate) fn close(&self) {
        *lock(&self.pipe) = None;
    }

    fn note(&self, written: &[u8]) {
        if let Some(last) = written.last() {
            let is_over = LINE_IS_OVER.contains(last);
            self.is_mid_line.store(!is_over, Ordering::Release);
        }
    }

    /// What has to be typed for the input of this terminal to end. In the middle of a line the first
    /// end key only hands over what there is of it; a program that takes single keys gets one key.
    fn end_keys(&self, terminal: &OwnedFd) -> Vec<u8> {
        let Some(settings) = terminal::settings(terminal.as_fd()) else {
            return vec![END_KEY];
        };
        let key = match settings.c_cc.get(libc::VEOF) {
            None | Some(0) => END_KEY,
            Some(key) => *key,
        };
        let takes_lines = settings.c_lflag & libc::ICANON != 0;
        if takes_lines && self.is_mid_line.load(Ordering::Acquire) {
            vec![key, key]
        } else {
            vec![key]
        }
    }
}

/// One stream's bytes for a process.
#[derive(Default)]
pub(crate) struct Typing {
    waiting: Vec<u8>,
    written: usize,
    /// The client has closed the input; done once everything before it is written.
    ended: bool,
    /// The keys for that are typed, or wait.
    end_typed: bool,
    /// How many bytes of the client's the process has taken.
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

    pub(crate) fn end(&mut self) {
        self.ended = true;
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
        loop {
            if self.waiting() == 0 {
                if !self.ended || self.end_typed || !process.about.terminal {
                    break;
                }
                self.end_typed = true;
                self.written = 0;
                self.waiting = process.stdin.end_keys(&pipe);
            }
            let rest = self.waiting.get(self.written..).unwrap_or_default();
            match nix::unistd::write(&pipe, rest) {
                Ok(count) => {
                    process.stdin.note(rest.get(..count).unwrap_or_default());
                    self.written = self.written.saturating_add(count);
                    if !self.end_typed {
                        self.taken = self.taken.saturating_add(as_u64(count));
                    }
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
