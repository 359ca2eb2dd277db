//! Questions that no name server could answer a moment ago (RFC 9520): they are not asked again at
//! once, so that a guest that repeats one does not make us repeat it to every server. Bounded; the
//! oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::answer::Ask;

/// How long a failure is remembered: RFC 9520, section 3.2, wants a second at least and begins with
/// five.
const KEPT: Duration = Duration::from_secs(5);

const MAX_ENTRIES: usize = 4096;

/// The questions, and when each of them failed.
#[derive(Default)]
pub(super) struct Failures {
    since: HashMap<Ask, Instant>,
    /// In the order in which they failed.
    order: VecDeque<(Instant, Ask)>,
}

impl Failures {
    /// Whether the question failed a moment ago.
    pub(super) fn contains(&mut self, ask: &Ask, now: Instant) -> bool {
        self.forget_old(now);
        self.since.contains_key(ask)
    }

    /// Notes that nobody could answer it.
    pub(super) fn insert(&mut self, ask: Ask, now: Instant) {
        self.forget_old(now);
        while self.order.len() >= MAX_ENTRIES {
            self.forget_oldest();
        }
        self.since.insert(ask.clone(), now);
        self.order.push_back((now, ask));
    }

    fn forget_old(&mut self, now: Instant) {
        let is_old = |(at, _): &(Instant, Ask)| now.saturating_duration_since(*at) >= KEPT;
        while self.order.front().is_some_and(is_old) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((at, ask)) = self.order.pop_front()
            && self.since.get(&ask) == Some(&at)
        {
            self.since.remove(&ask);
        }
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{Name, RecordType};

    use super::*;

    fn ask(text: &str) -> Ask {
        let name = Name::from_ascii(text).unwrap();
        Ask::new(&name, RecordType::A, false, false)
    }

    #[test]
    fn a_failure_is_remembered_for_its_time_from_the_last_one_on() {
        let (mut failures, begin) = (Failures::default(), Instant::now());
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        let one = ask("one.example.");
        assert!(!failures.contains(&one, begin));
        failures.insert(one.clone(), begin);
        assert!(failures.contains(&one, at(4_999)));
        assert!(!failures.contains(&ask("two.example."), begin));
        failures.insert(one.clone(), at(3_000));
        assert!(failures.contains(&one, at(7_999)));
        assert!(!failures.contains(&one, at(8_000)));
        assert_eq!((failures.since.len(), failures.order.len()), (0, 0));
    }

    #[test]
    fn the_oldest_failure_makes_room() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        for n in 0..=MAX_ENTRIES {
            failures.insert(ask(&format!("n{n}.example.")), now);
        }
        assert_eq!(failures.since.len(), MAX_ENTRIES);
        assert_eq!(failures.order.len(), MAX_ENTRIES);
        assert!(!failures.contains(&ask("n0.example."), now));
        assert!(failures.contains(&ask("n1.example."), now));
    }
}
