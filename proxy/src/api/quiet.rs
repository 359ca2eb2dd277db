//! Keeps strangers from filling the log: one line per event and call site, and no more than a few
//! per period. What was left out is counted and told with the next line.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(10);
const LINES: u32 = 50;

/// One call site's allowance.
#[derive(Debug, Default)]
pub struct Quiet(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Quiet {
    /// A call site that has written nothing yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State {
            since: None,
            lines: 0,
            left_out: 0,
        }))
    }

    /// Whether a line may be written now, and how many were left out before it.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = state
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= PERIOD);
        if fresh {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines >= LINES {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.lines = state.lines.saturating_add(1);
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_few_lines_and_its_number() {
        let quiet = Quiet::new();
        let start = Instant::now();
        let written = (0..100).filter(|_| quiet.allow_at(start).is_some()).count();
        assert_eq!(written, LINES as usize);
        assert_eq!(quiet.allow_at(start + PERIOD), Some(50));
    }
}
