//! Log lines, one per event with `key=value` fields: to /dev/kmsg in a virtual machine, to standard
//! error otherwise. A line is never waited for: what the sink cannot take at once is lost, and so
//! is what exceeds the rate, with a count of the loss.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Lines that may be written in one go.
const BURST: u32 = 64;
/// Lines per second after that.
const RATE: u32 = 8;
/// Longest line; /dev/kmsg refuses more than about a thousand bytes.
const MAX_LINE: usize = 900;

static KMSG: OnceLock<OwnedFd> = OnceLock::new();
static BUCKET: Mutex<Option<Bucket>> = Mutex::new(None);

/// Sends all later lines to the kernel's log.
pub(crate) fn to_kernel(kmsg: OwnedFd) {
    // Set once, at boot; a second call would change nothing.
    let _ = KMSG.set(kmsg);
}

/// Something ended that should not have, or the machine goes down.
pub(crate) fn error(line: fmt::Arguments<'_>) {
    write(3, line);
}

/// Something did not work and the agent goes on without it.
pub(crate) fn warn(line: fmt::Arguments<'_>) {
    write(4, line);
}

/// Something worth knowing happened.
pub(crate) fn info(line: fmt::Arguments<'_>) {
    write(6, line);
}

struct Bucket {
    tokens: u32,
    filled: Instant,
    lost: u32,
}

impl Bucket {
    /// Takes a token; gives the number of lines lost since the last one that passed.
    fn take(&mut self, now: Instant) -> Option<u32> {
        let seconds = now.saturating_duration_since(self.filled).as_secs();
        if seconds > 0 {
            let fresh = u32::try_from(seconds).unwrap_or(BURST).saturating_mul(RATE);
            self.tokens = self.tokens.saturating_add(fresh).min(BURST);
            self.filled = now;
        }
        match self.tokens.checked_sub(1) {
            Some(rest) => {
                self.tokens = rest;
                Some(std::mem::take(&mut self.lost))
            }
            None => {
                self.lost = self.lost.saturating_add(1);
                None
            }
        }
    }
}

fn write(level: u8, line: fmt::Arguments<'_>) {
    let now = Instant::now();
    let lost = BUCKET
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert(Bucket {
            tokens: BURST,
            filled: now,
            lost: 0,
        })
        .take(now);
    let Some(lost) = lost else { return };
    if lost > 0 {
        emit(4, format_args!("event=log_lines_lost count={lost}"));
    }
    emit(level, line);
}

fn emit(level: u8, line: fmt::Arguments<'_>) {
    match KMSG.get() {
        Some(kmsg) => {
            // The kernel's log takes every line at once, and knows no polling for that.
            // There is nobody to tell that a log line could not be written.
            let _ = nix::unistd::write(kmsg, &one_line(&format!("<{level}>guest-init: {line}")));
        }
        None => put_now(
            std::io::stderr().as_fd(),
            &one_line(&format!("guest-init: {line}")),
        ),
    }
}

/// The text as one line: what could begin another one or steer a terminal becomes a space.
fn one_line(text: &str) -> Vec<u8> {
    let mut line: Vec<u8> = text
        .bytes()
        .take(MAX_LINE)
        .map(|byte| if byte.is_ascii_control() { b' ' } else { byte })
        .collect();
    line.push(b'\n');
    line
}

/// Writes if that is possible without waiting.
fn put_now(sink: BorrowedFd<'_>, line: &[u8]) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(sink, PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        // There is nobody to tell that a log line could not be written.
        let _ = nix::unistd::write(sink, line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_flood_is_cut_and_the_loss_is_counted() {
        let start = Instant::now();
        let mut bucket = Bucket {
            tokens: BURST,
            filled: start,
            lost: 0,
        };
        let passed = (0..1000).filter(|_| bucket.take(start).is_some()).count();
        assert_eq!(passed, 64);
        assert_eq!(bucket.take(start + Duration::from_secs(1)), Some(936));
    }

    #[test]
    fn a_guest_string_cannot_begin_a_second_line() {
        assert_eq!(one_line("a\nb\u{1b}[2J"), b"a b [2J\n");
    }
}
