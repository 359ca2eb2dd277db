//! Labels that nobody has. They are remembered for a moment, so that whoever asks for the same again
//! and again does not reach control; no more than a number of them, the oldest go first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use protocol::id::Subdomain;

/// How long a label is remembered. A VM that is made meanwhile is known at once: control attaches it.
const REMEMBERED: Duration = Duration::from_secs(5);

/// Most labels.
const MOST: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Unknown {
    /// When each was asked for.
    asked: HashMap<Subdomain, Instant>,
    order: VecDeque<(Instant, Subdomain)>,
}

impl Unknown {
    /// Control said that nobody has it.
    pub(super) fn remember(&mut self, label: Subdomain, now: Instant) {
        while self.order.len() >= MOST || self.order.front().is_some_and(|one| old(one.0, now)) {
            if let Some((when, label)) = self.order.pop_front()
                && self.asked.get(&label) == Some(&when)
            {
                self.asked.remove(&label);
            }
        }
        self.asked.insert(label.clone(), now);
        self.order.push_back((now, label));
    }

    /// Somebody has it now.
    pub(super) fn forget(&mut self, label: &Subdomain) {
        self.asked.remove(label);
    }

    /// Whether nobody had it a moment ago.
    pub(super) fn has(&self, label: &Subdomain, now: Instant) -> bool {
        self.asked.get(label).is_some_and(|when| !old(*when, now))
    }
}

fn old(when: Instant, now: Instant) -> bool {
    now.saturating_duration_since(when) >= REMEMBERED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(number: u32) -> Subdomain {
        // Five bits of a byte count.
        let bits: [u8; 20] = std::array::from_fn(|at| ((number >> (at % 6 * 5)) & 31) as u8);
        Subdomain::from_random(bits)
    }

    #[test]
    fn a_label_is_remembered_for_a_moment_and_never_more_than_so_many() {
        let mut unknown = Unknown::default();
        let now = Instant::now();
        let later = now + REMEMBERED;
        unknown.remember(label(1), now);
        assert!(unknown.has(&label(1), now) && !unknown.has(&label(2), now));
        unknown.forget(&label(1));
        assert!(!unknown.has(&label(1), now));
        unknown.remember(label(1), now);
        assert!(!unknown.has(&label(1), later));
        for number in 0..2 * MOST as u32 {
            unknown.remember(label(number), now);
        }
        assert_eq!((unknown.asked.len(), unknown.order.len()), (MOST, MOST));
        assert!(unknown.has(&label(2 * MOST as u32 - 1), now));
        assert!(!unknown.has(&label(1), now));
        unknown.remember(label(1), later);
        assert_eq!((unknown.asked.len(), unknown.order.len()), (1, 1));
    }
}
