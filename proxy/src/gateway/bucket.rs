//! A token bucket: how many units per second may pass. It lets the unit through that overdraws it
//! and then closes until the debt is paid, so that no packet is too large for any limit.

use std::time::{Duration, Instant};

/// Nanoseconds of a second; debt is counted in these, because most limits are below one unit per
/// nanosecond and above one per second.
const SECOND: u64 = 1_000_000_000;

/// How long a burst may be, as a share of a second.
const BURST: Duration = Duration::from_millis(100);

/// One limit.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Units per second; zero for no limit.
    rate: u64,
    /// When the bucket would be exactly empty.
    paid_until: Instant,
}

impl Bucket {
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        Self {
            rate,
            paid_until: now,
        }
    }

    pub(super) fn set_rate(&mut self, rate: u64, now: Instant) {
        if rate != self.rate {
            self.rate = rate;
            self.paid_until = now;
        }
    }

    /// When something may pass next; none for now.
    pub(super) fn closed_until(&self, now: Instant) -> Option<Instant> {
        (self.rate != 0 && self.paid_until > now).then_some(self.paid_until)
    }

    /// Takes what passed.
    pub(super) fn take(&mut self, units: usize, now: Instant) {
        if self.rate == 0 {
            return;
        }
        let units = u64::try_from(units).unwrap_or(u64::MAX);
        let cost = units
            .saturating_mul(SECOND)
            .checked_div(self.rate)
            .unwrap_or(0);
        // What was saved up lies at most one burst back.
        let from = now
            .checked_sub(BURST)
            .map_or(self.paid_until, |floor| self.paid_until.max(floor));
        self.paid_until = from
            .checked_add(Duration::from_nanos(cost))
            .unwrap_or(self.paid_until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_rate_passes_after_the_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, start);
        let mut passed = 0;
        for millisecond in 0..10_000 {
            let now = start + Duration::from_millis(millisecond);
            while bucket.closed_until(now).is_none() {
                bucket.take(10, now);
                passed += 10;
            }
        }
        assert!((9_900..=10_220).contains(&passed), "{passed}");
    }

    #[test]
    fn a_packet_larger_than_the_rate_passes_and_is_paid_for() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, start);
        bucket.take(5000, start);
        let open = bucket.closed_until(start).unwrap();
        assert!(open > start + Duration::from_secs(4));
        assert!(bucket.closed_until(open).is_none());
    }

    #[test]
    fn without_a_rate_everything_passes() {
        let start = Instant::now();
        let mut bucket = Bucket::new(0, start);
        bucket.take(usize::MAX, start);
        assert!(bucket.closed_until(start).is_none());
    }
}
