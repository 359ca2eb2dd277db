//! How long to wait before a process that ended is started again: longer each time, short again
//! after it has been healthy for a while. It only reckons; it never waits.

use std::time::{Duration, Instant};

/// The first wait.
const FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(10);
/// A process that ran this long was healthy: its next end counts as the first.
const HEALTHY: Duration = Duration::from_secs(30);

/// The ends of one process, as far as they matter for its next start.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    ends: u32,
}

impl Backoff {
    /// The process that was started at `started` ended at `now`: how long to wait.
    pub(super) fn ended(&mut self, started: Instant, now: Instant) -> Duration {
        if now.saturating_duration_since(started) >= HEALTHY {
            self.ends = 0;
        }
        let wait = FIRST
            .saturating_mul(1_u32.checked_shl(self.ends).unwrap_or(u32::MAX))
            .min(LONGEST);
        self.ends = self.ends.saturating_add(1);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_ten_seconds() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        let waits: Vec<u128> = (0..40)
            .map(|_| backoff.ended(now, now).as_millis())
            .collect();
        assert_eq!(waits[..8], [100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
        assert!(waits[8..].iter().all(|wait| *wait == 10_000));
    }

    #[test]
    fn a_healthy_while_makes_the_wait_short_again() {
        let mut backoff = Backoff::default();
        let start = Instant::now();
        for _ in 0..10 {
            backoff.ended(start, start);
        }
        assert_eq!(backoff.ended(start, start + HEALTHY), FIRST);
        assert_eq!(backoff.ended(start, start), FIRST * 2);
    }
}
