//! The console log: what the guest prints, and lines of the monitor's own marked `[vmm]`. The file
//! holds at least the last 64 KiB and never more than 128 KiB; a guest that floods is cut down to a
//! rate, and what was dropped is counted in place. Never blocks a vCPU for longer than a small
//! write to a file.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::os::fd::{AsFd, BorrowedFd};

/// What is kept when the file is cut.
const KEEP: u64 = 64 << 10;
/// When it is cut.
const LIMIT: u64 = 2 * KEEP;
/// Bytes that a line may have before it is written without its end.
const LINE: usize = 512;
/// When a line that has no end yet is written.
const PATIENCE: Duration = Duration::from_millis(200);
/// What the guest may print at once, in bytes.
const BURST: u64 = 64 << 10;
/// What it may print in the long run, in bytes per second.
const RATE: u64 = 16 << 10;

/// The log of one machine; shared by all threads.
#[derive(Debug)]
pub struct ConsoleLog {
    inner: Mutex<Inner>,
    flush: TimerFd,
}

#[derive(Debug)]
struct Inner {
    file: Tail,
    line: Vec<u8>,
    waiting: bool,
    bucket: Bucket,
    dropped: u64,
    at_line_start: bool,
}

impl ConsoleLog {
    /// Goes on behind what `file` holds.
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let mut file = Tail { file, length };
        file.make_room(0)?;
        Ok(Self {
            inner: Mutex::new(Inner {
                file,
                line: Vec::with_capacity(LINE),
                waiting: false,
                bucket: Bucket::new(Instant::now()),
                dropped: 0,
                at_line_start: true,
            }),
            flush: TimerFd::new(
                ClockId::CLOCK_MONOTONIC,
                TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
            )?,
        })
    }

    /// Readable when [`flush`](Self::flush) is due.
    pub fn flush_due(&self) -> BorrowedFd<'_> {
        self.flush.as_fd()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One character of the guest.
    pub fn guest_byte(&self, byte: u8) {
        let mut inner = self.inner();
        inner.line.push(byte);
        if byte == b'\n' || inner.line.len() >= LINE {
            inner.write_line(Instant::now());
        } else if !inner.waiting {
            // At most one timer per line, whatever the guest does.
            inner.waiting = self
                .flush
                .set(
                    Expiration::OneShot(PATIENCE.into()),
                    TimerSetTimeFlags::empty(),
                )
                .is_ok();
        }
    }

    /// Writes the line that has no end yet.
    pub fn flush(&self) {
        // Clears the timer; whether it had expired does not matter.
        let mut ticks = [0; 8];
        let _ = nix::unistd::read(&self.flush, &mut ticks);
        let mut inner = self.inner();
        inner.waiting = false;
        if !inner.line.is_empty() {
            inner.write_line(Instant::now());
        }
    }

    /// A line of the monitor's own. The caller limits how often a guest can cause it.
    pub fn note(&self, text: &str) {
        let mut inner = self.inner();
        if !inner.line.is_empty() {
            inner.write_line(Instant::now());
        }
        inner.note(text);
    }
}

impl Inner {
    fn write_line(&mut self, now: Instant) {
        let mut line = std::mem::take(&mut self.line);
        if self.bucket.take(line.len() as u64, now) {
            if self.dropped > 0 {
                let dropped = std::mem::take(&mut self.dropped);
                self.note(&format!(
                    "{dropped} bytes of console output dropped: printed too fast"
                ));
            }
            self.at_line_start = line.last() == Some(&b'\n');
            self.append(&line);
        } else {
            self.dropped = self.dropped.saturating_add(line.len() as u64);
        }
        line.clear();
        self.line = line;
    }

    fn note(&mut self, text: &str) {
        let newline = if self.at_line_start { "" } else { "\n" };
        self.at_line_start = true;
        self.append(format!("{newline}[vmm] {text}\n").as_bytes());
    }

    fn append(&mut self, bytes: &[u8]) {
        // A log that cannot be written (disk full) must not end the machine.
        if let Err(error) = self.file.append(bytes) {
            tracing::debug!(%error, "console log not written");
        }
    }
}

/// A file of bounded length that ends with what was written last.
#[derive(Debug)]
struct Tail {
    file: File,
    length: u64,
}

impl Tail {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.make_room(bytes.len() as u64)?;
        self.file.write_all_at(bytes, self.length)?;
        self.length = self.length.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Moves the last part to the front when `more` bytes would make the file too long.
    fn make_room(&mut self, more: u64) -> io::Result<()> {
        if self.length.saturating_add(more) <= LIMIT {
            return Ok(());
        }
        let mut buffer = vec![0; KEEP as usize];
        self.file
            .read_exact_at(&mut buffer, self.length.saturating_sub(KEEP))?;
        self.file.write_all_at(&buffer, 0)?;
        self.file.set_len(KEEP)?;
        self.length = KEEP;
        Ok(())
    }
}

/// Tokens are bytes.
#[derive(Debug)]
struct Bucket {
    tokens: u64,
    filled: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self {
            tokens: BURST,
            filled: now,
        }
    }

    fn take(&mut self, bytes: u64, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled);
        let gained = u64::try_from(elapsed.as_millis())
            .unwrap_or(u64::MAX)
            .saturating_mul(RATE)
            / 1000;
        // Time that was too short for a token keeps counting.
        if gained > 0 {
            self.tokens = self.tokens.saturating_add(gained).min(BURST);
            self.filled = now;
        }
        match self.tokens.checked_sub(bytes) {
            Some(rest) => {
                self.tokens = rest;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn text(file: &File) -> String {
        let mut text = String::new();
        let mut file = file.try_clone().unwrap();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_file_keeps_the_last_64_kib_and_never_exceeds_128() {
        let file = tempfile::tempfile().unwrap();
        let mut tail = Tail {
            file: file.try_clone().unwrap(),
            length: 0,
        };
        let mut all = String::new();
        for number in 0..40_000 {
            let line = format!("line {number}\n");
            tail.append(line.as_bytes()).unwrap();
            all.push_str(&line);
            if number % 997 == 0 || number > 39_990 {
                let kept = text(&file);
                assert!(kept.len() as u64 <= LIMIT);
                assert!(kept.len() as u64 >= KEEP.min(all.len() as u64));
                assert!(all.ends_with(&kept), "at line {number}");
            }
        }
    }

    #[test]
    fn a_flood_is_dropped_counted_and_noted() {
        let file = tempfile::tempfile().unwrap();
        let log = ConsoleLog::new(file.try_clone().unwrap()).unwrap();
        {
            let mut inner = log.inner();
            let start = Instant::now();
            let mut print = |text: &str, now| {
                inner.line.extend_from_slice(text.as_bytes());
                inner.write_line(now);
            };
            let line = format!("{}\n", "x".repeat(255));
            for _ in 0..256 + 10 {
                print(&line, start);
            }
            print("calm\n", start + Duration::from_secs(1));
        }
        let text = text(&file);
        assert!(
            text.ends_with(
                "xx\n[vmm] 2560 bytes of console output dropped: printed too fast\ncalm\n"
            ),
            "{}",
            &text[text.len() - 200..]
        );
        assert_eq!(text.matches('x').count(), 256 * 255);
    }

    #[test]
    fn notes_stand_on_lines_of_their_own() {
        let file = tempfile::tempfile().unwrap();
        let log = ConsoleLog::new(file.try_clone().unwrap()).unwrap();
        b"login: ".iter().for_each(|&byte| log.guest_byte(byte));
        log.note("powered off");
        b"more\n".iter().for_each(|&byte| log.guest_byte(byte));
        assert_eq!(text(&file), "login: \n[vmm] powered off\nmore\n");
    }

    #[test]
    fn a_prompt_without_an_end_is_written_when_its_timer_expires() {
        let file = tempfile::tempfile().unwrap();
        let log = ConsoleLog::new(file.try_clone().unwrap()).unwrap();
        b"# ".iter().for_each(|&byte| log.guest_byte(byte));
        assert_eq!(text(&file), "");
        let mut polled = [nix::poll::PollFd::new(
            log.flush_due(),
            nix::poll::PollFlags::POLLIN,
        )];
        assert_eq!(nix::poll::poll(&mut polled, 10_000_u16).unwrap(), 1);
        log.flush();
        assert_eq!(text(&file), "# ");
    }
}
