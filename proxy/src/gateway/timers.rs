//! Deadlines of what a stack has open: at most one per entry. A deadline that moves later is left
//! where it is and looked at again when it comes, because most of them do move later.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use super::slab::Token;

#[derive(Debug, Default)]
pub(super) struct Timers {
    order: BTreeSet<(Instant, Token)>,
    of: HashMap<Token, Instant>,
}

impl Timers {
    /// Makes sure that `token` comes up no later than at `when`.
    pub(super) fn set(&mut self, token: Token, when: Instant) {
        match self.of.get(&token) {
            Some(earlier) if *earlier <= when => return,
            Some(later) => {
                self.order.remove(&(*later, token));
            }
            None => {}
        }
        self.order.insert((when, token));
        self.of.insert(token, when);
    }

    pub(super) fn remove(&mut self, token: Token) {
        if let Some(when) = self.of.remove(&token) {
            self.order.remove(&(when, token));
        }
    }

    /// The next deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(when, _)| *when)
    }

    /// Takes one whose deadline has come.
    pub(super) fn due(&mut self, now: Instant) -> Option<Token> {
        let (when, token) = *self.order.first()?;
        if when > now {
            return None;
        }
        self.order.pop_first();
        self.of.remove(&token);
        Some(token)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::slab::Slab;
    use super::*;

    #[test]
    fn the_earliest_deadline_counts_and_comes_once() {
        let mut slab = Slab::new();
        let (one, other) = (slab.insert(|_| ()), slab.insert(|_| ()));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut timers = Timers::default();
        timers.set(one, at(5));
        timers.set(one, at(9));
        timers.set(other, at(4));
        timers.set(one, at(3));
        assert_eq!(timers.next(), Some(at(3)));
        assert_eq!(timers.due(at(2)), None);
        assert_eq!(timers.due(at(9)), Some(one));
        assert_eq!(timers.due(at(9)), Some(other));
        assert_eq!(timers.due(at(9)), None);
        timers.set(one, at(1));
        timers.remove(one);
        assert_eq!(timers.next(), None);
    }
}
