//! A limit on how often one call site may log what a guest causes. It never drops silently: the next
//! line that passes says how many did not.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(60);
const LINES_PER_WINDOW: u32 = 10;

#[derive(Debug)]
struct Window {
    opened: Option<Instant>,
    written: u32,
    suppressed: u64,
}

/// At most ten lines a minute.
#[derive(Debug)]
pub(super) struct LogLimit(Mutex<Window>);

impl LogLimit {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Window {
            opened: None,
            written: 0,
            suppressed: 0,
        }))
    }

    /// `Some(suppressed)` when a line may be written: how many were not since the last one.
    pub(super) fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = window
            .opened
            .is_none_or(|opened| now.saturating_duration_since(opened) >= WINDOW);
        if fresh {
            window.opened = Some(now);
            window.written = 0;
        }
        if window.written >= LINES_PER_WINDOW {
            window.suppressed = window.suppressed.saturating_add(1);
            return None;
        }
        window.written = window.written.saturating_add(1);
        Some(std::mem::take(&mut window.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_counted_in_the_next_window() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let written = (0..1000)
            .filter(|_| limit.allow_at(start).is_some())
            .count();
        assert_eq!(written, 10);
        assert_eq!(limit.allow_at(start + WINDOW), Some(990));
        assert_eq!(limit.allow_at(start + WINDOW), Some(0));
    }
}
