//! The output of one process on its way to its readers and to its log: a window of memory that both
//! take from. The process is held back only when the window is full of bytes that a follower has
//! still to take, or that a working log has still to write; when the log does not work, the window
//! is a ring and what falls out of it is counted. No lock here is held across a system call that
//! could wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use protocol::frame::MAX_DATA;
use protocol::process::ProcessEnded;

use super::piece::{Piece, Source, as_u64, give_buffer, take_buffer};
use super::watcher::Watcher;

/// What one process may always keep in memory, and what is kept of it while its log does not work.
pub(crate) const RING: u64 = 64 << 10;
/// What one process may keep while [`PLENTY`] lasts.
const WINDOW: u64 = 1 << 20;
/// Unlogged output that is written at once.
const MUCH: u64 = 384 << 10;
/// What all processes may keep beyond their [`RING`]s, in bytes.
const PLENTY: usize = 2 << 20;
/// Reads at least so long become a chunk as they are; shorter ones are copied together.
const WHOLE: usize = 48 << 10;

/// Bytes in the windows of all processes.
static IN_USE: AtomicUsize = AtomicUsize::new(0);
/// Whether and how it runs.
#[derive(Clone, Debug)]
pub(crate) enum Phase {
    Starting,
    /// It was not to be started after all.
    Refused,
    Running,
    Ended {
        how: ProcessEnded,
        unix_ms: u64,
    },
}

struct Chunk {
    offset: u64,
    source: Source,
    data: Arc<Vec<u8>>,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset.saturating_add(as_u64(self.data.len()))
    }
}

/// In which of the log writer's queues the process is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Queued {
    pub(crate) now: bool,
    pub(crate) later: bool,
}

/// What a reader finds at its offset.
pub(crate) enum Found {
    Piece(Piece),
    /// Nothing in memory; the log may have it, up to this offset.
    NotInMemory {
        until: u64,
    },
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End,
}

/// See the module.
pub(crate) struct Output {
    pub(crate) phase: Phase,
    chunks: VecDeque<Chunk>,
    /// Where the window begins and ends.
    start: u64,
    head: u64,
    /// Everything before it is on the disk or lost.
    logged: u64,
    /// There is a log and it takes what it is given.
    log_works: bool,
    /// Bytes that can be read nowhere any more.
    pub(crate) dropped: u64,
    /// Readers may hold the process back.
    holds: bool,
    followers: Vec<(u64, u64)>,
    next_follower: u64,
    watchers: Vec<Weak<Watcher>>,
    pub(crate) queued: Queued,
    /// The pump waits for room.
    pub(crate) pump_held: bool,
}

impl Output {
    pub(crate) fn new(holds: bool, log_works: bool) -> Self {
        Self {
            phase: Phase::Starting,
            chunks: VecDeque::new(),
            start: 0,
            head: 0,
            logged: 0,
            log_works,
            dropped: 0,
            holds,
            followers: Vec::new(),
            next_follower: 0,
            watchers: Vec::new(),
            queued: Queued::default(),
            pump_held: false,
        }
    }

    /// One that has ended and has nothing in memory.
    pub(crate) fn past(phase: Phase, head: u64, dropped: u64) -> Self {
        let mut output = Self::new(false, true);
        output.phase = phase;
        output.start = head;
        output.head = head;
        output.logged = head;
        output.dropped = dropped;
        output
    }

    /// The merged offset of the end.
    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    /// How many bytes the log has still to take.
    pub(crate) fn unlogged(&self) -> u64 {
        self.head.saturating_sub(self.logged)
    }

    /// Nothing more comes.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. } | Phase::Refused)
    }

    /// How many bytes may be read from the process now.
    pub(crate) fn room(&self) -> u64 {
        let followed = self.followed();
        let owed = if self.log_works {
            followed.min(self.logged)
        } else {
            followed
        };
        window().saturating_sub(self.head.saturating_sub(owed))
    }

    /// The log should take what it has not got soon: it is much, or leaves no room.
    pub(crate) fn is_urgent(&self) -> bool {
        self.unlogged() >= MUCH.min(window())
    }

    /// There would be room if the log were faster.
    pub(crate) fn is_held_by_log(&self) -> bool {
        let window = WINDOW.saturating_sub(self.head.saturating_sub(self.followed()));
        self.log_works && window > 0 && self.unlogged() >= RING
    }

    /// The merged offset of the first byte in memory.
    pub(crate) fn window_start(&self) -> u64 {
        self.start
    }

    /// Up to where everybody who can hold the process back has read.
    fn followed(&self) -> u64 {
        let slowest = self.followers.iter().map(|(_, at)| *at).min();
        slowest.filter(|_| self.holds).unwrap_or(self.head)
    }

    /// Takes in what was read: `count` bytes of `scratch`, which may be replaced by another buffer
    /// of the same length.
    pub(crate) fn append(&mut self, source: Source, scratch: &mut Vec<u8>, count: usize) {
        let bytes = scratch.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            return;
        }
        let offset = self.head;
        self.head = self.head.saturating_add(as_u64(count));
        IN_USE.fetch_add(count, Ordering::Relaxed);
        if count >= WHOLE {
            let mut data = std::mem::take(scratch);
            data.truncate(count);
            self.chunks.push_back(Chunk {
                offset,
                source,
                data: Arc::new(data),
            });
            // First, so that the new buffer can be one of those that are let go.
            self.evict();
            *scratch = take_buffer();
        } else {
            let joined = self.chunks.back_mut().is_some_and(|last| {
                let fits =
                    last.source == source && last.data.len().saturating_add(count) <= MAX_DATA;
                match Arc::get_mut(&mut last.data) {
                    Some(data) if fits => {
                        // It doubles as a vector does, but never takes more than it may fill.
                        if data.capacity().saturating_sub(data.len()) < count {
                            let left = MAX_DATA.saturating_sub(data.len());
                            data.reserve_exact(data.len().max(count).min(left));
                        }
                        data.extend_from_slice(bytes);
                        true
                    }
                    _ => false,
                }
            });
            if !joined {
                self.chunks.push_back(Chunk {
                    offset,
                    source,
                    data: Arc::new(bytes.to_vec()),
                });
            }
        }
        self.evict();
        self.notify();
    }

    /// Lets go of what nobody needs.
    fn evict(&mut self) {
        let followed = self.followed();
        while let Some(first) = self.chunks.front() {
            let end = first.end();
            let is_logged = end <= self.logged;
            // Without a working log the last bytes stay, as long as there is room for them.
            let is_kept = !is_logged && (self.log_works || self.head.saturating_sub(end) < RING);
            if is_kept || end > followed {
                break;
            }
            let Some(first) = self.chunks.pop_front() else {
                break;
            };
            IN_USE.fetch_sub(first.data.len(), Ordering::Relaxed);
            if !is_logged {
                self.dropped = self.dropped.saturating_add(end.saturating_sub(self.logged));
                self.logged = end;
            }
            self.start = end;
            if let Ok(data) = Arc::try_unwrap(first.data) {
                give_buffer(data);
            }
        }
        if self.chunks.is_empty() {
            self.start = self.head;
        }
    }

    /// What is at `offset` for a reader of its own.
    pub(crate) fn find(&self, offset: u64) -> Found {
        if offset >= self.head {
            return if self.has_ended() {
                Found::End
            } else {
                Found::Nothing
            };
        }
        let index = self.chunks.partition_point(|chunk| chunk.end() <= offset);
        match self.chunks.get(index) {
            Some(chunk) if chunk.offset <= offset => {
                let piece = Piece::of(chunk.source, &chunk.data);
                Found::Piece(piece.skip(offset.saturating_sub(chunk.offset)))
            }
            _ => Found::NotInMemory { until: self.start },
        }
    }

    /// What the log has not got yet, from where it begins, at most `most` pieces.
    pub(crate) fn for_log(&self, most: usize) -> (u64, Vec<Piece>) {
        let mut offset = self.logged;
        let mut pieces = Vec::new();
        while let Found::Piece(piece) = self.find(offset) {
            if pieces.len() >= most {
                break;
            }
            offset = offset.saturating_add(piece.len());
            pieces.push(piece);
        }
        (self.logged, pieces)
    }

    /// The log has what lies between the two offsets.
    pub(crate) fn log_written(&mut self, start: u64, end: u64) {
        // Some of it may have been given up while it was being written.
        let given_up = self.logged.min(end).saturating_sub(start);
        self.dropped = self.dropped.saturating_sub(given_up);
        self.logged = self.logged.max(end);
        self.log_works = true;
        self.evict();
    }

    /// The log has not been able to take anything.
    pub(crate) fn log_failed(&mut self) {
        self.log_works = false;
        self.evict();
    }

    /// A follower from `offset` on.
    pub(crate) fn follow(&mut self, offset: u64) -> u64 {
        let id = self.next_follower;
        self.next_follower = id.wrapping_add(1);
        self.followers.push((id, offset));
        id
    }

    /// The follower has taken everything before `offset`.
    pub(crate) fn advance(&mut self, follower: u64, offset: u64) {
        if let Some((_, at)) = self.followers.iter_mut().find(|(id, _)| *id == follower) {
            *at = offset;
        }
        self.evict();
    }

    pub(crate) fn unfollow(&mut self, follower: u64) {
        self.followers.retain(|(id, _)| *id != follower);
        self.evict();
    }

    pub(crate) fn watch(&mut self, watcher: &Arc<Watcher>) {
        self.watchers.retain(|old| old.strong_count() > 0);
        self.watchers.push(Arc::downgrade(watcher));
    }

    pub(crate) fn notify(&self) {
        for watcher in &self.watchers {
            if let Some(watcher) = watcher.upgrade() {
                watcher.notify();
            }
        }
    }

    /// Lets go of everything in memory; what is not logged is lost.
    pub(crate) fn forget(&mut self) {
        self.dropped = self.dropped.saturating_add(self.unlogged());
        self.logged = self.head;
        self.log_works = true;
        self.evict();
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let held = self.chunks.iter().map(|chunk| chunk.data.len()).sum();
        IN_USE.fetch_sub(held, Ordering::Relaxed);
    }
}

/// What one process may keep in memory now.
fn window() -> u64 {
    if IN_USE.load(Ordering::Relaxed) < PLENTY {
        WINDOW
    } else {
        RING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(output: &mut Output, bytes: &[u8]) {
        let mut scratch = bytes.to_vec();
        scratch.resize(MAX_DATA.max(bytes.len()), 0);
        output.append(Source::Stdout, &mut scratch, bytes.len());
        assert_eq!(scratch.len(), MAX_DATA);
    }

    #[test]
    fn output_that_only_the_log_can_make_room_for_is_urgent_also_when_memory_is_scarce() {
        let mut others = Output::new(true, true);
        let mut output = Output::new(true, true);
        for _ in 0..PLENTY / MAX_DATA {
            put(&mut others, &[7; MAX_DATA]);
        }
        put(&mut output, &[7; MAX_DATA - 1]);
        assert!(output.room() > 0 && !output.is_urgent());
        put(&mut output, b"x");
        assert!(output.room() == 0 && output.is_urgent());
    }

    #[test]
    fn small_pieces_that_were_joined_take_no_more_memory_than_a_frame() {
        let mut output = Output::new(true, true);
        for _ in 0..40 {
            put(&mut output, &[7; 10_000]);
        }
        assert!(output.chunks.len() > 1);
        for chunk in &output.chunks {
            let capacity = chunk.data.capacity();
            assert!(capacity <= MAX_DATA, "{capacity}");
        }
    }

    #[test]
    fn a_follower_holds_the_process_back_and_loses_nothing() {
        let mut output = Output::new(true, false);
        let follower = output.follow(0);
        let mut bytes = 0;
        while output.room() >= as_u64(MAX_DATA) {
            put(&mut output, &[7; MAX_DATA]);
            bytes += MAX_DATA;
        }
        assert!((RING..=WINDOW).contains(&as_u64(bytes)), "{bytes}");
        assert!(matches!(output.find(0), Found::Piece(_)));
        output.advance(follower, as_u64(bytes));
        assert!(output.room() >= RING);
        assert_eq!(output.dropped, as_u64(bytes) - RING, "a ring stays");
    }

    #[test]
    fn without_a_follower_or_a_log_the_last_bytes_stay_and_the_loss_is_counted() {
        let mut output = Output::new(false, false);
        for _ in 0..1000 {
            put(&mut output, &[1; 1000]);
            assert!(output.room() > 0);
        }
        let kept = output.head() - output.dropped;
        assert!((RING..2 * RING).contains(&kept), "{kept}");
        assert!(matches!(output.find(0), Found::NotInMemory { .. }));
        assert!(matches!(output.find(output.dropped), Found::Piece(_)));
    }

    #[test]
    fn what_the_log_has_written_leaves_the_memory() {
        let mut output = Output::new(false, true);
        put(&mut output, b"abc");
        let (from, pieces) = output.for_log(10);
        assert_eq!((from, pieces[0].bytes()), (0, &b"abc"[..]));
        drop(pieces);
        output.log_written(0, 3);
        assert!(matches!(output.find(0), Found::NotInMemory { until: 3 }));
        assert_eq!((output.unlogged(), output.dropped), (0, 0));
    }

    #[test]
    fn what_a_slow_log_takes_after_all_is_not_lost() {
        let mut output = Output::new(false, true);
        for _ in 0..4 {
            put(&mut output, &[1; MAX_DATA]);
        }
        let (start, pieces) = output.for_log(10);
        let end = start + pieces.iter().map(Piece::len).sum::<u64>();
        output.log_failed();
        assert!(output.dropped > 0);
        output.log_written(start, end);
        assert_eq!(output.dropped, 0);
    }

    #[test]
    fn short_writes_of_one_source_share_a_piece_and_two_sources_never_do() {
        let mut output = Output::new(false, true);
        put(&mut output, b"ab");
        put(&mut output, b"cd");
        let mut scratch = b"e".to_vec();
        output.append(Source::Stderr, &mut scratch, 1);
        let (_, pieces) = output.for_log(10);
        let seen: Vec<_> = pieces.iter().map(|one| (one.source, one.bytes())).collect();
        assert_eq!(
            seen,
            [(Source::Stdout, &b"abcd"[..]), (Source::Stderr, &b"e"[..])]
        );
    }
}
