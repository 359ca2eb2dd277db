//! The logs of all processes on the disk: one thread writes them, in large pieces and some time
//! after the output came, so that no process, no reader and no short command waits for the disk. Only
//! that a process is about to start is written at once, by its own thread: into the system's memory,
//! which an agent's crash leaves alone. Keeps the bounds. A disk that takes nothing is tried again with the next output and stops nobody.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::life::Process;
use super::segment::Segments;
use crate::agent::lock;
use crate::log;

/// The most output that is kept of one process, in bytes.
pub(crate) const MAX_LOG: u64 = 64 << 20;
/// The most that all logs may take, in bytes.
pub(crate) const MAX_LOGS: u64 = 512 << 20;
/// Output is written at the latest so long after it came.
const LATER: Duration = Duration::from_secs(1);
/// A disk that has not taken a start's record for so long is not waited for by others.
const STUCK: Duration = Duration::from_secs(1);
/// Writes for one process before others have their turn.
const ROUNDS: u32 = 4;
/// Pieces of one write.
const BATCH: usize = 64;

/// See the module.
pub(crate) struct Logs {
    directory: Option<PathBuf>,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// The sizes of all logs together.
    total: AtomicU64,
    /// Since when starts wait for the disk.
    announcing: Mutex<Vec<Instant>>,
}

/// A start that writes its record. While one of them does not come back, others do without theirs: a
/// file system that was frozen must not keep anybody from the command that thaws it.
struct Announcement<'a> {
    all: &'a Mutex<Vec<Instant>>,
    since: Instant,
}

impl<'a> Announcement<'a> {
    fn begin(all: &'a Mutex<Vec<Instant>>) -> Option<Self> {
        let since = Instant::now();
        let mut waiting = lock(all);
        let is_stuck = |begun: &Instant| since.saturating_duration_since(*begun) > STUCK;
        if waiting.iter().any(is_stuck) {
            return None;
        }
        waiting.push(since);
        Some(Self { all, since })
    }
}

impl Drop for Announcement<'_> {
    fn drop(&mut self) {
        let mut waiting = lock(self.all);
        if let Some(own) = waiting.iter().position(|begun| *begun == self.since) {
            waiting.swap_remove(own);
        }
    }
}

#[derive(Default)]
struct Queue {
    now: VecDeque<Arc<Process>>,
    later: VecDeque<(Instant, Arc<Process>)>,
    /// The writer sleeps until somebody wakes it.
    idle: bool,
    /// Whom the writer has taken out last; it may still be at it.
    at_work: Option<Arc<Process>>,
}

impl Queue {
    /// Who is first, due or not.
    fn pop(&mut self) -> Option<Arc<Process>> {
        if let Some(process) = self.now.pop_front() {
            lock(&process.output).queued.now = false;
            return Some(process);
        }
        let (_, process) = self.later.pop_front()?;
        lock(&process.output).queued.later = false;
        Some(process)
    }
}

impl Logs {
    /// `total` is the size of the logs that are there already.
    pub(crate) fn new(directory: Option<PathBuf>, total: u64) -> Self {
        Self {
            directory,
            queue: Mutex::default(),
            wake: Condvar::new(),
            total: AtomicU64::new(total),
            announcing: Mutex::default(),
        }
    }

    /// Whether the logs take more than they may.
    pub(crate) fn are_too_large(&self) -> bool {
        self.total.load(Ordering::Relaxed) > MAX_LOGS
    }

    /// So many bytes of logs are gone.
    pub(crate) fn count_removed(&self, bytes: u64) {
        let less = |total: u64| Some(total.saturating_sub(bytes));
        // The closure always gives a value.
        let _ = self
            .total
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Removes the oldest part of a log. Says whether there was one.
    pub(crate) fn drop_oldest(&self, process: &Process) -> bool {
        let dropped = lock(&process.segments).drop_oldest();
        let Some((bytes, size)) = dropped else {
            return false;
        };
        self.count_removed(size);
        let mut output = lock(&process.output);
        output.dropped = output.dropped.saturating_add(bytes);
        true
    }

    pub(crate) fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Writes that the process is about to be started, so that its id is known also to an agent that
    /// comes after this one. A disk that does not take it, or has not for a while taken that of
    /// another, is no reason not to start.
    pub(crate) fn announce(&self, process: &Process) {
        let Some(directory) = &self.directory else {
            return;
        };
        let Some(announcement) = Announcement::begin(&self.announcing) else {
            log::warn(format_args!("event=process_unrecorded id={}", process.id));
            return;
        };
        let mut segments = lock(&process.segments);
        self.counted(process, &mut segments, |segments| {
            segments.open(directory, &process.info())
        });
        drop((segments, announcement));
    }

    /// Output has come or the process has ended: has it written in time.
    pub(crate) fn note(&self, process: &Arc<Process>) {
        let urgent = lock(&process.output).is_urgent();
        self.enqueue(process, urgent);
    }

    /// Has it written at once: the process waits for it.
    pub(crate) fn hurry(&self, process: &Arc<Process>) {
        self.enqueue(process, true);
    }

    fn enqueue(&self, process: &Arc<Process>, urgent: bool) {
        if self.directory.is_none() {
            return;
        }
        {
            let mut output = lock(&process.output);
            let queued = if urgent {
                &mut output.queued.now
            } else {
                &mut output.queued.later
            };
            if std::mem::replace(queued, true) {
                return;
            }
        }
        let mut queue = lock(&self.queue);
        if urgent {
            queue.now.push_back(Arc::clone(process));
        } else {
            let now = Instant::now();
            let at = now.checked_add(LATER).unwrap_or(now);
            queue.later.push_back((at, Arc::clone(process)));
        }
        let wake = urgent || queue.idle;
        queue.idle = false;
        drop(queue);
        if wake {
            self.wake.notify_one();
        }
    }

    /// Writes what is due, for ever. `trim` keeps the bound on all logs after a write.
    pub(crate) fn run(&self, trim: impl Fn(&Arc<Process>)) {
        let Some(directory) = &self.directory else {
            return;
        };
        loop {
            let process = self.next();
            self.write(directory, &process);
            trim(&process);
        }
    }

    fn next(&self) -> Arc<Process> {
        let mut queue = lock(&self.queue);
        queue.at_work = None;
        loop {
            let now = Instant::now();
            let due = queue.later.front().map(|(at, _)| *at);
            let is_due = !queue.now.is_empty() || due.is_some_and(|at| at <= now);
            if is_due && let Some(process) = queue.pop() {
                queue.at_work = Some(Arc::clone(&process));
                return process;
            }
            match due {
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    let waited = self.wake.wait_timeout(queue, left);
                    queue = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => {
                    queue.idle = true;
                    queue = self
                        .wake
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Writes everything that waits, until the deadline; for the end of the run.
    pub(crate) fn flush(&self, deadline: Instant) {
        let Some(directory) = &self.directory else {
            return;
        };
        while Instant::now() < deadline {
            let process = {
                let mut queue = lock(&self.queue);
                // What the writer is at is written again, which waits for it and finds nothing.
                queue.pop().or_else(|| queue.at_work.take())
            };
            match process {
                Some(process) => self.write(directory, &process),
                None => return,
            }
        }
        log::warn(format_args!("event=process_logs_unfinished"));
    }

    /// Writes what one process has for its log.
    fn write(&self, directory: &Path, process: &Arc<Process>) {
        // Held throughout: a log that is being removed is removed after this.
        let mut segments = lock(&process.segments);
        let mut works = true;
        for _ in 0..ROUNDS {
            let (start, pieces) = lock(&process.output).for_log(BATCH);
            if pieces.is_empty() {
                break;
            }
            let about = process.info();
            let written = self.counted(process, &mut segments, |segments| {
                segments.write(directory, &about, start, &pieces)
            });
            let length: u64 = pieces.iter().map(super::piece::Piece::len).sum();
            drop(pieces);
            let mut dropped: u64 = 0;
            while segments.bytes() > MAX_LOG {
                let Some((bytes, size)) = segments.drop_oldest() else {
                    break;
                };
                self.count_removed(size);
                dropped = dropped.saturating_add(bytes);
            }
            let mut output = lock(&process.output);
            output.dropped = output.dropped.saturating_add(dropped);
            works = written;
            if works {
                output.log_written(start, start.saturating_add(length));
            } else {
                output.log_failed();
            }
            drop(output);
            process.wake_pump_if_held();
            if !works {
                break;
            }
        }
        if works && lock(&process.output).unlogged() > 0 {
            // It writes faster than the disk; others have their turn.
            self.note(process);
            return;
        }
        let ended = lock(&process.output).has_ended();
        if ended {
            self.counted(process, &mut segments, |segments| {
                segments.finish(directory, &process.info())
            });
        }
    }

    /// Writes, and counts by how much the log has grown. Says whether it was written.
    fn counted(
        &self,
        process: &Process,
        segments: &mut Segments,
        write: impl FnOnce(&mut Segments) -> io::Result<()>,
    ) -> bool {
        let before = segments.size();
        let written = write(segments);
        let after = segments.size();
        self.total
            .fetch_add(after.saturating_sub(before), Ordering::Relaxed);
        self.count_removed(before.saturating_sub(after));
        if let Err(error) = &written {
            log::warn(format_args!(
                "event=process_log_failed id={} error=\"{error}\"",
                process.id
            ));
        }
        written.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_hangs_holds_up_the_starts_of_its_first_second_only() {
        let all = Mutex::default();
        let first = Announcement::begin(&all).unwrap();
        drop(Announcement::begin(&all).unwrap());
        let long_ago = first.since.checked_sub(2 * STUCK).unwrap();
        lock(&all)[0] = long_ago;
        assert!(Announcement::begin(&all).is_none());
        drop(Announcement {
            all: &all,
            since: long_ago,
        });
        assert!(Announcement::begin(&all).is_some());
    }
}
