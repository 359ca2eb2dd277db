//! What is counted for one VM. Its stack adds, whoever holds the stack reads.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use protocol::network::NetworkCounters;

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) frames_out: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    pub(super) frames_in: AtomicU64,
    pub(super) bytes_in: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) open: AtomicU32,
    pub(super) denied: AtomicU64,
    pub(super) limited: AtomicU64,
    pub(super) names: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) -> NetworkCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetworkCounters {
            frames_out: of(&self.frames_out),
            bytes_out: of(&self.bytes_out),
            frames_in: of(&self.frames_in),
            bytes_in: of(&self.bytes_in),
            dropped: of(&self.dropped),
            connections: of(&self.connections),
            open: self.open.load(Ordering::Relaxed),
            denied: of(&self.denied),
            limited: of(&self.limited),
            names: of(&self.names),
            // Counted by the edge.
            requests: 0,
        }
    }
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// So many more.
pub(super) fn add(counter: &AtomicU64, number: usize) {
    counter.fetch_add(u64::try_from(number).unwrap_or(u64::MAX), Ordering::Relaxed);
}
